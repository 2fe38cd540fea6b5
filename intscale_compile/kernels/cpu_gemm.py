"""The int32 accumulator on a CPU: oneDNN's int8 product over weights that are unpacked once and kept as int8; of single
tokens a kernel that reads the packed weight (:mod:`~.few_tokens`), where the processor has the instructions for it.

A weight costs one more byte per code while it is in use on a CPU. `benchmarks/cpu.py` compares with fp32. It is unpacked anew
when an exchanged part, an address, a version or a sample of its memory says that it changed (:mod:`~.fingerprint`); after a
write to single rows or elements that PyTorch does not count, call ``intscale_compile.refresh(model)``.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import NamedTuple, Optional

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from .. import format as fmt
from .dequantize import unpack_offset, unpack_weight
from .few_tokens import MOST_TOKENS, accumulate_few
from .fingerprint import sample_of, state_of

_unpacked: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def forget(qdata: Tensor) -> None:
    """Drop what was unpacked from the memory of ``qdata``: views of one weight have version counters of their own."""
    if type(qdata) is Tensor and qdata.device.type == "cpu":
        memory = qdata.untyped_storage().data_ptr()
        for kept in [key for key in _unpacked if key.untyped_storage().data_ptr() == memory]:
            del _unpacked[kept]


def forget_all() -> None:
    """Drop everything that was unpacked."""
    _unpacked.clear()


class Matrix(NamedTuple):
    """An unpacked weight: int8 ``[N, Kp]``, group scales ``[N, G]``, offsets int16 ``[N, G]`` or None."""

    codes: Tensor
    scale: Tensor
    offset: Optional[Tensor]


@functools.lru_cache(maxsize=1)
def int8_product_is_exact() -> bool:
    """Whether this CPU's ``torch._int_mm`` is exact at the extremes (older int8 instructions saturate at 16 bits)."""
    x = torch.full((2, 256), -127, dtype=torch.int8)
    w = torch.full((64, 256), -120, dtype=torch.int8)
    return bool((torch._int_mm(x, w.t()) == 127 * 120 * 256).all()) and bool(
        (torch._int_mm(x, -w.t()) == -127 * 120 * 256).all()
    )


FLOAT_TERMS = 1024  # fp32 holds sums of so many products of two int8 numbers exactly: 1024 * 128 * 128 = 2 ** 24


@functools.lru_cache(maxsize=1)
def float_product_is_faster() -> bool:
    """Whether products of many tokens are faster in fp32: ``torch._int_mm`` is slow without int8 instructions.

    Read once, on 32 tokens; either product is exact, so the choice changes no result.
    """
    x = torch.ones((32, 512), dtype=torch.int8)
    w = torch.ones((256, 512), dtype=torch.int8)

    def seconds(product: Callable[[Tensor, Tensor], Tensor]) -> float:
        start = time.perf_counter()
        product(x, w)
        return time.perf_counter() - start

    def shortest(product: Callable[[Tensor, Tensor], Tensor]) -> float:
        return min(seconds(product) for _ in range(5))  # other processes may take the processor for a while

    return 2 * shortest(_float_product) < shortest(lambda x, w: torch._int_mm(x, w.t()))


def _int8_product(x: Tensor, weight: Tensor) -> Tensor:
    """``x @ weight.T`` of int8 ``[M, K]`` and int8 ``[N, K]``, exact, int32 ``[M, N]``."""
    if int8_product_is_exact() and (x.shape[0] <= MOST_TOKENS or not float_product_is_faster()):
        return torch._int_mm(x, weight.t())
    return _float_product(x, weight)


def _float_product(x: Tensor, weight: Tensor) -> Tensor:
    """:func:`_int8_product` by sums of fp32 that are short enough to be exact."""
    acc = torch.zeros((x.shape[0], weight.shape[0]), dtype=torch.int32)
    with torch.autocast("cpu", enabled=False):  # it would round the sums
        for a, b in zip(x.split(FLOAT_TERMS, 1), weight.split(FLOAT_TERMS, 1)):
            acc += (a.float() @ b.float().t()).to(torch.int32)
    return acc


def _int8_weight(
    qdata: Tensor, scale: Tensor, zero_point: Optional[Tensor], out_features: int, group_size: int, packing: str, fold: bool
) -> Matrix:  # fmt: skip
    """Codes less zero points (times scales where they fold) as int8 ``[N, Kp]``, plain group scales and offsets."""
    codes, plain_scale = unpack_weight(qdata, scale, out_features, group_size, packing, zero_point)
    if fold:
        codes = codes * fmt.expand_group_scale(plain_scale, codes.shape[-1]).to(torch.int8)
    return Matrix(codes.contiguous(), plain_scale, unpack_offset(zero_point, out_features, packing))


class _Unpacked:
    """Unpacked matrices by expert, and the state of the weight that they are of: no reference to its codes."""

    __slots__ = ("_others", "_states", "_samples", "_fold", "matrices")

    def __init__(self, qdata: Tensor, scale: Tensor, zero_point: Optional[Tensor], fold: bool):
        self.matrices: dict[int, Matrix] = {}
        self._others, self._fold = (scale, zero_point), fold
        self._states = _states(qdata, scale, zero_point)
        parts = (qdata, scale) if zero_point is None else (qdata, scale, zero_point)
        self._samples = [sample for part in parts if (sample := sample_of(part)) is not None]

    def of(self, qdata: Tensor, scale: Tensor, zero_point: Optional[Tensor], fold: bool) -> bool:
        """Whether this is the weight, with the values that it had."""
        return (
            self._others[0] is scale
            and self._others[1] is zero_point
            and self._fold == fold
            and self._states == _states(qdata, scale, zero_point)
            and all([sample.same() for sample in self._samples])
        )


def _states(qdata: Tensor, scale: Tensor, zero_point: Optional[Tensor]) -> tuple:
    return state_of(qdata), state_of(scale), None if zero_point is None else state_of(zero_point)


def _kept_weight(
    qdata: Tensor, scale: Tensor, zero_point: Optional[Tensor], expert: int, out_features: int, group_size: int, packing: str,
    fold: bool,
) -> Matrix:  # fmt: skip
    """:func:`_int8_weight` of a matrix, or of one expert of a stack; unpacked at the first call, and when it changed."""
    matrix = (qdata, scale, zero_point)
    if qdata.dim() == 3:
        matrix = (qdata[expert], scale[expert], None if zero_point is None else zero_point[expert])
    if qdata.dtype == torch.int8 and packing == "plain":  # ready for use; to keep it here would keep it alive for ever
        return _int8_weight(*matrix, out_features, group_size, packing, fold)
    kept = _unpacked.get(qdata)
    if kept is None or not kept.of(qdata, scale, zero_point, fold):
        kept = _unpacked[qdata] = _Unpacked(qdata, scale, zero_point, fold)
    if expert not in kept.matrices:
        kept.matrices[expert] = _int8_weight(*matrix, out_features, group_size, packing, fold)
    return kept.matrices[expert]


def accumulate_cpu(
    xq: Tensor, qdata: Tensor, scale: Tensor, out_features: int, group_size: int, scale_bits: int, packing: str,
    zero_point: Optional[Tensor] = None,
) -> Tensor:  # fmt: skip
    """The accumulator of ``w4a8_linear``: int8 ``[..., K]`` to int32 ``[..., N]``, exact."""
    x = xq.reshape(-1, xq.shape[-1])
    if x.shape[0] == 0:
        return xq.new_empty((*xq.shape[:-1], out_features), dtype=torch.int32)
    acc = accumulate_expert_cpu(x, qdata, scale, 0, out_features, group_size, scale_bits, packing, zero_point)
    return acc.view(*xq.shape[:-1], out_features)


def accumulate_expert_cpu(
    x: Tensor, qdata: Tensor, scale: Tensor, expert: int, out_features: int, group_size: int, scale_bits: int, packing: str,
    zero_point: Optional[Tensor] = None,
) -> Tensor:  # fmt: skip
    """The accumulator of a matrix, or of one expert of a stack: int8 ``[M, K]`` to int32 ``[M, N]``, exact, M > 0."""
    if x.shape[0] <= MOST_TOKENS and packing == "plain" and zero_point is None:
        parts = (qdata, scale) if qdata.dim() == 2 else (qdata[expert], scale[expert])
        acc = accumulate_few(x, *parts, group_size)
        if acc is not None:
            return acc
    fold = fmt.schedule_bits(scale_bits, zero_point is not None) <= 4 and qdata.dtype == torch.uint8
    return _product(
        x, _kept_weight(qdata, scale, zero_point, expert, out_features, group_size, packing, fold), group_size, fold
    )


def _product(x: Tensor, matrix: Matrix, group_size: int, fold: bool) -> Tensor:
    """Accumulator int32 ``[M, N]`` of int8 ``[M, K]`` and an unpacked weight ``[N, Kp]``."""
    (weight, plain_scale, offset), in_features = matrix, x.shape[1]
    if fold:
        return _int8_product(x, weight[:, :in_features])
    if group_size == -1:
        acc, factors = _int8_product(x, weight[:, :in_features]), plain_scale.view(-1)
        return acc if bool((factors == 1).all()) else acc.mul_(factors.to(torch.int32))
    acc = x.new_zeros((x.shape[0], weight.shape[0]), dtype=torch.int32)
    for g in range(plain_scale.shape[-1]):
        part = slice(g * group_size, min((g + 1) * group_size, in_features))
        if part.start < in_features:
            acc.addcmul_(_int8_product(x[:, part], weight[:, part]), plain_scale[:, g].to(torch.int32))
    return acc if offset is None else acc - _offset_product(x, offset, group_size)


def _offset_product(x: Tensor, offset: Tensor, group_size: int) -> Tensor:
    """``sum_g offset[n, g] * sum_{k in g} x[m, k]``, int32 ``[M, N]``: float64 holds it exactly."""
    padded = torch.nn.functional.pad(x, (0, offset.shape[1] * group_size - x.shape[1]))
    sums = padded.unflatten(1, (-1, group_size)).sum(-1, dtype=torch.int32)
    return (sums.double() @ offset.double().t()).to(torch.int64).to(torch.int32)
