"""Codes of merged weights chosen with calibration data: the pipeline of ``calibrate`` over the weights that changed."""

from __future__ import annotations

import dataclasses
import logging
import re
from typing import Union

from torch import Tensor, nn

from ..calibration.capture import Data, batches_of
from ..calibration.config import CalibrationConfig, as_calibration_config
from ..calibration.pipeline import CONFIG_ATTRIBUTE, quantize_blocks
from ..calibration.report import CalibrationReport
from ..calibration.solve import frozen
from ..config import IntScaleConfig
from ..kernels.hadamard import hadamard_transform
from ..reasons import log_once
from ..tensors.input_rotation import start_rotating, stop_rotating
from ..tensors.intscale_tensor import IntScaleTensor
from .layers import Adapted


def choose_codes(
    model: nn.Module,
    changed: list[Adapted],
    wanted: dict[str, Tensor],
    before: dict[str, IntScaleTensor],
    data: Data,
    recipe: Union[str, CalibrationConfig, None],
    progress: bool,
) -> None:
    """Quantize merged weights with data, in place; those that the pipeline cannot reach keep what they have.

    Args:
        model: without adapters, the changed weights rounded without data.
        changed: the layers that an adapter changed.
        wanted: their merged weights by name, fp32.
        before: their weights before.
        data: as for ``calibrate``.
        recipe: as for ``lora.merge``.
        progress: show a bar.

    Raises:
        CalibrationError, WeightError, OverflowProofError: as for ``calibrate``.
    """
    batches = batches_of(data)
    chosen = [one for one in changed if _can_follow(one, before[one.name])]
    config = _configuration(model, recipe, {one.name: before[one.name] for one in chosen})
    rotations = {}
    rounded = {one.name: one.weight for one in chosen}
    for one in chosen:
        old = before[one.name]
        dense = wanted[one.name]
        if old.rotation:
            dense = hadamard_transform(dense, old.rotation)
            rotations[one.name] = old.rotation
            start_rotating(one.base, old.rotation)
        one.base.weight = frozen(dense.to(old.dtype))
    report = CalibrationReport(config)
    open_weights = {(id(one.base), "weight") for one in chosen}
    quantize_blocks(model, batches, config, report, open_weights, rotations, progress)
    for one in chosen:
        new = one.base.weight
        if not isinstance(new, IntScaleTensor):  # in no block
            one.base.weight = rounded[one.name]
            stop_rotating(one.base)
        elif before[one.name].act_pre_scale is not None:
            one.base.weight = frozen(new.replaced(act_pre_scale=before[one.name].act_pre_scale))


def _can_follow(one: Adapted, before: IntScaleTensor) -> bool:
    odd = "zero points" if before.zero_point is not None else "an input order" if before.input_order is not None else ""
    if odd:
        log_once(logging.WARNING, f"{one.name}: a weight with {odd} is merged without the calibration data.")
    return not odd


def _configuration(
    model: nn.Module, recipe: Union[str, CalibrationConfig, None], weights: dict[str, IntScaleTensor]
) -> CalibrationConfig:
    """The recipe's rounding and clipping, with the format that each weight has."""
    stored = getattr(getattr(model, "config", None), CONFIG_ATTRIBUTE, None)
    if recipe is not None:
        base = as_calibration_config(recipe)
    else:
        base = CalibrationConfig.from_dict(stored) if stored is not None else as_calibration_config("gptq")
    overrides = {re.escape(name): format_of(weight) for name, weight in weights.items()}
    return dataclasses.replace(
        base,
        overrides=overrides,
        smoothing="none",
        rotation="none",
        activation="dynamic",
        scales="integer",
        tuning_steps=0,
        distillation_steps=0,
    )


def format_of(weight: IntScaleTensor) -> IntScaleConfig:
    """The configuration that makes weights of a weight's format."""
    amplifier = 1.0 / float(weight.row_scale.flatten()[0])
    published = weight.scale.element_size() > 1 and amplifier == int(amplifier)
    return IntScaleConfig(
        weight.group_size,
        weight.weight_bits,
        min(8, weight.scale_bits),
        amplifier=int(amplifier) if published else "row",
    )
