"""Inductor settings under which the graphs of W4A8 models compile best; options of the user go before them.

Figures: Llama-3-8B decoding one token, H100, torch 2.11 (``benchmarks/results``).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, Optional

import torch
from torch import Tensor

from ..integrations.torch import dtype_rules_once, knows_early_launch, reduction_choices, waits_first
from ..versions import version_of

# Rows of an activation up to this length are kept in registers from the norm (or SiLU * mul) through its maximum to its
# quantization; Inductor's own limit is 1024, above which it computes everything twice.
LONGEST_ROW_IN_REGISTERS = 16384


# Up to this many tokens, rounding between operators as eager mode does costs nothing that can be seen. At 2048 it took
# 0.1 ms of a layer's 1.0 (conversions, and no contraction to multiply-add).
FEW_TOKENS = 256


def inductor_defaults(example_inputs: Sequence[Any], tokens: Optional[int] = None) -> dict[str, Any]:
    """Config patches for a graph with these inputs; ``tokens`` is the most that one of its products takes, if known."""
    # SiLU * mul and the activation quantization after it are one kernel only if the reduction is not split.
    defaults: dict[str, Any] = {"split_reductions": False}
    if version_of("torch") < (2, 13):
        # There, a residual of three dimensions does not fuse into a template whose output is a view of two.
        defaults["loop_ordering_after_fusion"] = False
    on_gpu = any(isinstance(x, Tensor) and x.device.type == "cuda" for x in example_inputs)
    if on_gpu and tokens is not None and tokens <= FEW_TOKENS:
        # bf16 and fp16 values are rounded between operators, whatever was fused: a model decodes the same tokens with and
        # without CUDA graphs, alone and in a batch.
        defaults["emulate_precision_casts"] = True
    if on_hopper_or_later(example_inputs) and knows_early_launch() and not _has_backward(example_inputs):
        # Each kernel of a decoding step takes some microseconds, of which one is its launch: programmatic dependent launch
        # lets it overlap the kernel before, and kernels that do not depend on each other (rotary embedding of q and k, the
        # two cache updates) become one.
        defaults |= {"triton.enable_pdl": True, "combo_kernels": True, "combo_kernels_pointwise_only": True}
    from torch._inductor import config  # slow to import

    return {name: value for name, value in defaults.items() if name in config.get_config_copy()}


def _has_backward(example_inputs: Sequence[Any]) -> bool:
    """Whether a backward graph may follow: Inductor compiles it later, outside of :func:`code_generation`."""
    return torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in example_inputs)


def on_hopper_or_later(example_inputs: Sequence[Any]) -> bool:
    """Whether the tensors of a graph are on an NVIDIA GPU of capability 9.0 or later."""
    device = next((x.device for x in example_inputs if isinstance(x, Tensor) and x.device.type == "cuda"), None)
    return device is not None and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (9, 0)


@contextlib.contextmanager
def code_generation() -> Iterator[None]:
    """What Inductor has no option for, while a graph of ours compiles: rows up to :data:`LONGEST_ROW_IN_REGISTERS` stay in
    registers, kernels that are launched early wait first, and the table of dtype rules is filled once."""
    with reduction_choices(LONGEST_ROW_IN_REGISTERS), waits_first(), dtype_rules_once():
        yield
