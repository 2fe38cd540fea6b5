"""Finished blocks of a calibration on disk, so that an interrupted one goes on."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional, Union

import torch
from torch import Tensor, nn

from ..config import IntScaleConfig
from ..errors import CalibrationError, CheckpointError
from ..tensors.intscale_tensor import IntScaleTensor
from ..tensors.stored_files import first_line, read_json, regular_file, whole_file
from .solve import Codes, FloatScaleWeight, frozen, set_integer

STATE = "calibration.json"


@dataclass
class StoredBlock:
    """Parameters of a finished block by name, weights with float scales as the fields of ``Codes``; which are quantized."""

    parameters: dict[str, Any]
    weights: list[str]

    def apply(self, block: nn.Module) -> None:
        """Give the block its parameters."""
        for name, value in self.parameters.items():
            owner, _, leaf = name.rpartition(".")
            module = block.get_submodule(owner)
            device = getattr(module, leaf).device
            if isinstance(value, dict):
                transposed = value.pop("transposed")
                config = IntScaleConfig(**value.pop("config"))
                tensors = {part: value.pop(part).to(device) for part in ("codes", "steps")}
                codes = Codes(**tensors, config=config, **value)
                setattr(module, leaf, frozen(FloatScaleWeight.of(codes, transposed)))
            elif name in self.weights:
                set_integer(module, leaf, value.to(device))
            else:
                setattr(module, leaf, frozen(value.to(device)))


class Checkpoint:
    """A folder with one file for each finished block, and what they were made with."""

    def __init__(self, folder: Path):
        self.folder = folder

    @classmethod
    def open(cls, folder: Union[str, Path], config: Any, data: str, model: Any) -> Checkpoint:
        """Open or create ``folder``.

        Args:
            folder: where to.
            config: what the blocks are made with; its ``to_dict`` says it in plain values.
            data: a fingerprint of the data.
            model: a model, or something else with ``named_parameters``.

        Raises:
            CalibrationError: it holds blocks that were made with another configuration, other data or another model.
        """
        folder = Path(folder)
        now = {"configuration": config.to_dict(), "data": data, "model": _fingerprint(model)}
        path = folder / STATE
        if path.is_file():
            before = read_json(path)
            for part, value in now.items():
                if before.get(part) != value:
                    raise CalibrationError(
                        f"{folder} holds blocks of a calibration with another {part}: delete it, or use another checkpoint_dir."
                    )
        else:
            folder.mkdir(parents=True, exist_ok=True)
            with whole_file(path) as file:
                file.write_text(json.dumps(now, indent=1))
        return cls(folder)

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.pt"

    def load(self, name: str) -> Optional[StoredBlock]:
        """The block's parameters, or None where it is not finished.

        Raises:
            CheckpointError: its file is damaged.
        """
        if not self._path(name).is_file():
            return None
        path = regular_file(self._path(name))
        try:
            stored = torch.load(path, map_location="cpu", weights_only=True)
            return StoredBlock(dict(stored["parameters"]), list(stored["weights"]))
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error} Delete the file, and the block is calibrated again.") from error
        except Exception as error:  # whatever torch makes of a damaged file
            raise CheckpointError(
                f"{path}: it cannot be read ({first_line(error)}): delete it, and the block is calibrated again."
            ) from error

    def save(self, name: str, block: nn.Module) -> None:
        """Store a finished block; the file appears under its name once it is whole."""
        parameters: dict[str, Any] = {}
        weights = []
        for key, value in block.named_parameters():
            if isinstance(value, FloatScaleWeight):
                stored = {**vars(value.source), "config": dict(vars(value.source.config))}
                stored |= {part: stored[part].cpu() for part in ("codes", "steps")}
                parameters[key] = {**stored, "transposed": value.kept_transposed}
            else:
                parameters[key] = value.detach().cpu()
            if isinstance(value, (FloatScaleWeight, IntScaleTensor)):
                weights.append(key)
        with whole_file(self._path(name)) as part:
            torch.save({"parameters": parameters, "weights": weights}, part)


def _fingerprint(model: Any) -> str:
    """Of the structure and of a sample of every parameter."""
    total = hashlib.sha256()
    for name, value in model.named_parameters():
        total.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
        if isinstance(value, Tensor) and value.device.type != "meta":
            total.update(value.detach().flatten()[:: max(1, value.numel() // 64)].float().cpu().numpy().tobytes())
    return total.hexdigest()
