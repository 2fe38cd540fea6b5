"""GGUF files of llama.cpp: 4-bit codes as they are, their scales and minima as integers; wider types as W8A8.

transformers reads the file in floating point (configuration, names, what it permutes), and the stored blocks of each 4-bit
weight are then matched with the rows that it made of them. Blocks of ``K`` input features, little-endian:

    Q4_0  32: fp16 d, 16 bytes             w = d * (q - 8)
    Q4_1  32: fp16 d, fp16 m, 16 bytes     w = d * q + m
    Q4_K  256: fp16 d, fp16 dmin, 12 bytes (8 scales and 8 minima of 6 bits), 128 bytes
                                           w = d * scale * q - dmin * minimum, a scale and a minimum for each 32

In Q4_0 and Q4_1 byte ``j`` holds feature ``j`` in its low and ``j + 16`` in its high nibble; in Q4_K each 32 bytes hold 32
features in their low nibbles and the next 32 in their high ones.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Optional, Union

import numpy as np
import torch
from torch import Tensor, nn

from ..config import IntScaleConfig
from ..errors import CheckpointError, ConfigError
from ..tensors.intscale_tensor import IntScaleTensor
from ..tensors.selection import mark_loaded
from ..tensors.stored_files import first_line, reading
from .layers import QuantizedLayer, ScaleOptions, decibels, headroom_bits, to_intscale
from .report import ConvertedLayer, ImportReport

SUFFIX = ".gguf"
FLOATS = ("F64", "F32", "F16", "BF16")
WIDE = ("Q8_0", "Q8_1", "Q8_K", "Q5_0", "Q5_1", "Q5_K", "Q6_K")
METADATA_ARCHITECTURE = "general.architecture"


class Blocks(NamedTuple):
    """A stored weight in groups of 32: unsigned codes uint8 ``[N, K]``, scales and minima fp32 ``[N, K / 32]``."""

    codes: Tensor
    scale: Tensor
    minimum: Tensor

    def dense(self) -> Tensor:
        """The weight as llama.cpp and transformers compute it, fp32 ``[N, K]``."""
        scale, minimum = (part.repeat_interleave(32, dim=1) for part in (self.scale, self.minimum))
        return scale * self.codes.float() + minimum

    def layer(self, kind: str) -> QuantizedLayer:
        """The same weight with codes around 0."""
        signed = (self.codes.to(torch.int16) - 8).to(torch.int8)
        minimum = None if kind == "Q4_0" else self.minimum + 8 * self.scale.double()
        return QuantizedLayer(kind, signed, self.scale, None, 32, minimum=minimum)


def _halves(data: np.ndarray) -> Tensor:
    """Little-endian fp16 as fp32, the last dimension of bytes taken by twos."""
    return torch.from_numpy(np.ascontiguousarray(data).view("<f2").astype(np.float32))


def _nibbles(data: np.ndarray, run: int) -> Tensor:
    """Codes uint8 ``[..., 2 B]`` of bytes ``[..., B]``: ``run`` low nibbles, then the ``run`` high ones of the same bytes."""
    runs = torch.from_numpy(np.ascontiguousarray(data)).unflatten(-1, (-1, run))
    return torch.stack((runs & 15, runs >> 4), dim=-2).flatten(-3)


def _q4_0(data: np.ndarray) -> Blocks:
    blocks = data.reshape(data.shape[0], -1, 18)
    scale = _halves(blocks[..., :2])[..., 0]
    return Blocks(_nibbles(blocks[..., 2:], 16).flatten(1), scale, -8 * scale)


def _q4_1(data: np.ndarray) -> Blocks:
    blocks = data.reshape(data.shape[0], -1, 20)
    scale, minimum = _halves(blocks[..., :4]).unbind(-1)
    return Blocks(_nibbles(blocks[..., 4:], 16).flatten(1), scale.contiguous(), minimum.contiguous())


def _q4_k(data: np.ndarray) -> Blocks:
    blocks = data.reshape(data.shape[0], -1, 144)
    scale, minimum = _halves(blocks[..., :4]).unbind(-1)
    first, second, third = torch.from_numpy(np.ascontiguousarray(blocks[..., 4:16])).unflatten(-1, (3, 4)).unbind(-2)
    # Of the later four of each kind, the two high bits are those of the first eight bytes.
    scales = torch.cat([first & 63, (third & 15) | (first >> 6 << 4)], dim=-1).float()
    minima = torch.cat([second & 63, (third >> 4) | (second >> 6 << 4)], dim=-1).float()
    codes = _nibbles(blocks[..., 16:], 32).flatten(1)
    return Blocks(codes, (scale[..., None] * scales).flatten(1), -(minimum[..., None] * minima).flatten(1))


READERS: dict[str, Callable[[np.ndarray], Blocks]] = {"Q4_0": _q4_0, "Q4_1": _q4_1, "Q4_K": _q4_k}


def is_gguf(path: Union[str, Path]) -> bool:
    """Whether a name is that of a GGUF file."""
    return str(path).lower().endswith(SUFFIX)


class _File:
    """Tensors of a GGUF file by the names that transformers gives them."""

    def __init__(self, path: Path, layers: int):
        gguf = _library(path)
        with reading(path):
            reader = gguf.GGUFReader(path)
            architecture = reader.fields[METADATA_ARCHITECTURE].contents()
        known = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}
        if architecture not in known:
            raise ConfigError(f"{path}: the package gguf does not know the architecture {architecture!r}: update it.")
        self._names = gguf.get_tensor_name_map(known[architecture], layers)
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}

    def find(self, parameter: str) -> Optional[Any]:
        """The stored tensor of a parameter, or None."""
        return self._tensors.get(self._names.get_name(parameter, try_suffixes=(".weight", ".bias")) or "")


def _library(path: Path) -> Any:
    try:
        # Optional.
        import gguf
    except ImportError as error:
        raise ConfigError(f"{path}: reading GGUF files needs the package gguf: pip install gguf.") from error
    return gguf


def from_gguf(
    path: Union[str, Path],
    options: ScaleOptions,
    dtype: Optional[torch.dtype] = None,
    device: Union[str, torch.device] = "cpu",
) -> tuple[nn.Module, ImportReport]:
    """A model of a GGUF file. The whole of it is in memory in fp32 for a while.

    Linear layers of 4-bit types keep their codes, those of 5 to 8 bits become W8A8 per channel, others and the output
    embedding stay in floating point.

    Args:
        path: the file.
        options: of the integer scales.
        dtype: of the model; by default bf16.
        device: where weights are converted, one at a time, and where the model ends up.

    Returns:
        The model in evaluation mode, and what was converted.

    Raises:
        ConfigError: no such file, no package to read it, an architecture that it does not have, or a type of fewer bits.
        CheckpointError: the file is damaged, or its weights are not those that transformers made of them.
    """
    path, dtype, report = Path(path).expanduser(), dtype or torch.bfloat16, ImportReport()
    if not path.is_file():
        raise ConfigError(f"{path}: there is no such file.")
    _library(path)
    model = _plain_model(path)
    file = _File(path, int(getattr(model.config.get_text_config(), "num_hidden_layers", 0)))
    heads = [model.get_output_embeddings(), model.get_input_embeddings()]
    linears = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear) and m not in heads]
    stored = [(name, module, file.find(f"{name}.weight")) for name, module in linears]
    for name, _, tensor in stored:
        _check_type(path, name, tensor)
    for name, module, tensor in stored:
        if tensor is None or tensor.tensor_type.name in FLOATS:
            report.unquantized.append(name)
            continue
        weight = module.weight.detach().to(device)
        converted, row = _convert(name, weight, tensor, dtype, options)
        module.weight = nn.Parameter(converted, requires_grad=False)
        report.layers.append(row)
    report.unquantized += [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and m in heads]
    mark_loaded(model)  # what stays in floating point was chosen: the compiler leaves it alone too
    return model.to(device=device, dtype=dtype).eval().requires_grad_(False), report


def _check_type(path: Path, name: str, tensor: Optional[Any]) -> None:
    kind = None if tensor is None else tensor.tensor_type.name
    if kind is not None and kind not in (*READERS, *WIDE, *FLOATS):
        raise ConfigError(
            f"{path}: {name} is stored as {kind}, which our formats cannot hold: use a file of {', '.join(READERS)}, "
            "or one of 5 to 8 bits."
        )


def _plain_model(path: Path) -> Any:
    """What transformers makes of the file, in fp32, without what says that it was quantized."""
    # Slow to import.
    from transformers import AutoModelForCausalLM

    try:
        model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    except Exception as error:  # whatever a damaged file led to
        raise CheckpointError(
            f"{path}: transformers cannot read this file: {type(error).__name__}: {first_line(error)}: get it again, or update "
            "transformers for its architecture."
        ) from error
    for owner in (model, model.config):
        for name in ("hf_quantizer", "quantization_config", "is_quantized", "quantization_method"):
            owner.__dict__.pop(name, None)
    return model


def _convert(
    name: str, weight: Tensor, tensor: Any, dtype: torch.dtype, options: ScaleOptions
) -> tuple[IntScaleTensor, ConvertedLayer]:
    kind = tensor.tensor_type.name
    if kind in READERS:
        blocks = READERS[kind](tensor.data)
        order = _rows(name, blocks.dense(), weight.cpu())
        layer = Blocks(*(part[order].to(weight.device) for part in blocks)).layer(kind)
        return to_intscale(layer, name, dtype, options)
    made = IntScaleTensor.from_hp(weight, IntScaleConfig(weight_bits=8, group_size=-1), name=name)
    noise = float((made.dequantize(torch.float32) - weight).double().square().sum())
    row = ConvertedLayer(
        name,
        kind,
        (weight.shape[0], weight.shape[1]),
        -1,
        True,
        decibels(float(weight.double().square().sum()), noise),
        headroom_bits(int(made.accumulator_bound().max())),
    )
    return made.replaced(dtype=dtype), row


def _rows(name: str, stored: Tensor, loaded: Tensor) -> Tensor:
    """Which stored row each row of a loaded weight is, int64 ``[N]``: transformers reorders those of queries and keys.

    Raises:
        CheckpointError: a row of the loaded weight is none of the stored ones.
    """
    if stored.shape == loaded.shape:
        if torch.equal(stored, loaded):
            return torch.arange(loaded.shape[0])
        place = {row.numpy().tobytes(): i for i, row in enumerate(stored + 0.0)}  # no negative zeros
        found = [place.get(row.numpy().tobytes()) for row in loaded + 0.0]
        if None not in found:
            return torch.tensor(found)
    raise CheckpointError(
        f"{name}: its stored rows {tuple(stored.shape)} are not those of the weight {tuple(loaded.shape)} that transformers made "
        "of them: this architecture changes weights in a way that codes cannot follow; import another file format."
    )
