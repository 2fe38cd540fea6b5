"""Reading a quantized checkpoint lazily: tensors stay in their files until the layer that they belong to is built."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Optional, Union

import torch
from torch import Tensor

from ..errors import CheckpointError, ConfigError, IntScaleError
from ..tensors.intscale_tensor import IntScaleTensor
from ..tensors.stored_files import check_described, first_line, open_safetensors, read_json, reading, weight_files
from .awq import AwqFormat
from .compressed import CompressedTensorsFormat
from .gptq import GptqFormat
from .layers import LayerFormat, ScaleOptions, to_intscale
from .report import ImportReport

_EXPERT = re.compile(r"\.experts\.\d+\.")
FORMATS: dict[str, Callable[[Mapping[str, Any]], LayerFormat]] = {
    "gptq": GptqFormat,
    "awq": AwqFormat,
    "compressed-tensors": CompressedTensorsFormat,
}


def checkpoint_folder(path: Union[str, Path], revision: Optional[str] = None) -> Path:
    """The folder of a checkpoint: itself, or the downloaded copy of a hub name."""
    folder = Path(path)
    if folder.is_dir():
        return folder
    if folder.is_absolute() or not 1 <= str(path).count("/") + 1 <= 2:
        raise FileNotFoundError(f"{path} is not a folder, and no hub name either.")
    # Slow to import.
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(str(path), revision=revision, allow_patterns=["*.json", "*.safetensors"]))


def quantization_config(folder: Path) -> dict[str, Any]:
    """How the checkpoint says that it is quantized: ``config.json``, or AutoGPTQ's own file.

    Raises:
        ConfigError: nothing says it.
        CheckpointError: it is no object, or one without a method.
    """
    config = read_json(folder / "config.json").get("quantization_config")
    if config is None and (folder / "quantize_config.json").is_file():
        config = {"quant_method": "gptq", **read_json(folder / "quantize_config.json")}
    if config is None:
        raise ConfigError(
            f"{folder}: config.json has no quantization_config with a quant_method: the model is not quantized; load it "
            "with transformers and use quantize_."
        )
    return check_described(config, folder)


def layer_format(config: Mapping[str, Any]) -> LayerFormat:
    """The reader for a ``quantization_config``.

    Raises:
        ConfigError: there is none, or it cannot read this variant.
    """
    method = config["quant_method"]
    if not isinstance(method, str) or method not in FORMATS:
        raise ConfigError(
            f"quant_method={method!r} cannot be imported: {', '.join(map(repr, (*FORMATS, 'torchao')))} can. Load the model "
            "in high precision and use quantize_."
        )
    try:
        return FORMATS[method](config)
    except (
        TypeError,
        AttributeError,
        ValueError,
        KeyError,
        RecursionError,
        re.error,
    ) as error:  # values of other types
        if isinstance(error, IntScaleError):
            raise
        raise ConfigError(
            f"quantization_config cannot be read: {first_line(error)}: a value in it has another type than {method} writes."
        ) from error


class CheckpointFiles:
    """The safetensors files of a folder, read tensor by tensor; nothing outside of the folder is opened.

    Raises:
        CheckpointError: no safetensors files, an index that names missing files or files elsewhere, or unreadable ones.
    """

    def __init__(self, folder: Path):
        self._files: dict[str, Any] = {}
        for path in weight_files(folder):
            file = open_safetensors(path)
            self._files.update(dict.fromkeys(file.keys(), file))

    def __iter__(self):
        return iter(self._files)

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def read(self, name: str) -> Tensor:
        """One tensor, on the CPU."""
        with reading(name):
            return self._files[name].get_tensor(name)


class StoredTensor:
    """A tensor that is read when transformers indexes it, as it does with slices of safetensors files."""

    def __init__(self, files: CheckpointFiles, name: str):
        self._files, self._name = files, name

    def __getitem__(self, index: Any) -> Tensor:
        return self._files.read(self._name)[index]


class StoredLayer:
    """A quantized weight that is unpacked and converted when transformers indexes it."""

    def __init__(self, layers: StoredLayers, name: str, parts: dict[str, str]):
        self._layers, self._name, self._parts = layers, name, parts

    def __getitem__(self, index: Any) -> IntScaleTensor:
        assert index is Ellipsis
        return self._layers.build(self._name, self._parts)


class StoredLayers:
    """The state dict of a quantized checkpoint under the names of the plain model, each entry read on demand.

    transformers reads in threads and only logs errors of single tensors. Layers are built one at a time all the same,
    so that the temporaries of one are all there are; the first error is kept, to be raised at the end.

    Args:
        files: the stored tensors.
        reader: of the checkpoint's format.
        options: how scales become integers.
        dtype: the dtype that weights claim.
        device: where they are built.

    Raises:
        CheckpointError: a layer lacks tensors.
        ConfigError: some experts of a layer are quantized and others are not.
    """

    def __init__(
        self,
        files: CheckpointFiles,
        reader: LayerFormat,
        options: ScaleOptions,
        dtype: torch.dtype,
        device: torch.device,
    ):
        self._files, self._reader, self._options, self._dtype, self._device = files, reader, options, dtype, device
        self._lock = threading.Lock()
        self.report = ImportReport()
        self.error: Optional[BaseException] = None
        self.ordered: list[str] = []  # layers that have an input order
        self.layers = self._group()
        if not self.layers:
            raise CheckpointError(
                f"no tensor of the checkpoint ends in .{reader.required[0]}: nothing is quantized in it."
            )
        self._check_experts()

    def _group(self) -> dict[str, dict[str, str]]:
        """Names of the stored tensors of every quantized layer, by the last part of the name."""
        known = {*self._reader.required, *self._reader.optional}
        groups: dict[str, dict[str, str]] = {}
        for key in self._files:
            layer, _, part = key.rpartition(".")
            if part in known:
                groups.setdefault(layer, {})[part] = key
        groups = {layer: parts for layer, parts in groups.items() if set(parts) != {"weight"}}
        for layer, parts in groups.items():
            missing = [part for part in self._reader.required if part not in parts]
            if missing:
                raise CheckpointError(f"{layer}: {missing[0]} is missing; the checkpoint is incomplete.")
        return groups

    def _check_experts(self) -> None:
        """Raise ``ConfigError`` where some experts of a layer are quantized and others are not: they cannot be stacked."""
        quantized = {_EXPERT.sub(".experts.*.", name): name for name in self.layers if _EXPERT.search(name)}
        for key in self._files:
            layer = key.removesuffix(".weight")
            other = quantized.get(_EXPERT.sub(".experts.*.", layer))
            if layer != key and layer not in self.layers and other is not None and _EXPERT.search(layer):
                raise ConfigError(
                    f"{layer} is not quantized, but {other} is, and the experts of a layer become one stack: quantize all "
                    "experts of a layer or none (take it off the list of ignored modules), or load the model in high "
                    "precision and use quantize_."
                )

    def state_dict(self) -> dict[str, Any]:
        """Entries that transformers reads as it reads slices of safetensors files."""
        used = {key for parts in self.layers.values() for key in parts.values()}
        state: dict[str, Any] = {key: StoredTensor(self._files, key) for key in self._files if key not in used}
        for layer, parts in self.layers.items():
            state[f"{layer}.weight"] = StoredLayer(self, layer, parts)
        return state

    def is_zero_bias(self, key: str) -> bool:
        """Whether a stored tensor is a bias of zeros, as AutoGPTQ writes for layers that have none."""
        return key.endswith(".bias") and key in self._files and not bool(self._files.read(key).any())

    def build(self, name: str, parts: Mapping[str, str]) -> IntScaleTensor:
        """Unpack and convert one layer; the first error is kept."""
        with self._lock:
            try:
                tensors = {part: self._files.read(key).to(self._device) for part, key in parts.items()}
                with reading(name):
                    layer = self._reader.read(name, tensors)
                tensor, row = to_intscale(layer, name, self._dtype, self._options)
            except BaseException as error:
                self.error = self.error or error
                raise
            self.report.layers.append(row)
            if layer.note:
                self.report.notes.append(f"{name}: {layer.note}")
            if tensor.input_order is not None:
                self.ordered.append(name)
        return tensor
