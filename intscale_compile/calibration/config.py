"""``CalibrationConfig``: everything that decides what ``calibrate`` does, and the presets by name."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Union

from ..config import IntScaleConfig
from ..errors import ConfigError

CHOICES = {
    "rounding": ("nearest", "gptq"),
    "clipping": ("none", "search", "learned", "block"),
    "smoothing": ("none", "fptq", "outliers", "awq"),
    "rotation": ("none", "hadamard", "auto", "inputs"),
    "activation": ("dynamic", "fptq", "fptq-paper"),
    "scales": ("integer", "float"),
    "distillation": ("always", "fresh"),
}
COUNTS = ("sweeps", "tuning_steps", "statistics_tokens", "distillation_steps", "distillation_tokens")


@dataclass(frozen=True)
class CalibrationConfig:
    """How a model is calibrated. Equal configurations, data and model give equal bits on one machine.

    Args:
        name: what it is called; has no effect.
        base_config: format of the weights: group size, bits of codes and group scales, amplifier.
        overrides: formats of some weights, ``{regular expression: IntScaleConfig}``; a pattern that matches the whole
            name of a layer in the model, or ends at its end after a dot, wins over ``base_config``; the first match counts.
        rounding: ``"nearest"`` or ``"gptq"`` (arXiv 2210.17323).
        act_order: GPTQ visits columns in the order of falling activation.
        damping: fraction of the Hessian's mean diagonal entry that GPTQ adds to its diagonal.
        sweeps: sweeps of coordinate descent (arXiv 2309.01885) after GPTQ.
        match_original: codes are chosen to match the original output on the original inputs instead of the original
            weight on the inputs as they are now (GPTAQ, arXiv 2504.02692); not for stacks of experts.
        clipping: ``"none"``: scales as ``base_config.scale_search`` says, without looking at activations; ``"search"``: the
            same search with the error of each column weighted by its mean square activation; ``"learned"``: from there
            on by gradient descent on the layer's output error (OmniQuant, arXiv 2308.13137, in the symmetric form of
            OdysseyLLM, arXiv 2311.09550); ``"block"``: by gradient descent on the output of the whole block, as these
            papers do it, which takes longer.
        smoothing: ``"fptq"`` (arXiv 2308.15987), ``"outliers"`` (by FPTQ's policy, but only channels above twice the
            median are scaled) or ``"awq"`` (arXiv 2306.00978): channel scales folded into what comes before the layer.
        rotation: ``"hadamard"``: the residual stream is rotated by a Hadamard matrix folded into the weights, and the
            input of the down projections by an online transform (QuaRot, arXiv 2404.00456). ``"auto"``: so where the
            model is of a kind that can be rotated, else not, with the reason in the log. ``"inputs"``: every linear layer
            transforms its own input online, in any model; it takes time before each layer, and encoders gain the most.
        activation: ``"dynamic"``: one scale per token; ``"fptq"``: static per tensor where FPTQ's policy says so, of the
            least squared error; ``"fptq-paper"``: static scales from the largest magnitude, and activations above 150 not
            equalized, as it was published.
        scales: ``"integer"``, or ``"float"``: group scales stay floats and the model is fake quantized; slow, and only
            there to be compared with.
        tuning_steps: steps of gradient descent on row scales and norm weights of each block, to match the output of
            the original block on the original inputs (ApiQ's block-wise objective, arXiv 2402.05147). 0: none.
        statistics_tokens: statistics and tuning look at the first so many tokens of the data (whole sequences, or entries of
            a list; padding does not count), and distillation at what is behind them, or at all of the data where nothing
            is. 0: at all of the data, both. Data without token ids or embeddings is not divided.
        distillation_steps: in the end, steps of gradient descent on row scales, norm weights and biases of the whole model,
            to match the original's next-token distribution (``distill``). 0: none.
        distillation: ``"always"``: these steps, text again where it ends; ``"fresh"``: one pass over the text behind
            ``statistics_tokens``, of at most so many steps, and none where less lies there than 100 steps (or all of them, if
            fewer) take, or where the model cannot be distilled; the report and the log say which it was, and why.
        distillation_tokens: tokens of a step, several batches together. 0: about 4096 of a tensor, one entry of a list.
        distillation_rate: of the logarithms of row scales, and of vectors relative to their mean magnitude.
        seed: of everything random.

    Raises:
        ConfigError: a field has a value that is not listed, or two fields contradict each other.
    """

    name: str = "custom"
    base_config: IntScaleConfig = field(default_factory=IntScaleConfig)
    overrides: Mapping[str, IntScaleConfig] = field(default_factory=dict)
    rounding: str = "gptq"
    act_order: bool = True
    damping: float = 0.01
    sweeps: int = 0
    match_original: bool = False
    clipping: str = "search"
    smoothing: str = "none"
    rotation: str = "none"
    activation: str = "dynamic"
    scales: str = "integer"
    tuning_steps: int = 0
    statistics_tokens: int = 0
    distillation_steps: int = 0
    distillation: str = "always"
    distillation_tokens: int = 0
    distillation_rate: float = 1e-3
    seed: int = 0

    def __post_init__(self) -> None:
        for name, allowed in CHOICES.items():
            self._check(name, getattr(self, name) in allowed, f"one of {allowed}")
        self._check("base_config", type(self.base_config) is IntScaleConfig, "an IntScaleConfig")
        self._check("damping", isinstance(self.damping, float) and 0 < self.damping <= 1, "a float in (0, 1]")
        rate = self.distillation_rate
        self._check("distillation_rate", isinstance(rate, float) and 0 < rate < 1, "a float in (0, 1)")
        for name in (*COUNTS, "seed"):
            value = getattr(self, name)
            self._check(name, type(value) is int and value >= 0, "an integer, 0 or more")
        policy = self.activation == "dynamic" or self.smoothing in ("fptq", "outliers")
        self._check("activation", policy, '"dynamic" unless smoothing is "fptq" or "outliers"')
        whole = self.distillation_steps == 0 or self.scales == "integer" or self.distillation == "fresh"
        self._check("distillation_steps", whole, '0 unless scales="integer"')
        self._check("sweeps", self.sweeps == 0 or self.rounding == "gptq", '0 unless rounding="gptq"')
        for pattern, config in self.overrides.items():
            _compiled(pattern)
            self._check("overrides", type(config) is IntScaleConfig, "{pattern: IntScaleConfig}")

    def _check(self, name: str, ok: bool, allowed: str) -> None:
        if not ok:
            raise ConfigError(f"CalibrationConfig.{name}={getattr(self, name)!r} is not supported: use {allowed}.")

    def config_of(self, layer: str) -> IntScaleConfig:
        """The format of the weight of a layer, by the layer's name in the model."""
        for pattern, config in self.overrides.items():
            if re.fullmatch(rf"(?:.*\.)?(?:{pattern})", layer):
                return config
        return self.base_config

    @property
    def needs_statistics(self) -> bool:
        """Whether weights are quantized with regard to activations."""
        return self.rounding == "gptq" or self.clipping != "none" or self.match_original

    def to_dict(self) -> dict[str, Any]:
        """A dictionary of plain values, for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_preset(cls, name: str = "best", **changes: Any) -> CalibrationConfig:
        """A preset with some fields changed; fields of ``IntScaleConfig`` change its ``base_config``.

            CalibrationConfig.from_preset("gptq", scale_bits=8, damping=0.05)

        Raises:
            ConfigError: an unknown preset or field.
        """
        if name not in PRESETS:
            raise ConfigError(f"there is no preset {name!r}: use one of {sorted(PRESETS)} or a CalibrationConfig.")
        preset = PRESETS[name]
        own = {f.name for f in dataclasses.fields(cls)}
        of_weights = {f.name for f in dataclasses.fields(IntScaleConfig)}
        if unknown := set(changes) - own - of_weights:
            raise ConfigError(f"CalibrationConfig has no fields {sorted(unknown)}: it has {sorted(own | of_weights)}.")
        inner = {key: changes.pop(key) for key in list(changes) if key in of_weights}
        base: IntScaleConfig = changes.pop("base_config", preset.base_config)
        return dataclasses.replace(preset, base_config=dataclasses.replace(base, **inner), **changes)

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> CalibrationConfig:
        """The configuration that ``to_dict`` described.

        Raises:
            ConfigError: an unknown field, or a value that is not supported.
        """
        fields = dict(stored)
        unknown = set(fields) - {f.name for f in dataclasses.fields(cls)}
        if unknown:
            raise ConfigError(
                f"a stored CalibrationConfig has unknown fields {sorted(unknown)}: it is of another release."
            )
        try:
            if "base_config" in fields:
                fields["base_config"] = IntScaleConfig(**fields["base_config"])
            fields["overrides"] = {p: IntScaleConfig(**c) for p, c in fields.get("overrides", {}).items()}
        except TypeError as error:
            raise ConfigError(f"a stored CalibrationConfig has a configuration of another release: {error}.") from error
        return cls(**fields)

    def __str__(self) -> str:
        """One line for each field that differs from the defaults."""
        default = CalibrationConfig()
        lines = [f"calibration {self.name}:"]
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            if item.name != "name" and (
                value != getattr(default, item.name) or item.name in ("base_config", "rounding")
            ):
                lines.append(f"  {item.name}: {_short(value)}")
        return "\n".join(lines)


def _compiled(pattern: str) -> re.Pattern:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"CalibrationConfig.overrides: {pattern!r} is no regular expression: {error}.") from error


def _short(value: Any) -> str:
    if isinstance(value, IntScaleConfig):
        default = IntScaleConfig(weight_bits=value.weight_bits)
        chosen = ("group_size", "weight_bits", "scale_bits")
        names = [f.name for f in dataclasses.fields(value)]
        parts = [f"{n}={getattr(value, n)!r}" for n in names if n in chosen or getattr(value, n) != getattr(default, n)]
        return ", ".join(parts)
    if isinstance(value, Mapping):
        return "; ".join(f"{name}: {_short(part)}" for name, part in value.items()) or "none"
    return str(value)


W8A8 = IntScaleConfig(weight_bits=8, group_size=-1)

PRESETS: dict[str, CalibrationConfig] = {
    preset.name: preset
    for preset in (
        CalibrationConfig("rtn", rounding="nearest", clipping="search"),
        CalibrationConfig("gptq", sweeps=2),
        CalibrationConfig("odyssey", IntScaleConfig(group_size=-1), clipping="learned"),
        CalibrationConfig("fptq", smoothing="outliers", activation="fptq", sweeps=2),
        CalibrationConfig("fptq-paper", rounding="nearest", clipping="none", smoothing="fptq", activation="fptq-paper"),
        CalibrationConfig(
            "llama3", overrides={"down_proj": W8A8}, rotation="hadamard", match_original=True, damping=0.2, sweeps=2
        ),
        CalibrationConfig("mixtral", clipping="none", match_original=True, sweeps=2),
        CalibrationConfig("robust", match_original=True, damping=0.2, sweeps=2, rotation="auto"),
        CalibrationConfig("encoder", W8A8, match_original=True, damping=0.2, sweeps=2, rotation="inputs"),
        CalibrationConfig(
            "best",
            IntScaleConfig(group_size=32),
            match_original=True,
            damping=0.05,
            sweeps=2,
            rotation="auto",
            tuning_steps=64,
            statistics_tokens=128 * 512,
            distillation_steps=200,
            distillation="fresh",
            distillation_tokens=8192,
            distillation_rate=3e-3,
        ),
    )
}


def as_calibration_config(given: Union[str, CalibrationConfig]) -> CalibrationConfig:
    """A configuration as it is, or the preset of that name.

    Raises:
        ConfigError: an unknown preset, or neither a name nor a ``CalibrationConfig``.
    """
    if isinstance(given, str):
        return CalibrationConfig.from_preset(given)
    if not isinstance(given, CalibrationConfig):
        raise ConfigError(
            f"config={given!r} is not supported: use one of {sorted(PRESETS)} or a CalibrationConfig "
            "(base_config=IntScaleConfig(...) is the format of its weights)."
        )
    return given
