"""Adapters of finished blocks on disk, so that an interrupted initialization goes on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Optional, Union

import torch
from torch import Tensor, nn

from ..calibration.capture import digest_of
from ..calibration.resume import Checkpoint
from ..errors import CheckpointError
from ..tensors.intscale_tensor import IntScaleTensor
from ..tensors.stored_files import first_line, regular_file, whole_file


class _Base:
    """The parameters of a model without its adapters, packed ones as their codes: those that nothing here changes."""

    def __init__(self, model: nn.Module):
        self.model = model

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Names and values."""
        for name, value in self.model.named_parameters():
            if "lora_" not in name:
                yield name, value.qdata if isinstance(value, IntScaleTensor) else value


class FinishedBlocks:
    """A folder with one file for each finished block; without a folder nothing is stored."""

    def __init__(self, folder: Optional[Path]):
        self.folder = folder

    @classmethod
    def open(cls, folder: Union[str, Path, None], options: Any, batches: list, model: nn.Module) -> FinishedBlocks:
        """Open or create ``folder``.

        Raises:
            CalibrationError: it holds blocks that were made with other arguments, other data or another model.
        """
        if folder is None:
            return cls(None)
        return cls(Checkpoint.open(folder, options, digest_of(batches), _Base(model)).folder)

    def load(self, name: str, parameters: Mapping[str, Tensor]) -> bool:
        """Read the parameters of a block, in place; False where it is not finished.

        Raises:
            CheckpointError: its file is damaged.
        """
        if self.folder is None or not (self.folder / f"{name}.pt").is_file():
            return False
        path = regular_file(self.folder / f"{name}.pt")
        try:
            stored = torch.load(path, map_location="cpu", weights_only=True)
            with torch.no_grad():
                for key, parameter in parameters.items():
                    parameter.copy_(stored[key])
        except Exception as error:  # whatever torch makes of a damaged file
            raise CheckpointError(
                f"{path}: it cannot be read ({first_line(error)}): delete it, and the block is learned again."
            ) from error
        return True

    def save(self, name: str, parameters: Mapping[str, Tensor]) -> None:
        """Store a finished block; the file appears under its name once it is whole."""
        if self.folder is not None:
            with whole_file(self.folder / f"{name}.pt") as part:
                torch.save({key: parameter.detach().cpu() for key, parameter in parameters.items()}, part)
