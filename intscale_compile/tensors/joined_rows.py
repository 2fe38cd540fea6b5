"""Weights whose output rows are joined without a second copy: the sources become row slices of the joined tensors.

A row slice of a contiguous matrix is contiguous, and tiled packing keeps 64 rows together, so each source stays a weight of
its own: same values, same packing, other memory. A write through a source is a write to the joined weight.
"""

from __future__ import annotations

import itertools
import logging
import weakref
from collections import Counter
from collections.abc import Sequence
from typing import Optional

import torch
from torch import Tensor

from .. import format as fmt
from ..integrations.torch import storage_use_count
from ..kernels.cpu_gemm import forget
from ..reasons import log_once
from .activation_parts import PER_WEIGHT, same_part
from .intscale_tensor import IntScaleTensor

SLICES = "_intscale_slices"  # attribute of a joined tensor: weak references to the row slices that we gave to weights
ALIGNMENT = 16  # bytes; GPU kernels are compiled for inputs that are aligned so


def joined_in_place(tensors: Sequence[IntScaleTensor]) -> Optional[IntScaleTensor]:
    """Several weights ``[N_i, K]`` as one ``[sum N_i, K]`` that shares their memory, or None where that cannot be.

    Replaces the inner tensors of the sources by row slices of the joined ones, unless they are that already; their
    former memory is then free. Reads through any other alias of that memory would miss later updates, so a weight that
    has one is not touched. The result is never transposed, whatever the sources are.
    """
    names = [name for name in tensors[0].data_names if name not in PER_WEIGHT]
    columns = {name: [getattr(t, name) for t in tensors] for name in names}
    obstacle = _obstacle(tensors, columns)
    if obstacle is None:
        with torch.no_grad(), torch.inference_mode(False):  # inference tensors could not be written to later
            found = {name: _adjacent(parts) for name, parts in columns.items()}
            moves = any(base is None for base in found.values())
            if moves:
                for qdata in columns["qdata"]:
                    forget(qdata)  # what a CPU unpacked may share memory with the scales
            if moves and not all(map(_sole_holders, columns.values())):
                obstacle = "another tensor shares memory with one of them"
            else:
                data = {name: _joined(name, tensors, parts, found[name]) for name, parts in columns.items()}
    if obstacle is not None:
        log_once(logging.INFO, f"merged weights are kept twice, joined and apart: {obstacle}.")
        return None
    return tensors[0].replaced(
        **data,
        out_features=sum(t.out_features for t in tensors),
        scale_bits=max(t.scale_bits for t in tensors),
        transposed=False,
    )


def _obstacle(tensors: Sequence[IntScaleTensor], columns: dict[str, list[Tensor]]) -> Optional[str]:
    first = tensors[0]
    if any(t.data_names != first.data_names or t.rotation != first.rotation for t in tensors):
        return "their formats differ"
    if any(not same_part(t, first, "act_pre_scale") for t in tensors[1:]):
        return "they have static activation scales of their own"
    if any(not same_part(t, first, "input_order") for t in tensors[1:]):
        return "they have input orders of their own"
    parts = [part for column in columns.values() for part in column]
    if any(type(part) is not Tensor for part in parts):
        return "their data are not plain tensors"
    if len({id(part) for part in parts}) < len(parts):
        return "one of them is there twice"
    if any(t.packing_format != first.packing_format or t.scale.dtype != first.scale.dtype for t in tensors):
        return "their formats differ"
    if first.packing_format == "tiled" and any(t.out_features % fmt.TILE_N for t in tensors[:-1]):
        return f"{[t.out_features for t in tensors]} output features are not whole tiles of {fmt.TILE_N}"
    if not all(part.is_contiguous() for part in parts):
        return "their rows are not contiguous"
    if first.device.type != "cpu" and any(p.nbytes % ALIGNMENT for column in columns.values() for p in column[:-1]):
        return f"their rows would not begin at multiples of {ALIGNMENT} bytes"
    return None


def _adjacent(parts: list[Tensor]) -> Optional[Tensor]:
    """The tensor whose consecutive rows ``parts`` are, if they lie one after another in one piece of memory."""
    first = parts[0]
    offset = first.storage_offset()
    for part in parts:
        if part.untyped_storage().data_ptr() != first.untyped_storage().data_ptr() or part.storage_offset() != offset:
            return None
        offset += part.numel()
    shape = (sum(part.shape[0] for part in parts), first.shape[1])
    base = first._base
    if base is not None and base.shape == shape:  # the same object each time: a CPU keeps unpacked weights by object
        return base
    return first.as_strided(shape, (first.shape[1], 1), first.storage_offset())


def _sole_holders(parts: list[Tensor]) -> bool:
    """Whether nothing that lives uses the memory of ``parts`` but they, so that they may move together."""
    mine = {id(part) for part in parts}
    unknown = []
    for part in parts:
        slices = getattr(part._base, SLICES, None)
        if slices is None:
            unknown.append(part.untyped_storage())
        elif any(s is not None and id(s) not in mine for s in (ref() for ref in slices)):
            return False
    holders = Counter(storage._cdata for storage in unknown)
    # Every tensor holds its storage once, and so does the Python object of the storage that ``unknown`` has.
    return all(storage_use_count(memory) == count + 1 for memory, count in holders.items())


def _joined(name: str, tensors: Sequence[IntScaleTensor], parts: list[Tensor], found: Optional[Tensor]) -> Tensor:
    """Join one inner tensor of all sources and hand each its rows; ``found`` where they lie in one piece already."""
    joined = torch.cat(parts) if found is None else found
    root = joined if joined._base is None else joined._base
    if found is None or any(part._base is not root for part in parts):  # one version counter for all
        ends = itertools.accumulate(part.shape[0] for part in parts)
        slices = [joined[end - part.shape[0] : end] for part, end in zip(parts, ends)]
        for tensor, part, rows in zip(tensors, parts, slices):
            setattr(tensor, name, rows)
            if not part.is_inference():
                # Dynamo holds the former tensor until it has compiled: let go of the memory behind it.
                part.set_(rows.untyped_storage(), rows.storage_offset(), rows.shape, rows.stride())
        setattr(slices[0]._base, SLICES, [weakref.ref(rows) for rows in slices])
    return joined
