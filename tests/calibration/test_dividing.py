"""The data of one call in two parts: statistics look at the first, the model is distilled on what is behind it."""

import copy
import logging

import pytest
import torch

from intscale_compile import CalibrationConfig, calibrate
from intscale_compile.calibration import distilling_plan, pipeline
from intscale_compile.calibration.distilling import distill_steps
from intscale_compile.calibration.dividing import divided, grouped, tokens_of
from intscale_compile.errors import CalibrationError
from tests.support.calibration import SHORT, calibrated, same_weights, tiny_llama

FRESH = {**SHORT, "statistics_tokens": 128, "distillation": "fresh", "distillation_steps": 4, "distillation_tokens": 64}


@pytest.fixture
def model():
    """One layer: what is divided is the data."""
    return tiny_llama(1)


def padded(count, seen=9):
    mask = torch.zeros(2, 16, dtype=torch.long)
    mask[:, :seen] = 1
    return [{"input_ids": torch.randint(0, 128, (2, 16)), "attention_mask": mask} for _ in range(count)]


@pytest.mark.parametrize("wanted, rows", [(0, 8), (1, 1), (128, 2), (129, 3), (512, 8), (10**9, 8)])
def test_whole_sequences_of_a_tensor(data, wanted, rows):
    first, rest = divided(data, wanted)
    assert torch.equal(torch.cat([first, rest]), data) and len(first) == rows


def test_padding_does_not_count():
    batches = padded(5)
    assert [tokens_of(batch) for batch in batches] == [18] * 5
    for wanted, entries in ((18, 1), (19, 2), (36, 2), (10**9, 5), (0, 5)):
        first, rest = divided(batches, wanted)
        assert (len(first), len(rest)) == (entries, 5 - entries) and [*first, *rest] == batches
    assert [len(part) for part in grouped(batches, 36)] == [2, 2, 1]
    assert [len(part) for part in divided([torch.ones(30, dtype=torch.long)] * 4, 31)] == [2, 2]


def test_images_have_no_tokens_and_are_not_divided():
    images = [{"pixel_values": torch.rand(2, 3, 8, 8)}] * 3
    assert [len(part) for part in divided(images, 1)] == [3, 0]
    assert tokens_of({"inputs_embeds": torch.rand(2, 5, 8)}) == 10


def test_statistics_see_the_first_part_only(model, data):
    chosen = CalibrationConfig(statistics_tokens=128)
    assert same_weights(calibrated(model, data[:2], chosen), calibrated(model, data, chosen))
    assert not same_weights(calibrated(model, data, CalibrationConfig()), calibrated(model, data, chosen))


def test_distillation_takes_what_is_behind(model, data, monkeypatch):
    """Of padded batches too; and all of the data where nothing is behind."""
    seen = []
    run = distilling_plan.distill_steps

    def watched(model, original, parts, *args, **options):
        seen.append(torch.cat([batch["input_ids"] for part in parts for batch in part]))
        return run(model, original, parts, *args, **options)

    monkeypatch.setattr(distilling_plan, "distill_steps", watched)
    batches = padded(12)  # of 18 tokens: the first 8 are 144
    last = torch.cat([batch["input_ids"] for batch in batches[8:]])
    for given, behind in ((data, data[2:]), (data[:2], data[:2]), (batches, last)):
        chosen = CalibrationConfig(**SHORT, statistics_tokens=128, distillation_steps=2)
        report = calibrate(copy.deepcopy(model), given, chosen, progress=False)
        assert report.distillation is not None and "distilled: 2 steps" in str(report)
        assert torch.equal(seen.pop(), behind)


def test_fresh_text_is_enough_or_nothing_happens(model, data, caplog):
    caplog.set_level(logging.INFO, "intscale_compile")
    report = calibrate(copy.deepcopy(model), data, CalibrationConfig(**FRESH), progress=False)
    assert report.distillation is not None
    assert "distilled: 4 steps of about 64 tokens" in report.how_distilled and report.how_distilled in str(report)
    short = calibrate(copy.deepcopy(model), data[:5], CalibrationConfig(**FRESH), progress=False)
    assert short.distillation is None and short.how_distilled in str(short) and short.how_distilled in caplog.text
    for part in ("not distilled", "leave 192", "256 tokens behind", "64 tokens more"):
        assert part in short.how_distilled
    assert calibrate(copy.deepcopy(model), data, CalibrationConfig(**SHORT), progress=False).how_distilled == ""


def test_large_batches_are_too_few_steps(model, data):
    report = calibrate(model, [data[:2], data[2:]], CalibrationConfig(**FRESH), progress=False)
    assert report.distillation is None and "384 tokens in 1 batches are too few steps" in report.how_distilled


def test_fresh_text_is_read_once(model, data, monkeypatch):
    monkeypatch.setattr(distilling_plan, "LEAST_STEPS", 3)
    chosen = CalibrationConfig(**{**FRESH, "distillation_steps": 200})
    report = calibrate(model, data, chosen, progress=False)
    assert "distilled: 6 steps" in report.how_distilled


@pytest.mark.parametrize("change", [{"scales": "float"}, {"statistics_tokens": 0}, {"distillation_steps": 0}])
def test_what_leaves_out_distilling(model, data, change):
    report = calibrate(model, data, CalibrationConfig(**{**FRESH, **change}), progress=False)
    assert report.distillation is None and ("not distilled" in report.how_distilled) == (
        "distillation_steps" not in change
    )


@pytest.mark.parametrize("error", [CalibrationError, torch.OutOfMemoryError])
def test_a_calibration_is_kept_where_fresh_distilling_fails(model, data, monkeypatch, caplog, error):
    def failing(*args, **options):
        raise error("too large")

    monkeypatch.setattr(distilling_plan, "distill_steps", failing)
    plain = calibrated(model, data[:2], CalibrationConfig(**SHORT))
    tried = copy.deepcopy(model)
    report = calibrate(tried, data, CalibrationConfig(**FRESH), progress=False)
    assert report.distillation is None and "too large" in report.how_distilled and "too large" in caplog.text
    assert same_weights(plain, tried)
    with pytest.raises(error):
        calibrate(model, data, CalibrationConfig(**{**FRESH, "distillation": "always"}), progress=False)


def test_an_interrupted_distillation_goes_on_and_more_data_reuses_blocks(model, data, monkeypatch, tmp_path):
    chosen = CalibrationConfig(**FRESH)
    whole = calibrated(model, data, chosen)
    calibrate(copy.deepcopy(model), data[:3], chosen, checkpoint_dir=tmp_path, progress=False)  # too little to distil

    def interrupted(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "solve", None)  # no block is quantized again
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(distilling_plan, "distill_steps", interrupted)
        calibrate(copy.deepcopy(model), data, chosen, checkpoint_dir=tmp_path, progress=False)
    assert same_weights(whole, calibrated(model, data, chosen, checkpoint_dir=tmp_path))
    with pytest.raises(CalibrationError, match="another data"):
        calibrate(copy.deepcopy(model), data.flip(0), chosen, checkpoint_dir=tmp_path, progress=False)


def test_batches_of_a_step_count_by_their_tokens(data):
    """A step over a long and a short batch is the step over both in one."""
    mask = torch.ones(2, 64, dtype=torch.long)
    mask[1, 20:] = 0
    together = [[{"input_ids": data[:2], "attention_mask": mask}]]
    apart = [[{"input_ids": data[:1]}, {"input_ids": data[1:2, :20]}]]
    reports = []
    for parts in (together, apart):
        torch.manual_seed(0)
        original = tiny_llama(1)
        quantized = calibrated(original, data[:2], CalibrationConfig(**SHORT))
        reports.append(distill_steps(quantized, original, parts, 3, progress=False))
    assert reports[0].last == pytest.approx(reports[1].last, rel=1e-4)
