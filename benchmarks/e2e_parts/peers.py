"""Ways to run the model: how it is quantized and how it is compiled."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Optional

import torch
import torch._inductor.config
from torch import nn


@dataclass(frozen=True)
class Peer:
    """One way.

    Attributes:
        name, title: short and long.
        quantize: changes the model in place; None leaves it in bf16.
        by_layer: whether ``quantize`` takes a decoder layer as well, and then the model that holds the quantized layers.
        backend, mode: of ``torch.compile``.
        attention: of the model.
        gemm_backends: Inductor's ``max_autotune_gemm_backends``; ``"ATEN"``: cuBLAS alone.
        skip_guards: let Dynamo not look at the modules at each call, as one does who serves a model that nobody changes.
    """

    name: str
    title: str
    quantize: Optional[Callable[[nn.Module], Any]] = None
    backend: str = "inductor"
    mode: str = "reduce-overhead"
    attention: str = "grouped_sdpa"
    by_layer: bool = False
    gemm_backends: Optional[str] = None
    skip_guards: bool = False


def _torchao(make_config: Callable[..., Any], tuned: bool = False) -> Callable[[nn.Module], None]:
    """Through torchao's ``quantize_``.

    ``tuned``: with the settings that torchao makes for Inductor by default, coordinate descent over the launch parameters of
    every generated kernel. It takes minutes (171 s for the prefill of 8192 tokens of three layers, H100), for as long uses the
    GPU on which the others are timed, and bf16 has it as little as ours.
    """

    def quantize(model: nn.Module) -> None:
        from torchao.quantization import quantize_

        quantize_(model, make_config(set_inductor_config=tuned))

    return quantize


def _fp8(**settings: Any) -> Any:
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow

    return Float8DynamicActivationFloat8WeightConfig(granularity=PerRow(), **settings)


def _int8(**settings: Any) -> Any:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig

    return Int8DynamicActivationInt8WeightConfig(**settings)


def _int4(**settings: Any) -> Any:
    from torchao.quantization import Int4WeightOnlyConfig

    # The packing whose kernel is part of PyTorch; the default one needs another package.
    return Int4WeightOnlyConfig(group_size=128, int4_packing_format="tile_packed_to_4d", **settings)


def _intscale(model: nn.Module, output: str, group_size: int = 128) -> None:
    """All linears and expert stacks; the output embedding in ``"bf16"``, ``"w8a8"`` or ``"w4a8"``, as torchao's configs do it."""
    from torchao.quantization import quantize_

    import intscale_compile

    head = getattr(model, "lm_head", None)
    in_eight_bits = output == "w8a8" and head is not None
    config = intscale_compile.IntScaleConfig(group_size=group_size, output_embedding="w8a8" if in_eight_bits else None)
    quantize_(model, config, filter_fn=intscale_compile.linears_and_experts)
    if output == "w4a8" and head is not None:
        quantize_(model, config, filter_fn=lambda module, name: module is head)


def _float_scales(model: nn.Module) -> None:
    """Quantize as ours and run the same kernels with fp32 group scales: what W4A8 costs without integer scales."""
    from intscale_compile.kernels import gluon_launch, gluon_tiles, triton_gemm

    _intscale(model, "w4a8")
    launch, scales = gluon_launch.launch_gluon, {}

    def as_float(scale):
        """In a thread of its own: Inductor forbids what stays alive in the pool that this thread allocates from.

        By size as well: compiling joins weights, and the joined one may lie where one of its parts was.
        """
        key = scale.data_ptr(), scale.shape
        if key not in scales:
            thread = threading.Thread(target=lambda: scales.update({key: scale.float()}))
            thread.start()
            thread.join()
        return scales[key]

    def launch_float(out, xq, token_scale, qdata, scale, row_scale, bias, group_size, scale_bits, tile, overlap=False,
                     gated="none", residual=None):  # fmt: skip
        # The tile of the schedule of the same form: a partial sum for each group, then a multiply-add.
        tile = triton_gemm.pick_tile(xq.shape[0], qdata.shape[0], xq.shape[1], group_size, 8, 4, xq.device, True)
        tile = tile if gated == "none" else gluon_tiles.gated_tile(tile, "float")
        operands = (out, xq, token_scale, qdata, as_float(scale), row_scale, bias, group_size, scale_bits)
        launch(*operands, tile, overlap, gated, residual)

    gluon_launch.launch_gluon = launch_float


PEERS = {
    peer.name: peer
    for peer in (
        Peer("bf16", "bf16, Inductor reduce-overhead"),
        Peer("bf16_autotune", "bf16, Inductor max-autotune", mode="max-autotune"),
        Peer("bf16_default", "bf16, transformers' default attention", attention="sdpa"),
        Peer("fp8", "torchao fp8, dynamic, per row; cuBLAS", _torchao(_fp8), gemm_backends="ATEN"),
        Peer("fp8_tuned", "torchao fp8, dynamic, per row; tuned as torchao sets Inductor", _torchao(_fp8, True)),
        Peer("int4", "torchao int4 weight-only, group 128", _torchao(_int4)),
        Peer("int4_tuned", "torchao int4 weight-only, group 128; tuned as torchao sets Inductor", _torchao(_int4, True)),
        Peer("int8", "torchao int8, dynamic; cuBLAS", _torchao(_int8), gemm_backends="ATEN"),
        Peer("int8_tuned", "torchao int8, dynamic; tuned as torchao sets Inductor", _torchao(_int8, True)),
        Peer("float_scales", "ours with float group scales", _float_scales, "intscale"),
        Peer("intscale", "ours", lambda m: _intscale(m, "w4a8"), "intscale", by_layer=True),
        Peer("intscale_32", "ours, groups of 32", lambda m: _intscale(m, "w4a8", 32), "intscale", by_layer=True),
        Peer("intscale_head", "ours, output embedding left in bf16", lambda m: _intscale(m, "bf16"), "intscale",
             by_layer=True),
        Peer("intscale_w8a8", "ours, output embedding in W8A8", lambda m: _intscale(m, "w8a8"), "intscale", by_layer=True),
        Peer("intscale_default", "ours, transformers' default attention", lambda m: _intscale(m, "w4a8"), "intscale",
             attention="sdpa", by_layer=True),
    )
}  # fmt: skip


def compiled(peer: Peer, model: nn.Module) -> Callable:
    """The model's forward, compiled as the peer asks for."""
    if peer.gemm_backends is not None:  # of this process, which runs no other peer; ``mode`` excludes ``options``
        torch._inductor.config.max_autotune_gemm_backends = peer.gemm_backends
    if not peer.skip_guards:
        return torch.compile(model, backend=peer.backend, mode=peer.mode, dynamic=False)
    options = torch._inductor.list_mode_options(peer.mode)  # ``mode`` excludes ``options``
    options["guard_filter_fn"] = torch.compiler.skip_guard_on_all_nn_modules_unsafe
    return torch.compile(model, backend=peer.backend, options=options, dynamic=False)
