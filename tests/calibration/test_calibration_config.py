"""CalibrationConfig: presets, changes, what they say, and the way to JSON and back."""

from __future__ import annotations

import json

import pytest

from intscale_compile import CalibrationConfig, IntScaleConfig
from intscale_compile.calibration import PRESETS
from intscale_compile.errors import ConfigError

from_preset = CalibrationConfig.from_preset

W8A8 = IntScaleConfig(weight_bits=8, group_size=-1)


@pytest.mark.parametrize(
    "name", ["rtn", "gptq", "odyssey", "fptq", "fptq-paper", "llama3", "mixtral", "robust", "encoder", "best"]
)
def test_presets_survive_json(name):
    preset = from_preset(name)
    assert preset.name == name and PRESETS[name] == preset
    assert CalibrationConfig.from_dict(json.loads(json.dumps(preset.to_dict()))) == preset


def test_presets_are_what_their_papers_say():
    assert from_preset("odyssey").base_config.group_size == -1 and from_preset("odyssey").clipping == "learned"
    assert from_preset("fptq").activation == "fptq" and from_preset("fptq").smoothing == "outliers"
    assert from_preset("fptq", smoothing="fptq").rounding == from_preset("fptq").rounding == "gptq"
    paper = from_preset("fptq-paper")
    assert (paper.smoothing, paper.activation, paper.rounding, paper.clipping) == (
        "fptq",
        "fptq-paper",
        "nearest",
        "none",
    )
    llama3 = from_preset("llama3")
    assert llama3.rotation == "hadamard" and llama3.base_config.group_size == 128
    assert llama3.config_of("model.layers.0.mlp.down_proj").weight_bits == 8
    assert llama3.config_of("model.layers.0.mlp.up_proj").weight_bits == 4
    assert llama3.match_original and (llama3.damping, llama3.sweeps) == (0.2, 2)
    encoder = from_preset("encoder")
    assert encoder.rotation == "inputs" and encoder.base_config == W8A8


def test_best_distills_only_on_much_fresh_text():
    best = from_preset("best")
    assert best.base_config.group_size == 32 and (best.damping, best.clipping) == (0.05, "search")
    assert (best.statistics_tokens, best.distillation_steps, best.distillation) == (65536, 200, "fresh")
    assert (best.distillation_tokens, best.distillation_rate) == (8192, 3e-3)
    assert from_preset("best", scales="float").distillation_steps == 200  # does not distil, and says so


def test_dictionaries_of_before_are_read_as_they_were_meant():
    stored = CalibrationConfig("old", distillation_steps=50).to_dict()
    for name in ("statistics_tokens", "distillation", "distillation_tokens", "distillation_rate"):
        del stored[name]
    read = CalibrationConfig.from_dict(stored)
    assert read == CalibrationConfig("old", distillation_steps=50)
    assert (read.statistics_tokens, read.distillation, read.distillation_tokens) == (0, "always", 0)


def test_changes_reach_the_configuration_too():
    changed = from_preset("gptq", scale_bits=8, damping=0.05)
    assert changed.base_config.scale_bits == 8 and changed.damping == 0.05 and changed.name == "gptq"
    assert from_preset("gptq") == PRESETS["gptq"]
    assert from_preset("gptq", base_config=changed.base_config, group_size=64).base_config == IntScaleConfig(
        group_size=64, scale_bits=8
    )


def test_overrides_match_whole_names_or_their_ends():
    chosen = CalibrationConfig(overrides={r"layers\.1\.mlp\.\w+": W8A8, "v_proj": IntScaleConfig(group_size=32)})
    assert chosen.config_of("model.layers.1.mlp.up_proj") == W8A8
    assert chosen.config_of("model.layers.11.mlp.up_proj") == chosen.base_config
    assert chosen.config_of("model.layers.0.self_attn.v_proj").group_size == 32
    assert chosen.config_of("model.layers.0.self_attn.kv_proj") == chosen.base_config


def test_says_what_differs():
    text = str(from_preset("llama3", damping=0.02))
    for part in ("llama3", "rotation: hadamard", "damping: 0.02", "down_proj", "weight_bits=8", "group_size=128"):
        assert part in text
    assert "smoothing" not in text
    assert eval(
        repr(from_preset("llama3")),
        {"CalibrationConfig": CalibrationConfig, "IntScaleConfig": IntScaleConfig},
    ) == from_preset("llama3")


@pytest.mark.parametrize(
    "change",
    [
        {"rounding": "rtn"},
        {"clipping": "mse"},
        {"smoothing": "smoothquant"},
        {"rotation": "random"},
        {"activation": "static"},
        {"activation": "fptq"},  # without its smoothing
        {"activation": "fptq-paper"},
        {"scales": "fp8"},
        {"damping": 0.0},
        {"damping": 1},
        {"sweeps": -1},
        {"sweeps": True},
        {"tuning_steps": 1.0},
        {"distillation_steps": -1},
        {"distillation_steps": 1, "scales": "float"},
        {"distillation": "rest"},
        {"distillation_tokens": -1},
        {"distillation_rate": 0.0},
        {"distillation_rate": 1},
        {"statistics_tokens": 1.0},
        {"seed": None},
        {"base_config": "int4"},
        {"overrides": {"(": W8A8}},
        {"overrides": {"down_proj": 8}},
        {"rounding": "nearest", "sweeps": 1},
    ],
    ids=str,
)
def test_bad_fields_are_named(change):
    with pytest.raises(ConfigError, match=f"CalibrationConfig.({'|'.join(change)})"):
        CalibrationConfig(**change)


def test_unknown_names():
    with pytest.raises(ConfigError, match="no preset 'gtpq'.*odyssey"):
        from_preset("gtpq")
    with pytest.raises(ConfigError, match="no fields.*dampening"):
        from_preset("gptq", dampening=0.1)
    with pytest.raises(ConfigError, match="unknown fields.*future"):
        CalibrationConfig.from_dict({"future": 1})
    with pytest.raises(ConfigError, match="another release"):
        CalibrationConfig.from_dict({"base_config": {"future": 1}})
