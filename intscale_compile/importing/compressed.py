"""Checkpoints of compressed-tensors: pack-quantized int4 weights, and int-quantized per-channel int8 weights.

For a linear layer with ``K`` input and ``N`` output features in ``G`` groups (or one per channel):

    weight_packed      int32 [N, K / 8]   code k in bits 4 (k % 8) of word k // 8, offset binary
    weight_scale       [N, G]
    weight_zero_point  int32 [N / 8, G]   packed along N, offset binary; asymmetric schemes only
    weight_shape       [2]                N and K
    weight             int8 [N, K]        instead of weight_packed, format "int-quantized"
    input_scale        [1]                static activation scale; schemes with static activations only
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, Optional

import torch
from torch import Tensor

from ..errors import ConfigError
from .layers import (
    ORIGINAL,
    QuantizedLayer,
    check_group_size,
    check_part,
    groups_of,
    nibbles,
    require,
    require_symmetric,
)

PACKED, PLAIN = "pack-quantized", "int-quantized"


class CompressedTensorsFormat:
    """Reader of compressed-tensors layers.

    Args:
        config: ``quantization_config`` of the checkpoint; where compressed-tensors is installed, it checks it too.

    Raises:
        ConfigError: a format, a weight scheme, an activation scheme or a transform that we cannot run.
    """

    required: tuple[str, ...] = ("weight_scale",)
    optional: tuple[str, ...] = (
        "weight_packed",
        "weight_zero_point",
        "weight_shape",
        "weight_g_idx",
        "weight",
        "input_scale",
    )

    def __init__(self, config: Mapping[str, Any]):
        _check_with_library(config)
        if config.get("transform_config"):
            raise ConfigError(
                f"compressed-tensors transform_config rotates activations online, which cannot be imported: {ORIGINAL}"
            )
        if config.get("kv_cache_scheme"):
            raise ConfigError("compressed-tensors kv_cache_scheme cannot be imported: remove it from config.json.")
        self._format = config.get("format", PACKED)
        self._schemes: dict[str, Mapping[str, Any]] = {}
        for group, scheme in (config.get("config_groups") or {}).items():
            if not isinstance(scheme, Mapping):
                raise ConfigError(f"config_groups[{group!r}] names a preset: write its scheme out.")
            self._check_scheme(group, scheme)
            for target in scheme.get("targets") or ():
                self._schemes.setdefault(target, scheme)
        if not self._schemes:
            raise ConfigError(
                "quantization_config has no config_groups with targets: nothing says how weights are stored."
            )

    def _check_scheme(self, group: str, scheme: Mapping[str, Any]) -> None:
        weights, inputs = scheme.get("weights"), scheme.get("input_activations")
        if not weights:
            raise ConfigError(
                f"config_groups[{group!r}] does not quantize weights, which cannot be imported: {ORIGINAL}"
            )
        storage = scheme.get("format") or self._format
        bits, kind, strategy = weights.get("num_bits"), weights.get("type", "int"), _strategy(weights)
        symmetric = weights.get("symmetric", True)
        four = bits == 4 and storage in (PACKED, PLAIN) and strategy in ("group", "channel")
        eight = bits == 8 and storage == PLAIN and strategy == "channel" and symmetric
        if kind != "int" or not (four or eight):
            raise ConfigError(
                f"config_groups[{group!r}]: {kind}{bits} weights, {strategy}, {storage} cannot be imported, int4 per group "
                f"or channel, and symmetric int8 per channel in int-quantized format, can: {ORIGINAL}"
            )
        if weights.get("actorder") in ("group", "dynamic", True):
            raise ConfigError(
                f"config_groups[{group!r}]: actorder='group' scatters groups: quantize with 'static' or None."
            )
        check_group_size(f"config_groups[{group!r}]", _group_size(weights))
        if inputs and not _activations_fit(inputs):
            raise ConfigError(
                f"config_groups[{group!r}]: input_activations are not symmetric int8, dynamic or static per tensor: remove "
                "them from config.json to import the weights alone, for dynamic activations per token."
            )
        if scheme.get("output_activations"):
            raise ConfigError(
                f"config_groups[{group!r}]: output_activations cannot be imported: remove them from config.json, or {ORIGINAL}"
            )

    def _of_layer(self, name: str) -> Mapping[str, Any]:
        """The scheme of a layer: exact names before patterns before classes."""
        if name in self._schemes:
            return self._schemes[name]
        for target, scheme in self._schemes.items():
            if target.startswith("re:") and re.match(target[3:], name):
                return scheme
        if "Linear" not in self._schemes:
            raise ConfigError(f"{name} is stored quantized, but no target of config_groups selects it.")
        return self._schemes["Linear"]

    def read(self, name: str, parts: Mapping[str, Tensor]) -> QuantizedLayer:
        """Unpack one layer.

        Raises:
            CheckpointError: tensors are missing, shapes or dtypes do not fit each other, or there are zero points in a
                symmetric scheme.
            ConfigError: no scheme selects the layer, or its groups are scattered.
        """
        scheme = self._of_layer(name)
        weights = scheme["weights"]
        group_size = _group_size(weights)
        if "weight_g_idx" in parts:
            raise ConfigError(
                f"{name}: its groups are scattered (weight_g_idx): quantize with actorder='static' or None."
            )
        codes = _codes(name, parts, scheme.get("format") or self._format)
        out_features, in_features = codes.shape
        groups = groups_of(in_features, group_size)
        scale = parts["weight_scale"]
        scale = scale.unsqueeze(-1) if scale.dim() == 1 else scale
        check_part(name, "weight_scale", scale, None, (out_features, groups))
        symmetric, zero_point = weights.get("symmetric", True), None
        require(symmetric or "weight_zero_point" in parts, name, "weight_zero_point is missing in an asymmetric scheme")
        if "weight_zero_point" in parts:
            zero_point = _zero_point(name, parts["weight_zero_point"], out_features, groups)
            if symmetric:  # some releases store zeros all the same
                require_symmetric(name, "weight_zero_point", zero_point, "symmetric=true")
                zero_point = None
        activation_scale = None
        if _is_static(scheme.get("input_activations")):
            require("input_scale" in parts, name, "input_scale is missing in a scheme with static activations")
            require(parts["input_scale"].numel() == 1, name, "input_scale is not one number")
            activation_scale = float(parts["input_scale"])
            require(0 < activation_scale < math.inf, name, f"input_scale is {activation_scale}, not a positive number")
        return QuantizedLayer(
            "compressed-tensors", codes, scale.float(), zero_point, group_size, weights["num_bits"], activation_scale
        )


def _activations_fit(inputs: Mapping[str, Any]) -> bool:
    """Whether activations are quantized as our kernels can: symmetric int8, per token, or with one static scale."""
    int8 = inputs.get("num_bits") == 8 and inputs.get("type", "int") == "int" and inputs.get("symmetric", True)
    return bool(int8) and (inputs.get("dynamic") is True or _is_static(inputs))


def _is_static(inputs: Optional[Mapping[str, Any]]) -> bool:
    return bool(inputs) and not inputs.get("dynamic") and _strategy(inputs) in ("tensor", None)  # type: ignore[union-attr, arg-type]


def _codes(name: str, parts: Mapping[str, Tensor], storage: str) -> Tensor:
    if storage == PLAIN:
        require("weight" in parts, name, "weight is missing")
        weight = parts["weight"]
        require(weight.dim() == 2, name, f"weight has {weight.dim()} dimensions, not 2")
        check_part(name, "weight", weight, torch.int8, tuple(weight.shape))
        return weight
    for part in ("weight_packed", "weight_shape"):
        require(part in parts, name, f"{part} is missing")
    shape = parts["weight_shape"].tolist()
    require(len(shape) == 2 and min(shape) > 0, name, f"weight_shape is {shape}")
    out_features, in_features = int(shape[0]), int(shape[1])
    packed = parts["weight_packed"]
    check_part(name, "weight_packed", packed, torch.int32, (out_features, -(-in_features // 8)))
    return nibbles(packed)[:, :in_features].to(torch.int8) - 8


def _zero_point(name: str, stored: Tensor, out_features: int, groups: int) -> Tensor:
    if stored.dim() == 1:  # per channel
        stored = stored.unsqueeze(-1)
    if stored.dtype == torch.int8:  # "int-quantized" does not pack them
        check_part(name, "weight_zero_point", stored, torch.int8, (out_features, groups))
        return stored
    check_part(name, "weight_zero_point", stored, torch.int32, (-(-out_features // 8), groups))
    return (nibbles(stored.t())[:, :out_features].to(torch.int8) - 8).t().contiguous()


def _strategy(weights: Mapping[str, Any]) -> Optional[str]:
    strategy, group_size = weights.get("strategy"), weights.get("group_size")
    if strategy is None and group_size is not None:
        return "group" if group_size > 0 else "channel"
    return strategy


def _group_size(weights: Mapping[str, Any]) -> int:
    return -1 if _strategy(weights) == "channel" else weights.get("group_size")  # type: ignore[return-value]


def _check_with_library(config: Mapping[str, Any]) -> None:
    """Let compressed-tensors read the configuration, where it is installed: what it refuses is refused."""
    try:
        # Optional.
        from compressed_tensors.quantization import QuantizationConfig
    except ImportError:
        return
    known = {name: value for name, value in config.items() if name in QuantizationConfig.model_fields}
    try:
        QuantizationConfig.model_validate(known)
    except (ValueError, NotImplementedError, KeyError) as error:  # pydantic's errors are ValueErrors
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"compressed-tensors does not accept this quantization_config: mend config.json, or {ORIGINAL} It says: {reason}"
        ) from error
