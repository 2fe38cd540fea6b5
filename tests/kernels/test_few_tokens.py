"""The kernel for single tokens on a CPU: the integers of the reference, on random, extreme and ragged operands."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import time

import pytest
import torch

from intscale_compile import IntScaleConfig
from intscale_compile.kernels import cpu_gemm, few_tokens
from intscale_compile.kernels.w4a8_linear import reference_accumulate
from intscale_compile.tensors.intscale_tensor import IntScaleTensor

needs_kernel = pytest.mark.skipif(few_tokens.library() is None, reason="no AVX512-VNNI, or no C++ compiler")
CONFIGS = [
    *(IntScaleConfig(group_size=size, scale_search="absmax") for size in (32, 64, 128, 256, -1)),
    IntScaleConfig(scale_bits=8, scale_search="absmax"),
    IntScaleConfig(weight_bits=8, scale_search="absmax"),
]


def operands(config, out_features, in_features, tokens, extreme):
    torch.manual_seed(0)
    weight = torch.randn(out_features, in_features)
    x = torch.randint(-127, 128, (tokens, in_features), dtype=torch.int8)
    if extreme:
        weight, x = torch.full_like(weight, -3.0), torch.full_like(x, -127)
    return x, IntScaleTensor.from_hp(weight, config)


@needs_kernel
@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.group_size}-{c.weight_bits}-{c.scale_bits}")
def test_it_gives_the_integers_of_the_reference(config, monkeypatch):
    monkeypatch.setattr(few_tokens, "ENOUGH_CODES", 1 << 12)  # several threads at these sizes
    threads = torch.get_num_threads()
    shapes = ((5, 33), (37, 576), (130, 1000))
    try:
        for (rows, features), tokens, extreme in itertools.product(shapes, range(1, 5), (False, True)):
            torch.set_num_threads(3 if tokens == 2 else 1)
            x, weight = operands(config, rows, features, tokens, extreme)
            found = few_tokens.accumulate_few(x, weight.qdata, weight.scale, weight.group_size)
            expected = reference_accumulate(x, weight.qdata, weight.scale, rows, weight.group_size, "plain")
            assert torch.equal(found, expected), (rows, features, tokens, extreme)
    finally:
        torch.set_num_threads(threads)


@needs_kernel
def test_the_op_takes_it_for_few_tokens_and_unpacks_nothing(monkeypatch):
    cpu_gemm.forget_all()
    x, weight = operands(CONFIGS[2], 48, 256, 4, False)
    arguments = (48, weight.group_size, weight.scale_bits, "plain")
    found = cpu_gemm.accumulate_cpu(x, weight.qdata, weight.scale, *arguments)
    assert not len(cpu_gemm._unpacked)
    monkeypatch.setattr(cpu_gemm, "accumulate_few", lambda *_: None)
    assert torch.equal(found, cpu_gemm.accumulate_cpu(x, weight.qdata, weight.scale, *arguments))
    assert len(cpu_gemm._unpacked) == 1
    cpu_gemm.forget_all()


def test_other_machines_and_many_threads_take_the_other_way(monkeypatch):
    x, weight = operands(CONFIGS[2], 48, 256, 1, False)
    monkeypatch.setattr(few_tokens.torch, "get_num_threads", lambda: few_tokens.MOST_THREADS + 1)
    assert few_tokens.accumulate_few(x, weight.qdata, weight.scale, 128) is None
    monkeypatch.undo()
    monkeypatch.setattr(few_tokens, "library", lambda: None)
    assert few_tokens.accumulate_few(x, weight.qdata, weight.scale, 128) is None


@needs_kernel
def test_a_forked_process_starts_threads_of_its_own(monkeypatch):
    monkeypatch.setattr(few_tokens, "ENOUGH_CODES", 1)
    monkeypatch.setattr(few_tokens.torch, "get_num_threads", lambda: few_tokens.MOST_THREADS)
    x, weight = operands(CONFIGS[2], 48, 256, 1, False)
    arguments = (x, weight.qdata, weight.scale, 128)
    expected = few_tokens.accumulate_few(*arguments)
    others = few_tokens.MOST_THREADS - 1
    list(few_tokens._pool(others).map(time.sleep, [0.05] * others))  # all threads of this process are there

    def child():
        os._exit(0 if torch.equal(few_tokens.accumulate_few(*arguments), expected) else 1)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(20)
    process.kill()
    assert process.exitcode == 0
