"""Shards of a quantized weight: output rows, or input features cut at group boundaries. Nothing is dequantized.

    rows:      codes, group scales, zero points and row scales of the rows
    features:  codes of the features, scales and zero points of their groups; every shard keeps all row scales

With a static activation scale the int32 accumulators of the feature shards add up to that of the whole weight, bit for bit.
Activations that are quantized per token get a token scale for each shard, from the features that the shard sees.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import format as fmt
from ..errors import ShardingError
from ..tensors.activation_parts import PER_WEIGHT
from ..tensors.intscale_tensor import IntScaleTensor
from ..tensors.operators import concatenate, stored_dim

PER_GROUP = ("scale", "zero_point")


@dataclass(frozen=True)
class Layout:
    """How the parts of a stored weight lie, without its data.

    Attributes:
        name: the weight's name for error messages.
        in_features, out_features, group_size, weight_bits, packing_format, rotation: as of ``IntScaleTensor``.
        ordered: whether the weight has an input order.
    """

    name: str
    in_features: int
    out_features: int
    group_size: int
    weight_bits: int
    packing_format: str
    rotation: int = 0
    ordered: bool = False

    @classmethod
    def of(cls, weight: IntScaleTensor, name: str = "weight") -> Layout:
        """The layout of a weight."""
        return cls(
            name, weight.in_features, weight.out_features, weight.group_size, weight.weight_bits,
            weight.packing_format, weight.rotation, weight.input_order is not None,
        )  # fmt: skip

    @property
    def codes_per_column(self) -> int:
        """Codes in one entry of ``qdata``."""
        return 1 if self.weight_bits == 8 else 2

    def check_features(self, start: int, end: int) -> None:
        """Raise ``ShardingError`` unless the weight can be cut to the input features ``start`` to ``end``."""
        whole = self.in_features
        if not 0 <= start < end <= whole:
            raise ShardingError(
                f"{self.name}: input features {start}:{end} of {whole} are no shard: use fewer ranks than there are groups."
            )
        edges = [edge for edge in (start, end) if edge not in (0, whole)]
        if edges and self.ordered:
            raise ShardingError(
                f"{self.name}: it has an input order, so the features {start}:{end} of its activation are scattered over its "
                "groups: divide its rows (colwise) or keep it whole (replicate), or quantize it without activation order."
            )
        if any(self.rotation and edge % self.rotation for edge in edges):
            raise ShardingError(
                f"{self.name}: input features {start}:{end} cut through a block of its rotation of {self.rotation}: use a "
                f"number of ranks that leaves each a multiple of {self.rotation} features, or calibrate with smaller blocks."
            )
        if self.group_size != -1 and any(edge % self.group_size for edge in edges):
            raise ShardingError(
                f"{self.name}: input features {start}:{end} of {whole} cut through a group of {self.group_size} weights, which "
                f"has one scale. Quantize this weight with {_mend(edges, self.group_size)}, or use another number of ranks."
            )

    def columns(self, part: str, start: int, end: int) -> tuple[int, int]:
        """Columns of a part in plain packing that hold the features ``start`` to ``end``, and maybe more on both sides."""
        if part == "qdata":
            block = fmt.pack_block(self.group_size)
            first, last = start // block * block, -(-end // block) * block
            if end == self.in_features:
                last = fmt.padded_in_features(end, self.group_size)
            return first // self.codes_per_column, last // self.codes_per_column
        if part in PER_GROUP and self.group_size != -1:
            last = (
                fmt.num_groups(self.in_features, self.group_size)
                if end == self.in_features
                else -(-end // self.group_size)
            )
            return start // self.group_size, last
        return 0, 1

    def cut(self, part: str, covering: Tensor, start: int, end: int) -> Tensor:
        """The part of a weight of the features ``start`` to ``end``, padded, from its :meth:`columns`; a view where it can be."""
        if part == "qdata":
            return self._cut_codes(covering, start, end)
        if part in PER_GROUP and self.group_size != -1:
            wanted = fmt.num_groups(end - start, self.group_size)
            if wanted <= covering.shape[-1]:
                return covering[..., :wanted]
            fill = 0 if part == "zero_point" else 1
            return torch.nn.functional.pad(covering, (0, wanted - covering.shape[-1]), value=fill)
        return covering

    def _cut_codes(self, covering: Tensor, start: int, end: int) -> Tensor:
        block = fmt.pack_block(self.group_size)
        padded = fmt.padded_in_features(end - start, self.group_size)
        if start % block == 0 and (end % block == 0 or end == self.in_features):
            return covering[..., : padded // self.codes_per_column]
        codes = covering if self.weight_bits == 8 else fmt.unpack_int4(covering, self.group_size)
        first = start - start // block * block
        codes = fmt.pad_codes(codes[..., first : first + end - start], end - start, self.group_size)
        return codes if self.weight_bits == 8 else fmt.pack_int4(codes, self.group_size)


def _mend(edges: Sequence[int], group_size: int) -> str:
    fits = [g for g in (128, 64, 32) if g < group_size and all(edge % g == 0 for edge in edges)]
    return f"group_size={fits[0]}" if fits else "group_size=-1 (one scale for each row)"


def shard_features(weight: IntScaleTensor, start: int, end: int, name: str = "weight") -> IntScaleTensor:
    """The input features ``start`` to ``end`` of a weight ``[N, K]`` or a stack ``[E, N, K]`` of either orientation.

    Tiled weights give tiled shards. Where the cut lies within a block of packed codes, these are packed anew.

    Raises:
        ShardingError: the shard would cut a group of weights or a block of the rotation; the weight has an input order.
    """
    layout = Layout.of(weight, name)
    layout.check_features(start, end)
    plain = weight.to_packing("plain")
    parts = {}
    for part in plain.data_names:
        first, last = layout.columns(part, start, end)
        parts[part] = layout.cut(part, getattr(plain, part)[..., first:last], start, end)
    return plain.replaced(**parts, in_features=end - start).to_packing(weight.packing_format)


def shard_rows(weight: IntScaleTensor, rows: Sequence[tuple[int, int]], name: str = "weight") -> IntScaleTensor:
    """Output rows of a weight or a stack: those of the given ranges, one range after another.

    Raises:
        ShardingError: a range is empty or outside of the weight.
    """
    if any(not 0 <= start < end <= weight.out_features for start, end in rows):
        raise ShardingError(
            f"{name}: rows {list(rows)} of {weight.out_features} are no shard: use fewer ranks than there are rows."
        )
    plain = weight.to_packing("plain")
    parts = {
        part: torch.cat([getattr(plain, part)[..., start:end, :] for start, end in rows], dim=-2)
        for part in plain.data_names
        if part not in PER_WEIGHT
    }
    count = sum(end - start for start, end in rows)
    return plain.replaced(**parts, out_features=count).to_packing(weight.packing_format)


def chunk(size: int, index: int, count: int, what: str = "weight") -> tuple[int, int]:
    """Range of chunk ``index`` when ``size`` entries are divided among ``count`` ranks.

    Raises:
        ShardingError: they cannot be divided evenly.
    """
    if size % count:
        raise ShardingError(
            f"{what}: {size} features cannot be divided evenly among {count} ranks: use another number."
        )
    return index * size // count, (index + 1) * size // count


def shard(
    weight: IntScaleTensor, dim: int, index: int, count: int, *, packed: int = 1, name: str = "weight"
) -> IntScaleTensor:
    """Shard ``index`` of ``count`` equal ones of a quantized weight, with memory of its own.

    Args:
        weight: ``[N, K]`` or a stack ``[E, N, K]``; or transposed, then ``dim`` counts as the tensor's shape shows it.
        dim: dimension to divide; along 0 of a stack each shard gets some of the experts.
        index: which shard.
        count: number of shards.
        packed: how many projections lie one after another in the rows (2: gate and up in one weight). Each is divided.
        name: the weight's name, for error messages.

    Raises:
        ShardingError: the dimension cannot be divided evenly, or a shard would cut a group of weights.
    """
    stored = stored_dim(weight, dim)
    if stored == weight.dim() - 1:
        part = shard_features(weight, *chunk(weight.in_features, index, count, name), name)
    elif stored == weight.dim() - 2:
        whole, rest = divmod(weight.out_features, packed)
        if rest:
            raise ShardingError(f"{name}: {weight.out_features} rows do not hold {packed} projections of one size.")
        start, end = chunk(whole, index, count, name)
        part = shard_rows(weight, [(i * whole + start, i * whole + end) for i in range(packed)], name)
    else:
        start, end = chunk(weight.shape[0], index, count, name)
        part = weight.replaced(**{n: getattr(weight, n)[start:end] for n in weight.data_names})
    return part.replaced(**{n: owned(getattr(part, n)) for n in part.data_names})


def unshard(shards: Sequence[IntScaleTensor], dim: int, *, packed: int = 1, name: str = "weight") -> IntScaleTensor:
    """The weight that :func:`shard` divided, from all of its shards in order: the same bits.

    Args:
        shards, dim, packed, name: as :func:`shard` gives and takes them.

    Raises:
        ShardingError: feature shards with different row scales: each was quantized by itself.
    """
    first = shards[0]
    stored = stored_dim(first, dim)
    if stored == first.dim() - 1:
        return _join_features(shards, name)
    if stored < first.dim() - 2:
        return torch.cat(list(shards), dim=dim)  # type: ignore[return-value]
    if packed > 1:
        size = first.out_features // packed
        shards = [shard_rows(s, [(i * size, i * size + size)], name) for i in range(packed) for s in shards]
    return concatenate(list(shards), stored).to_packing(first.packing_format)


def shared_parts(weight: IntScaleTensor) -> list[str]:
    """Names of the parts that shards of input features have in common."""
    per_row = ("per_tensor_scale", *(PER_GROUP if weight.group_size == -1 else ()), *PER_WEIGHT)
    return [name for name in weight.data_names if name in per_row]


def _join_features(shards: Sequence[IntScaleTensor], name: str) -> IntScaleTensor:
    """Codes, group scales and zero points one after another, packed and padded anew."""
    first = shards[0].to_packing("plain")
    if any(not torch.equal(getattr(s, n), getattr(shards[0], n)) for n in shared_parts(first) for s in shards[1:]):
        raise ShardingError(
            f"{name}: its shards have different row scales, so each was quantized by itself: they cannot be joined."
        )
    features, group = sum(s.in_features for s in shards), first.group_size
    codes = fmt.pad_codes(torch.cat([s.codes for s in shards], dim=-1), features, group)
    parts = {"qdata": codes if first.weight_bits == 8 else fmt.pack_int4(codes, group)}
    for part, whole in (("scale", "group_scale"), ("zero_point", "group_zero_point")):
        if getattr(first, part) is None or group == -1:
            continue
        real = torch.cat([getattr(s, whole)[..., : -(-s.in_features // group)] for s in shards], dim=-1)
        missing = fmt.num_groups(features, group) - real.shape[-1]
        parts[part] = torch.nn.functional.pad(real, (0, missing), value=1 if part == "scale" else 0)
    return first.replaced(**parts, in_features=features).to_packing(shards[0].packing_format)


def owned(part: Tensor) -> Tensor:
    """``part``, contiguous and in memory of its own: a view would keep the whole weight alive."""
    return part.clone(memory_format=torch.contiguous_format) if part._is_view() or not part.is_contiguous() else part
