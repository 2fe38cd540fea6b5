"""From one model folder to another: quantize, calibrate or import, and save."""

from __future__ import annotations

import dataclasses
import difflib
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Optional, Union

import torch
from torch import Tensor, nn
from torchao.quantization import quantize_

from ..calibration.config import CalibrationConfig
from ..calibration.pipeline import calibrate
from ..config import IntScaleConfig
from ..errors import ConfigError
from ..explanation import LayerReport
from ..explanation.blocks import repeated_blocks
from ..importing.export import save_compressed_tensors
from ..saving.checkpoint import save_pretrained
from ..tensors.intscale_tensor import IntScaleTensor
from ..tensors.selection import linears_and_experts
from ..tensors.stored_files import whole_folder
from .evaluation import read_texts, token_sequences
from .inspection import products
from .loading import (
    PathLike,
    is_quantized,
    load_model,
    load_tokenizer,
    source_folder,
    stored_by_us,
    stored_method,
    weight_bytes,
)

EXPORTS = ("compressed-tensors",)


@dataclass
class QuantizeSummary:
    """What ``quantize_folder`` did.

    Attributes:
        source, out: where the model came from and went.
        method: ``"IntScaleConfig"``, the preset's name, or the tool whose checkpoint was imported.
        config: of the weights, for JSON; empty for an import.
        weights: quantized weights.
        parameters, quantized_parameters: of the model, tied ones once.
        bytes_before, bytes_after: of the weight files.
        left_alone: products that stayed in high precision, with the reason.
        blocks: dotted names of the repeated layers.
        losses: relative squared error of each block's output, where the model was calibrated.
        notes: what else happened.
        seconds: without loading and saving.
    """

    source: str
    out: str
    method: str
    config: dict[str, Any]
    weights: int = 0
    parameters: int = 0
    quantized_parameters: int = 0
    bytes_before: int = 0
    bytes_after: int = 0
    left_alone: list[LayerReport] = field(default_factory=list)
    blocks: tuple[str, ...] = ()
    losses: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def quantized_fraction(self) -> float:
        """Quantized weights as a fraction of all parameters."""
        return self.quantized_parameters / max(1, self.parameters)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        words = [{"name": x.name, "reason": x.reason, "explanation": x.explanation} for x in self.left_alone]
        return {**dataclasses.asdict(self), "left_alone": words, "quantized_fraction": self.quantized_fraction}


def quantize_folder(
    source: PathLike,
    out: PathLike,
    fields: Optional[dict[str, Any]] = None,
    *,
    preset: Optional[str] = None,
    data: Sequence[PathLike] = (),
    sequences: int = 64,
    tokens: int = 512,
    checkpoint_dir: Optional[PathLike] = None,
    device: Union[str, torch.device] = "cpu",
    dtype: Optional[torch.dtype] = None,
    export: Optional[str] = None,
    progress: bool = True,
) -> QuantizeSummary:
    """Quantize the model of a folder, GGUF file or hub name and save it, tokenizer included, as a folder.

    A plain model is quantized, or calibrated where a preset is given; a checkpoint of another tool is imported with its codes.

    Args:
        source: folder, GGUF file or hub name.
        out: folder that does not exist yet, or is empty.
        fields: of ``IntScaleConfig``; with a preset also those of ``CalibrationConfig``;
            of an import ``scale_bits`` and ``amplifier``.
        preset: name of one of ``calibration.PRESETS``.
        data: text files for the calibration.
        sequences, tokens: how much of the text is used.
        checkpoint_dir: where ``calibrate`` keeps finished blocks.
        device, dtype: where weights are quantized; the model's type, by default the checkpoint's.
        export: ``"compressed-tensors"`` writes that format instead of ours.
        progress: show bars.

    Raises:
        ConfigError: a name, field or combination that is not supported; ``out`` holds something.
        CheckpointError, CalibrationError, WeightError: as ``load_model``, ``calibrate`` and ``quantize_`` do.
    """
    fields, target = dict(fields or {}), Path(out).expanduser()
    _check(preset, data, export, target)
    folder = source_folder(source)
    method, config, calibration = stored_method(folder), None, None
    if method is not None:
        _check_import(source, preset, fields, export, ours=stored_by_us(folder))
    elif preset is None:
        config = make_config(fields)
    else:
        calibration = _Calibration.of(preset, fields, folder, data, sequences, tokens)
        config = calibration.options.base_config
    model, _ = load_model(folder, dtype=dtype, **({"device": device, **fields} if method is not None else {}))
    summary = QuantizeSummary(str(source), str(target), preset or method or "IntScaleConfig", {})
    start = time.perf_counter()
    if calibration is not None:
        calibration.run(model, summary, checkpoint_dir, device, progress)
    elif config is not None:
        quantize_(model, config, filter_fn=linears_and_experts, device=str(device))
        summary.config = dataclasses.asdict(config)
    summary.seconds = time.perf_counter() - start
    _count(model, summary)
    _save(model, folder, target, config, export, summary)
    summary.bytes_before, summary.bytes_after = weight_bytes(folder), weight_bytes(target)
    return summary


class _Calibration(NamedTuple):
    """How to calibrate and the token ids ``[S, T]``, read before the model is."""

    options: CalibrationConfig
    ids: Tensor

    @classmethod
    def of(
        cls, name: str, fields: dict[str, Any], folder: Path, data: Sequence[PathLike], sequences: int, tokens: int
    ) -> _Calibration:
        chosen, texts = CalibrationConfig.from_preset(name, **fields), read_texts(data)
        return cls(chosen, token_sequences(load_tokenizer(folder), texts, sequences, tokens))

    def run(
        self,
        model: nn.Module,
        summary: QuantizeSummary,
        checkpoint_dir: Optional[PathLike],
        device: Union[str, torch.device],
        progress: bool,
    ) -> None:
        """Calibrate a model, which is nobody else's: it need not be restored where that fails."""
        report = calibrate(
            model.to(device),
            self.ids.to(device),
            self.options,
            checkpoint_dir=checkpoint_dir,
            progress=progress,
            restore=False,
        )
        summary.losses, summary.config = report.losses, self.options.to_dict()
        summary.notes += [report.how_distilled] if report.how_distilled else []


def make_config(fields: dict[str, Any]) -> IntScaleConfig:
    """An ``IntScaleConfig`` from its fields by name.

    Raises:
        ConfigError: an unknown field, with the nearest name, or a value that is not supported.
    """
    known = [f.name for f in dataclasses.fields(IntScaleConfig) if f.name != "version"]
    for name in fields:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"use one of {', '.join(known)}."
            raise ConfigError(f"IntScaleConfig has no field {name!r}: {hint}")
    return IntScaleConfig(**fields)


def parse_fields(pairs: Iterable[str]) -> dict[str, Any]:
    """``["group_size=64", "amplifier=layer"]`` as a dictionary; numbers, ``true`` and ``false`` are read as such.

    Raises:
        ConfigError: a piece is not ``name=value``, or a name comes twice.
    """
    fields: dict[str, Any] = {}
    for pair in pairs:
        name, separator, text = pair.partition("=")
        if not separator or not name.strip() or not text.strip():
            raise ConfigError(f"{pair!r} is not a field: write name=value, such as group_size=64.")
        if name.strip() in fields:
            raise ConfigError(f"the field {name.strip()!r} is given twice: give it once.")
        fields[name.strip()] = _value(text.strip())
    return fields


def _value(text: str) -> Any:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def _check(preset: Optional[str], data: Sequence, export: Optional[str], target: Path) -> None:
    """What can be known to be wrong before anything is loaded."""
    if preset is not None and not data:
        raise ConfigError(f"the preset {preset!r} looks at activations: give text files with --data FILE.")
    if data and preset is None:
        raise ConfigError("--data is text for calibration: name a preset with --preset, such as --preset gptq.")
    if export is not None and export not in EXPORTS:
        raise ConfigError(
            f"export={export!r} is not supported: use {EXPORTS[0]!r}, or leave it out for our own format."
        )
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"{target} exists and is not an empty folder: name another one, or remove it first.")


def _check_import(
    source: PathLike, preset: Optional[str], fields: dict[str, Any], export: Optional[str], ours: bool
) -> None:
    if preset is not None:
        raise ConfigError(f"{source} is quantized already: leave --preset out, or start from the original model.")
    if ours and (fields or export is None):
        raise ConfigError(
            f"{source} is quantized by intscale already: use it as it is, write it for other engines with --export "
            f"{EXPORTS[0]} and no fields, or start from the original model."
        )
    if unused := set(fields) - {"scale_bits", "amplifier"}:
        raise ConfigError(
            f"{source} is quantized already and its codes are taken over: {sorted(unused)} cannot be changed, only "
            "scale_bits and amplifier."
        )


def _count(model: nn.Module, summary: QuantizeSummary) -> None:
    """Count weights and layers; an error where nothing is quantized."""
    if not is_quantized(model):
        source = summary.source
        raise ConfigError(f"{source}: no weight of this model can be quantized: see intscale inspect {source}.")
    parameters = {id(p): p for p in model.parameters()}.values()
    summary.parameters = sum(p.numel() for p in parameters)
    quantized = [p for p in parameters if isinstance(p, IntScaleTensor)]
    summary.weights, summary.quantized_parameters = len(quantized), sum(p.numel() for p in quantized)
    summary.left_alone = [layer for layer in products(model) if not layer.quantized]
    summary.blocks = repeated_blocks(model)


def _save(
    model: Any, folder: Path, target: Path, config: Optional[IntScaleConfig], export: Optional[str],
    summary: QuantizeSummary,
) -> None:  # fmt: skip
    with whole_folder(target) as part:  # a failure leaves nothing that would stand in the way of another try
        if export is None:
            save_pretrained(model, part, config)
        else:
            report = save_compressed_tensors(model, part)
            worst = min(report.layers, key=lambda layer: layer.snr_db)
            note = f"compressed-tensors: float scales rounded, least {worst.snr_db:.1f} dB in {worst.name}"
            summary.notes.append(note)
        try:
            load_tokenizer(folder).save_pretrained(part)
        except ConfigError:
            summary.notes.append("no tokenizer: the model has none that transformers can read")
