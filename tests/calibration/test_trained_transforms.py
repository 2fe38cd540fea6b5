"""A trained model with outliers put in: plain rounding suffers, smoothing and rotation mend it."""

import copy
import sysconfig
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers")
from torch import nn  # noqa: E402
from torchao.quantization import quantize_  # noqa: E402

from intscale_compile import IntScaleConfig, IntScaleTensor  # noqa: E402
from intscale_compile.calibration.layers import blocks, record_inputs  # noqa: E402
from intscale_compile.calibration.rotation import rotate  # noqa: E402
from intscale_compile.calibration.sensitivity import auto_overrides, measure_sensitivity, quantizable  # noqa: E402
from intscale_compile.calibration.smoothing import EQUALIZATIONS, smooth_fptq  # noqa: E402
from tests.support.benchmarks import inject_outliers, load  # noqa: E402

SEQUENCES, TOKENS = 4, 384
CONFIG = IntScaleConfig(scale_search="absmax")  # much faster here than the searched scales, and shows the same


@pytest.fixture(scope="module")
def trained(models_dir):
    """tiny-llama, held-out sequences and a function for perplexity."""
    bench = load(("perplexity",)).perplexity
    tokenizer = transformers.AutoTokenizer.from_pretrained(models_dir / "tiny-llama")
    model = transformers.AutoModelForCausalLM.from_pretrained(models_dir / "tiny-llama", dtype=torch.float32)
    sequences = bench.held_out_sequences(tokenizer, models_dir / bench.MODULE_LIST, SEQUENCES, TOKENS)
    text = (Path(sysconfig.get_paths()["stdlib"]) / "ast.py").read_text()
    calibration = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False).input_ids[:1024]).view(2, 512)

    def perplexity(model):
        with torch.no_grad():
            return bench.perplexity(model, sequences)

    return model.eval().requires_grad_(False), calibration, perplexity


@pytest.fixture(scope="module")
def with_outliers(trained):
    model = copy.deepcopy(trained[0])
    inject_outliers(model)
    return model


def rtn(model):
    quantize_(model, CONFIG)
    return model


def equalized(model, calibration, smoothing="fptq"):
    """The model, equalized, and whether anything had to be."""
    recorded, found = record_inputs(model, calibration), False
    for name, block in blocks(model):
        policies = smooth_fptq(block, [recorded[name]], EQUALIZATIONS[smoothing])
        found |= any(policy.equalized for policy in policies.values())
    return model, found


@pytest.fixture(scope="module")
def plain(trained):
    model, _, perplexity = trained
    return perplexity(rtn(copy.deepcopy(model)))


def test_outliers_keep_the_model_but_break_rounding(trained, with_outliers, plain):
    model, _, perplexity = trained
    exact = perplexity(model)
    assert perplexity(with_outliers) == pytest.approx(exact, rel=1e-4)
    assert exact < plain < 1.15 * exact
    assert perplexity(rtn(copy.deepcopy(with_outliers))) > 1.1 * plain


def test_a_model_without_outliers_is_left_alone(trained):
    assert not equalized(copy.deepcopy(trained[0]), trained[1])[1]


@pytest.mark.parametrize("smoothing", ["outliers", pytest.param("fptq", marks=pytest.mark.slow)])
def test_equalizing_mends_outliers(trained, with_outliers, plain, smoothing):
    _, calibration, perplexity = trained
    model, changed = equalized(copy.deepcopy(with_outliers), calibration, smoothing)
    assert changed and perplexity(rtn(model)) < 1.03 * plain


@pytest.mark.slow
def test_rotation_mends_outliers(trained, with_outliers, plain):
    model, _, perplexity = trained
    rotated = [copy.deepcopy(model), copy.deepcopy(with_outliers)]
    for one in rotated:
        rotate(one)
    assert perplexity(rotated[1]) == pytest.approx(perplexity(model), rel=1e-4)
    without, mended = (perplexity(rtn(one)) for one in rotated)
    assert mended == pytest.approx(without, rel=0.01)
    assert mended < 1.03 * plain


@pytest.mark.slow
def test_auto_buys_accuracy_with_a_tenth_more_memory(trained, plain):
    model, calibration, perplexity = trained
    names = [name for name in quantizable(model) if "v_proj" in name or "layers.0" in name]
    report = measure_sensitivity(model, calibration[:1], CONFIG, names=names)
    overrides = auto_overrides(model, calibration, 1.1, report=report)
    assert 0 < len(overrides) < len(names)
    mixed = copy.deepcopy(model)
    for name, weight in quantizable(mixed).items():
        tensor = IntScaleTensor.from_hp(weight.weight, overrides.get(name, CONFIG))
        weight.module.weight = nn.Parameter(tensor, requires_grad=False)
    assert perplexity(mixed) < 0.99 * plain
