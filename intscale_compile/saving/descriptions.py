"""The ``quantization_config`` of a folder of ours: one that cannot be used ends in our error, before transformers fails with it.

What wraps transformers' functions here takes part only where a folder holds weights of ours. ``shard_reading`` installs it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, Optional

from ..errors import CheckpointError, IntScaleError
from ..tensors.stored_files import check_described, first_line, open_safetensors, weight_files
from .integrity import ENTRY, MEND


def checking_folder(get_config_dict: Callable) -> Callable:
    """Around ``PreTrainedConfig.get_config_dict``: the same where transformers fails before it asks for a quantizer.

    That is where the entry is no object: a list, a text, a number.
    """

    @functools.wraps(get_config_dict)
    def checked(cls: Any, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        # taken first: transformers takes entries out of its arguments
        folder = Path(str(pretrained_model_name_or_path), str(kwargs.get("subfolder") or ""))
        found = get_config_dict(cls, pretrained_model_name_or_path, *args, **kwargs)
        stored = found[0].get("quantization_config") if isinstance(found[0], dict) else None
        if stored is not None and folder.is_dir():
            _check_described(stored, folder)
        return found

    return checked


def checking_config(get_quantizer: Callable) -> Callable:
    """Around ``get_hf_quantizer``: a ``quantization_config`` that cannot be read, of weights that are ours, is our error."""

    @functools.wraps(get_quantizer)
    def checked(config: Any, quantization_config: Any, *args: Any, **kwargs: Any) -> Any:
        stored = getattr(config, "quantization_config", None)
        try:
            return get_quantizer(config, quantization_config, *args, **kwargs)
        except IntScaleError:
            raise
        except Exception as error:
            folder = str(getattr(config, "_name_or_path", "") or "")
            if (
                isinstance(stored, dict)
                and not _parses(stored)
                and ("IntScaleConfig" in str(stored) or _has_ours(folder))
            ):
                raise damaged_config(error, folder) from error
            raise

    return checked


def _check_described(stored: Any, folder: Path) -> None:
    """Raise ``CheckpointError`` where weights of ours are described by something that cannot be used."""
    named = isinstance(stored, dict) and isinstance(stored.get("quant_method"), str)
    if named and stored["quant_method"] != "torchao":
        return
    error = _parse_error(stored)
    if error is None or not _has_ours(str(folder)):
        return
    check_described(stored, folder)
    raise damaged_config(error, str(folder)) from error


def damaged_config(error: Exception, folder: str) -> CheckpointError:
    """The error of a ``quantization_config`` that something failed with."""
    what = f"{type(error).__name__}: {first_line(error)}"
    return CheckpointError(f"{folder}: config.json: its quantization_config cannot be used ({what}); {MEND}.")


def _parses(stored: dict) -> bool:
    return stored.get("quant_method") == "torchao" and _parse_error(stored) is None


def _parse_error(stored: Any) -> Optional[Exception]:
    """What transformers fails with where it reads the description of weights of ours; None: nothing."""
    from transformers import TorchAoConfig  # optional

    try:
        TorchAoConfig.from_dict(dict(stored))
    except Exception as error:  # whatever wrong types lead to
        return error
    return None


def _has_ours(folder: str) -> bool:
    """Whether a folder holds weights that this package stored."""
    try:
        for path in weight_files(Path(folder)):
            with open_safetensors(path) as file:
                metadata = file.metadata() or {}
            if ENTRY in metadata or any('"IntScaleTensor"' in text for text in metadata.values()):
                return True
    except (IntScaleError, OSError):  # no folder, or none that can be read
        pass
    return False
