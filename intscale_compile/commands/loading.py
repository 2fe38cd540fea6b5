"""Models by folder or hub name, in whatever form they are stored: plain, ours, or quantized by another tool."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Optional, Union

import torch

from ..errors import CheckpointError, ConfigError, IntScaleError
from ..importing import ImportReport
from ..importing.checkpoint_files import FORMATS, quantization_config
from ..importing.gguf import is_gguf
from ..importing.model import architecture, from_quantized
from ..importing.torchao_tensors import convert_from_torchao
from ..tensors.intscale_tensor import IntScaleTensor
from ..tensors.stored_files import INDEX, SINGLE, first_line, read_json, reading, weight_files

PathLike = Union[str, Path]
PATTERNS = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
NOT_NEEDED = ["original/*", "consolidated*"]


def source_folder(name: PathLike, *, weights: bool = True) -> Path:
    """The folder of a model: itself, or the downloaded copy of a hub name; a GGUF file stands for itself.

    Args:
        name: folder, GGUF file, or hub name such as ``Qwen/Qwen3-0.6B``.
        weights: also download weights, of a hub name.

    Raises:
        ConfigError: there is no such folder, it holds no ``config.json``, or the hub has no such model or cannot be reached.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ConfigError(f"{name}: this folder has no config.json: give the folder of a transformers model.")
        return folder
    if folder.is_file() and is_gguf(folder):
        return folder
    if folder.exists():
        raise ConfigError(f"{name} is not a folder: give the folder of a transformers model, or its hub name.")
    if _looks_local(str(name)):
        raise ConfigError(f"{name}: there is no such folder: give the folder of a transformers model, or its hub name.")
    # Slow to import.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    patterns = PATTERNS if weights else ["config.json"]
    try:
        return Path(snapshot_download(str(name), allow_patterns=patterns, ignore_patterns=NOT_NEEDED))
    except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
        raise ConfigError(
            f"{name}: there is no such folder, and it could not be had from the hub either ({first_line(error)})."
        ) from error


def _looks_local(name: str) -> bool:
    """Whether a name means a path: ``owner/model`` and ``model`` may be hub names, unless they begin in a folder here."""
    first, *rest = Path(name).parts or ("",)
    return (
        name.startswith((".", "~", "/")) or name.endswith("/") or len(rest) > 1 or (rest != [] and Path(first).is_dir())
    )


def stored_method(folder: Path) -> Optional[str]:
    """How a checkpoint was quantized: ``"gptq"``, ``"gguf"``, ``"torchao"`` (ours too), ...; None: it was not."""
    if is_gguf(folder):
        return "gguf"
    config = read_json(folder / "config.json")
    if config.get("quantization_config") is None and not (folder / "quantize_config.json").is_file():
        return None
    return quantization_config(folder)["quant_method"]


def stored_by_us(folder: Path) -> bool:
    """Whether the quantized checkpoint in a folder holds weights of ours."""
    return not is_gguf(folder) and '"IntScaleConfig"' in json.dumps(
        read_json(folder / "config.json").get("quantization_config")
    )


def load_model(
    name: PathLike,
    *,
    dtype: Optional[torch.dtype] = None,
    device: Union[str, torch.device] = "cpu",
    **importing: Any,
) -> tuple[Any, Optional[ImportReport]]:
    """A transformers model, in evaluation mode and without gradients, whatever it was quantized with.

    Args:
        name: folder, GGUF file or hub name.
        dtype: of the activations and of weights that are not quantized; the default is the checkpoint's.
        device: where the model ends up.
        importing: ``scale_bits`` and ``amplifier`` for a checkpoint of another tool, as for ``from_quantized``.

    Returns:
        The model, and the report of the import where another tool quantized it.

    Raises:
        ConfigError: there is no such model, or transformers does not know its architecture.
        CheckpointError: weights are missing or damaged.
    """
    folder = source_folder(name)
    method, report = stored_method(folder), None
    if method in (*FORMATS, "gguf"):
        model, report = from_quantized(folder, dtype=dtype, device=device, **importing)
    else:
        model = _from_pretrained(folder, dtype).to(device)
        if method is not None and not is_quantized(model):
            report = convert_from_torchao(model, **importing)
    return model.eval().requires_grad_(False), report


def is_quantized(model: torch.nn.Module) -> bool:
    """Whether a model holds weights of ours."""
    return any(isinstance(parameter, IntScaleTensor) for parameter in model.parameters())


def _from_pretrained(folder: Path, dtype: Optional[torch.dtype]) -> Any:
    model_class = architecture(_config(folder))
    if (folder / SINGLE).exists() or (folder / INDEX).exists():
        weight_files(folder)  # regular files of this folder: transformers would wait for a pipe, and follow ../
    with reading(folder):
        model, info = model_class.from_pretrained(folder, dtype=dtype or "auto", output_loading_info=True)
    if missing := sorted(info["missing_keys"]):
        raise CheckpointError(
            f"{folder}: {len(missing)} weights are missing, first {missing[0]}: the checkpoint is incomplete."
        )
    return model


def _config(folder: Path) -> Any:
    # Slow to import.
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder)
    except IntScaleError:
        raise
    except Exception as error:  # whatever wrong types in the file led to
        raise ConfigError(f"{folder}: transformers cannot read its config.json: {first_line(error)}") from error


def meta_model(name: PathLike) -> Any:
    """A plain model on the meta device, from ``config.json`` alone: shapes and dtypes, no weights.

    Raises:
        ConfigError: there is no such model, transformers does not know its architecture, or it is quantized already.
    """
    folder = source_folder(name, weights=False)
    if (method := stored_method(folder)) is not None:
        raise ConfigError(f"{name} is quantized already ({method}): inspect it with its weights.")
    config = _config(folder)
    with torch.device("meta"):
        return architecture(config)._from_config(config, dtype=getattr(config, "dtype", None) or torch.float32).eval()


def load_tokenizer(name: PathLike) -> Any:
    """The tokenizer of a model, by folder or hub name.

    Raises:
        ConfigError: there is none.
    """
    # Slow to import.
    from transformers import AutoTokenizer

    folder = source_folder(name)
    where = (folder.parent, {"gguf_file": folder.name}) if is_gguf(folder) else (folder, {})
    try:
        return AutoTokenizer.from_pretrained(where[0], **where[1])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{name}: it has no tokenizer that transformers can read: {first_line(error)}") from error


def weight_bytes(folder: Path) -> int:
    """Bytes of the weight files of a transformers folder, or of a GGUF file."""
    if folder.is_file():
        return folder.stat().st_size
    found = list(folder.glob("model*.safetensors")) or list(folder.glob("pytorch_model*.bin"))
    return sum(path.stat().st_size for path in found)


def usable_device(name: str) -> torch.device:
    """``"auto"`` (a GPU where there is one), or a device by name.

    Raises:
        ConfigError: it cannot be used here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = "PyTorch sees no GPU" if name.startswith("cuda") else first_line(error)
        raise ConfigError(
            f"device={name!r} cannot be used here ({reason}): use cpu, or see intscale doctor."
        ) from error
