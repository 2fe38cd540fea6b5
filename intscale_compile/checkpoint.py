"""Saving and loading: registration with torch, torchao and transformers, and safetensors files of quantized models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Union

import torch
import torchao.core.config as torchao_config
import torchao.prototype.safetensors.safetensors_utils as torchao_safetensors
from torch import nn
from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict, unflatten_tensor_state_dict

from .config import IntScaleConfig
from .errors import CheckpointError, ConfigError
from .tensor import IntScaleTensor

PathLike = Union[str, Path]


def rebuild_tensor(**parts) -> IntScaleTensor:
    """Build a tensor from stored parts and check them.

    Raises:
        CheckpointError: parts are missing, unknown, or contradict each other.
    """
    names = {*IntScaleTensor.tensor_data_names, *IntScaleTensor.tensor_attribute_names}
    if set(parts) != names:
        raise CheckpointError(
            f"a stored IntScaleTensor lacks {sorted(names - set(parts))} and has unknown {sorted(set(parts) - names)}."
        )
    try:
        tensor = IntScaleTensor(**parts)
    except (TypeError, ValueError, RuntimeError, IndexError) as error:
        raise CheckpointError(f"a stored IntScaleTensor cannot be rebuilt: {error}") from error
    return tensor.validate()


def register() -> None:
    """Let torch.load, torchao's safetensors support and transformers find our config and tensor. Idempotent."""
    torchao_config.ALLOWED_AO_MODULES.add("intscale_compile")
    torchao_safetensors.ALLOWED_CLASSES.setdefault("IntScaleTensor", rebuild_tensor)
    if "IntScaleTensor" not in torchao_safetensors.ALLOWED_TENSORS_SUBCLASSES:
        torchao_safetensors.ALLOWED_TENSORS_SUBCLASSES.append("IntScaleTensor")
    torch.serialization.add_safe_globals([IntScaleTensor])


def make_savable(model: nn.Module, config: IntScaleConfig | None = None) -> nn.Module:
    """Give a transformers model that went through ``quantize_`` what ``save_pretrained`` needs to store it.

    Args:
        model: a ``PreTrainedModel`` with at least one ``IntScaleTensor``.
        config: the configuration it was quantized with; it is written into ``config.json``.

    Returns:
        The same model.

    Raises:
        ConfigError: the model is not a transformers model, or holds no ``IntScaleTensor``.
    """
    from transformers import PreTrainedModel, TorchAoConfig
    from transformers.quantizers import AutoHfQuantizer

    if not isinstance(model, PreTrainedModel):
        raise ConfigError(f"make_savable takes a transformers model, not {type(model).__name__}: use save_safetensors.")
    if not any(isinstance(p, IntScaleTensor) for p in model.parameters()):
        raise ConfigError("make_savable: no parameter of the model is quantized; call quantize_ first.")
    model.config.quantization_config = TorchAoConfig(config or IntScaleConfig())
    quantizer = AutoHfQuantizer.from_config(model.config.quantization_config, pre_quantized=True)
    model.hf_quantizer = quantizer
    return model


def save_safetensors(model: nn.Module, path: PathLike) -> None:
    """Write the model's state dict, quantized weights included, into one safetensors file."""
    from safetensors.torch import save_file

    state = {name: t if isinstance(t, IntScaleTensor) else t.detach() for name, t in model.state_dict().items()}
    tensors, metadata = flatten_tensor_state_dict(state)
    save_file({name: t.contiguous() for name, t in tensors.items()}, path, metadata=metadata)


def load_safetensors(path: PathLike, device: str = "cpu") -> dict[str, torch.Tensor]:
    """Read a file of :func:`save_safetensors`; load it with ``model.load_state_dict(state, assign=True)``.

    Raises:
        CheckpointError: the file is truncated, altered, or its header does not fit its data.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt", device=device) as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        state, leftover = unflatten_tensor_state_dict(tensors, metadata)
    except FileNotFoundError:
        raise
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, json.JSONDecodeError, OSError) as error:
        raise CheckpointError(f"{path}: {_innermost(error)}") from error
    missing = set(json.loads(metadata["tensor_names"])) - set(state)
    if missing or leftover:
        raise CheckpointError(f"{path}: data missing for {sorted(missing)[:3]}, data without a name {sorted(leftover)[:3]}.")
    return state


def _innermost(error: BaseException) -> str:
    cause = error.__context__
    return str(cause) if isinstance(cause, CheckpointError) else str(error)
