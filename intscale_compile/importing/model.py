"""``from_quantized``: a transformers model with ``IntScaleTensor`` weights from somebody else's quantized checkpoint."""

from __future__ import annotations

import hashlib
import logging
import re
from pathlib import Path
from typing import Any, Optional, Union

import torch
from torch import nn

from ..errors import CheckpointError, ConfigError, IntScaleError
from ..tensors.intscale_tensor import IntScaleTensor
from ..tensors.selection import mark_loaded
from ..tensors.stored_files import first_line, reading, weight_files
from .checkpoint_files import CheckpointFiles, StoredLayers, checkpoint_folder, layer_format, quantization_config
from .gguf import from_gguf, is_gguf
from .layers import ScaleOptions
from .report import ImportReport
from .torchao_tensors import convert_from_torchao

log = logging.getLogger("intscale_compile")


def from_quantized(
    model_or_path: Union[nn.Module, str, Path],
    *,
    scale_bits: int = 8,
    amplifier: Union[str, int] = "row",
    dtype: Optional[torch.dtype] = None,
    device: Union[str, torch.device] = "cpu",
    revision: Optional[str] = None,
) -> tuple[nn.Module, ImportReport]:
    """Take over a model that GPTQ, AWQ, compressed-tensors, torchao or llama.cpp quantized, without requantizing it.

    The codes stay as they are; the float group scales become integers row by row (or as published in Integer Scale,
    arXiv 2405.14597, with ``amplifier``). Activations are quantized to int8 per token, whatever the checkpoint was made
    for, unless it holds static activation scales.

    Args:
        model_or_path: folder or hub name of a transformers checkpoint in safetensors files, with a ``quantization_config``;
            a GGUF file, as :func:`~.gguf.from_gguf` reads it; or a loaded model with torchao int4 weights, which is
            converted in place as by :func:`convert_from_torchao`.
        scale_bits: bits of the integer group scales, 1 to 8.
        amplifier: ``"row"``, or the paper's: ``"layer"`` or an integer such as 1024.
        dtype: of the model; by default the checkpoint's; bf16 for a GGUF file.
        device: where weights are converted and where the model ends up.
        revision: branch, tag or commit of a hub name.

    Returns:
        The model in evaluation mode and a report that prints itself. Store the model with ``save_pretrained``.

    Raises:
        FileNotFoundError: there is no such folder.
        ConfigError: a method, format, number of bits, group size or activation scheme that cannot be imported.
        CheckpointError: tensors are missing or damaged.
        OverflowProofError: a weight's accumulator cannot be proved free of overflow.
    """
    if isinstance(model_or_path, nn.Module):
        return model_or_path, convert_from_torchao(model_or_path, scale_bits=scale_bits, amplifier=amplifier)
    scales = ScaleOptions(scale_bits, amplifier)
    if is_gguf(model_or_path):
        return from_gguf(model_or_path, scales, dtype, device)
    folder = checkpoint_folder(model_or_path, revision)
    stored = quantization_config(folder)
    config = plain_config(folder)
    model_class = architecture(config)
    if stored["quant_method"] == "torchao":
        model = _loaded(model_class, folder, dtype).to(device)
        report = convert_from_torchao(model, scale_bits=scale_bits, amplifier=amplifier)
        _forget_quantization(model)
        return model, report
    reader = layer_format(stored)
    dtype = dtype or getattr(config, "dtype", None) or torch.float16
    if not isinstance(dtype, torch.dtype):
        raise ConfigError(
            f"{folder}: config.json has dtype={dtype!r}, which is none of PyTorch's: correct it, or pass dtype."
        )
    layers = StoredLayers(CheckpointFiles(folder), reader, scales, dtype, torch.device(device))
    model = _load(model_class, config, layers, dtype).to(device)
    _share_input_orders(model)
    _add_generation_config(model, folder)
    _finish(layers.report, model)
    return model, layers.report


def _finish(report: ImportReport, model: nn.Module) -> None:
    """Sort the rows of a report, add what was left in floating point, and log its first note."""
    report.layers.sort(key=lambda row: [int(p) if p.isdigit() else p for p in re.split(r"(\d+)", row.name)])
    report.unquantized = unquantized_linears(model)
    report.notes.sort()
    if report.notes:
        log.warning("from_quantized: %s (%d such notes in the report)", report.notes[0], len(report.notes))


def unquantized_linears(model: nn.Module) -> list[str]:
    """Names of linear layers whose weight is not an ``IntScaleTensor``."""
    linears = ((name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear))
    return [name for name, module in linears if not isinstance(module.weight, IntScaleTensor)]


def plain_config(folder: Path) -> Any:
    """The model's configuration without what says that it is quantized.

    Raises:
        ConfigError: transformers cannot read it.
    """
    # Slow to import.
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder)
    except IntScaleError:
        raise
    except Exception as error:  # whatever wrong types in the file led to
        raise ConfigError(
            f"{folder}: transformers cannot read this config.json: {type(error).__name__}: {first_line(error)}: correct it, "
            "or get it again."
        ) from error
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def architecture(config: Any) -> Any:
    """The class that ``config.json`` names.

    Raises:
        ConfigError: it names none that transformers has.
    """
    # Slow to import.
    import transformers

    names = getattr(config, "architectures", None)
    for name in names if isinstance(names, (list, tuple)) else ():
        found = getattr(transformers, name, None) if isinstance(name, str) else None
        if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
            return found
    raise ConfigError(
        f"config.json names the architectures {names}, of which transformers {transformers.__version__} has "
        "none: name one that it has, or install another release."
    )


def _loaded(model_class: Any, folder: Path, dtype: Optional[torch.dtype]) -> Any:
    """A model of torchao's tensors, as transformers loads it."""
    weight_files(folder)
    with reading(folder):
        model, info = model_class.from_pretrained(folder, dtype=dtype or "auto", output_loading_info=True)
    if missing := sorted(info.get("missing_keys") or ()):
        raise CheckpointError(
            f"{folder}: {len(missing)} weights are missing, first {missing[0]}: the checkpoint is incomplete."
        )
    return model


def _load(model_class: Any, config: Any, layers: StoredLayers, dtype: torch.dtype) -> Any:
    """Let transformers build the plain model and put every tensor where it belongs, renamed and merged as it does."""
    try:
        model, info = model_class.from_pretrained(
            None,
            config=config,
            state_dict=layers.state_dict(),
            dtype=dtype,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except Exception as error:
        if layers.error is not None:
            raise layers.error from None
        experts = [name for name in layers.ordered if re.search(r"\.experts\.\d+\.", name)]
        if experts:
            raise ConfigError(
                f"{experts[0]}: its groups are scattered over the input features (GPTQ act-order, desc_act=True), in an order of "
                "each expert's own, so experts cannot be stacked. Quantize with desc_act=False, or with static_groups=True."
            ) from error
        raise CheckpointError(
            f"transformers cannot load this checkpoint: {type(error).__name__}: {first_line(error)}; tensors of one layer "
            "that it stacks or joins must be quantized alike, and config.json must be this model's."
        ) from error
    if layers.error is not None:
        raise layers.error
    _check_loading(info, layers)
    for parameter in model.parameters():
        if isinstance(parameter, IntScaleTensor):
            parameter.requires_grad_(False)
    mark_loaded(model)
    return model


def _share_input_orders(model: nn.Module) -> None:
    """Give weights with equal input orders one tensor for them: siblings, which GPTQ ordered by one activation, in place."""
    kept: dict[tuple, torch.Tensor] = {}
    for parameter in model.parameters():
        order = parameter.input_order if isinstance(parameter, IntScaleTensor) else None
        if order is not None:
            digest = hashlib.sha256(order.cpu().numpy().tobytes()).digest()
            parameter.input_order = kept.setdefault((digest, order.device), order)  # type: ignore[attr-defined]


def _check_loading(info: dict[str, Any], layers: StoredLayers) -> None:
    """Raise ``CheckpointError`` for whatever transformers only reports."""
    mismatched = sorted(map(str, info.get("mismatched_keys") or ()))
    if mismatched:
        raise CheckpointError(f"stored and expected shapes differ: {', '.join(mismatched[:3])}.")
    missing = sorted(info.get("missing_keys") or ())
    if missing:
        raise CheckpointError(
            f"{', '.join(missing[:3])}: not in the checkpoint ({len(missing)} missing); it is incomplete."
        )
    if info.get("conversion_errors") or info.get("error_msgs"):
        raise CheckpointError(f"transformers cannot load this checkpoint: {info}")
    unexpected = [name for name in sorted(info.get("unexpected_keys") or ()) if not layers.is_zero_bias(name)]
    if any(name.endswith((".weight", ".bias")) for name in unexpected):
        raise CheckpointError(
            f"the model has no place for {', '.join(unexpected[:3])}: its config.json is another model's."
        )
    if unexpected:
        log.warning("from_quantized: tensors without a place in the model: %s", ", ".join(unexpected))


def _forget_quantization(model: Any) -> None:
    """Drop what makes transformers treat the model as one of another quantizer."""
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config


def _add_generation_config(model: Any, folder: Path) -> None:
    if model.can_generate() and (folder / "generation_config.json").is_file():
        # Slow to import.
        from transformers import GenerationConfig

        with reading(folder / "generation_config.json"):
            model.generation_config = GenerationConfig.from_pretrained(folder)
