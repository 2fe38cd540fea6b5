"""Stored quantized weights read shard by shard: of a safetensors file, each rank reads the rows and features that it keeps.

``StoredPart`` stands for one stored part (codes, group scales, ...) and is indexed by rows and features of the *weight*. So
what divides tensors, transformers or ``tensor_parallel.from_safetensors``, need not know how codes
are packed. Hooks into transformers (``integrations.transformers``) are installed when it is imported, and take part only
where a model is divided; but for one that names the stored parts which transformers does not know.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from typing import Any, Optional

import torch
from torch import Tensor

from .. import format as fmt
from ..errors import CheckpointError, ShardingError
from ..integrations.torch import is_dtensor, local_tensor
from ..integrations.transformers import hook_loading
from ..parallel.sharding import Layout, chunk
from ..tensors.activation_parts import PER_WEIGHT
from ..tensors.fields import DATA_NAMES
from ..tensors.selection import mark_loaded
from ..tensors.stored_files import PathLike, open_safetensors, reading
from .checked_loading import (
    checking_files,
    checking_result,
    keeping_errors,
    marking,
    renaming,
    sealing,
)
from .checkpoint import stored_tensor, tensor_names
from .descriptions import checking_config, checking_folder
from .integrity import check_header, check_metadata, read_entry, stored_key
from .shard_writing import gather_shards, is_divided
from .ties import read_ties


class StoredPart:
    """One part of a stored weight, read when it is indexed with the rows and features of the weight that are wanted.

    Args:
        stored: a slice object of safetensors, or a tensor.
        part: the part's name, one of ``DATA_NAMES``.
        layout: how the weight is stored. Tiled rows are read whole and given back in plain packing.
        transposed: whether the weight's shape shows its features before its rows.
    """

    def __init__(self, stored: Any, part: str, layout: Layout, transposed: bool):
        self.stored, self.part, self.layout, self.transposed = stored, part, layout, transposed
        shape = stored.shape if isinstance(stored, Tensor) else stored.get_shape()
        self._lead = list(shape[:-2])

    def get_shape(self) -> list[int]:
        """Shape of the weight, not of the part."""
        matrix = [self.layout.out_features, self.layout.in_features]
        return [*self._lead, *(reversed(matrix) if self.transposed else matrix)]

    def get_dtype(self) -> str:
        """Dtype of the part, as safetensors names it."""
        return self.stored.get_dtype() if hasattr(self.stored, "get_dtype") else str(self.stored.dtype)

    def __getitem__(self, index: Any) -> Tensor:
        shape = self.get_shape()
        slices = [slice(None)] * len(shape) if index is Ellipsis else list(index)
        ranges = [slice(*s.indices(size)) for s, size in zip(slices, shape)]
        lead, (rows, features) = ranges[:-2], reversed(ranges[-2:]) if self.transposed else ranges[-2:]
        if self.part in PER_WEIGHT:
            return self.stored[(*lead, slice(None), slice(None))]
        wanted = slice(None) if self.layout.packing_format == "tiled" and self.part != "per_tensor_scale" else rows
        first, last = self.layout.columns(self.part, features.start, features.stop)
        if (features.start, features.stop) != (0, self.layout.in_features):
            self.layout.check_features(features.start, features.stop)
        if wanted is rows:
            covering = self.stored[(*lead, rows, slice(first, last))]
        else:
            columns = (
                fmt.code_block_columns(self.layout.group_size, self.layout.weight_bits) if self.part == "qdata" else 1
            )
            whole = self.stored[(*lead, slice(None), slice(None))]
            covering = fmt.untile_rows(whole, self.layout.out_features, columns)[..., rows, first:last]
        return self.layout.cut(self.part, covering, features.start, features.stop).contiguous()


def stored_parts(
    slices: Mapping[str, Any], metadata: Mapping[str, str], name_of: Optional[Callable[[str], str]] = None
) -> dict[str, Any]:
    """``slices`` with those that are parts of an ``IntScaleTensor`` as :class:`StoredPart`.

    Args:
        slices: slice objects of safetensors or tensors, by key of the file.
        metadata: the file's header, as torchao writes it, by name of the weight.
        name_of: the name of the weight that a key belongs to, where the modules in the file are called otherwise.
    """
    headers = {name: header for name, text in metadata.items() if (header := _header(text)) is not None}
    parts: dict[str, dict[str, str]] = {}  # keys by name and part
    if name_of is None:
        known = {stored_key(name, part): (name, part) for name in headers for part in DATA_NAMES}
        owners = {key: known[key] for key in slices if key in known}
    else:
        names = {key: name_of(key) for key in slices}
        owners = {key: (name, _part(key, name)) for key, name in names.items() if name in headers}
    for key, (name, part) in owners.items():
        parts.setdefault(name, {})[part] = key
    found = dict(slices)
    for name, keys in parts.items():
        if "qdata" in keys:
            data = headers[name]["_data"]
            layout = _layout(data, slices[keys["qdata"]], name, "input_order" in keys)
            found.update({key: StoredPart(slices[key], part, layout, data["transposed"]) for part, key in keys.items()})
    return found


def _part(key: str, name: str) -> str:
    return key.rpartition(".")[2].removeprefix(f"_{name.rpartition('.')[2]}_")


def _header(text: str) -> Optional[dict]:
    try:
        header = json.loads(text)
    except (TypeError, ValueError, RecursionError):
        return None
    return header if isinstance(header, dict) and header.get("_type") == "IntScaleTensor" else None


def _layout(data: Mapping[str, Any], qdata: Any, name: str, ordered: bool) -> Layout:
    dtype = str(qdata.dtype) if isinstance(qdata, Tensor) else qdata.get_dtype()
    return Layout(
        name, data["in_features"], data["out_features"], data["block_size"][-1], 8 if dtype in ("I8", "torch.int8") else 4,
        data["packing_format"], data.get("rotation", 0), ordered,
    )  # fmt: skip


def local_header(text: str, shape: tuple[int, ...]) -> str:
    """The header of a weight, changed to that of a shard of the given shape: parts of shards are in plain packing."""
    header = json.loads(text)
    data = header["_data"]
    rows, features = reversed(shape[-2:]) if data["transposed"] else shape[-2:]
    data.update(out_features=rows, in_features=features, packing_format="plain")
    return json.dumps(header)


def read_shards(
    path: PathLike, divided: Mapping[str, tuple[int, int, int]], rank: int, ranks: int
) -> dict[str, Tensor]:
    """This rank's shards of the tensors in a file of ``save_safetensors``; nothing else is read.

    Args:
        path: the file.
        divided: names of the tensors to divide, with the dimension, from the end, how many projections lie packed in it,
            and how many ranks in a row read the same shard.
        rank, ranks: which shard of how many.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: the file is damaged, or a newer release wrote it.
        ShardingError: a tensor cannot be divided so.
    """
    state: dict[str, Tensor] = {}
    with open_safetensors(path) as file, reading(path):
        metadata = file.metadata() or {}
        read_entry(metadata, path)  # a newer format before anything else
        names = tensor_names(metadata, path)
        unused = set(file.keys())
        for name in names:
            header = check_header(metadata[name], f"{path}: {name.removeprefix('.')}")
            unused -= {name} if header is None else {stored_key(name, part) for part in header["_tensor_data_names"]}
        if unused:
            raise CheckpointError(f"{path}: data without a name in the header: {sorted(unused)[:3]}.")
        check_metadata(metadata, path)
        with reading(f"{path}: a header"):
            parts = stored_parts({key: file.get_slice(key) for key in file.keys()}, metadata)
        ties = read_ties(metadata, names, path)
        for name in (*names, *ties):
            public, stored = name.removeprefix("."), ties.get(name, name)
            dim, packed, copies = divided.get(public, (None, 1, 1))
            cut = None if dim is None else (dim, packed)
            with reading(f"{path}: {public}"):
                state[public] = _read_shard(stored, parts, metadata, cut, rank // copies, ranks // copies, path)
    return state


def _read_shard(
    name: str, stored: Mapping[str, Any], metadata: Mapping[str, str], divided: Optional[tuple[int, int]], rank: int,
    ranks: int, path: PathLike,
) -> Tensor:  # fmt: skip
    if _header(metadata[name]) is None:
        if name not in stored:
            raise CheckpointError(f"{path}: {name.removeprefix('.')}: data missing; the file is incomplete.")
        return _read(stored[name], name, divided, rank, ranks)
    keys = {part: stored_key(name, part) for part in DATA_NAMES}
    if keys["qdata"] not in stored:
        raise CheckpointError(f"{path}: {name.removeprefix('.')}: qdata is missing; the file is incomplete.")
    parts = {key: _read(stored[key], name, divided, rank, ranks) for part, key in keys.items() if key in stored}
    shape = list(stored[keys["qdata"]].get_shape())
    if divided is not None:
        shape[divided[0]] //= ranks
    shared = {keys[part] for part in PER_WEIGHT}
    parts = {key: part[..., :1, :] if key in shared else part for key, part in parts.items()}
    return stored_tensor(name, parts, {**metadata, name: local_header(metadata[name], tuple(shape))}, path)[0]


def _read(stored: Any, name: str, divided: Optional[tuple[int, int]], rank: int, ranks: int) -> Tensor:
    shape = stored.get_shape()
    everything = [slice(None)] * len(shape)
    if divided is None:
        return stored[tuple(everything)] if shape else stored[...]
    dim, packed = divided
    size = shape[dim] // packed
    start, end = chunk(size, rank, ranks, name)
    pieces = []
    for i in range(packed):
        everything[dim] = slice(i * size + start, i * size + end)
        pieces.append(stored[tuple(everything)])
    if packed == 1 or (isinstance(stored, StoredPart) and stored.part in PER_WEIGHT):
        return pieces[0]
    return torch.cat(pieces, -2 if isinstance(stored, StoredPart) else dim)


# --- transformers -------------------------------------------------------------------------------------------------------


def register_sharded_loading() -> None:
    """Let ``from_pretrained(..., tp_plan="auto")`` read quantized checkpoints shard by shard, and ``save_pretrained`` gather."""
    hook_loading(
        {
            "convert_and_load_state_dict_in_model": lambda load: checking_result(_reading_shards(load)),
            "safe_save_file": sealing,
            "shard_tensor": _of_whole_parts,
            "convert": lambda convert: keeping_errors(_with_local_headers(convert)),
            "get_state_dict_and_metadata": lambda get_state: marking(_gathering(get_state)),
            "_process_model_before_weight_loading": checking_files,
            "get_weight_conversions": _with_all_parts,
            "postprocess_model": _deciding,
            "get_hf_quantizer": checking_config,
            "get_config_dict": checking_folder,
        }
    )


def _deciding(postprocess: Callable) -> Callable:
    """Marks a loaded model, so that the compiler leaves alone what is plain in it."""

    def marked(self: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        result = postprocess(self, model, *args, **kwargs)
        mark_loaded(model)
        return result

    return marked


def _with_all_parts(get_conversions: Callable) -> Callable:
    """transformers collects the parts of a stored tensor subclass by a list of names, which has those of torchao only."""

    @functools.wraps(get_conversions)
    def conversions(self: Any) -> list[Any]:
        found = []
        for known in get_conversions(self):
            sources, targets = known._original_source_patterns, known._original_target_patterns
            suffix = "_qdata"
            stems = [name.removesuffix(suffix) for name in sources if name.endswith(suffix)]
            added = [f"{stem}_{part}" for stem in stems for part in DATA_NAMES if f"{stem}_{part}" not in sources]
            found.append(type(known)([*sources, *added], targets, known.operations) if added else known)
        return found

    return conversions


def _gathering(get_state: Callable) -> Callable:
    @functools.wraps(get_state)
    def gathered(self: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        if not is_divided(model):
            return get_state(self, model, *args, **kwargs)
        return get_state(self, _WithState(gather_shards(model)), *args, **kwargs)

    return gathered


class _WithState:
    """What the quantizer asks of a model."""

    def __init__(self, state: dict[str, Tensor]):
        self._state = state

    def state_dict(self) -> dict[str, Tensor]:
        return self._state


def _reading_shards(load: Callable) -> Callable:
    @functools.wraps(load)
    def convert_and_load(model: Any, state_dict: Any, load_config: Any, *args: Any, **kwargs: Any) -> Any:
        metadata = getattr(load_config.hf_quantizer, "metadata", None)
        if metadata and any(is_dtensor(p) for p in model.parameters()):
            state_dict = stored_parts(state_dict, metadata, renaming(model, load_config))
        return load(model, state_dict, load_config, *args, **kwargs)

    return convert_and_load


def _of_whole_parts(shard_tensor: Callable) -> Callable:
    @functools.wraps(shard_tensor)
    def shard_part(
        self: Any, source: Any, tensor_idx: Optional[int] = None, device: Any = None, dtype: Any = None
    ) -> Any:
        if isinstance(
            source, StoredPart
        ):  # a part is no slice of a list of experts: transformers 5.17 takes it for one
            tensor_idx = None
            strided = [p for p in self.placements if hasattr(p, "split_factor")]
            if strided and (source.transposed or any(p.dim % self.param_ndim != self.param_ndim - 2 for p in strided)):
                raise ShardingError(
                    f"{source.layout.name}: features of packed projections cannot be divided while they are read; load the "
                    "whole model and call intscale_compile.tensor_parallel.parallelize."
                )
        return shard_tensor(self, source, tensor_idx=tensor_idx, device=device, dtype=dtype)

    return shard_part


def _with_local_headers(convert: Callable) -> Callable:
    @functools.wraps(convert)
    def deserialize(self: Any, input_dict: Any, *args: Any, **kwargs: Any) -> Any:
        model, name = kwargs.get("model"), kwargs.get("full_layer_name")
        whole: Any = getattr(self.hf_quantizer, "metadata", None)
        known = model is not None and name is not None and bool(whole)
        stored = _stored_as(str(name), whole, model) if known else None
        if model is None or name is None or stored is None:
            return convert(self, input_dict, *args, **kwargs)
        module, _, leaf = name.rpartition(".")
        parameter = getattr(model.get_submodule(module), leaf)
        header, divided = whole[stored], is_dtensor(parameter)
        if divided:
            header = local_header(header, tuple(local_tensor(parameter).shape))
            input_dict = _one_of_each_weight(input_dict)
        elif stored == name:
            return convert(self, input_dict, *args, **kwargs)
        quantizer = _WithMetadata({"tensor_names": json.dumps([name]), name: header})
        return convert(type(self)(quantizer), input_dict, *args, **kwargs)

    return deserialize


def _stored_as(name: str, headers: dict[str, str], model: Any) -> Optional[str]:
    """The name under which a weight of ours is stored: a model without its head may be loaded from one with it, and back."""
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    for stored in (name, prefix + name, name.removeprefix(prefix)):
        if _header(headers.get(stored, "")) is not None:
            return stored
    return None


def _one_of_each_weight(parts: dict[str, Any]) -> dict[str, Any]:
    """Parts of which transformers read several pieces of rows: what all rows share came with each piece."""
    shared = tuple(f"_{part}" for part in PER_WEIGHT)
    return {
        key: [t[..., :1, :] for t in tensors] if key.endswith(shared) else tensors for key, tensors in parts.items()
    }


class _WithMetadata:
    """What the deserializer asks of a quantizer."""

    def __init__(self, metadata: dict[str, str]):
        self.metadata = metadata
