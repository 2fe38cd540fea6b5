"""Weights of a quantized checkpoint for vLLM's default loader, read by our own readers, with their checks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Optional

from torch import Tensor, nn

from ...errors import ConfigError
from ...importing.checkpoint_files import checkpoint_folder
from ..registry import PrivateName
from . import NAME
from .checkpoints import PLAIN, ExpertNames, kind_of, stored_weights

ALL_WEIGHTS = PrivateName(
    "vllm.model_executor.model_loader.default_loader:DefaultModelLoader.get_all_weights",
    "reading quantized checkpoints for vLLM",
    parameters=("model_config", "model"),
)


def hook() -> None:
    """Let vLLM's default loader read what is served by us through our readers. Idempotent."""
    ALL_WEIGHTS.wrap(_wrap)


def _wrap(original: Callable) -> Callable:
    def get_all_weights(loader: Any, model_config: Any, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
        if model_config.quantization != NAME:
            return original(loader, model_config, model)
        if loader.enable_weights_track is None:
            loader.enable_weights_track = True  # vLLM checks by itself only where nothing is quantized
        stored = stored_config(model_config.hf_config)
        if kind_of(stored) == PLAIN:
            check_ignored(model)
            return original(loader, model_config, model)
        if getattr(model, "secondary_weights", ()):
            raise ConfigError(
                f"{model_config.model}: models with weights of a second checkpoint are not served quantized."
            )
        folder = checkpoint_folder(model_config.model, model_config.revision)
        return stored_weights(folder, stored or {}, model_config.dtype, expert_names(model))

    return get_all_weights


def stored_config(hf_config: Any) -> Optional[dict[str, Any]]:
    """``quantization_config`` of a model, also where it stands in the configuration of the text model."""
    for config in (hf_config, getattr(hf_config, "text_config", None)):
        found = getattr(config, "quantization_config", None)
        if found:
            return found if isinstance(found, dict) else found.to_dict()
    return None


def expert_names(model: nn.Module) -> Optional[ExpertNames]:
    """How a model of vLLM calls the projections of its experts in checkpoints; None: it has none."""
    module: Any
    for module in model.modules():
        if hasattr(module, "ckpt_gate_proj_name"):
            return ExpertNames(module.ckpt_gate_proj_name, module.ckpt_up_proj_name, module.ckpt_down_proj_name)
    return None


def check_ignored(model: nn.Module) -> None:
    """Raise ``ConfigError`` where a name of ``ignore`` is that of no layer in vLLM, which merges some of the checkpoint's."""
    names, config = [], None
    module: Any
    for name, module in model.named_modules():
        if type(module).__name__ == "PPMissingLayer":
            return  # the layer may be on another rank
        names.append(f".{name}.")
        config = config or getattr(getattr(module, "quant_method", None), "config", None)
    for ignored in getattr(config, "ignore", ()):
        if not any(f".{ignored}." in name for name in names):
            raise ConfigError(
                f"quantization_config_dict_json: ignore: {type(model).__name__} of vLLM has no layer {ignored!r}: name whole "
                "parts of its dotted names; merged layers have one name (qkv_proj, gate_up_proj)."
            )
