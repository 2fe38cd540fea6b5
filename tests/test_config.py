"""Configuration and compile options: every mistake is named, with what is allowed instead."""

from __future__ import annotations

import dataclasses

import pytest
from torchao.core.config import config_from_dict, config_to_dict

from intscale_compile import IntScaleConfig
from intscale_compile.compile.options import parse_options
from intscale_compile.config import GROUP_SIZES
from intscale_compile.errors import ConfigError
from intscale_compile.passes.settings import Settings
from intscale_compile.reasons import log_once

# --- IntScaleConfig -------------------------------------------------------------------------------------------------

BAD = [
    *(("group_size", value, "32, 64, 128, 256, -1") for value in (0, 16, 100, 512, -2, 128.0, "128", None, True)),
    *(("weight_bits", value, "4, 8") for value in (0, 2, 3, 16, 4.0, "4", None, True)),
    *(("scale_bits", value, "1 to 8") for value in (0, 9, -1, 4.0, "4", None, True)),
    *(
        ("amplifier", value, '"row", "layer" or an integer from 1')
        for value in (0, -1, 2**20 + 1, 1024.0, "column", "", None, True, [1])
    ),
    *(("scale_search", value, "'mse', 'absmax'") for value in ("MSE", "grid", "", None, 1, [])),
    *(("packing_format", value, "'auto', 'plain', 'tiled'") for value in ("Plain", "", None, 0, [])),
    *(("output_embedding", value, '"w8a8" or None') for value in ("W8A8", "", 8, True, [])),
    *(("version", value, "knows no other format") for value in (0, 2, "1", None)),
]


@pytest.mark.parametrize("field, value, allowed", BAD, ids=lambda v: repr(v)[:24])
def test_bad_field_is_named_with_its_allowed_values(field, value, allowed):
    with pytest.raises(ConfigError) as caught:
        IntScaleConfig(**{field: value})
    message = str(caught.value)
    assert f"IntScaleConfig.{field}={value!r}" in message and allowed in message
    assert isinstance(caught.value, ValueError), "callers that know only built-in errors must catch it too"


def test_every_field_has_a_bad_value_in_the_list_above():
    assert {field for field, _, _ in BAD} == {f.name for f in dataclasses.fields(IntScaleConfig)}


GOOD = [
    *({"group_size": g} for g in GROUP_SIZES),
    {"weight_bits": 8},
    {"weight_bits": 8, "group_size": -1},
    {"scale_bits": 1},
    {"scale_bits": 8},
    {"amplifier": 1},
    {"amplifier": 2**20},
    {"amplifier": "layer"},
    {"scale_search": "absmax"},
    {"packing_format": "tiled"},
    {"packing_format": "plain"},
    {},
]


@pytest.mark.parametrize("fields", GOOD, ids=str)
def test_good_fields_survive_torchaos_dictionaries(fields):
    """config.json of a transformers model is this dictionary."""
    config = IntScaleConfig(**fields)
    stored = config_to_dict(config)
    assert stored["_type"] == "IntScaleConfig" and stored["_version"] == 1
    again = config_from_dict(stored)
    assert type(again) is IntScaleConfig and again == config
    for name, value in fields.items():
        assert getattr(again, name) == value


def test_defaults_are_the_documented_ones():
    assert dataclasses.asdict(IntScaleConfig()) == {
        "group_size": 128,
        "weight_bits": 4,
        "scale_bits": 4,
        "amplifier": "row",
        "scale_search": "mse",
        "packing_format": "auto",
        "version": 1,
        "output_embedding": None,
    }


def test_altered_dictionary_is_refused_with_our_message():
    stored = config_to_dict(IntScaleConfig())
    stored["_data"]["group_size"] = 48
    with pytest.raises(ValueError, match="IntScaleConfig.group_size=48"):
        config_from_dict(stored)
    stored = config_to_dict(IntScaleConfig())
    stored["_version"] = 7
    with pytest.warns(UserWarning, match="version"), pytest.raises(ValueError, match="IntScaleConfig.version=7"):
        config_from_dict(stored)


def test_communication_of_an_old_configuration_is_dropped_and_said_once(caplog):
    log_once.cache_clear()
    stored = config_to_dict(IntScaleConfig(group_size=64))
    assert "communication" not in stored["_data"]
    for value, said in ((None, 0), ("int8", 1), ("int4", 1)):
        stored["_data"]["communication"] = value
        found = config_from_dict(stored)
        assert found == IntScaleConfig(group_size=64) and config_to_dict(found)["_data"].keys() == {
            field.name for field in dataclasses.fields(IntScaleConfig)
        } - {"version"} | ({"version"} & stored["_data"].keys())
        assert caplog.text.count('options={"intscale.communication": "int8"}') == said
    log_once.cache_clear()


@pytest.mark.parametrize("value", ["int7", "INT8", "", 8, True, ["int8"], "int8-g64"])
def test_bad_wire_format(value):
    with pytest.raises(ConfigError, match=r'\'intscale.communication\'=.*use "int8", "int6"'):
        parse_options(None, {"intscale.communication": value})
    assert parse_options(None, {"intscale.communication": "int4-spikes"})[0].communication == "int4-spikes"


@pytest.mark.parametrize("group_size", [32, 64, 256])
def test_eight_bits_are_per_channel(group_size):
    with pytest.raises(ConfigError, match="group_size=.*-1 with weight_bits=8"):
        IntScaleConfig(weight_bits=8, group_size=group_size)
    with pytest.raises(ConfigError, match='amplifier=1024.*"row" with weight_bits=8'):
        IntScaleConfig(weight_bits=8, amplifier=1024)
    assert IntScaleConfig(weight_bits=8).effective_group_size == -1
    assert IntScaleConfig(group_size=group_size).effective_group_size == group_size


# --- options of torch.compile ---------------------------------------------------------------------------------------


def test_no_options_are_the_defaults():
    for mode in (None, "default"):
        for options in (None, {}):
            settings, patches = parse_options(mode, options)
            assert settings == Settings() and patches == {}
    assert Settings().config == IntScaleConfig() and Settings().quantize_plain is None
    assert Settings().disable_passes == Settings().force_passes == ()


CONFIG_FIELDS = {
    "group_size": 64,
    "weight_bits": 8,
    "scale_bits": 6,
    "amplifier": "layer",
    "scale_search": "absmax",
    "packing_format": "plain",
    "output_embedding": "w8a8",
}


@pytest.mark.parametrize("name", CONFIG_FIELDS)
def test_config_fields_one_by_one(name):
    settings, patches = parse_options(None, {f"intscale.{name}": CONFIG_FIELDS[name]})
    assert settings.config == IntScaleConfig(**{name: CONFIG_FIELDS[name]}) and patches == {}
    with pytest.raises(ConfigError, match=f"IntScaleConfig.{name}"):
        parse_options(None, {f"intscale.{name}": object()})


def test_all_config_fields_can_be_options():
    assert set(CONFIG_FIELDS) == {f.name for f in dataclasses.fields(IntScaleConfig)} - {"version"}


def test_whole_config_and_single_fields_together():
    """A single field changes the given configuration, not the default one, and leaves the caller's object alone."""
    mine = IntScaleConfig(group_size=64, scale_search="absmax")
    settings, _ = parse_options(None, {"intscale.config": mine, "intscale.scale_bits": 2})
    assert settings.config == IntScaleConfig(group_size=64, scale_search="absmax", scale_bits=2)
    assert mine == IntScaleConfig(group_size=64, scale_search="absmax")


def test_own_settings():
    settings, _ = parse_options(
        None,
        {
            "intscale.quantize_plain": False,
            "intscale.disable_passes": ["merge_siblings", "quantize_collectives"],
            "intscale.force_passes": ["gated_activation"],
            "intscale.skip": [r".*\.down_proj", "head"],
        },
    )
    assert settings.quantize_plain is False and settings.skip == (r".*\.down_proj", "head")
    assert settings.disable_passes == ("merge_siblings", "quantize_collectives")
    assert settings.force_passes == ("gated_activation",)
    assert parse_options(None, {"intscale.force_passes": "residual_add"})[0].force_passes == ("residual_add",)
    assert parse_options(None, {"intscale.skip": "head"})[0].skip == ("head",)
    assert parse_options(None, {"intscale.quantize_plain": None})[0].quantize_plain is None


@pytest.mark.parametrize(
    "key, nearest",
    [
        ("intscale.groupsize", "intscale.group_size"),
        ("intscale.disable_pass", "intscale.disable_passes"),
        ("intscale.Config", "intscale.config"),
        ("intscale", "intscale.config"),
        ("intscale.skips", "intscale.skip"),
        ("instcale.group_size", "intscale.group_size"),
        ("max_autotun", "max_autotune"),
        ("triton.cudagraph", "triton.cudagraphs"),
    ],
)
def test_unknown_option_names_the_nearest(key, nearest):
    with pytest.raises(ConfigError) as caught:
        parse_options(None, {key: True})
    assert repr(key) in str(caught.value) and f"did you mean {nearest!r}" in str(caught.value)


def test_unknown_option_far_from_all_lists_them():
    with pytest.raises(ConfigError, match="intscale.zzzzqq.*use one of.*intscale.group_size.*intscale.skip"):
        parse_options(None, {"intscale.zzzzqq": 1})
    with pytest.raises(ConfigError, match="'qqqqqqqq' is known neither to Inductor nor to intscale"):
        parse_options(None, {"qqqqqqqq": 1})
    with pytest.raises(ConfigError, match="intscale.version"):
        parse_options(None, {"intscale.version": 1})  # the stored format is not an option of a compilation


@pytest.mark.parametrize(
    "key, value",
    [
        ("intscale.config", {"group_size": 64}),
        ("intscale.config", None),
        ("intscale.config", IntScaleConfig),
        ("intscale.quantize_plain", "yes"),
        ("intscale.quantize_plain", 1),
        ("intscale.force_passes", True),
        ("intscale.force_passes", ["gated_activations"]),
        ("intscale.disable_passes", None),
        ("intscale.skip", "("),
        ("intscale.skip", 5),
        ("intscale.skip", None),
        ("intscale.skip", ["ok", 5]),
        ("intscale.skip", [b"bytes"]),
    ],
)
def test_wrong_types_are_refused(key, value):
    with pytest.raises(ConfigError, match=key):
        parse_options(None, {key: value})


def test_only_passes_with_a_rule_of_profit_can_be_forced():
    with pytest.raises(
        ConfigError, match="force_passes': the pass 'merge_siblings' cannot be forced: use one of.*residual_add"
    ):
        parse_options(None, {"intscale.force_passes": ["merge_siblings"]})
    with pytest.raises(ConfigError, match="did you mean 'gated_activation'"):
        parse_options(None, {"intscale.force_passes": ["gated_activations"]})
    with pytest.raises(
        ConfigError, match="'intscale.merge_siblings' is not known.*name it in 'intscale.disable_passes'"
    ):
        parse_options(None, {"intscale.merge_siblings": False})


def test_inductor_options_and_modes_pass_through():
    _, patches = parse_options(
        None, {"max_autotune": True, "triton.cudagraphs": False, "epilogue-fusion": False, "intscale.scale_bits": 3}
    )
    assert patches == {"max_autotune": True, "triton.cudagraphs": False, "epilogue_fusion": False}
    settings, patches = parse_options("reduce-overhead", None)
    assert patches == {"triton.cudagraphs": True} and settings == Settings()
    _, patches = parse_options("max-autotune", {"max_autotune": False})
    assert patches["max_autotune"] is False and patches["triton.cudagraphs"] is True, "an option outranks the mode"


def test_unknown_mode_is_refused():
    with pytest.raises(ConfigError, match="mode='fastest'"):
        parse_options("fastest", None)
