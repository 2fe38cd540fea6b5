"""``save_compressed_tensors``: quantized weights in the format of compressed-tensors, which vLLM and transformers read."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional, Union

import torch
from torch import Tensor, nn

from .. import format as fmt
from ..errors import ConfigError
from ..tensors.from_codes import scale_rounding_snr
from ..tensors.intscale_tensor import IntScaleTensor
from ..tensors.stored_files import whole_folder
from .compressed import PACKED, PLAIN
from .layers import headroom_bits
from .model import unquantized_linears
from .report import ConvertedLayer, ImportReport

SHARD_SIZE = "5GB"


@dataclass(frozen=True)
class _Scheme:
    """What layers of one config group have in common."""

    weight_bits: int
    group_size: int
    symmetric: bool
    static: bool
    storage: str

    def to_dict(self, targets: list[str]) -> dict[str, Any]:
        weights = {"num_bits": self.weight_bits, "type": "int", "symmetric": self.symmetric, "dynamic": False}
        if self.group_size == -1:
            weights["strategy"] = "channel"
        else:
            weights |= {"strategy": "group", "group_size": self.group_size}
        inputs = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": not self.static}
        inputs["strategy"] = "tensor" if self.static else "token"
        return {"targets": targets, "weights": weights, "input_activations": inputs, "format": self.storage}


def save_compressed_tensors(
    model: nn.Module,
    folder: Union[str, Path],
    *,
    storage: str = PACKED,
    scale_dtype: Optional[torch.dtype] = None,
) -> ImportReport:
    """Write a transformers model with ``IntScaleTensor`` weights as a W4A8 checkpoint of compressed-tensors.

    Codes and zero points are stored as they are. A group's float scale is ``row_scale * group_scale``, rounded to
    ``scale_dtype``: the report says what that cost; 16-bit scales of a bf16 model cost less than what rounding the
    weights did by more than 30 dB. Layers with ``weight_bits=8`` become int-quantized per-channel int8.
    Activations are declared as int8, dynamic per token, or with their static scale. The files appear in ``folder`` once all
    of them are written: a failed call leaves it as it was.

    Args:
        model: a transformers model after ``quantize_``, ``calibrate`` or ``from_quantized``.
        folder: where ``config.json`` and the safetensors files go. Save the tokenizer beside them.
        storage: of 4-bit weights: ``"pack-quantized"`` (8 codes in an int32), or ``"int-quantized"`` (a code per byte),
            the only one that vLLM releases without a kernel choice for packed W4A8 weights read.
        scale_dtype: of the float scales; by default the model's, which engines expect.

    Returns:
        A report that prints itself.

    Raises:
        ConfigError: the model is not a transformers model, no weight is quantized, or a weight has a form that
            compressed-tensors cannot express: the message names the layer.
        CheckpointError: the folder cannot be written.
    """
    # Slow to import.
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise ConfigError(f"save_compressed_tensors takes a transformers model, not {type(model).__name__}.")
    if storage not in (PACKED, PLAIN):
        raise ConfigError(
            f"save_compressed_tensors: storage={storage!r} is not supported: use {PACKED!r} or {PLAIN!r}."
        )
    state, report = dict(model.state_dict()), ImportReport()
    schemes: dict[_Scheme, list[str]] = {}
    for key in [key for key, value in state.items() if isinstance(value, IntScaleTensor)]:
        tensor, name = state.pop(key), key.removesuffix(".weight")
        _check_expressible(model, tensor, key)
        parts, scheme, row = _exported(tensor, name, storage, scale_dtype or tensor.dtype)
        state.update({f"{name}.{part}": value for part, value in parts.items()})
        schemes.setdefault(scheme, []).append(name)
        report.layers.append(row)
    if not schemes:
        raise ConfigError("save_compressed_tensors: no weight of the model is quantized; call quantize_ first.")
    report.unquantized = unquantized_linears(model)
    with whole_folder(folder) as part, _as_plain(model):
        model.save_pretrained(part, state_dict=state, max_shard_size=SHARD_SIZE)
        _add_to_config(part, _quantization_config(schemes, report.unquantized))
    return report


def _check_expressible(model: nn.Module, tensor: IntScaleTensor, key: str) -> None:
    name, _, leaf = key.rpartition(".")
    mend = "quantize that layer otherwise, or dequantize() it before the export"
    if tensor.dim() != 2 or leaf != "weight" or not isinstance(model.get_submodule(name), nn.Linear):
        raise ConfigError(f"{key}: compressed-tensors stores weights of linear layers only: {mend}.")
    if tensor.rotation:
        raise ConfigError(f"{key}: rotation={tensor.rotation} of its activation cannot be expressed: {mend}.")
    if tensor.input_order is not None:
        raise ConfigError(f"{key}: its input order (GPTQ's activation order) cannot be expressed: {mend}.")


def _exported(
    tensor: IntScaleTensor, name: str, storage: str, dtype: torch.dtype
) -> tuple[dict[str, Tensor], _Scheme, ConvertedLayer]:
    """Stored tensors of a layer by the last part of their names, its scheme, and its row of the report."""
    out_features, in_features = tensor.shape
    if fmt.is_offset(tensor.zero_point):
        raise ConfigError(
            f"{name}: its groups have minima that are no multiples of their scales (from GGUF), for which compressed-tensors has "
            "no place: save the model with save_pretrained."
        )
    codes, group_size = tensor.codes, tensor.group_size
    groups = 1 if group_size == -1 else -(-in_features // group_size)
    scale = (tensor.group_scale[:, :groups].double() * tensor.row_scale.double()).to(dtype)
    if not bool((torch.isfinite(scale) & (scale > 0)).all()):
        raise ConfigError(f"{name}: a scale does not fit {dtype}: pass scale_dtype=torch.float32.")
    row = ConvertedLayer(
        name,
        PLAIN if tensor.weight_bits == 8 else storage,
        (out_features, in_features),
        group_size,
        tensor.zero_point is None,
        scale_rounding_snr(tensor, scale),
        headroom_bits(int(tensor.accumulator_bound().max())),
    )
    zero_point = tensor.group_zero_point
    zero_point = None if zero_point is None else zero_point[:, :groups]
    scale, zero_point, group_size = _whole_groups(name, scale, zero_point, group_size, in_features)
    scheme = _Scheme(
        tensor.weight_bits, group_size, zero_point is None, tensor.activation_scale is not None, row.format
    )
    parts = {"weight_scale": scale.contiguous()}
    if row.format == PLAIN:
        parts["weight"] = codes.contiguous()
    else:
        parts |= {"weight_packed": _words(codes), "weight_shape": torch.tensor([out_features, in_features])}
    if zero_point is not None:
        parts["weight_zero_point"] = (
            zero_point.contiguous() if row.format == PLAIN else _words(zero_point.t()).t().contiguous()
        )
    if tensor.activation_scale is not None:
        parts["input_scale"] = tensor.activation_scale.reshape(1).to(dtype)
    return {part: value.cpu() for part, value in parts.items()}, scheme, row


def _whole_groups(
    name: str, scale: Tensor, zero_point: Optional[Tensor], group_size: int, in_features: int
) -> tuple[Tensor, Optional[Tensor], int]:
    """Groups as compressed-tensors has them, which must divide the input features: shorter ones that share scales."""
    if scale.shape[1] == 1:
        return scale, zero_point, -1
    if in_features % group_size == 0:
        return scale, zero_point, group_size
    size = math.gcd(in_features, group_size)
    if size < 32:
        raise ConfigError(
            f"{name}: {in_features} input features have no whole groups of 32 or more, which compressed-tensors needs: "
            "quantize that layer per channel."
        )
    cut = [
        None if part is None else part.repeat_interleave(group_size // size, 1)[:, : in_features // size]
        for part in (scale, zero_point)
    ]
    assert cut[0] is not None
    return cut[0], cut[1], size


def _words(codes: Tensor) -> Tensor:
    """int32 words ``[R, ceil(C / 8)]`` of signed 4-bit codes ``[R, C]``, offset binary, the first in the lowest bits."""
    unsigned = torch.nn.functional.pad((codes + 8).to(torch.uint8), (0, -codes.shape[1] % 8))
    return (unsigned[:, ::2] | (unsigned[:, 1::2] << 4)).contiguous().view(torch.int32)


def _quantization_config(schemes: dict[_Scheme, list[str]], unquantized: list[str]) -> dict[str, Any]:
    groups = {
        f"group_{i}": scheme.to_dict(["Linear"] if len(schemes) == 1 else names)
        for i, (scheme, names) in enumerate(schemes.items())
    }
    storages = {scheme.storage for scheme in schemes}
    return {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": storages.pop() if len(storages) == 1 else "mixed-precision",
        "config_groups": groups,
        "ignore": unquantized,
        "kv_cache_scheme": None,
    }


@contextmanager
def _as_plain(model: Any) -> Iterator[None]:
    """Let transformers save the model as one that no quantizer of its own takes care of."""
    quantizer = getattr(model, "hf_quantizer", None)
    stored = getattr(model.config, "quantization_config", None)
    model.hf_quantizer = None
    if stored is not None:
        del model.config.quantization_config
    try:
        yield
    finally:
        model.hf_quantizer = quantizer
        if stored is not None:
            model.config.quantization_config = stored


def _add_to_config(folder: Path, quantization_config: dict[str, Any]) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] = quantization_config
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
