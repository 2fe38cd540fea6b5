"""What a calibration changes besides codes is said before and after."""

import logging

import torch

from intscale_compile import CalibrationConfig, calibrate
from intscale_compile.calibration.config import W8A8


def test_untied_embedding_and_eight_bit_layers_are_said(model, data, caplog):
    model.lm_head.weight = model.model.embed_tokens.weight
    tied = model.lm_head.weight.numel()
    config = CalibrationConfig("rotated", rounding="nearest", rotation="hadamard", overrides={"down_proj": W8A8})
    with caplog.at_level(logging.INFO, "intscale_compile"):
        report = calibrate(model, data, config, progress=False)
    before = [record.getMessage() for record in caplog.records]
    assert any("a weight of its own" in line and f"{tied / 1e6:.1f} million" in line for line in before)
    assert any("'down_proj'" in line and "8 bits" in line for line in before)
    said = str(report)
    for part in ("no longer tied", "12 weights in 4 bits, 2 weights in 8 bits", "MB instead of"):
        assert part in said
    assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)


def test_a_plain_preset_says_its_bytes_only(model, data, caplog):
    with caplog.at_level(logging.INFO, "intscale_compile"):
        report = calibrate(model, data, "rtn", progress=False)
    assert len(report.changes) == 1 and "MB instead of" in report.changes[0]
    assert not any("of its own" in record.getMessage() for record in caplog.records)
