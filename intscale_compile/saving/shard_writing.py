"""Saving models that are divided among ranks: gathered to one whole state dict, or shard by shard.

    state = tensor_parallel.gather_shards(model)     # on rank 0 what the model was before it was divided, to the bit
    save_safetensors(model, path)                    # called by every rank; rank 0 writes an ordinary file
    tensor_parallel.save_shards(model, folder)       # torch.distributed.checkpoint: each rank writes what it has
    tensor_parallel.load_shards(model, folder)       # into a model divided in the same way

Works for models of ``tensor_parallel.parallelize`` and for DTensors (``parallelize_module``, transformers' ``tp_plan``).
Nothing is dequantized.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .. import format as fmt
from ..errors import CheckpointError, ShardingError
from ..integrations.torch import is_dtensor, local_tensor
from ..parallel.sharding import shared_parts, unshard
from ..tensors.activation_parts import PER_WEIGHT
from ..tensors.fields import ATTRIBUTE_NAMES
from ..tensors.intscale_tensor import IntScaleTensor
from ..tensors.operators import stored_dim
from ..tensors.stored_files import parse_json
from ..versions import __version__
from .integrity import ENTRY, MEND, tensor_digest, text_digest
from .verifying import read_index, records_of_ranks

RECORD = "_intscale_divided"  # attribute of a module that ``parallelize`` divided: a list of ``Divided``
NOT_STORED = ("packing_format",)  # attributes in which a stored shard may differ from the model's


@dataclass(frozen=True)
class Cut:
    """How one tensor is divided.

    Attributes:
        group: the process group that holds its shards.
        dim: dimension that is divided.
        packed: how many projections lie one after another in it.
        copies: how many ranks in a row hold one and the same shard.
    """

    group: Any
    dim: int
    packed: int = 1
    copies: int = 1

    @property
    def index(self) -> int:
        """Which shard this rank has."""
        return self.group.rank() // self.copies

    @property
    def count(self) -> int:
        """Number of different shards."""
        return self.group.size() // self.copies


@dataclass(frozen=True)
class Divided:
    """What ``parallelize`` did below a module.

    Attributes:
        cuts: by name from that module on.
        first_only: names of biases that only the first rank of the group still has.
    """

    cuts: dict[str, Cut]
    first_only: tuple[str, ...]

    def __deepcopy__(self, memo: dict) -> Divided:
        return self  # process groups cannot be copied


def cuts_of(model: nn.Module) -> dict[str, Cut]:
    """The tensors of a model's state dict that are divided among ranks, and how; empty for a whole model.

    Raises:
        ShardingError: a DTensor is divided along several dimensions of its mesh, or holds partial sums; or transformers read
            a checkpoint that was not quantized, and each rank quantized the shard that it read.
    """
    cuts = {
        f"{prefix}.{name}" if prefix else name: cut
        for prefix, module in model.named_modules()
        for record in module.__dict__.get(RECORD, ())
        for name, cut in record.cuts.items()
    }
    state = model.state_dict(keep_vars=True)
    _check_known(model, state)
    for name, value in state.items():
        if is_dtensor(value):
            divided = [(i, place) for i, place in enumerate(value.placements) if not place.is_replicate()]
            if len(divided) > 1 or any(place.is_partial() for _, place in divided):
                raise ShardingError(
                    f"{name}: placed as {value.placements} on {value.device_mesh}: only tensors that one dimension of a mesh "
                    "divides can be saved; redistribute it first."
                )
            for i, place in divided:  # packed projections: a _StridedShard
                cuts[name] = Cut(value.device_mesh.get_group(i), place.dim, getattr(place, "split_factor", 1))
    return cuts


def _check_known(model: nn.Module, state: dict[str, Any]) -> None:
    """transformers keeps shards that a rank quantized for itself as plain tensors, which nothing tells from whole ones."""
    weights = {name: value for name, value in state.items() if isinstance(local_tensor(value), IntScaleTensor)}
    if (getattr(model, "_tp_size", None) or 1) > 1 and weights and not any(is_dtensor(w) for w in weights.values()):
        raise ShardingError(
            f"{next(iter(weights))}: each rank quantized its own shard while it read the model, so their row scales differ and "
            "the shards cannot be saved as one model: quantize the whole model before it is divided."
        )


def is_divided(model: nn.Module) -> bool:
    """Whether ranks share a model's tensors among them."""
    return bool(cuts_of(model))


def gather_shards(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of a divided model as it was before it was divided, bit for bit, on the CPU.

    Every rank of the groups that share the model calls this. Shards travel one tensor after another.

    Returns:
        The state dict on the first rank of each group (rank 0, where all ranks are one group), and an empty one on the others.
        Every rank of a model that is not divided gets its state dict.

    Raises:
        ShardingError: on every rank: shards that do not fit together, such as those that each rank quantized for itself while
            it read a checkpoint that is not quantized; their row scales differ.
    """
    cuts = cuts_of(model)
    variables = model.state_dict(keep_vars=True)
    state = {name: local_tensor(value).detach() for name, value in variables.items()}
    _check_alike(state, cuts)
    first = all(cut.group.rank() == 0 for cut in cuts.values())
    whole: dict[str, Tensor] = {}
    names: dict[int, str] = {}  # of tensors that have several names: they stay one tensor
    for name, value in state.items():
        known = names.setdefault(id(variables[name]), name)
        if known != name:
            whole.update({name: whole[known]} if known in whole else {})
        elif name not in cuts:
            whole[name] = value.cpu()
        elif (shards := _gathered(value, cuts[name])) is not None:
            whole[name] = _joined(shards, cuts[name], name)
    return whole if first else {}


def _check_alike(state: dict[str, Tensor], cuts: dict[str, Cut]) -> None:
    """Raise on every rank of a group where the shards of a tensor cannot be joined: no rank waits for one that has left."""
    for group in {id(cut.group): cut.group for cut in cuts.values()}.values():
        mine = {name: _likeness(state[name], cut) for name, cut in cuts.items() if cut.group is group}
        theirs: list = [None] * group.size()
        dist.all_gather_object(theirs, mine, group=group)
        for name, likeness in mine.items():
            if any(other.get(name) != likeness for other in theirs) or any(len(o) != len(mine) for o in theirs):
                raise ShardingError(
                    f"{name}: the ranks hold shards that are not of one weight (their shapes, layouts or row scales differ). "
                    "Shards that each rank quantized for itself cannot be joined: quantize the whole model before it is "
                    "divided, or keep the shards apart with tensor_parallel.save_shards."
                )


def _likeness(value: Tensor, cut: Cut) -> tuple:
    """What all shards of a tensor have in common; shards of input features have all row scales in common."""
    if not isinstance(value, IntScaleTensor):
        return tuple(value.shape), str(value.dtype)
    features = stored_dim(value, cut.dim) == value.dim() - 1
    names = shared_parts(value) if features else [name for name in value.data_names if name in PER_WEIGHT]
    data = [getattr(value, name).cpu().contiguous().numpy().tobytes() for name in names]
    attributes = [str(getattr(value, name)) for name in ATTRIBUTE_NAMES]
    parts = [(name, tuple(getattr(value, name).shape), str(getattr(value, name).dtype)) for name in value.data_names]
    return (*attributes, *parts, hashlib.sha256(b"".join(data)).hexdigest())


def _gathered(value: Tensor, cut: Cut) -> Optional[list[Tensor]]:
    """All different shards, in order, on the first rank of the group; None elsewhere."""
    if not isinstance(value, IntScaleTensor):
        received = _sent(value, cut.group)
        return None if received is None else received[:: cut.copies]
    parts = {name: _sent(getattr(value, name), cut.group) for name in value.data_names}
    if cut.group.rank():
        return None
    ranks = range(0, cut.group.size(), cut.copies)
    return [value.replaced(**{name: found[i] for name, found in parts.items() if found}) for i in ranks]


def _sent(part: Tensor, group: Any) -> Optional[list[Tensor]]:
    """One tensor of every rank, as bytes: backends lack some integer types."""
    flat = part.contiguous().as_strided((part.numel(),), (1,)).view(torch.uint8)
    received = [torch.empty_like(flat) for _ in range(group.size())] if group.rank() == 0 else None
    dist.gather(flat, received, group=group, group_dst=0)
    return None if received is None else [found.cpu().view(part.dtype).view(part.shape) for found in received]


def _joined(shards: list[Tensor], cut: Cut, name: str) -> Tensor:
    if isinstance(shards[0], IntScaleTensor):
        return unshard(shards, cut.dim, packed=cut.packed, name=name)  # type: ignore[arg-type]
    pieces = [shard.chunk(cut.packed, cut.dim) for shard in shards]
    return torch.cat([piece[i] for i in range(cut.packed) for piece in pieces], cut.dim)


# --- shard by shard ---------------------------------------------------------------------------------------------------


def save_shards(model: nn.Module, path: Any, **options: Any) -> None:
    """Write a divided model with ``torch.distributed.checkpoint``: each rank the shards that it has, whole tensors once.

    The list of what is in the folder is removed first and written last: a save that failed leaves a folder that does not load.

    Args:
        model: divided by ``parallelize``, or of DTensors. Every rank of the default group calls this.
        path: folder.
        options: further arguments of ``torch.distributed.checkpoint.save``, such as ``process_group``.

    Raises:
        CheckpointError: the folder cannot be written; on every rank.
    """
    # Slow to import.
    import torch.distributed.checkpoint as dcp

    entries = _entries(model)
    record = json.dumps(_digests(entries))
    try:
        if "storage_writer" not in options:
            with contextlib.suppress(FileNotFoundError):
                (Path(path) / ".metadata").unlink()
        dcp.save({**entries, _record_key(): record}, checkpoint_id=path, **options)
    except (OSError, dcp.api.CheckpointException) as error:  # the latter is no Exception; it ends in what happened
        last = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        raise CheckpointError(f"{path}: it cannot be written: {last}.") from error


def load_shards(model: nn.Module, path: Any, *, verify: bool = False, **options: Any) -> nn.Module:
    """Fill a model from a folder of :func:`save_shards`, in place.

    Args:
        model: quantized and divided in the same way, by as many ranks, as the one that was saved.
        path: folder.
        verify: also compare all that this rank reads with the checksums that it stored; folders of version 0.1.0 have none.
        options: further arguments of ``torch.distributed.checkpoint.load``.

    Returns:
        The same model.

    Raises:
        CheckpointError: the folder is no checkpoint, holds a model that was divided or quantized in another way, is of a newer
            release, or its data differ from their checksums.
    """
    # Slow to import.
    import torch.distributed.checkpoint as dcp

    wanted = _entries(model)
    records = _check_stored(wanted, path, _shared(model.state_dict(keep_vars=True)))
    record = next((key for key in records if key.endswith(f"/{_place()}")), None)
    found = {key: torch.empty_like(value) if isinstance(value, Tensor) else value for key, value in wanted.items()}
    if record is not None:
        found[record] = ""
    try:
        dcp.load(found, checkpoint_id=path, **options)
    except MemoryError:
        raise
    except (Exception, dcp.api.CheckpointException) as error:  # the latter is no Exception; it ends in what happened
        last = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        raise CheckpointError(f"{path}: {last}; intscale inspect --verify names what is damaged.") from error
    for key, value in wanted.items():
        if isinstance(value, str) and found[key] != value:
            raise CheckpointError(
                f"{path}: {key}: stored as {found[key]}, but the model has {value}: quantize it alike."
            )
    if verify:
        _verify(found, None if record is None else str(found[record]), path)
    cuts = cuts_of(model)
    parameters = _once(model.state_dict(keep_vars=True))  # themselves: parts of them may be exchanged
    with torch.no_grad():
        for name, value in parameters.items():
            _fill(local_tensor(value), _key(name, cuts), found)
    return model


def _once(variables: dict[str, Any]) -> dict[str, Any]:
    """A state dict with what several names share under the first of them."""
    shared = _shared(variables)
    return {name: value for name, value in variables.items() if name not in shared}


def _shared(variables: dict[str, Any]) -> dict[str, str]:
    """Names in a state dict whose tensor is stored under another name, with that name."""
    first: dict[int, str] = {}
    named = {name: first.setdefault(id(value), name) for name, value in variables.items()}
    return {name: stored for name, stored in named.items() if name != stored}


def _place() -> str:
    return f"{dist.get_rank()}of{dist.get_world_size()}" if dist.is_available() and dist.is_initialized() else "0of1"


def _record_key() -> str:
    """Where a rank's checksums lie. Version and release are in the name: it is read before anything is loaded."""
    return f"{ENTRY}/format_version={fmt.VERSION}/written_by={__version__}/{_place()}"


def _digests(entries: dict[str, Any]) -> dict[str, str]:
    return {
        key: tensor_digest(value) if isinstance(value, Tensor) else text_digest(value) for key, value in entries.items()
    }


def _verify(found: dict[str, Any], record: Optional[str], path: Any) -> None:
    """Raise ``CheckpointError`` unless what was read has the checksums that were stored."""
    if record is None:
        raise CheckpointError(f"{path}: this rank stored no checksums, as in version 0.1.0: save it again.")
    wanted = parse_json(record, f"{path}: the checksums of rank {_place()}")
    entries = {key: value for key, value in found.items() if not key.startswith(f"{ENTRY}/")}
    known = wanted if isinstance(wanted, dict) else {}
    if damaged := sorted(key for key, digest in _digests(entries).items() if known.get(key) != digest):
        raise CheckpointError(f"{path}: {', '.join(damaged[:3])}: the data differ from their checksum; {MEND}.")


def _fill(target: Tensor, key: str, found: dict[str, Any]) -> None:
    if not isinstance(target, IntScaleTensor):
        target.copy_(found[key])
        return
    parts = {name: found[f"{key}/{name}"] for name in target.data_names}
    target.copy_(target.replaced(**parts, packing_format="plain").validate())


def _key(name: str, cuts: dict[str, Cut]) -> str:
    """Name of a tensor in a checkpoint: shards have their number in it, so that no rank takes another's."""
    return f"{name}/{cuts[name].index}of{cuts[name].count}" if name in cuts else name


def _entries(model: nn.Module) -> dict[str, Any]:
    """What is stored: plain tensors on the CPU, and the layout of each quantized one as text."""
    cuts, entries = cuts_of(model), {}
    alone = {name for module in _first_only(model) for name in module}
    for name, value in _once(model.state_dict(keep_vars=True)).items():
        key, local = _key(name, cuts), local_tensor(value.detach())
        if name in alone:
            raise ShardingError(
                f"{name}: only the first rank has this bias, which is added before a sum: use gather_shards, or divide the "
                "model with PyTorch's parallelize_module."
            )
        if not isinstance(local, IntScaleTensor):
            entries[key] = local.cpu()
            continue
        plain = local.to("cpu").to_packing("plain")
        entries.update({f"{key}/{part}": getattr(plain, part) for part in plain.data_names})
        entries[f"{key}/layout"] = _layout(plain)
    return entries


def _first_only(model: nn.Module) -> Iterable[list[str]]:
    for prefix, module in model.named_modules():
        for record in module.__dict__.get(RECORD, ()):
            yield [f"{prefix}.{name}" if prefix else name for name in record.first_only]


def _layout(weight: IntScaleTensor) -> str:
    return json.dumps({name: str(getattr(weight, name)) for name in ATTRIBUTE_NAMES if name not in NOT_STORED})


def _check_stored(wanted: dict[str, Any], path: Any, shared: dict[str, str]) -> list[str]:
    """Raise unless the checkpoint has exactly what a rank's part of the model is made of; returns the keys of checksums.

    ``shared`` are the names that the model stores under another one: they must not have data of their own.
    """
    stored = read_index(path).state_dict_metadata
    records = records_of_ranks(stored, path)
    mend = "Divide and quantize the model as the saved one was, by as many ranks; or save with gather_shards, which fits any."
    for key, value in wanted.items():
        if key not in stored:
            near = sorted(name for name in stored if name.split("/")[0] == key.split("/")[0])[:2]
            raise CheckpointError(f"{path}: it has no {key}, but {near or 'nothing of that name'}. {mend}")
        size = getattr(stored[key], "size", None)
        if isinstance(value, Tensor) and size != value.shape:
            raise CheckpointError(f"{path}: {key} has shape {size}, the model's {tuple(value.shape)}. {mend}")
    for name in sorted({key.split("/")[0] for key in stored} & shared.keys()):
        raise CheckpointError(
            f"{path}: {name} was saved as a tensor of its own, but the model shares it with {shared[name]}: load it into a "
            "model that does not (of transformers: tie_word_embeddings=False)."
        )
    owned = {key.removesuffix("/layout") for key in wanted if key.endswith("/layout")}
    if unused := sorted(key for key in stored if key not in wanted and key.rpartition("/")[0] in owned):
        raise CheckpointError(f"{path}: the model lacks {unused[:3]}. {mend}")
    return records
