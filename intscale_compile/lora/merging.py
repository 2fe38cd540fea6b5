"""``lora.merge``: an adapter becomes part of the quantized weights; and what peft's own ``merge_and_unload`` does with them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Optional, Union

import torch
from torch import Tensor, nn

from ..calibration.capture import Data
from ..calibration.config import CalibrationConfig
from ..config import IntScaleConfig
from ..errors import ConfigError
from ..integrations.peft import hook_merging
from ..tensors.intscale_tensor import IntScaleTensor
from ..tensors.model_state import ModelState
from .layers import Adapted, adapted_layers, base_model_of, check_supported, delta_of
from .requantize import orthonormal, requantized

log = logging.getLogger("intscale_compile")
BEFORE = "_intscale_before_merge"  # attribute of peft's layers: the weight that an adapter was merged into


def merge(
    peft_model: Any,
    data: Optional[Data] = None,
    recipe: Union[str, CalibrationConfig, None] = None,
    *,
    adapter: Optional[str] = None,
    progress: bool = True,
) -> nn.Module:
    """Merge an adapter into the quantized weights below it and take the adapter layers away, in place.

    Every weight keeps what calibration or an override chose for it: group size, bits, zero points, rotation, static activation
    scale. A weight that the adapter does not change keeps its tensor to the bit. What the others lose in rounding is logged, as
    the part of the adapter's effect that is gone.

    Args:
        peft_model: a peft model with LoRA layers over quantized weights.
        data: calibration data as ``calibrate`` takes it; codes are then chosen by GPTQ for the merged weights. Weights with zero
            points or an input order are rounded without it.
        recipe: with ``data``: preset or configuration whose rounding and clipping are used; its smoothing, rotation and tuning
            are not, and formats are those of the weights. None: the one that the model was calibrated with, or ``"gptq"``.
        adapter: name of the adapter; None: the active one.
        progress: show a bar, with ``data``.

    Returns:
        The base model.

    Raises:
        ConfigError: as for ``lora.initialize``; or a ``recipe`` without ``data``.
        WeightError: the adapter has NaN or Inf entries.
        OverflowProofError: the accumulator of a merged row cannot be proved free of overflow.
        CalibrationError: as for ``calibrate``.
    """
    if recipe is not None and data is None:
        raise ConfigError("recipe says how codes are chosen with calibration data: pass data as well, or leave it out.")
    base = base_model_of(peft_model)
    layers = adapted_layers(peft_model, adapter)
    _no_other_adapters(peft_model, layers[0].adapter)
    state = ModelState(peft_model)
    try:
        wanted = {one.name: _wanted(one) for one in layers}
        before = {one.name: one.weight for one in layers}
        changed = [one for one in layers if not torch.equal(wanted[one.name], one.weight.dequantize(torch.float32))]
        for one in changed:
            _set(one.base, requantized(one.weight, wanted[one.name], f"{one.name}.weight", one.down.detach()))
        merged = peft_model.unload()
        if data is not None and changed:
            # Imports the whole pipeline, which merging without data does not need.
            from .merging_with_data import choose_codes

            choose_codes(merged, changed, wanted, before, data, recipe, progress)
        _say_what_is_lost(changed, wanted, before, data is not None)
        return merged
    except BaseException:
        state.restore()
        raise
    finally:
        del base


def _no_other_adapters(peft_model: Any, adapter: str) -> None:
    others = [name for name in peft_model.peft_config if name != adapter]
    if others:
        raise ConfigError(
            f"merging {adapter!r} takes the adapter layers away, and {others} with them: delete those first "
            "(peft_model.delete_adapter), or merge one into the other."
        )


def _wanted(one: Adapted) -> Tensor:
    return one.weight.dequantize(torch.float32) + delta_of(one.layer, [one.adapter])


def _set(module: nn.Module, tensor: IntScaleTensor) -> None:
    module.weight = tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, requires_grad=False)


def lost_effect(wanted: Tensor, merged: Tensor, before: Tensor, directions: Tensor) -> float:
    """The part of an adapter's effect that a merged weight lost: ``||(W' - merged) Q|| / ||(W' - W) Q||``, fp32 ``[N, K]`` all
    three, ``Q`` a basis of the directions ``[r, K]`` that it reads. 0: nothing was lost, 1: as if it had not been merged.
    """
    basis = orthonormal(directions.float())
    if basis is None:
        return 0.0
    whole = float(((wanted - before) @ basis).norm())
    return float(((wanted - merged) @ basis).norm()) / whole if whole else 0.0


def _say_what_is_lost(
    changed: list[Adapted], wanted: dict[str, Tensor], before: dict[str, IntScaleTensor], with_data: bool
) -> None:
    if not changed:
        log.info("the adapter changes no weight: all of them are kept to the bit")
        return
    lost = {}
    for one in changed:
        now, then = (weight.dequantize(torch.float32) for weight in (one.weight, before[one.name]))
        rows = [part.mT if one.weight.transposed else part for part in (wanted[one.name], now, then)]
        lost[one.name] = lost_effect(rows[0], rows[1], rows[2], one.down.detach())
    worst = max(lost, key=lost.__getitem__)
    mean = sum(lost.values()) / len(lost)
    hint = (
        "" if with_data else "; with data= codes are chosen by GPTQ, or serve the adapter unmerged, which loses nothing"
    )
    log.log(
        logging.INFO if with_data else logging.WARNING,
        f"merged an adapter into {len(lost)} quantized weights: rounding lost {mean:.0%} of its effect, at most "
        f"{lost[worst]:.0%} ({worst}){hint}",
    )


# --- peft's own merging -------------------------------------------------------------------------------------------------


def _merge_layer(original: Callable) -> Callable:
    def merge(self: Any, safe_merge: bool = False, adapter_names: Optional[list[str]] = None) -> None:
        weight = self.get_base_layer().weight
        if not isinstance(weight, IntScaleTensor):
            return original(self, safe_merge=safe_merge, adapter_names=adapter_names)
        # Part of peft, which is optional.
        from peft.tuners.tuners_utils import check_adapters_to_merge

        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.lora_A]
        if not names:
            return None
        for name in names:
            check_supported(self, name, "a layer of the adapter")
        wanted = weight.dequantize(torch.float32) + delta_of(self, names)
        down = torch.cat([self.lora_A[name].weight.detach() for name in names])
        tensor = requantized(weight, wanted, "the merged weight", down)
        if not self.merged_adapters:
            setattr(self, BEFORE, (weight,))  # in a tuple: no parameter of the layer
        _set(self.get_base_layer(), tensor)
        self.merged_adapters.extend(names)
        return None

    return merge


def _unmerge_layer(original: Callable) -> Callable:
    def unmerge(self: Any) -> None:
        before = getattr(self, BEFORE, None)
        if before is None or not self.merged:
            return original(self)
        now = self.get_base_layer().weight
        _set(self.get_base_layer(), before[0] if before[0].device == now.device else before[0].to(now.device))
        delattr(self, BEFORE)
        self.merged_adapters.clear()
        return None

    return unmerge


def _create_layer(original: Callable) -> Callable:
    def create(self: Any, *args: Any, get_apply_tensor_subclass: Optional[Callable] = None, **kwargs: Any) -> None:
        below: Any = args[0] if args else kwargs.get("base_layer")
        below = below.get_base_layer() if hasattr(below, "get_base_layer") else below
        if get_apply_tensor_subclass is None and isinstance(getattr(below, "weight", None), IntScaleTensor):
            get_apply_tensor_subclass = IntScaleConfig  # merging takes the format of the weight; peft wants something
        original(self, *args, get_apply_tensor_subclass=get_apply_tensor_subclass, **kwargs)

    return create


def _set_base_weight(original: Callable) -> Callable:
    def set_base_weight(self: Any, peft_layer: Any, weight_data: Tensor) -> None:
        base = peft_layer.get_base_layer()
        if not isinstance(base.weight, IntScaleTensor):
            return original(self, peft_layer, weight_data)
        _set(base, requantized(base.weight, weight_data, "the merged weight"))
        return None

    return set_base_weight


def register() -> None:
    """Let peft merge into quantized weights as :func:`merge` does without data. Idempotent."""
    hook_merging(
        {
            "merge": _merge_layer,
            "unmerge": _unmerge_layer,
            "__init__": _create_layer,
            "set_base_weight": _set_base_weight,
        }
    )
