"""Parameters that several names share are stored once, under the first of them; the file's metadata says which names share.

    {"tied_names": {name: the name that its tensor is stored under}}

Metadata is covered by a digest, so a changed table is noticed. Buffers that share memory are stored once for each name.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Any, Optional

from torch import Tensor, nn

from ..errors import CheckpointError
from ..tensors.fields import ATTRIBUTE_NAMES, DATA_NAMES
from ..tensors.intscale_tensor import IntScaleTensor
from ..tensors.stored_files import parse_json
from .integrity import MEND, stored_key

TIES = "tied_names"  # names of tensors have a dot


def shared_names(state: Mapping[str, Tensor], among: Optional[Collection[str]] = None) -> dict[str, str]:
    """Names whose tensor lies under an earlier name already, with that name.

    Args:
        state: a state dict.
        among: names that may share; by default those of each ``IntScaleTensor``.
    """
    first: dict[tuple, str] = {}
    ties: dict[str, str] = {}
    for name, tensor in state.items():
        quantized = isinstance(tensor, IntScaleTensor)
        if not (quantized if among is None else name in among) or tensor.numel() == 0:
            continue
        attributes = [str(getattr(tensor, attribute)) for attribute in ATTRIBUTE_NAMES] if quantized else []
        parts = (
            [getattr(tensor, part) for part in tensor.data_names] if isinstance(tensor, IntScaleTensor) else [tensor]
        )
        stored = first.setdefault((*attributes, *map(_memory, parts)), name)
        if stored != name:
            ties[name] = stored
    return ties


def _memory(tensor: Tensor) -> tuple:
    return tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride(), str(tensor.device)


def store_once(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str], ties: Mapping[str, str]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What torchao made of a state dict, tensors by key and headers by name, without what ``ties`` finds elsewhere."""
    if not ties:
        return dict(tensors), dict(metadata)
    keys = {key for name in ties for key in (name, *(stored_key(name, part) for part in DATA_NAMES))}
    left = {name: text for name, text in metadata.items() if name not in ties}
    left["tensor_names"] = json.dumps([name for name in json.loads(metadata["tensor_names"]) if name not in ties])
    left[TIES] = json.dumps(dict(ties), sort_keys=True)
    return {key: tensor for key, tensor in tensors.items() if key not in keys}, left


def read_ties(metadata: Mapping[str, str], names: Collection[str], where: object) -> dict[str, str]:
    """The table of tied names of a file; empty where it has none.

    Args:
        metadata: of the file.
        names: of the tensors that are stored.
        where: the file, for messages.

    Raises:
        CheckpointError: it is damaged, or names tensors that are not stored.
    """
    if TIES not in metadata:
        return {}
    ties: Any = parse_json(metadata[TIES], f"{where}: the table of its tied names")
    good = isinstance(ties, dict) and all(isinstance(stored, str) for stored in ties.values())
    if not good or any(stored not in names or name in names or "." not in name for name, stored in ties.items()):
        raise CheckpointError(f"{where}: the table of its tied names in the header is damaged; {MEND}.")
    return ties


def tie(state: dict[str, Tensor], ties: Mapping[str, str]) -> None:
    """Add the tied names to a state dict: one parameter for all names, so that ``load_state_dict(assign=True)`` ties them."""
    for name, stored in ties.items():
        name, stored = name.removeprefix("."), stored.removeprefix(".")
        if not isinstance(state[stored], nn.Parameter):
            state[stored] = nn.Parameter(state[stored], requires_grad=False)
        state[name] = state[stored]
