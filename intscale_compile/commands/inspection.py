"""What the compiler does with the model of a folder, and what it would do, from the shapes alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Optional

import torch
from torch import Tensor, nn

from .. import format as fmt
from ..config import IntScaleConfig
from ..errors import ConfigError
from ..explanation import Explanation, LayerReport, explain
from ..quantization.output_probe import longest_text
from ..reasons import Reason
from ..saving.verifying import Verification, stored_by_ranks, verify_checkpoint
from ..tensors.expert_layers import expert_stacks
from ..tensors.intscale_tensor import IntScaleTensor
from ..tensors.selection import is_conv1d, left_alone_by_default, output_config
from .loading import PathLike, is_quantized, source_folder


def inspect_model(
    model: Any, tokens: int = 16, how: Optional[IntScaleConfig] = None, *, measure: bool = False
) -> Explanation:
    """``explain`` for a transformers model that takes token ids, on ``tokens`` random ones.

    Args:
        model: quantized, or plain: then its weights are quantized by this call.
        tokens: length of the one sequence.
        how: plain weights are quantized; the default is ``IntScaleConfig()``.
        measure: also time every GEMM.

    Raises:
        ConfigError: the model does not take token ids, takes fewer than ``tokens``, or is quantized and ``how`` is given.
    """
    config = model.config
    if how is not None and is_quantized(model):
        raise ConfigError("the model is quantized already, --config cannot change it: leave it out.")
    if getattr(model, "main_input_name", "input_ids") != "input_ids":
        raise ConfigError(
            f"{type(model).__name__} takes {model.main_input_name}, not token ids: call intscale_compile.explain(model, "
            "*inputs) in Python."
        )
    longest = longest_text(config)
    if tokens < 1 or (longest is not None and tokens > longest):
        raise ConfigError(f"--tokens {tokens} is not supported: use 1 to {longest or 'any number'}.")
    ids = random_ids(model, tokens)
    more: dict[str, Any] = {"decoder_input_ids": ids} if getattr(config, "is_encoder_decoder", False) else {}
    if hasattr(config, "use_cache"):
        config.use_cache = False
    options = None if how is None else {"intscale.config": how}
    return explain(model, options=options, measure=measure, input_ids=ids, **more)


def verify_folder(name: PathLike) -> Verification:
    """Compare all stored data of a model with the checksums that were written when it was saved; nothing is run.

    Args:
        name: folder or hub name, a folder of ``save_shards``, or a file of ``save_safetensors``.

    Raises:
        ConfigError: there is no such model.
        CheckpointError: something differs; the message names the first such parameters.
    """
    path = Path(name).expanduser()
    if stored_by_ranks(path) or (path.suffix == ".safetensors" and path.is_file()):
        return verify_checkpoint(path)
    folder = source_folder(name)
    if not folder.is_dir():
        raise ConfigError(
            f"{name}: a GGUF file has no checksums: import it with intscale quantize, and verify that folder."
        )
    return verify_checkpoint(folder)


def random_ids(model: Any, tokens: int) -> Tensor:
    """The same random token ids ``[1, tokens]`` at every call."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = torch.randint(vocabulary, (1, tokens), generator=torch.Generator().manual_seed(0))
    return ids.to(model.device)


def plan(model: nn.Module, config: Optional[IntScaleConfig] = None) -> list[LayerReport]:
    """What ``quantize_`` with ``linears_and_experts`` would do with each weight: from shapes, also on the meta device.

    Not known without data: scales, the headroom of the overflow proof, non-finite weights; and without a run: graph breaks,
    which products share a GEMM, and kernels. Bytes are those of plain packing.
    """
    config = config or IntScaleConfig()
    found = []
    for layer in products(model):
        output = None if layer.quantized else output_config(config, Reason[str(layer.reason)])
        if output is not None or layer.reason == Reason.NOT_SELECTED.name:
            assert layer.shape is not None
            how = output or config
            nbytes = (layer.experts or 1) * packed_bytes(*layer.shape, how)
            layer = dataclasses.replace(
                layer,
                quantized=True,
                reason=None,
                explanation="",
                group_size=how.effective_group_size,
                weight_bits=how.weight_bits,
                bytes_after=nbytes,
            )
        found.append(layer)
    return found


def products(model: nn.Module) -> Iterator[LayerReport]:
    """Weights of linear layers and stacks of experts as they are; of a plain one, why it would be left alone.

    The reason is ``NOT_SELECTED`` where there is no other.
    """
    reasons = left_alone_by_default(model)
    for name, module in model.named_modules():
        leaves = dict(expert_stacks(module))
        if isinstance(module, nn.Linear) or is_conv1d(module):
            leaves["weight"] = is_conv1d(module)
        for leaf, transposed in leaves.items():
            reason = reasons.get(id(module), Reason.NOT_SELECTED)
            yield _product(f"{name}.{leaf}" if name else leaf, getattr(module, leaf), transposed, reason)


def _product(name: str, weight: Tensor, transposed: bool, reason: Reason) -> LayerReport:
    n, k = weight.shape[-2:] if not transposed else (weight.shape[-1], weight.shape[-2])
    quantized = isinstance(weight, IntScaleTensor)
    before = weight.numel() * weight.dtype.itemsize
    return LayerReport(
        name,
        (n, k),
        "-",
        quantized,
        None if quantized else reason.name,
        "" if quantized else reason.value,
        experts=weight.shape[0] if weight.dim() == 3 else None,
        parameters=weight.numel(),
        bytes_before=before,
        bytes_after=weight.nbytes_packed() if isinstance(weight, IntScaleTensor) else before,
    )


def packed_bytes(out_features: int, in_features: int, config: IntScaleConfig) -> int:
    """Bytes of codes, group scales and row scales of a weight ``[N, K]`` in plain packing."""
    group_size = config.effective_group_size
    codes = fmt.padded_in_features(in_features, group_size) * config.weight_bits // 8
    scales = fmt.num_groups(in_features, group_size) * (1 if config.amplifier == "row" else 2)
    return out_features * (codes + scales + 4)
