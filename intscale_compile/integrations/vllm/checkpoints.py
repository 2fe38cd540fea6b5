"""What a checkpoint holds, as vLLM is to load it: tensors by their stored names, quantized weights as ``IntScaleTensor``.

Three kinds: folders of ours (``save_pretrained``, ``intscale quantize``), quantized folders of other tools, whose codes stay as
they are (``importing``), and plain ones, whose weights ``linear`` and ``experts`` quantize as they come.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor

from ...errors import CheckpointError, ConfigError
from ...importing.checkpoint_files import FORMATS, CheckpointFiles, StoredLayers, layer_format
from ...importing.layers import ScaleOptions
from ...ops import KERNEL_ABI
from ...reasons import OUTPUT_NAMES
from ...saving.checkpoint import stored_tensor, tensor_names
from ...saving.integrity import check_metadata, read_entry
from ...saving.ties import read_ties
from ...tensors.fields import DATA_NAMES
from ...tensors.intscale_tensor import IntScaleTensor
from ...tensors.stored_files import open_safetensors, reading, weight_files

OURS, IMPORTED, PLAIN = "ours", "imported", "plain"
_PART = re.compile(rf"^_(?P<leaf>\w+?)_(?P<part>{'|'.join(sorted(DATA_NAMES, key=len, reverse=True))})$")
_STACKS = ("gate_up_proj", "down_proj")


class ExpertNames(NamedTuple):
    """How a model calls the three projections of an expert in its checkpoints."""

    gate: str
    up: str
    down: str


def is_ours(quantization_config: Optional[Mapping[str, Any]]) -> bool:
    """Whether a ``quantization_config`` is that of a folder of ours: torchao's, with our configuration."""
    if not isinstance(quantization_config, Mapping) or quantization_config.get("quant_method") != "torchao":
        return False
    return '"IntScaleConfig"' in json.dumps(quantization_config, default=str)


def kind_of(quantization_config: Optional[Mapping[str, Any]]) -> str:
    """The kind of a checkpoint with this ``quantization_config``.

    Raises:
        ConfigError: it is quantized in a way that cannot be taken over.
    """
    if not quantization_config:
        return PLAIN
    if is_ours(quantization_config):
        return OURS
    method = quantization_config.get("quant_method")
    if method in FORMATS:
        layer_format(quantization_config)  # refuses variants before anything is read
        return IMPORTED
    raise ConfigError(
        f"quantization intscale cannot take over a checkpoint with quant_method={method!r}: serve the original model, or one of "
        f"{', '.join(FORMATS)} in 4 bits, or a folder written by intscale."
    )


def stored_weights(
    folder: Path, quantization_config: Mapping[str, Any], dtype: torch.dtype, names: Optional[ExpertNames] = None
) -> Iterator[tuple[str, Tensor]]:
    """All tensors of a quantized folder by their stored names, ``name.weight`` for the parts of a quantized weight.

    Stacks of experts ``[E, N, K]`` come under the names of fused stacks that vLLM knows.

    Args:
        folder: of the checkpoint.
        quantization_config: of its ``config.json``.
        dtype: that quantized weights claim.
        names: of the projections of the model's experts; None: it has no experts.

    Raises:
        CheckpointError: something is damaged or missing.
        ConfigError: something that cannot be served, by its name.
    """
    if kind_of(quantization_config) == OURS:
        weights = _ours(folder)
    else:
        layers = StoredLayers(
            CheckpointFiles(folder), layer_format(quantization_config), ScaleOptions(), dtype, torch.device("cpu")
        )
        weights = ((name, entry[...]) for name, entry in layers.state_dict().items() if not layers.is_zero_bias(name))
    for name, weight in weights:
        if not isinstance(weight, IntScaleTensor):
            yield name, weight
            continue
        _check_servable(name, weight)
        yield _fused_name(name, weight, names), weight.replaced(dtype=dtype)


def quantized_names(folder: Path, quantization_config: Mapping[str, Any]) -> list[str]:
    """Stored names of the modules that hold quantized weights; reads headers only."""
    keys = CheckpointFiles(folder)
    if kind_of(quantization_config) == OURS:
        return sorted({key.rpartition(".")[0] for key in keys if _PART.match(key.rpartition(".")[2])})
    required = layer_format(quantization_config).required
    return sorted({key.rpartition(".")[0] for key in keys if key.rpartition(".")[2] in required})


def compiled_for(folder: Optional[Path]) -> str:
    """What compiled models depend on beside the configuration: our sources, and the files of a quantized checkpoint.

    vLLM finds a compiled model again by the path and the configuration of its checkpoint, and does not check guards. How each
    weight is stored is neither in the one nor in the other, and neither are our kernels.

    Args:
        folder: of a quantized checkpoint; None: the model is plain.
    """
    digest = hashlib.sha256(str(KERNEL_ABI).encode())
    for path in weight_files(folder) if folder is not None else ():
        seen = path.stat()
        digest.update(f"{path.name} {seen.st_size} {seen.st_mtime_ns};".encode())
    return digest.hexdigest()[:16]


def _check_servable(name: str, weight: IntScaleTensor) -> None:
    """Raise ``ConfigError`` for a quantized weight that no layer of vLLM takes."""
    module = name.removesuffix(".weight")
    if any(module == known or module.endswith(f".{known}") for known in OUTPUT_NAMES):
        raise ConfigError(
            f"{module} is quantized, which vLLM's output embeddings cannot load: quantize the model without naming it "
            "and without output_embedding."
        )
    if weight.transposed:
        raise ConfigError(
            f"{name} is stored transposed ({weight!r}), as Conv1D layers and some experts are, which is not served: use "
            "generate of transformers for this model."
        )


def _fused_name(name: str, weight: IntScaleTensor, names: Optional[ExpertNames]) -> str:
    """The name under which vLLM's loader of experts takes a stack; other names as they are."""
    module, _, leaf = name.rpartition(".")
    if weight.dim() != 3:
        return name
    if names is None or leaf not in _STACKS:
        raise ConfigError(f"{name} is a stack of quantized weights for which this model has no place in vLLM.")
    fused = {("gate_proj", "up_proj"): "gate_up_proj", ("w1", "w3"): "w13"}.get((names.gate, names.up))
    if fused is None:
        raise ConfigError(
            f"{name}: vLLM has no name for stacks of {names.gate} and {names.up}: this model is not served."
        )
    return f"{module}.{fused if leaf == 'gate_up_proj' else names.down}"


# --- folders of ours --------------------------------------------------------------------------------------------------


def _ours(folder: Path) -> Iterator[tuple[str, Tensor]]:
    for path in weight_files(folder):
        with open_safetensors(path) as file, reading(path):
            metadata = file.metadata() or {}
            read_entry(metadata, path)  # a newer format before anything else
            check_metadata(metadata, path)
            keys = list(file.keys())
        names = tensor_names(metadata, path)
        aliases: dict[str, list[str]] = {}
        for alias, stored in read_ties(metadata, names, path).items():
            aliases.setdefault(stored, []).append(alias)
        with open_safetensors(path) as file:
            for name, header, parts in header_of_each(keys, names, path):
                weight = (
                    file.get_tensor(name) if header is None else _assembled(file, name, header, parts, metadata, path)
                )
                for known in (name, *aliases.get(header or name, ())):
                    yield known.removeprefix("."), weight


def _assembled(file: Any, name: str, header: str, parts: list[str], metadata: dict[str, str], path: Path) -> Tensor:
    """The quantized weight of these keys."""
    module = header.rpartition(".")[0]  # torchao looks for the parts under the name in the header
    tensors = {f"{module}.{key.rpartition('.')[2]}": file.get_tensor(key) for key in parts}
    weight, used = stored_tensor(header, tensors, metadata, path)
    if used != set(tensors):
        raise CheckpointError(f"{path}: {name}: data without a place in its header: {sorted(set(tensors) - used)}.")
    return weight


def header_of_each(keys: list[str], headers: list[str], path: object) -> Iterator[tuple[str, Optional[str], list[str]]]:
    """Each tensor of a file: its stored name, the header of a quantized one, and the keys of its parts.

    transformers stores experts under other names than its modules have, and the headers have the names of the modules:
    numbers and the last two parts of the name are the same in both.

    Raises:
        CheckpointError: a quantized weight has no header, or more than one.
    """
    groups: dict[str, list[str]] = {}
    for key in keys:
        module, _, leaf = key.rpartition(".")
        found = _PART.match(leaf)
        if found is None:
            yield key, None, []
        else:
            groups.setdefault(f"{module}.{found['leaf']}", []).append(key)
    known = set(headers)
    by_place: dict[tuple, list[str]] = {}
    for header in headers:
        by_place.setdefault(_place(header), []).append(header)
    for name, parts in groups.items():
        candidates = [name] if name in known else by_place.get(_place(name), [])
        if len(candidates) != 1:
            raise CheckpointError(
                f"{path}: {name}: {len(candidates)} headers fit it; the checkpoint is damaged: save it again."
            )
        yield name, candidates[0], parts


def _place(name: str) -> tuple:
    return tuple(re.findall(r"\.(\d+)(?=\.)", name)), tuple(name.split(".")[-2:])
