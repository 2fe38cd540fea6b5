"""Imported models: no code changed, logits as good as with float scales, whatever the format."""

from __future__ import annotations

import copy

import pytest
import torch

from intscale_compile import IntScaleTensor, from_quantized
from tests.support.quantized_checkpoints import (
    awq_parts,
    compressed_parts,
    compressed_scheme,
    gptq_parts,
    quantize_groups,
    snr_db,
    tiny_llama,
    with_float_scales,
    write_checkpoint,
)

CASES = {
    "gptq": (True, 128),
    "gptq asymmetric": (False, 128),
    "gptq_v2 asymmetric": (False, 64),
    "gptq per channel": (True, -1),
    "awq": (True, 128),
    "awq asymmetric": (False, 64),
    "compressed-tensors": (True, 128),
    "compressed-tensors asymmetric": (False, 128),
    "compressed-tensors per channel": (True, -1),
    "compressed-tensors per channel asymmetric": (False, -1),
    "compressed-tensors int-quantized": (True, 32),
}


def written(case: str, model, folder, shards=1):
    """The checkpoint of a case."""
    symmetric, group_size = CASES[case]
    dtype = torch.float32 if case.startswith("compressed") else torch.float16
    make = lambda weight: quantize_groups(weight, group_size, symmetric, dtype)  # noqa: E731
    if case.startswith("gptq"):
        version = case.split()[0]
        config = {
            "bits": 4,
            "group_size": group_size,
            "desc_act": False,
            "sym": symmetric,
            "checkpoint_format": version,
        }

        def parts(name, weight):
            layer = make(weight)
            return layer, gptq_parts(layer, version)
    elif case.startswith("awq"):
        config = {"bits": 4, "group_size": group_size, "zero_point": True, "version": "gemm"}

        def parts(name, weight):
            layer = make(weight)
            return layer, awq_parts(layer)
    else:
        pytest.importorskip("compressed_tensors", reason="compressed-tensors makes these checkpoints")
        storage = "int-quantized" if "int-quantized" in case else "pack-quantized"
        scheme = compressed_scheme(4, group_size, symmetric, storage=storage)
        config = {"config_groups": {"group_0": scheme}, "format": storage, "ignore": ["lm_head"]}

        def parts(name, weight):
            layer = make(weight)
            return layer, compressed_parts(layer, weight, scheme)

    return write_checkpoint(model, folder, case.split()[0].split("_")[0], parts, config, shards)


def linears(model):
    return {name: module.weight for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}


@pytest.mark.parametrize("case", CASES)
def test_imported_model(case, tmp_path):
    plain = tiny_llama()
    checkpoint = written(case, plain, tmp_path, shards=3)
    model, report = from_quantized(tmp_path)
    symmetric, group_size = CASES[case]

    weights = linears(model)
    assert report.unquantized == ["lm_head"]
    assert [row.name for row in report.layers] == sorted(checkpoint.originals)
    for name, original in checkpoint.originals.items():
        weight = weights[name]
        assert isinstance(weight, IntScaleTensor) and not weight.requires_grad
        assert weight.group_size == group_size and weight.scale_bits == (1 if group_size == -1 else 8)
        assert torch.equal(weight.codes.long() + 8, original.codes), f"{name}: a code changed"
        if symmetric:
            assert weight.zero_point is None
        else:
            assert torch.equal(weight.group_zero_point[:, : original.zero.shape[1]].long() + 8, original.zero)
        assert snr_db(original.weight, weight.dequantize(torch.float64)) > 50
    for row in report.layers:
        assert row.snr_db > 50 and row.headroom_bits > 0 and row.symmetric == symmetric

    ids = torch.randint(0, 96, (2, 24))
    reference = plain(ids).logits
    floats = with_float_scales(copy.deepcopy(plain), checkpoint.originals)(ids).logits
    found = model(ids).logits
    assert abs(snr_db(reference, found) - snr_db(reference, floats)) < 0.05
    assert snr_db(floats, found) > 40
