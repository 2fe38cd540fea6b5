"""Inductor settings under which the graphs of W4A8 models compile best; options of the user go before them.

Figures: Llama-3-8B decoding one token, H100, torch 2.11 (``benchmarks/results``).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, Optional

import torch
from torch import Tensor

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
    if on_hopper_or_later(example_inputs) and _knows_pdl() and not _has_backward(example_inputs):
        # Each kernel of a decoding step takes some microseconds, of which one is its launch: programmatic dependent launch
        # lets it overlap the kernel before, and kernels that do not depend on each other (rotary embedding of q and k, the
        # two cache updates) become one.
        defaults |= {"triton.enable_pdl": True, "combo_kernels": True, "combo_kernels_pointwise_only": True}
    from torch._inductor import config

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
    """What Inductor has no option for, while a graph of ours compiles: :func:`reduction_choices`, :func:`waits_first` and
    :func:`dtype_rules_once`."""
    with reduction_choices(), waits_first(), dtype_rules_once():
        yield


@contextlib.contextmanager
def dtype_rules_once() -> Iterator[None]:
    """Let Inductor (2.11) keep its table of dtype rules, which it fills anew for every operation that it writes.

    The table is one object, and the rules do not change: filling it took 65 us, 12600 times for Llama-3-8B's decoding step.
    """
    from torch._inductor import dtype_propagation, utils

    rules: Any = getattr(dtype_propagation, "DtypePropagationOpsHandler", None)
    if rules is None or not {"_instance", "__init__"} <= vars(rules).keys():
        yield  # another release, without this table
        return
    original, filled = rules.__init__, -1

    def once(self):
        nonlocal filled
        known = len(utils.op_dtype_propagation_rules)
        if filled != known:
            original(self)
            filled = known

    rules.__init__ = once
    try:
        yield
    finally:
        rules.__init__ = original


def _knows_pdl() -> bool:
    from torch._inductor.codegen.triton import TritonKernel

    names = ("_handle_pdl_before_access", "_enable_pdl_codegen", "GDC_WAIT")
    return all(hasattr(TritonKernel, name) for name in names)


@contextlib.contextmanager
def waits_first() -> Iterator[None]:
    """Make every kernel that Inductor launches early wait for the kernel before it at its first access to memory.

    Inductor leaves the wait out for operands that the kernel just before did not write. That is right only if no kernel
    lets the next one begin before its own wait is over, and if each has a wait: ours begin to read weights before they
    wait, and a kernel that only fills a buffer has none. With a wait in each, an end implies the ends of all before.
    """
    from torch._inductor.codegen.triton import TritonKernel

    if not _knows_pdl():
        yield
        return

    def before_access(self, wait_buffer, *dependencies, consider_reads=False):
        if self._enable_pdl_codegen():
            in_loop = self.inside_reduction and self.range_trees[-1].is_loop
            (self.body if in_loop else wait_buffer).writeline(self.GDC_WAIT)

    original = TritonKernel._handle_pdl_before_access
    TritonKernel._handle_pdl_before_access = before_access  # type: ignore[method-assign]
    try:
        yield
    finally:
        TritonKernel._handle_pdl_before_access = original  # type: ignore[method-assign]


def reduction_choices() -> contextlib.AbstractContextManager:
    """Let Inductor keep rows of up to :data:`LONGEST_ROW_IN_REGISTERS` in registers while it compiles in this context, and not
    fuse what it cannot generate.

    Inductor does not hash its choices. Graphs compiled here hold our ops, whose ``abi`` argument hashes this file.
    """
    from torch._inductor.choices import InductorChoices
    from torch._inductor.virtualized import V

    class Choices(InductorChoices):
        @staticmethod
        def should_use_persistent_reduction(features, cooperative_reduction):
            """Inductor's answer, or yes for whole rows that lie within the limit."""
            return InductorChoices.should_use_persistent_reduction(features, cooperative_reduction) or (
                not cooperative_reduction
                and features.get_reduction_hint() is _inner_hint()
                and V.graph.sizevars.statically_known_leq(features.reduction_numel, LONGEST_ROW_IN_REGISTERS)
                and V.graph.get_current_device_or_throw().type == "cuda"
            )

        @staticmethod
        def can_fuse(scheduler, node1, node2, shared_data_score):
            """Inductor's answer, or no for a scan in parts with a reduction.

            Torch 2.11 finds that out and fuses them all the same, which fails in its code generation; it takes reductions that
            are not split to get there.
            """
            scans = node1.is_split_scan(), node2.is_split_scan()
            if scans[0] != scans[1] and (node2 if scans[0] else node1).is_reduction():
                return False
            return InductorChoices.can_fuse(scheduler, node1, node2, shared_data_score)

    return V.set_choices_handler(Choices())


def _inner_hint():
    from torch._inductor.runtime.hints import ReductionHint

    return ReductionHint.INNER
