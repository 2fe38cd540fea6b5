"""Reading a quantized checkpoint lazily: tensors stay in their files until the layer that they belong to is built."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Optional, Union

import torch
from torch import Tensor

from ..errors import CheckpointError, ConfigError
from ..tensors.intscale_tensor import IntScaleTensor
from .awq import AwqFormat
from .compressed import CompressedTensorsFormat
from .gptq import GptqFormat
from .layers import LayerFormat, ScaleOptions, to_intscale
from .report import ImportReport

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
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
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(str(path), revision=revision, allow_patterns=["*.json", "*.safetensors"]))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object.

    Raises:
        CheckpointError: it does not.
    """
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: it holds no JSON object.")
    return content


def quantization_config(folder: Path) -> dict[str, Any]:
    """How the checkpoint says that it is quantized: ``config.json``, or AutoGPTQ's own file.

    Raises:
        ConfigError: nothing says it.
    """
    config = read_json(folder / "config.json").get("quantization_config")
    if config is None and (folder / "quantize_config.json").is_file():
        config = {"quant_method": "gptq", **read_json(folder / "quantize_config.json")}
    if not isinstance(config, dict) or not config.get("quant_method"):
        raise ConfigError(
            f"{folder}: config.json has no quantization_config with a quant_method: the model is not quantized; load it "
            "with transformers and use quantize_."
        )
    return config


def layer_format(config: Mapping[str, Any]) -> LayerFormat:
    """The reader for a ``quantization_config``.

    Raises:
        ConfigError: there is none, or it cannot read this variant.
    """
    method = config["quant_method"]
    if method not in FORMATS:
        raise ConfigError(
            f"quant_method={method!r} cannot be imported: {', '.join(map(repr, (*FORMATS, 'torchao')))} can. Load the model "
            "in high precision and use quantize_."
        )
    return FORMATS[method](config)


class CheckpointFiles:
    """The safetensors files of a folder, read tensor by tensor.

    Raises:
        CheckpointError: no safetensors files, an index that names missing files, or unreadable ones.
    """

    def __init__(self, folder: Path):
        from safetensors import SafetensorError, safe_open

        names = [SINGLE] if (folder / SINGLE).is_file() else sorted(set(self._index(folder).values()))
        self._files: dict[str, Any] = {}
        for name in names:
            try:
                file = safe_open(folder / name, framework="pt")
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"{folder / name}: {error}") from error
            self._files.update(dict.fromkeys(file.keys(), file))

    @staticmethod
    def _index(folder: Path) -> dict[str, str]:
        if not (folder / INDEX).is_file():
            raise CheckpointError(f"{folder}: neither {SINGLE} nor {INDEX} is there.")
        found = read_json(folder / INDEX).get("weight_map")
        if not isinstance(found, dict) or not all(isinstance(name, str) for name in found.values()):
            raise CheckpointError(f"{folder / INDEX}: it has no weight_map.")
        return found

    def __iter__(self):
        return iter(self._files)

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def read(self, name: str) -> Tensor:
        """One tensor, on the CPU."""
        from safetensors import SafetensorError

        try:
            return self._files[name].get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{name}: {error}") from error


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
                tensor, row = to_intscale(self._reader.read(name, tensors), name, self._dtype, self._options)
            except BaseException as error:
                self.error = self.error or error
                raise
            self.report.layers.append(row)
            if tensor.input_order is not None:
                self.ordered.append(name)
        return tensor
