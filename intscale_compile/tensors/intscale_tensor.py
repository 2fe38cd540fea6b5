"""``IntScaleTensor``: a weight with integer group scales, as a torchao tensor subclass."""

from __future__ import annotations

from typing import Any, Optional, Union

import torch
from torch import Tensor
from torchao.utils import TorchAOBaseTensor

from .. import format as fmt
from ..config import IntScaleConfig
from ..errors import CheckpointError, ConfigError, UnsupportedOpError
from ..integrations.dynamo_scope import leave_to_python
from ..integrations.torchao import check_unpickled
from ..kernels.abi import KERNEL_ABI
from ..kernels.arguments import DequantizeWeightArguments
from ..kernels.dequantize import WEIGHT_OP
from ..kernels.hadamard import hadamard_transform
from . import activation_parts, construction
from .eager import eager_linear
from .fields import ABSENT, ALL_NAMES, ATTRIBUTE_NAMES, DATA_NAMES, TensorParts, drop_old_parts
from .from_codes import check_from_codes
from .stored_files import reading
from .validate import validate_tensor
from .weight_checks import check_weight

LINEAR = torch.nn.functional.linear
KEPT = ("_flat", "_eager")  # of ``__tensor_flatten__`` and of ``eager.form_of``


class IntScaleTensor(TorchAOBaseTensor):
    """A 2-D weight ``[N, K]`` or a stack ``[E, N, K]`` (experts), quantized with integer group scales.

        W[n, k] = row_scale[n] * group_scale[n, k // group_size] * (q[n, k] - zero_point[n, k // group_size])

    The tensors inside all have the weight's number of dimensions. Their names are those that transformers reloads;
    ``group_scale``, ``row_scale`` and ``activation_scale`` are the readable ones. ``format`` describes the layout.

    Tensor data:
        qdata: uint8 ``[..., N, Kp / 2]``, two 4-bit codes a byte, or int8 ``[..., N, Kp]`` for 8-bit weights.
        scale: integer group scales, uint8 or int16 ``[..., N, G]``, at least 1.
        per_tensor_scale: row scales, fp32 ``[..., N, 1]``.
        zero_point: int8 ``[..., N, G]`` in [-8, 7], for 4-bit weights; or int16, offsets in units of the row scale (see
            ``format``); None: the weight is symmetric.
        act_pre_scale: the static scale of the activation, fp32 ``[..., 1, 1]``; None: dynamic, per token.
        input_order: int32 ``[1, K]``, a permutation: stored column ``j`` belongs to input feature ``input_order[0, j]``, so
            that groups whose features are scattered (GPTQ's activation order) are contiguous here. None: as they come.

    Attributes:
        block_size: ``[1, ..., group_size]`` as elsewhere in torchao; the last entry is -1 per channel.
        in_features, out_features: ``K`` and ``N`` without padding.
        scale_bits: no group scale is above ``2**scale_bits - 1``; up to 4 bits the scale folds into the int8 weight.
        packing_format: ``"plain"`` or ``"tiled"``.
        transposed: whether the tensor stands for the transpose of its stored rows, shape ``[..., K, N]``.
        dtype: the dtype that the tensor claims, and of ``dequantize()``.
        rotation: size of the block Hadamard transform that is applied to the activation before it is quantized; the
            stored weight is already multiplied by it. 0: none.

    Raises:
        CheckpointError: the parts contradict each other.
    """

    tensor_data_names = [name for name in DATA_NAMES if name not in ABSENT]
    tensor_attribute_names = [name for name in ATTRIBUTE_NAMES if name not in ABSENT]
    optional_tensor_data_names = [name for name in DATA_NAMES if name in ABSENT]
    optional_tensor_attribute_names = [name for name in ATTRIBUTE_NAMES if name in ABSENT]

    # TensorParts has the arguments, the class says what they are. Or one tensor, as nn.Parameter takes it.
    def __new__(cls, *args, requires_grad: bool = False, **kwargs):  # noqa: D102
        parts = _parts_of(*args, **kwargs)
        n, k = parts.out_features, parts.in_features
        shape = (*parts.qdata.shape[:-2], *((k, n) if parts.transposed else (n, k)))
        return torch.Tensor._make_wrapper_subclass(
            cls, shape, dtype=parts.dtype, device=parts.qdata.device, requires_grad=requires_grad
        )

    def __init__(self, *args, requires_grad: bool = False, **kwargs):
        super().__init__()
        for name, value in _parts_of(*args, **kwargs)._asdict().items():
            if name != "dtype":
                setattr(self, name, value)

    @property
    def group_scale(self) -> Tensor:
        """Integer group scales ``[..., N, G]``, plain row order."""
        return fmt.untile_rows(self.scale, self.out_features, 1) if self.packing_format == "tiled" else self.scale

    @property
    def row_scale(self) -> Tensor:
        """Float row scales, fp32 ``[..., N, 1]``."""
        return self.per_tensor_scale

    @property
    def activation_scale(self) -> Optional[Tensor]:
        """The static activation scale, fp32 ``[..., 1, 1]``; None where activations are quantized per token."""
        return self.act_pre_scale

    @property
    def group_zero_point(self) -> Optional[Tensor]:
        """Zero points int8 (int16: offsets) ``[..., N, G]``, plain row order; None where the weight is symmetric."""
        if self.zero_point is None or self.packing_format == "plain":
            return self.zero_point
        return fmt.untile_rows(self.zero_point, self.out_features, 1)

    @property
    def data_names(self) -> list[str]:
        """Names of the inner tensors that are there."""
        return self.__tensor_flatten__()[0]

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
        """Unpacked codes, int8 ``[..., N, K]``, in the stored order of columns."""
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
        check_weight(weight, name)
        return construction.quantized(cls, weight, IntScaleConfig() if config is None else config, name)

    @classmethod
    def from_codes(
        cls,
        codes: Tensor,
        group_scale: Tensor,
        *,
        group_size: int,
        zero_point: Optional[Tensor] = None,
        minimum: Optional[Tensor] = None,
        scale_bits: int = 8,
        amplifier: Union[str, int] = "row",
        weight_bits: int = 4,
        dtype: torch.dtype = torch.bfloat16,
        packing_format: str = "auto",
        name: str = "weight",
    ) -> IntScaleTensor:
        """Build a weight from codes that stay as they are and float group scales that become integers.

            W[n, k] = group_scale[n, k // group_size] * (codes[n, k] - zero_point[n, k // group_size])

        Two kinds of group change their codes and not their weights. A group with scale 0 gets codes equal to its zero point
        and scale 1. A group with a negative scale gets ``-codes`` and the positive scale, or, with zero points,
        ``-1 - codes`` and ``-1 - zero_point``, which always fit.

        With ``amplifier="row"`` the row scale is searched: the largest group scale of the row stands for each of the
        32 largest integers in turn, the row scale is fitted to the integers by least squares, and the least
        squared error of the weights is kept. A row whose overflow proof fails is converted again with one bit less.

        Args:
            codes: int8 ``[N, K]`` or ``[E, N, K]`` in [-8, 7]; in [-127, 127] where ``weight_bits`` is 8.
            group_scale: floating point ``[..., N, ceil(K / group_size)]``; ``[..., N, 1]`` per channel.
            group_size: weights that share one scale: 32, 64, 128, 256, or -1 per channel.
            zero_point: integers of the shape of ``group_scale`` in [-8, 7], on the scale of the codes; None: symmetric.
            minimum: floating point of the shape of ``group_scale``, added to ``group_scale * codes``: for groups whose zero
                point is no whole code. It becomes an integer in units of the row scale.
            scale_bits: bits of the integer group scales, 1 to 8. Used with ``amplifier="row"``.
            amplifier: ``"row"``, ``"layer"`` or an integer.
            weight_bits: 4, or 8: per channel and symmetric.
            dtype: the dtype that the tensor claims.
            packing_format: ``"plain"``, ``"tiled"`` or ``"auto"``.
            name: named in error messages.

        Raises:
            ConfigError: an argument that says how has a value that is not supported.
            WeightError: codes, scales or zero points have another shape or dtype, or are out of range; a negative scale
                meets a code of -8 without a zero point.
            OverflowProofError: the accumulator of a row cannot be proved free of overflow.
        """
        check_from_codes(group_size, scale_bits, amplifier, weight_bits, zero_point, minimum)
        how: dict[str, Any] = dict(
            group_size=group_size, scale_bits=scale_bits, amplifier=amplifier, weight_bits=weight_bits
        )
        parts = construction.CodeParts(codes, group_scale, zero_point, minimum)
        return construction.coded(cls, parts, how, dtype, packing_format, name)

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
            zero_point = None if self.zero_point is None else fmt.tile_rows(self.zero_point, 1, 0)
        else:
            qdata = fmt.untile_rows(self.qdata, self.out_features, columns)
            scale, zero_point = self.group_scale, self.group_zero_point
        return self.replaced(qdata=qdata, scale=scale, zero_point=zero_point, packing_format=packing_format)

    def replaced(self, **parts) -> IntScaleTensor:
        """A tensor like this one with some of its data or attributes exchanged."""
        return type(self)(*(parts[name] if name in parts else getattr(self, name) for name in ALL_NAMES))

    def with_activation_scale(self, scale: Union[Tensor, float, None]) -> IntScaleTensor:
        """This weight with a static activation scale: :func:`~.activation_parts.with_activation_scale`."""
        return activation_parts.with_activation_scale(self, scale)

    def with_rotation(self, size: int) -> IntScaleTensor:
        """This weight, marked as rotated: :func:`~.activation_parts.with_rotation`."""
        return activation_parts.with_rotation(self, size)

    def with_input_order(self, order: Optional[Tensor]) -> IntScaleTensor:
        """This weight, its columns marked as ordered: :func:`~.activation_parts.with_input_order`."""
        return activation_parts.with_input_order(self, order)

    def dequantize(self, output_dtype: Optional[torch.dtype] = None) -> Tensor:
        """The weight in floating point, in this tensor's shape; ``output_dtype`` defaults to its dtype.

        It is the weight that multiplies the activation as it comes: a rotation and an input order are undone.
        """
        dtype = self.dtype if output_dtype is None else output_dtype
        arguments = DequantizeWeightArguments(
            qdata=self.qdata,
            scale=self.scale,
            row_scale=self.per_tensor_scale,
            out_features=self.out_features,
            in_features=self.in_features,
            group_size=self.group_size,
            packing=self.packing_format,
            dtype=torch.float32 if self.rotation else dtype,
            zero_point=self.zero_point,
        )
        dense = WEIGHT_OP(*arguments)
        if self.rotation:
            dense = hadamard_transform(dense, self.rotation).to(dtype)
        if self.input_order is not None:
            dense = dense.index_select(-1, self.input_order.view(-1).argsort())
        return dense.transpose(-2, -1) if self.transposed else dense

    def accumulator_bound(self) -> Tensor:
        """Largest magnitude of each row's int32 accumulator over all activations, int64 ``[..., N]``; below 2**31."""
        if self.dim() == 3:  # expert by expert: unpacked codes of a stack are large
            stored = self.transpose(-2, -1) if self.transposed else self
            return torch.stack([expert.accumulator_bound() for expert in stored.unbind(0)])  # type: ignore[attr-defined]
        codes, zero_point = fmt.pad_codes(self.codes, self.in_features, self.group_size), self.group_zero_point
        if fmt.is_offset(zero_point):
            return fmt.accumulator_bound(codes, self.group_scale, zero_point, self.in_features)
        if zero_point is not None:
            centered = fmt.centered_codes(codes, zero_point)[..., : self.in_features]
            codes = fmt.pad_codes(centered, self.in_features, self.group_size)
        return fmt.accumulator_bound(codes, self.group_scale)

    def nbytes_packed(self) -> int:
        """Bytes that codes, scales and zero points take together."""
        return sum(getattr(self, name).nbytes for name in self.data_names)

    def validate(self, name: str = "weight") -> IntScaleTensor:
        """Check stored data as far as it can be checked: shapes, dtypes, ranges, the overflow proof. Reads all of it.

        Raises:
            CheckpointError: naming what is wrong.
        """
        validate_tensor(self, name)
        return self

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        """``F.linear`` of an eager call on a GPU goes the short way; everything else is looked up."""
        table = cls._TORCH_FN_TABLE[cls]
        if torch.compiler.is_compiling():  # Dynamo of torch 2.11 cannot tell whether a property is in torchao's table
            for known, handler in table.items():
                if func is known:
                    return handler(func, types, args, kwargs or {})
        else:
            if func is LINEAR and not kwargs and type(args[1]) is cls:
                y = eager_linear(*args)
                if y is not None:
                    return y
            if func in table:
                return table[func](func, types, args, kwargs or {})
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        """Run ``func`` as ``tensor_ops`` defines it; what is not there has no exact meaning on packed data."""
        if func not in cls._ATEN_OP_TABLE[cls]:
            mend = "use weight.dequantize() first"
            raise UnsupportedOpError(f"IntScaleTensor: {func} is not defined on packed data; {mend}.")
        return super().__torch_dispatch__(func, types, args, kwargs or {})

    def storage(self) -> Any:
        """Not there: the data are in the inner tensors.

        Raises:
            CheckpointError: always. ``safetensors.torch.save_file`` asks for it.
        """
        raise CheckpointError(
            "a quantized weight has no storage of its own, so safetensors cannot write it: use intscale_compile.save_safetensors("
            "model, path), or save_pretrained(model, folder) for a model of transformers."
        )

    def __deepcopy__(self, memo) -> IntScaleTensor:
        """A copy that owns its data: a row slice of a merged weight would take the whole of it along."""
        for name in self.data_names:
            part = getattr(self, name)
            if part.untyped_storage().nbytes() != part.nbytes:
                memo.setdefault(id(part), part.clone())
        return super().__deepcopy__(memo)

    def __tensor_flatten__(self):
        """Names of the inner tensors and the attributes, collected once: nothing changes an attribute of a tensor.

        Dynamo may ask at every call of a compiled model (see ``weight_guards``), and ``dtype`` alone costs some microseconds
        through ``__torch_function__``.
        """
        flat = self.__dict__.get("_flat")
        if flat is None:
            attributes = {name: getattr(self, name) for name in ATTRIBUTE_NAMES}
            present = [name for name in DATA_NAMES if getattr(self, name) is not None]
            # Dynamo guards attributes, and a graph holds for certain parts only. Their shapes follow from the rest.
            attributes["data"] = " ".join(f"{name}:{getattr(self, name).dtype}" for name in present)
            flat = self.__dict__["_flat"] = (present, attributes)
        return flat

    def __getstate__(self) -> dict:
        """What is stored: without what is kept beside the parts and follows from them; with the format version."""
        state = {name: value for name, value in self.__dict__.items() if name not in KEPT}
        return {**state, "_format_version": fmt.VERSION}

    def _stable_hash_for_caching(self) -> str:
        """What AOTAutograd's cache knows of this tensor. Its key is made of the graph that Dynamo made, in which no op of ours is
        yet that carries the number of our sources, so the number is here too.
        """
        parts = [(n, tuple(getattr(self, n).shape), str(getattr(self, n).dtype)) for n in self.data_names]
        attributes = [(n, str(getattr(self, n))) for n in ATTRIBUTE_NAMES]
        return f"IntScaleTensor{parts}{attributes}{self.device}{KERNEL_ABI}"

    def __repr__(self, *, tensor_contents=None) -> str:
        group = "per channel" if self.group_size == -1 else f"group_size={self.group_size}"
        flag = ", transposed" if self.transposed else ""
        flag += ", asymmetric" if self.zero_point is not None else ""
        flag += ", static activation scale" if self.act_pre_scale is not None else ""
        flag += ", input order" if self.input_order is not None else ""
        flag += f", rotation={self.rotation}" if self.rotation else ""
        return (
            f"IntScaleTensor(shape={tuple(self.shape)}, int{self.weight_bits}, {group}, scale_bits={self.scale_bits}, "
            f"{self.packing_format}{flag}, dtype={self.dtype}, device={self.device})"
        )

    def _set_checked_state(self, state) -> None:
        """Unpickling, also by ``torch.load``: the stored parts are checked."""
        with reading("a stored IntScaleTensor"):
            torch._utils._set_obj_state(self, state)
        for name in KEPT:  # never from a file: nothing would check it
            self.__dict__.pop(name, None)
        drop_old_parts(self.__dict__)
        version = self.__dict__.pop("_format_version", 1)  # version 0.1.0 stored none
        if type(version) is not int or not 1 <= version <= fmt.VERSION:
            raise CheckpointError(
                f"a stored IntScaleTensor has format version {version!r}; this release reads versions up to {fmt.VERSION}: "
                "install a newer intscale_compile."
            )
        self.__dict__.update({**ABSENT, **self.__dict__})  # ABSENT: files from before these parts existed
        missing = [n for n in (*self.tensor_data_names, *self.tensor_attribute_names) if not hasattr(self, n)]
        if missing:
            raise CheckpointError(f"stored IntScaleTensor lacks {missing}: a truncated file, or of another version.")
        self.validate()


leave_to_python(IntScaleTensor.__torch_function__.__func__)  # type: ignore[attr-defined]
check_unpickled(IntScaleTensor, IntScaleTensor._set_checked_state)
# torch pickles classes by module and name: the public path keeps files readable when modules move.
IntScaleTensor.__module__ = "intscale_compile"


def _parts_of(*args, **kwargs) -> TensorParts:
    """What a tensor is made of: given by itself, or as those of another (accelerate writes ``type(weight)(weight)``)."""
    if len(args) == 1 and not kwargs and isinstance(args[0], IntScaleTensor):
        return TensorParts(**{name: getattr(args[0], name) for name in ALL_NAMES})
    return TensorParts(*args, **kwargs)
