"""Distrust of what transformers loads, and checksums in what it saves: ``from_pretrained`` ends in our errors.

transformers catches the errors of single weights, logs them and raises one of its own; a folder without its
``quantization_config`` it fills with random weights, and says so in a note. What wraps its functions here checks the
metadata of all files before anything is read, keeps the first error of a weight and raises it in the end. All of it takes
part only where a checkpoint holds weights of ours. ``shard_reading`` installs the wrappers.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, Optional

import torch

from ..config import IntScaleConfig
from ..errors import CheckpointError, ConfigError, IntScaleError
from ..integrations.torch import is_dtensor
from ..integrations.transformers import RENAMING
from ..tensors.intscale_tensor import IntScaleTensor
from ..tensors.stored_files import open_safetensors, reading, regular_file
from .checkpoint import innermost, tensor_names
from .descriptions import damaged_config
from .integrity import ENTRY, check_header, check_metadata, read_entry, stored_key, with_checksums, with_version
from .ties import read_ties, shared_names, store_once

LOADING = "_intscale_loading"  # attribute of transformers' quantizer
_PART = re.compile(r"\._(\w+)_qdata$")


# --- saving -------------------------------------------------------------------------------------------------------------


def marking(get_state: Callable) -> Callable:
    """Around ``get_state_dict_and_metadata``: the format version and digests of the headers go into the metadata.

    What several names share is left once in the state dict: transformers does so where the model's class declares it.
    """

    @functools.wraps(get_state)
    def marked(self: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        state, metadata = get_state(self, model, *args, **kwargs)
        if not any('"IntScaleTensor"' in text for text in metadata.values()):
            return state, metadata
        state, metadata = store_once(state, metadata, shared_names(model.state_dict()))
        return state, with_version(metadata)

    return marked


def sealing(save: Callable) -> Callable:
    """Around safetensors' ``save_file``: digests of the tensors of a file go into its metadata."""

    @functools.wraps(save)
    def sealed(tensors: Any, filename: Any, metadata: Any = None, *args: Any, **kwargs: Any) -> Any:
        if metadata and ENTRY in metadata:
            metadata = with_checksums(tensors, metadata)
        return save(tensors, filename, metadata, *args, **kwargs)

    return sealed


@dataclass
class _Loading:
    """One call of ``from_pretrained``: names of all stored tensors, those that share one, the first error, dtypes."""

    names: set[str]
    ties: dict[str, str]
    error: Optional[CheckpointError] = None
    dtypes: Callable[[str], Any] = lambda name: None  # what transformers gives a plain parameter of that name

    def __deepcopy__(self, memo: dict) -> _Loading:
        return self  # transformers copies its quantizer for every weight


# --- before anything is read ----------------------------------------------------------------------------------------------


def checking_files(prepare: Callable) -> Callable:
    """Around ``_process_model_before_weight_loading`` of the quantizer: every header of ours is checked first.

    The errors are raised to the caller of ``from_pretrained``.
    """

    @functools.wraps(prepare)
    def checked(self: Any, model: Any, checkpoint_files: Any = None, **kwargs: Any) -> Any:
        files = list(checkpoint_files or ())
        if self.pre_quantized and _is_ours(self.quantization_config):
            for file in files:
                _check_place(Path(file), str(getattr(model.config, "_name_or_path", "") or ""))
        if self.pre_quantized and files and all(str(file).endswith(".safetensors") for file in files):
            folder = str(getattr(model.config, "_name_or_path", "") or "")
            setattr(self, LOADING, _Loading(*_checked_files(files, _is_ours(self.quantization_config), folder)))
        try:
            named = name_output_embedding(self, model)
            result = prepare(self, model, checkpoint_files=checkpoint_files, **kwargs)
            if named:
                self.modules_to_not_convert = [name for name in self.modules_to_not_convert if name not in named]
            return result
        except (TypeError, ValueError, AttributeError, KeyError) as error:
            if not getattr(self, LOADING, _Loading(set(), {})).names or isinstance(error, IntScaleError):
                raise
            raise damaged_config(error, str(getattr(model.config, "_name_or_path", "") or "")) from error

    return checked


def name_output_embedding(quantizer: Any, model: Any) -> tuple[str, ...]:
    """Let transformers quantize what ``IntScaleConfig.output_embedding`` asks for: it hands over one layer at a time, without
    its name, so the layer is named in a table of configurations. Returns its name, or nothing.

    Raises:
        ConfigError: the output embedding shares the weight of the input embedding, which no checkpoint stores twice.
    """
    given = quantizer.quantization_config
    chosen = getattr(given, "quant_type", None)
    if quantizer.pre_quantized or not isinstance(chosen, IntScaleConfig) or chosen.output_embedding is None:
        return ()
    # Slow to import.
    from torchao.quantization import FqnToConfig
    from transformers import TorchAoConfig

    head = model.get_output_embeddings()
    names = tuple(name for name, module in model.named_modules() if module is head and head is not None)
    if not names:
        return ()
    if getattr(model.config.get_text_config(decoder=True), "tie_word_embeddings", False):
        raise ConfigError(
            f"IntScaleConfig.output_embedding={chosen.output_embedding!r}: {names[0]} shares the weight of the input embedding, "
            "which can only be divided in a model that is loaded: call from_pretrained without a quantization_config, and then "
            "quantize_(model, config)."
        )
    table = FqnToConfig({**{name: chosen.of_output_embedding for name in names}, "_default": chosen})
    quantizer.quantization_config = TorchAoConfig(table, modules_to_not_convert=given.modules_to_not_convert)
    return names


def _is_ours(quantization_config: Any) -> bool:
    """Whether ``config.json`` says that weights are ours."""
    quant_type = getattr(quantization_config, "quant_type", None)
    kinds = getattr(quant_type, "fqn_to_config", None)
    return any(isinstance(kind, IntScaleConfig) for kind in (kinds.values() if kinds else [quant_type]))


def _checked_files(files: Iterable[Any], ours: bool, folder: str) -> tuple[set[str], dict[str, str]]:
    """Names of all stored tensors, and the table of tied names; both empty where none is ours.

    Raises:
        CheckpointError: a file is not regular or lies elsewhere, or a header is damaged or of a newer release.
    """
    names: set[str] = set()
    quantized: dict[str, tuple[dict, Path]] = {}
    keys: set[str] = set()
    ties: dict[str, str] = {}
    for path in map(Path, files):
        _check_place(path, folder)
        regular_file(path)
        with open_safetensors(path) as file, reading(path):
            metadata, found = file.metadata() or {}, set(file.keys())
        known = ours or ENTRY in metadata or any('"IntScaleTensor"' in text for text in metadata.values())
        if not known:
            continue
        read_entry(metadata, path)  # a newer format before anything else
        stored = tensor_names(metadata, path)
        ties.update(read_ties(metadata, stored, path))
        for name in stored:
            names.add(name)
            header = check_header(metadata[name], f"{path}: {name}")
            if header is not None:
                quantized[name] = header, path
        check_metadata(metadata, path)
        keys |= found
    for name, (header, path) in quantized.items():
        parts = [part for part in header["_tensor_data_names"] if stored_key(name, part) in keys]
        lost = sorted(set(header["_tensor_data_names"]) - set(parts))
        if parts and lost:  # where none is there, the keys have names that transformers changes
            raise CheckpointError(f"{path}: {name}: {lost[0]} is missing; the checkpoint is incomplete.")
    return names, ties


def _check_place(path: Path, folder: str) -> None:
    """Raise ``CheckpointError`` where an index named a file outside of the folder that is loaded, or none."""
    outside = ".." in PurePath(str(path)[len(folder) :] if folder and str(path).startswith(folder) else "").parts
    if folder and Path(folder).is_dir():  # else a hub name, whose files lie in a cache
        outside |= not Path(os.path.abspath(path)).is_relative_to(os.path.abspath(folder))
    if outside:
        raise CheckpointError(f"{path}: the index of the checkpoint names a file outside of its folder.")
    if not path.exists():
        raise CheckpointError(f"{path}: it is missing; the checkpoint is incomplete.")


# --- while and after weights are built --------------------------------------------------------------------------------------


def keeping_errors(convert: Callable) -> Callable:
    """Around ``TorchAoDeserialize.convert``: an error becomes ours, with the parameter's name, and the first one is kept."""

    @functools.wraps(convert)
    def kept(self: Any, input_dict: Any, *args: Any, **kwargs: Any) -> Any:
        loading: Optional[_Loading] = getattr(self.hf_quantizer, LOADING, None)
        try:
            made = convert(self, input_dict, *args, **kwargs)
            _check_shapes(made, kwargs.get("model"))
            return made if loading is None else {name: _in_dtype(t, loading.dtypes(name)) for name, t in made.items()}
        except Exception as error:
            if loading is None or not loading.names:
                raise
            ours = CheckpointError(f"{kwargs.get('full_layer_name')}: {innermost(error)}")
            loading.error = loading.error or ours
            raise ours from error

    return kept


def _in_dtype(tensor: Any, dtype: Optional[torch.dtype]) -> Any:
    """A stored weight that claims the dtype which was asked for, as plain ones are converted to it."""
    if dtype is None or not isinstance(tensor, IntScaleTensor) or tensor.dtype == dtype:
        return tensor
    return tensor.replaced(dtype=dtype)


def _dtypes(load_config: Any) -> Callable[[str], Any]:
    """The dtype of a parameter by its name; some models keep modules in fp32, which they name."""
    asked, kept = getattr(load_config, "dtype", None), dict(getattr(load_config, "dtype_plan", None) or {})
    patterns = [(re.compile(pattern.replace("*", ".*")), dtype) for pattern, dtype in kept.items()]
    return lambda name: next((dtype for pattern, dtype in patterns if pattern.search(name)), asked)


def _check_shapes(made: dict[str, Any], model: Any) -> None:
    """Raise where a stored weight is not of the shape of the parameter whose place it takes."""
    for name, tensor in made.items():
        owner, _, leaf = name.rpartition(".")
        expected = None if model is None else getattr(model.get_submodule(owner), leaf, None)
        if not isinstance(tensor, IntScaleTensor) or expected is None or is_dtensor(expected):
            continue
        if tensor.shape != expected.shape:
            raise CheckpointError(
                f"it has shape {tuple(tensor.shape)} where config.json makes the model's {tuple(expected.shape)}: one of them "
                "is not this model's."
            )


def checking_result(load: Callable) -> Callable:
    """Around the function that fills the model: raises what was kept, and where stored weights are missing after it."""

    @functools.wraps(load)
    def checked(model: Any, state_dict: Any, load_config: Any, *args: Any, **kwargs: Any) -> Any:
        quantizer = load_config.hf_quantizer
        loading: Optional[_Loading] = getattr(quantizer, LOADING, None)
        if loading is None and not (
            getattr(quantizer, "pre_quantized", False) and getattr(quantizer, "metadata", None)
        ):
            _check_not_quantized(state_dict)
        if loading is not None:
            loading.dtypes = _dtypes(load_config)
        result = load(model, state_dict, load_config, *args, **kwargs)
        _forget_deserializing(model)
        if loading is not None:
            _tie(model, loading.ties, renaming(model, load_config) if loading.ties else str, result[0])
            _check_report(loading, result[0], model, getattr(load_config, "ignore_mismatched_sizes", False))
        return result

    return checked


def _tie(model: Any, ties: dict[str, str], rename: Callable[[str], str], report: Any) -> None:
    """Give the names that shared a stored weight one parameter again; what a model lacks was left out by its architecture."""
    missing: set[str] = getattr(report, "missing_keys", set())
    for name, stored in ties.items():
        name, stored = rename(name), rename(stored)
        (owner, _, leaf), (source, _, of_source) = name.rpartition("."), stored.rpartition(".")
        modules = dict(model.named_modules(remove_duplicate=False))
        if owner in modules and source in modules and isinstance(getattr(modules[source], of_source), IntScaleTensor):
            setattr(modules[owner], leaf, getattr(modules[source], of_source))
            missing.discard(name)


def _check_report(loading: _Loading, report: Any, model: Any, other_sizes: bool) -> None:
    """Raise what was kept, and where transformers reports tensors as missing or of another shape that were stored."""
    if loading.error is not None:
        raise loading.error
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    prefix = (
        f"{getattr(model, 'base_model_prefix', '')}."  # a model without its head is stored with, or the other way round
    )
    names = {*loading.names, *(n.removeprefix(prefix) for n in loading.names), *(prefix + n for n in loading.names)}
    if missing := sorted((names & set(getattr(report, "missing_keys", ()))) - tied):
        raise CheckpointError(
            f"{missing[0]}: its data are missing ({len(missing)} such tensors); the checkpoint is incomplete."
        )
    others = [] if other_sizes else sorted(map(str, getattr(report, "mismatched_keys", None) or ()))
    if loading.names and others:
        raise CheckpointError(
            f"{others[0]}: its shape is not that of the model's parameter ({len(others)} such tensors); the checkpoint is "
            "damaged, or config.json is another model's."
        )


def _check_not_quantized(state_dict: Any) -> None:
    """Raise where quantized weights would be left lying, and random ones taken instead."""
    for key in state_dict:
        found = _PART.search(key)
        if found and f"{key[: found.start()]}._{found[1]}_per_tensor_scale" in state_dict:
            raise CheckpointError(
                f"{key[: found.start()]}.{found[1]} is stored quantized, but config.json has no quantization_config that says "
                "so: the file was changed after it was saved; get it again, or save the model again."
            )


def _forget_deserializing(model: Any) -> None:
    """A loaded model keeps how its weights were put together, to take them apart when it is saved.

    Packed weights are not taken apart, and there is nothing that would: transformers would fail where it saves. What joins
    experts and the like stays.
    """
    conversions = getattr(model, "_weight_conversions", None)
    if conversions:
        model._weight_conversions = [known for known in conversions if not _deserializes(known)]


def _deserializes(conversion: Any) -> bool:
    operations: Optional[list] = getattr(conversion, "operations", None)
    return any(type(operation).__name__ == "TorchAoDeserialize" for operation in operations or ())


def renaming(model: Any, load_config: Any) -> Callable[[str], str]:
    """What transformers calls the parameter that it fills from a key of the file."""
    from transformers.core_model_loading import WeightConverter, WeightRenaming  # optional

    rename_source_key = RENAMING.get()
    mapping = load_config.weight_mapping or []
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    own = model.state_dict()
    return lambda key: rename_source_key(key, renamings, converters, model.base_model_prefix, own)[0]
