"""``quantize_`` and GPT-2's ``Conv1D``: left out by torchao's default filter with a warning, reached by ours."""

import logging

import pytest
import torch
from torch import nn
from torchao.quantization import quantize_

from intscale_compile import IntScaleConfig, IntScaleTensor, explain, linears_and_experts
from intscale_compile.reasons import log_once

pytest.importorskip("transformers")
from transformers.pytorch_utils import Conv1D  # noqa: E402

from tests.support.model_families import FAMILIES, token_ids  # noqa: E402


def quantized(model):
    return [name for name, p in model.named_parameters() if isinstance(p, IntScaleTensor)]


def test_default_filter_says_once_what_to_write(caplog):
    log_once.cache_clear()
    model = FAMILIES["gpt2"].build()
    with caplog.at_level(logging.WARNING, "intscale_compile"):
        quantize_(model, IntScaleConfig())
        quantize_(FAMILIES["gpt2"].build(), IntScaleConfig())
    warnings = [record.message for record in caplog.records if "Conv1D" in record.message]
    assert len(warnings) == 1 and "filter_fn=intscale_compile.linears_and_experts" in warnings[0]
    assert quantized(model) == []
    assert explain(model, token_ids()).gemms == 4  # the backend still quantizes them when it compiles


def test_our_filter_takes_them_and_leaves_the_output_embedding(caplog):
    log_once.cache_clear()
    model = FAMILIES["gpt2"].build()
    with caplog.at_level(logging.WARNING, "intscale_compile"):
        quantize_(model, IntScaleConfig(), filter_fn=linears_and_experts)
    assert len(quantized(model)) == 4 and all(name.startswith("transformer.h.0.") for name in quantized(model))
    assert not caplog.records


def test_what_a_filter_leaves_out_stays_as_it_is():
    model = nn.Sequential(Conv1D(96, 64), Conv1D(64, 96), Conv1D(8, 64)).requires_grad_(False)
    quantize_(model, IntScaleConfig(), filter_fn=lambda module, name: name == "0")
    report = explain(model, torch.randn(3, 64))
    assert [layer.reason for layer in report.layers] == [None, "NOT_SELECTED", "TOO_SMALL"]


def test_tiny_ones_are_left_alone():
    model = nn.Sequential(nn.Linear(64, 64), Conv1D(8, 64))
    quantize_(model, IntScaleConfig(), filter_fn=linears_and_experts)
    assert quantized(model) == ["0.weight"]
