"""Saving and loading: registration with torch, torchao and transformers, and safetensors files of quantized models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import format as fmt
from ..config import IntScaleConfig
from ..errors import CheckpointError, ConfigError
from ..integrations import torchao
from ..integrations.torch import local_tensor
from ..tensors.fields import ABSENT, ALL_NAMES, drop_old_parts
from ..tensors.intscale_tensor import IntScaleTensor
from ..tensors.stored_files import PathLike, first_line, open_safetensors, parse_json, reading, whole_file, whole_folder
from .integrity import check_header, check_metadata, read_entry, verify_file, with_checksums, with_version
from .shard_writing import gather_shards, is_divided
from .ties import read_ties, shared_names, store_once, tie


def rebuild_tensor(**parts) -> IntScaleTensor:
    """Build a tensor from stored parts and check them.

    Raises:
        CheckpointError: parts are missing, unknown, or contradict each other.
    """
    names = set(ALL_NAMES)
    drop_old_parts(parts)
    parts = {**ABSENT, **parts}
    if set(parts) != names:
        raise CheckpointError(
            f"a stored IntScaleTensor lacks {sorted(names - set(parts))} and has unknown {sorted(set(parts) - names)}."
        )
    for name in ("in_features", "out_features"):  # before they size anything
        if type(parts[name]) is not int or not 0 < parts[name] < 2**31:
            raise CheckpointError(f"{name} is {parts[name]!r} in a stored IntScaleTensor.")
    for name, part in parts.items():
        if type(part) is torch.Tensor and part.device.type != "meta":
            parts[name] = fmt.contiguous(part)
    try:
        tensor = IntScaleTensor(**parts)
    except Exception as error:  # whatever wrong types led to
        raise CheckpointError(f"a stored IntScaleTensor cannot be rebuilt: {first_line(error)}") from error
    return tensor.validate()


def register() -> None:
    """Let torch.load, torchao's safetensors support and transformers find our config and tensor. Idempotent."""
    torchao.register(IntScaleConfig, IntScaleTensor, rebuild_tensor)
    torch.serialization.add_safe_globals([IntScaleTensor])


def save_pretrained(model: nn.Module, folder: PathLike, config: IntScaleConfig | None = None, **kwargs: Any) -> None:
    """Write a quantized transformers model as a folder that ``from_pretrained`` reads, equal to the bit.

    The files appear in ``folder`` once all of them are written: a failed call leaves it as it was. Checksums are stored with
    them: :func:`~intscale_compile.verify_checkpoint`, or ``intscale inspect FOLDER --verify``.

    A model that is divided among ranks is gathered: every rank calls this, and rank 0 writes. From then on the model's own
    ``save_pretrained`` writes the same, as training loops call it.

    Args:
        model: a ``PreTrainedModel`` with at least one ``IntScaleTensor``.
        folder: where to.
        config: the configuration it was quantized with; it is written into ``config.json``, and by
            default read off the first quantized weight. Loading takes the format of each weight from the weight itself.
        kwargs: what the model's own ``save_pretrained`` takes, such as ``max_shard_size``.

    Raises:
        ConfigError: the model is not a transformers model, or holds no ``IntScaleTensor``.
        CheckpointError: the folder cannot be written.
    """
    attached = attach_quantizer(model, config)
    kwargs.setdefault("repo_id", Path(folder).name) if kwargs.get("push_to_hub") else None
    with whole_folder(folder) as part:
        attached.save_pretrained(part, **kwargs)


def attach_quantizer(model: nn.Module, config: IntScaleConfig | None = None) -> Any:
    """Give a quantized transformers model what its own ``save_pretrained`` needs; returns it.

    Raises:
        ConfigError: as for :func:`save_pretrained`.
    """
    # Slow to import.
    from transformers import PreTrainedModel, TorchAoConfig
    from transformers.quantizers import AutoHfQuantizer

    if not isinstance(model, PreTrainedModel):
        raise ConfigError(
            f"save_pretrained takes a transformers model, not {type(model).__name__}: use save_safetensors."
        )
    weight = next((w for p in model.parameters() if isinstance(w := local_tensor(p), IntScaleTensor)), None)
    if weight is None:
        raise ConfigError("save_pretrained: no parameter of the model is quantized; call quantize_ first.")
    if config is None:
        config = IntScaleConfig(weight.group_size, weight.weight_bits, min(8, weight.scale_bits))
    model.config.quantization_config = TorchAoConfig(config)
    model.hf_quantizer = AutoHfQuantizer.from_config(model.config.quantization_config, pre_quantized=True)
    return model


def save_safetensors(model: nn.Module, path: PathLike) -> None:
    """Write the model's state dict, quantized weights included, into one safetensors file.

    A parameter that several names share is written once (``saving.ties``). The file appears under its name once it is
    whole: a failed call leaves the one that was there before, and nothing beside it. Checksums are stored with it
    (``saving.integrity``).

    A model that is divided among ranks is gathered: every rank calls this, and rank 0 writes the file that it would have
    written before.

    Raises:
        CheckpointError: the file cannot be written: no such folder, no space.
        ShardingError: shards do not fit together (``tensor_parallel.gather_shards``).
    """
    # Comes with transformers.
    from safetensors.torch import save_file

    if is_divided(model):
        whole = gather_shards(model)
        if torch.distributed.get_rank():
            return
    else:
        whole = model.state_dict()
    state = {_stored_name(n): t if isinstance(t, IntScaleTensor) else t.detach() for n, t in whole.items()}
    parameters = {_stored_name(name) for name, _ in model.named_parameters(remove_duplicate=False)}
    flat, headers = torchao.FLATTEN.get()(state)
    tensors, metadata = store_once(flat, headers, shared_names(state, parameters))
    separate, seen = {}, set()
    for name, tensor in tensors.items():
        memory = tensor.untyped_storage().data_ptr()
        separate[name] = (tensor.clone() if memory in seen else tensor).contiguous()
        seen.add(memory)
    metadata = with_checksums(separate, with_version(metadata))
    with whole_file(path) as part:
        save_file(separate, part, metadata=metadata)


def _stored_name(name: str) -> str:
    """torchao splits names at their last dot; parameters of the outermost module have none."""
    return name if "." in name else f".{name}"


def load_safetensors(path: PathLike, device: str = "cpu", *, verify: bool = False) -> dict[str, torch.Tensor]:
    """Read a file of :func:`save_safetensors`; load it with ``model.load_state_dict(state, assign=True)``.

    Names that shared a parameter share one in the result, and in a model that it is assigned to.

    Args:
        path: the file.
        device: where the tensors go.
        verify: also compare all data with the checksums that were stored with them; files of version 0.1.0 have none.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: the file is truncated or altered, its header does not fit its data, or a newer release wrote it.
    """
    with open_safetensors(path, device) as file, reading(path):
        metadata = file.metadata() or {}
        read_entry(metadata, path)  # a newer format before anything else
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    names = tensor_names(metadata, path)
    of_module: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        of_module.setdefault(key.rpartition(".")[0], {})[key] = tensor
    state, unused = {}, set(tensors)
    for name in names:
        parts = of_module.get(name.rpartition(".")[0], {})
        state[name.removeprefix(".")], used = stored_tensor(name, parts, metadata, path)
        unused -= used
    if unused:
        raise CheckpointError(f"{path}: data without a name in the header: {sorted(unused)[:3]}.")
    check_metadata(metadata, path)
    tie(state, read_ties(metadata, names, path))
    if verify and verify_file(Path(path)) is None:
        raise CheckpointError(
            f"{path}: it has no checksums, as files of version 0.1.0: it cannot be verified; save it again."
        )
    return state


def tensor_names(metadata: dict[str, str], path: PathLike) -> list[str]:
    """The names of all tensors of a file of ours, each of which has a header.

    Raises:
        CheckpointError: the list is missing or damaged.
    """
    if "tensor_names" not in metadata:
        raise CheckpointError(f"{path}: no list of tensors in its header: not a file of save_safetensors.")
    names = parse_json(metadata["tensor_names"], f"{path}: the list of its tensors")
    if not isinstance(names, list) or not all(isinstance(name, str) and "." in name for name in names):
        raise CheckpointError(f"{path}: the list of its tensors in the header is damaged.")
    for name in names:
        if name not in metadata:
            raise CheckpointError(f"{path}: {name.removeprefix('.')}: its header is missing.")
    if len(set(names)) != len(names):
        raise CheckpointError(f"{path}: the list of its tensors names one twice.")
    return names


def stored_tensor(name: str, parts: dict, metadata: dict, path: PathLike) -> tuple[torch.Tensor, set]:
    """One tensor of a file, and the keys that it is made of.

    Raises:
        CheckpointError: the header and the data do not fit together.
    """
    public = name.removeprefix(".")
    check_header(metadata[name], f"{path}: {public}")
    try:
        header = {"tensor_names": json.dumps([name]), name: metadata[name]}
        state, rest = torchao.UNFLATTEN.get()(parts, header)
    except MemoryError:
        raise
    except Exception as error:  # torchao's, which wraps ours
        raise CheckpointError(f"{path}: {public}: {innermost(error)}") from error
    if name not in state:
        raise CheckpointError(f"{path}: {public}: data missing; the file is incomplete.")
    return state[name], set(parts) - set(rest)


def innermost(error: BaseException) -> str:
    """Our own message where torchao wrapped it; header mistakes come as bare ``KeyError`` and the like."""
    cause: Any = error
    while cause is not None and not isinstance(cause, CheckpointError):
        cause = cause.__cause__ or cause.__context__
    if cause is not None:
        return str(cause).removeprefix("weight: ")
    return f"its header cannot be read ({type(error).__name__}: {first_line(error)})"
