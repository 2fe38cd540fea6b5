"""The adapter layers of a peft model whose base weight is quantized, and what of them is not supported."""

from __future__ import annotations

from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..tensors.intscale_tensor import IntScaleTensor


class Adapted(NamedTuple):
    """A layer with an adapter: its name in the base model, peft's layer, the layer below it, the adapter's name."""

    name: str
    layer: Any
    base: nn.Module
    adapter: str

    @property
    def weight(self) -> IntScaleTensor:
        """The quantized weight."""
        return self.base.weight  # type: ignore[return-value]

    @property
    def down(self) -> Tensor:
        """``A``, ``[r, K]``."""
        return self.layer.lora_A[self.adapter].weight

    @property
    def up(self) -> Tensor:
        """``B``, ``[N, r]``."""
        return self.layer.lora_B[self.adapter].weight

    @property
    def scaling(self) -> float:
        """What peft multiplies ``B A`` with."""
        return self.layer.scaling[self.adapter]


def require_peft() -> Any:
    """The package peft.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import peft  # optional: only adapters need it
    except ImportError as error:
        raise ConfigError(
            "intscale_compile.lora works on models of peft: pip install 'intscale-compile[lora]'."
        ) from error
    return peft


def base_model_of(peft_model: Any) -> nn.Module:
    """The model below a peft model's adapters.

    Raises:
        ConfigError: it is no peft model.
    """
    peft = require_peft()
    if not isinstance(peft_model, peft.PeftModel):
        raise ConfigError(
            f"a {type(peft_model).__name__} has no adapters: pass what peft.get_peft_model or PeftModel.from_pretrained returns."
        )
    return peft_model.get_base_model()


def adapted_layers(peft_model: Any, adapter: Optional[str] = None) -> list[Adapted]:
    """The LoRA layers of a peft model over quantized weights.

    Args:
        peft_model: a ``PeftModel``.
        adapter: the name of an adapter; None: the active one.

    Raises:
        ConfigError: no peft model, no such adapter, several active ones, no LoRA layer over a quantized weight, or an adapter of
            a kind that is not supported: on stacks of experts, DoRA and other variants, with a bias.
    """
    base = base_model_of(peft_model)
    known = list(peft_model.peft_config)
    chosen = [adapter] if adapter is not None else list(peft_model.active_adapters)
    if adapter is not None and adapter not in known:
        raise ConfigError(f"adapter={adapter!r} is not there: use one of {known}.")
    if len(chosen) != 1:
        raise ConfigError(f"{len(chosen)} adapters are active ({chosen}): name one with adapter=.")
    found, plain = [], []
    for name, layer in base.named_modules():
        if not hasattr(layer, "base_layer") or chosen[0] not in getattr(layer, "lora_A", {}):
            continue
        check_supported(layer, chosen[0], name)
        below = layer.get_base_layer()
        if isinstance(below.weight, IntScaleTensor):
            found.append(Adapted(name, layer, below, chosen[0]))
        else:
            plain.append(name)
    if not found:
        what = (
            f"its base weights are not quantized ({plain[0]})" if plain else "it has no LoRA layer over a linear layer"
        )
        raise ConfigError(
            f"adapter {chosen[0]!r}: {what}: quantize the model before get_peft_model, and adapt linear layers."
        )
    return found


def check_supported(layer: Any, adapter: str, name: str) -> None:
    """Raise ``ConfigError`` where what a layer adds to its weight is not ``scaling * B A``."""
    kind = type(layer).__name__
    if hasattr(layer, "parameter_name") and kind == "ParamWrapper":
        raise ConfigError(
            f"{name}.{layer.parameter_name}: adapters of stacks of experts (target_parameters) are not supported: adapt other "
            "layers, with target_modules."
        )
    if adapter in getattr(layer, "lora_variant", {}):
        variant = type(layer.lora_variant[adapter]).__name__
        raise ConfigError(f"{name}: adapters of the kind {variant} are not supported: use plain LoRA (use_dora=False).")
    up = layer.lora_B[adapter] if adapter in getattr(layer, "lora_B", {}) else None
    if getattr(up, "bias", None) is not None:
        raise ConfigError(f"{name}: an adapter with a bias is not supported: use lora_bias=False.")


def delta_of(layer: Any, adapters: list[str]) -> Tensor:
    """What adapters add to a layer's weight, fp32 in the weight's shape."""
    with torch.no_grad():
        return torch.stack([layer.get_delta_weight(adapter).float() for adapter in adapters]).sum(0)
