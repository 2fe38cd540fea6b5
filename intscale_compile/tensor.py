"""``IntScaleTensor``: a weight with integer group scales, as a torchao tensor subclass."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Optional

import torch
from torch import Tensor
from torchao.utils import TorchAOBaseTensor

from . import format as fmt
from .config import IntScaleConfig
from .errors import CheckpointError, ConfigError, UnsupportedOpError, WeightError
from .kernels.dequantize import WEIGHT_OP
from .scale_search import quantize_weight

SCALE_DTYPES = (torch.uint8, torch.int16)
QDATA_DTYPES = (torch.uint8, torch.int8)


class IntScaleTensor(TorchAOBaseTensor):
    """A 2-D weight ``[N, K]`` or a stack ``[E, N, K]`` (experts), quantized with integer group scales.

        W[n, k] = row_scale[n] * group_scale[n, k // group_size] * q[n, k]

    The tensors inside all have the weight's number of dimensions. Their names are those that transformers reloads;
    ``group_scale`` and ``row_scale`` are the readable ones. ``format`` describes the layout.

    Tensor data:
        qdata: uint8 ``[..., N, Kp / 2]``, two 4-bit codes a byte, or int8 ``[..., N, Kp]`` for 8-bit weights.
        scale: integer group scales, uint8 or int16 ``[..., N, G]``, at least 1.
        per_tensor_scale: row scales, fp32 ``[..., N, 1]``.

    Attributes:
        block_size: ``[1, ..., group_size]`` as elsewhere in torchao; the last entry is -1 per channel.
        in_features, out_features: ``K`` and ``N`` without padding.
        scale_bits: no group scale is above ``2**scale_bits - 1``; up to 4 bits the scale folds into the int8 weight.
        packing_format: ``"plain"`` or ``"tiled"``.
        transposed: whether the tensor stands for the transpose of its stored rows, shape ``[..., K, N]``.
        dtype: the dtype that the tensor claims, and of ``dequantize()``.

    Raises:
        CheckpointError: the parts contradict each other.
    """

    tensor_data_names = ["qdata", "scale", "per_tensor_scale"]
    tensor_attribute_names = [
        "block_size",
        "in_features",
        "out_features",
        "scale_bits",
        "packing_format",
        "transposed",
        "dtype",
    ]

    def __new__(  # noqa: D102  (the class says what the arguments are)
        cls,
        qdata: Tensor,
        scale: Tensor,
        per_tensor_scale: Tensor,
        block_size: list,
        in_features: int,
        out_features: int,
        scale_bits: int,
        packing_format: str,
        transposed: bool,
        dtype: torch.dtype,
    ):
        matrix = (in_features, out_features) if transposed else (out_features, in_features)
        shape = (*qdata.shape[:-2], *matrix)
        return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=qdata.device, requires_grad=False)

    def __init__(
        self,
        qdata: Tensor,
        scale: Tensor,
        per_tensor_scale: Tensor,
        block_size: list,
        in_features: int,
        out_features: int,
        scale_bits: int,
        packing_format: str,
        transposed: bool,
        dtype: torch.dtype,
    ):
        super().__init__()
        self.qdata = qdata
        self.scale = scale
        self.per_tensor_scale = per_tensor_scale
        self.block_size = block_size
        self.in_features = in_features
        self.out_features = out_features
        self.scale_bits = scale_bits
        self.packing_format = packing_format
        self.transposed = transposed

    @property
    def group_scale(self) -> Tensor:
        """Integer group scales ``[..., N, G]``, plain row order."""
        return fmt.untile_rows(self.scale, self.out_features, 1) if self.packing_format == "tiled" else self.scale

    @property
    def row_scale(self) -> Tensor:
        """Float row scales, fp32 ``[..., N, 1]``."""
        return self.per_tensor_scale

    @property
    def group_size(self) -> int:
        """Weights per group scale; -1 per channel."""
        return self.block_size[-1]

    @property
    def weight_bits(self) -> int:
        """4 or 8."""
        return 8 if self.qdata.dtype == torch.int8 else 4

    @property
    def codes(self) -> Tensor:
        """Unpacked codes, int8 ``[..., N, K]``."""
        columns = fmt.code_block_columns(self.group_size, self.weight_bits)
        plain = (
            fmt.untile_rows(self.qdata, self.out_features, columns) if self.packing_format == "tiled" else self.qdata
        )
        return (plain if self.weight_bits == 8 else fmt.unpack_int4(plain, self.group_size))[..., : self.in_features]

    @classmethod
    def from_hp(
        cls, weight: Tensor, config: Optional[IntScaleConfig] = None, *, name: str = "weight"
    ) -> IntScaleTensor:
        """Quantize a high-precision weight.

        Args:
            weight: fp32, bf16 or fp16 ``[N, K]`` or ``[E, N, K]``, finite.
            config: how; the default is 4 bits, group 128, 4-bit searched integer scales.
            name: named in error messages.

        Raises:
            WeightError: the weight is not floating point, not finite, on the meta device, empty, or has another rank.
            OverflowProofError: its accumulator cannot be proved free of overflow.
        """
        config = IntScaleConfig() if config is None else config
        check_weight(weight, name)
        if weight.dim() == 3:  # one by one: temporaries of a whole stack would not fit beside it
            experts = (cls.from_hp(expert, config, name=f"{name}[{e}]") for e, expert in enumerate(weight))
            return _stacked(experts, weight.shape[0])
        quantized = quantize_weight(weight, config)
        group_size, bits = config.effective_group_size, config.weight_bits
        tensor = cls(
            quantized.codes if bits == 8 else fmt.pack_int4(quantized.codes, group_size),
            quantized.group_scale,
            quantized.row_scale,
            [1, group_size],
            weight.shape[-1],
            weight.shape[-2],
            quantized.scale_bits,
            "plain",
            False,
            weight.dtype,
        )
        return tensor.to_packing(resolve_packing(config.packing_format, weight.device))

    def to_packing(self, packing_format: str) -> IntScaleTensor:
        """The same weight in ``"plain"`` or ``"tiled"`` packing; lossless, and a no-op where it is so packed already."""
        if packing_format not in ("plain", "tiled"):
            raise ConfigError(f"packing_format={packing_format!r} is not supported: use 'plain' or 'tiled'.")
        if packing_format == self.packing_format:
            return self
        columns = fmt.code_block_columns(self.group_size, self.weight_bits)
        if packing_format == "tiled":
            zero = 0 if self.weight_bits == 8 else fmt.ZERO_BYTE
            qdata, scale = fmt.tile_rows(self.qdata, columns, zero), fmt.tile_rows(self.scale, 1, 1)
        else:
            qdata = fmt.untile_rows(self.qdata, self.out_features, columns)
            scale = fmt.untile_rows(self.scale, self.out_features, 1)
        return self.replaced(qdata=qdata, scale=scale, packing_format=packing_format)

    def replaced(self, **parts) -> IntScaleTensor:
        """A tensor like this one with some of its data or attributes exchanged."""
        names = (*self.tensor_data_names, *self.tensor_attribute_names)
        return type(self)(*(parts[name] if name in parts else getattr(self, name) for name in names))

    def dequantize(self, output_dtype: Optional[torch.dtype] = None) -> Tensor:
        """The weight in floating point, in this tensor's shape; ``output_dtype`` defaults to its dtype."""
        dense = WEIGHT_OP(
            self.qdata,
            self.scale,
            self.per_tensor_scale,
            self.out_features,
            self.in_features,
            self.group_size,
            self.packing_format,
            self.dtype if output_dtype is None else output_dtype,
        )
        return dense.transpose(-2, -1) if self.transposed else dense

    def accumulator_bound(self) -> Tensor:
        """Largest magnitude of each row's int32 accumulator over all activations, int64 ``[..., N]``; below 2**31."""
        if self.dim() == 3:  # expert by expert: unpacked codes of a stack are large
            stored = self.transpose(-2, -1) if self.transposed else self
            return torch.stack([expert.accumulator_bound() for expert in stored.unbind(0)])  # type: ignore[attr-defined]
        codes = fmt.pad_codes(self.codes, self.in_features, self.group_size)
        return fmt.accumulator_bound(codes, self.group_scale)

    def nbytes_packed(self) -> int:
        """Bytes that codes and scales take together."""
        return sum(getattr(self, name).nbytes for name in self.tensor_data_names)

    def validate(self, name: str = "weight") -> IntScaleTensor:
        """Check stored data as far as it can be checked: shapes, dtypes, ranges, the overflow proof. Reads all of it.

        Raises:
            CheckpointError: naming what is wrong.
        """
        from .validate import validate_tensor

        validate_tensor(self, name)
        return self

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        """Run ``func`` as ``tensor_ops`` defines it; what is not there has no exact meaning on packed data."""
        if func not in cls._ATEN_OP_TABLE[cls]:
            mend = "use weight.dequantize() first"
            raise UnsupportedOpError(f"IntScaleTensor: {func} is not defined on packed data; {mend}.")
        return super().__torch_dispatch__(func, types, args, kwargs or {})

    def __deepcopy__(self, memo) -> IntScaleTensor:
        """A copy that owns its data: a row slice of a merged weight would take the whole of it along."""
        for name in self.tensor_data_names:
            part = getattr(self, name)
            if part.untyped_storage().nbytes() != part.nbytes:
                memo.setdefault(id(part), part.clone())
        return super().__deepcopy__(memo)

    def __tensor_flatten__(self):
        """Names of the inner tensors and the attributes, collected once: nothing changes an attribute of a tensor.

        Dynamo asks twice for each weight at every call of a compiled model, and ``dtype`` alone costs some microseconds
        through ``__torch_function__``: a decoding step of a 32-layer model spent more than its GPU time here.
        """
        flat = self.__dict__.get("_flat")
        if flat is None:
            attributes = {name: getattr(self, name) for name in self.tensor_attribute_names}
            flat = self.__dict__["_flat"] = (list(self.tensor_data_names), attributes)
        return flat

    def __getstate__(self) -> dict:
        """What is stored: without what ``__tensor_flatten__`` keeps, which follows from the rest."""
        return {name: value for name, value in self.__dict__.items() if name != "_flat"}

    def _stable_hash_for_caching(self) -> str:
        parts = [(n, tuple(getattr(self, n).shape), str(getattr(self, n).dtype)) for n in self.tensor_data_names]
        attributes = [(n, str(getattr(self, n))) for n in self.tensor_attribute_names]
        return f"IntScaleTensor{parts}{attributes}{self.device}"

    def __repr__(self, *, tensor_contents=None) -> str:
        group = "per channel" if self.group_size == -1 else f"group_size={self.group_size}"
        flag = ", transposed" if self.transposed else ""
        return (
            f"IntScaleTensor(shape={tuple(self.shape)}, int{self.weight_bits}, {group}, scale_bits={self.scale_bits}, "
            f"{self.packing_format}{flag}, dtype={self.dtype}, device={self.device})"
        )

    def _set_checked_state(self, state) -> None:
        """Unpickling, also by ``torch.load``: the stored parts are checked."""
        torch._utils._set_obj_state(self, state)
        self.__dict__.pop("_flat", None)  # never from a file: nothing would check it
        missing = [n for n in (*self.tensor_data_names, *self.tensor_attribute_names) if not hasattr(self, n)]
        if missing:
            raise CheckpointError(
                f"stored IntScaleTensor lacks {missing}: the file is truncated or of another version."
            )
        self.validate()


# torchao's base class installs its own, unchecked one on every subclass, over what the class body says.
IntScaleTensor.__setstate__ = IntScaleTensor._set_checked_state  # type: ignore[method-assign]
# torch pickles classes by module and name: the public path keeps files readable when modules move.
IntScaleTensor.__module__ = "intscale_compile"


def _stacked(experts: Iterator[IntScaleTensor], count: int) -> IntScaleTensor:
    """A stack of ``count`` matrices, each of them freed once it is copied."""
    data: dict[str, Tensor] = {}
    scale_bits = 1
    for e, expert in enumerate(experts):
        for name in expert.tensor_data_names:
            part = getattr(expert, name)
            data.setdefault(name, part.new_empty((count, *part.shape)))[e] = part
        scale_bits = max(scale_bits, expert.scale_bits)
    return expert.replaced(**data, block_size=[1, *expert.block_size], scale_bits=scale_bits)


def resolve_packing(packing_format: str, device: torch.device) -> str:
    """``"auto"`` becomes tiled on a GPU and plain elsewhere."""
    return ("tiled" if device.type == "cuda" else "plain") if packing_format == "auto" else packing_format


def check_weight(weight: Tensor, name: str) -> None:
    """Raise ``WeightError`` unless ``weight`` can be quantized."""
    if not weight.dtype.is_floating_point or weight.dtype.itemsize < 2:
        raise WeightError(f"{name} is {weight.dtype}; only floating point weights of 16 bits or more can be quantized.")
    if weight.dim() not in (2, 3) or 0 in weight.shape:
        raise WeightError(f"{name} has shape {tuple(weight.shape)}; a non-empty [N, K] or [E, N, K] weight is needed.")
    if weight.device.type == "meta":
        raise WeightError(f"{name} is on the meta device and has no data: load the checkpoint (or to_empty) first.")
    if not _is_finite(weight):
        raise WeightError(
            f"{name} has NaN or Inf entries: repair the checkpoint, or leave this layer out with filter_fn."
        )


def _is_finite(weight: Tensor) -> bool:
    # The least and the greatest entry are NaN where any entry is; nothing of the size of the weight is allocated for them.
    # float64 is quantized in float32, where 1e300 is Inf.
    return bool(torch.isfinite(torch.stack(torch.aminmax(weight)).float()).all())
