"""Inductor lowerings of the W4A8 ops: one Triton template on a GPU, oneDNN plus generated C++ on a CPU.

The template applies every scale and the bias itself and rounds once to the activation's dtype, also where what follows (a
residual, an activation function) is fused behind it by Inductor: a value does not depend on what was fused. The device
functions are pasted into each generated module, which makes it self-contained and lets Triton's cache hash our source.

There is exactly one choice per node, hence nothing to benchmark at compile time: the tile follows from the shape alone.
Written against torch 2.11 to 2.13, and only with names that are in all of them.
"""

from __future__ import annotations

import logging
from typing import Any, Optional

import torch
from torch._inductor import config as inductor_config
from torch._inductor import ir
from torch._inductor.kernel.mm_common import mm_grid
from torch._inductor.lowering import empty, fallback_handler, lowerings, register_lowering
from torch._inductor.select_algorithm import TritonTemplate
from torch._inductor.utils import triton_type
from torch._inductor.virtualized import V

from ..errors import CompileError
from ..format import schedule_bits
from ..reasons import log_once
from .arguments import AccumulateArguments, LinearArguments, converted, form, takes
from .tiles import choose_tile, few_tokens_tile
from .triton_gemm import capability, gluon_obstacle, schedule_flags, use_ptx
from .triton_tile import device_source
from .w4a8_gated import GATED_OP
from .w4a8_grouped import GROUPED_OP
from .w4a8_linear import ACCUMULATE_OP, LINEAR_OP
from .w4a8_residual import LINEAR_ADD_OP

# From this many tokens on a call of the op pays without CUDA graphs too: a prepared launch takes the host some 40 us (H100
# machine, torch 2.11); the four GEMMs of a Llama-3-8B layer take the GPU some 200 us at 512 tokens and 1340 at 4096.
GLUON_TOKENS = 512

# Where the number of tokens is symbolic, other numbers follow: a prompt of 100 tokens may be compiled first and one of 8192
# come next, and only the op picks a tile at each call. Below this hint it is a batch of decoding steps.
GLUON_TOKENS_SYMBOLIC = 32

# Assumed number of tokens where the graph gives no hint: tiles for it are correct for every other number too.
UNKNOWN_TOKENS = 256

_KERNEL = """
{{def_kernel(*(["XQ", "QDATA", "SCALE"] + (["ZERO_POINT"] if ASYMMETRIC else [])
    + (["TOKEN_SCALE", "ROW_SCALE"] if DEQUANTIZE else []) + (["BIAS"] if HAS_BIAS else [])))}}
    M = {{size("XQ", 0)}}
    K = {{size("XQ", 1)}}
    N = {{size(None, 1)}}
    tile_m, tile_n = tile_position(tl.program_id(0).to(INDEX_DTYPE), M, N, BLOCK_M, BLOCK_N, GROUP_N)
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M).to(INDEX_DTYPE)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N).to(INDEX_DTYPE)
    rows_m = tl.where(m < M, m, 0)
    rows_n = tl.where(n < N, n, 0)
    acc = accumulate_tile(
        XQ, {{stride("XQ", 0)}}, QDATA, SCALE, {{ "ZERO_POINT" if ASYMMETRIC else "None" }}, rows_m, rows_n, K,
        GROUP_SIZE, PACK, WEIGHT_BITS, FOLD, TIMES16, ASYMMETRIC, TILED, EVEN_K, PTX, BLOCK_M, BLOCK_N,
    )
    {% if DEQUANTIZE %}
    acc = dequantize_tile(acc, TOKEN_SCALE, {{stride("TOKEN_SCALE", 0)}}, ROW_SCALE, rows_m, rows_n)
    {% endif %}
    {% if HAS_BIAS %}
    acc = add_bias(acc, BIAS, rows_n)
    {% endif %}
    {% if DEQUANTIZE %}
    acc = acc.to(OUT_DTYPE).to(tl.float32)
    {% endif %}
    idx_m = m[None, :]
    idx_n = n[:, None]
    mask = (idx_m < M) & (idx_n < N)
    {{store_output(("idx_m", "idx_n"), "acc", "mask", val_shape=("BLOCK_N", "BLOCK_M"))}}


"""

w4a8_template = TritonTemplate(name="intscale_w4a8", grid=mm_grid, source=_KERNEL + device_source())


def _as_rows(x: ir.TensorBox) -> ir.TensorBox:
    """View ``[..., C]`` as ``[M, C]``."""
    *lead, columns = x.get_size()
    if len(lead) == 1:
        return x
    rows = 1
    for size in lead:
        rows = rows * size
    return lowerings[torch.ops.aten.view.default](x, [rows, columns])


def _is_empty(size: Any) -> bool:
    return V.graph.sizevars.statically_known_equals(size, 0)


def _static(size: Any) -> int:
    """A size as a number; a symbolic one (``dynamic=True`` with weights as plain inputs) is guarded on."""
    sizevars = V.graph.sizevars
    guard = getattr(sizevars, "guard_int", None) or sizevars.evaluate_static_shape  # type: ignore[attr-defined]
    return int(guard(size))


def _contiguous(x: ir.TensorBox) -> ir.IRNode:
    return ir.ExternKernel.require_contiguous(ir.ExternKernel.realize_input(x))


def _gemm(
    xq: ir.TensorBox,
    scales: Optional[tuple[ir.TensorBox, ir.TensorBox]],
    qdata: ir.TensorBox,
    scale: ir.TensorBox,
    bias: Optional[ir.TensorBox],
    out_features: int,
    group_size: int,
    scale_bits: int,
    packing: str,
    dtype: torch.dtype,
    zero_point: Optional[ir.TensorBox],
) -> ir.TensorBox:
    """Template call for ``xq`` ``[..., K]``; ``scales`` (token, row) is None for the bare accumulator."""
    lead, device = xq.get_size()[:-1], xq.get_device_or_error()
    rows = _as_rows(xq)
    m, k = rows.get_size()
    if _is_empty(m):
        return empty([*lead, out_features], dtype=dtype, device=device)
    in_features = _static(k)
    weight_bits = 8 if qdata.get_dtype() is torch.int8 else 4
    tokens = V.graph.sizevars.optimization_hint(m, fallback=UNKNOWN_TOKENS)
    asymmetric = zero_point is not None
    bits = schedule_bits(scale_bits, asymmetric)
    tile = choose_tile(tokens, out_features, in_features, group_size, bits, weight_bits, capability(device))
    activation = ir.ExternKernel.require_stride1(ir.ExternKernel.realize_input(rows))
    inputs = [activation, _contiguous(qdata), _contiguous(scale)]
    if zero_point is not None:
        inputs.append(_contiguous(zero_point))
    if scales is not None:
        token_scale, row_scale = scales
        inputs += [ir.ExternKernel.realize_input(_as_rows(token_scale)), _contiguous(row_scale)]
    if bias is not None:
        inputs.append(_contiguous(bias))
    choices: list[Any] = []
    refusal = w4a8_template.maybe_append_choice(
        choices,
        input_nodes=tuple(inputs),
        layout=ir.FixedLayout(device, dtype, [m, out_features]),
        num_stages=tile.num_stages,
        num_warps=tile.num_warps,
        DEQUANTIZE=scales is not None,
        HAS_BIAS=bias is not None,
        ACC_TYPE="tl.int32" if scales is None else "tl.float32",
        OUT_DTYPE=triton_type(dtype),
        PTX=use_ptx(device),
        **schedule_flags(in_features, group_size, scale_bits, weight_bits, packing, tile, asymmetric),
    )
    if not choices:
        raise CompileError(f"Inductor refused the W4A8 template: {refusal}. Report it; backend='eager' still runs.")
    out = choices[0].output_node()
    return out if len(lead) == 1 else lowerings[torch.ops.aten.view.default](out, [*lead, out_features])


def prefers_op(
    xq: ir.TensorBox, qdata: ir.TensorBox, scale: ir.TensorBox, group_size: int, scale_bits: int, packing: str,
    asymmetric: bool, out_features: int,
) -> bool:  # fmt: skip
    """Whether a linear is better left to the op, see :func:`op_is_faster`."""
    rows = _as_rows(xq).get_size()[0]
    tokens = V.graph.sizevars.optimization_hint(rows, fallback=UNKNOWN_TOKENS)
    if getattr(rows, "free_symbols", None) and tokens >= GLUON_TOKENS_SYMBOLIC:
        tokens = max(tokens, GLUON_TOKENS)
    cuda_graphs, features = inductor_config.triton.cudagraphs, _static(xq.get_size()[-1])
    dtypes, device = (qdata.get_dtype(), scale.get_dtype()), xq.get_device_or_error()
    form = (group_size, scale_bits, packing, device, asymmetric)
    return op_is_faster(tokens, cuda_graphs, features, out_features, dtypes, *form)


def op_is_faster(
    tokens: int, cuda_graphs: bool, features: int, out_features: int, dtypes: tuple[torch.dtype, torch.dtype],
    group_size: int, scale_bits: int, packing: str, device: torch.device, asymmetric: bool,
) -> bool:  # fmt: skip
    """Whether the op, which picks a kernel and a tile at each call, beats the template.

    So it does where it calls a Gluon kernel, or, for few tokens and in CUDA graphs, the one that shares K among programs.

    The Gluon kernels are faster than the template, but nothing is fused behind them; what follows a linear of a language
    model (the next norm, an activation function and a quantization) becomes a kernel of its own either way. ``dtypes`` are
    those of ``qdata`` and ``scale``.
    """
    if not (cuda_graphs or tokens >= GLUON_TOKENS) or dtypes[1] is torch.int16:
        return False
    weight_bits = 8 if dtypes[0] is torch.int8 else 4
    obstacle = gluon_obstacle(features, group_size, scale_bits, weight_bits, packing, device, asymmetric)
    if obstacle is None:
        return True
    log_once(logging.INFO, f"plain Triton instead of Gluon: {obstacle}")
    bits = schedule_bits(scale_bits, asymmetric)
    return cuda_graphs and few_tokens_tile(tokens, out_features, features, group_size, bits, weight_bits) is not None


def lower_w4a8_accumulate(a: Any) -> ir.TensorBox:
    """CUDA lowering of ``intscale::w4a8_accumulate``: int32 ``[..., N]``; ``a`` are its ``AccumulateArguments``."""
    return _gemm(a.xq, None, a.qdata, a.scale, None, *form(a), torch.int32, a.zero_point)


def lower_w4a8_linear(a: Any) -> ir.TensorBox:
    """The template for ``intscale::w4a8_linear`` on a GPU; ``a`` are its ``LinearArguments``."""
    scales = (a.token_scale, a.row_scale)
    return _gemm(a.xq, scales, a.qdata, a.scale, a.bias, *form(a), a.dtype, a.zero_point)


def decompose_w4a8_linear(a: Any) -> ir.TensorBox:
    """CPU lowering of ``intscale::w4a8_linear``: the accumulator is opaque, its scales join the surrounding C++."""
    aten, to_dtype = torch.ops.aten, torch.ops.prims.convert_element_type.default
    mul, view, convert = lowerings[aten.mul.Tensor], lowerings[aten.view.default], lowerings[to_dtype]
    acc = lowerings[ACCUMULATE_OP](*converted(AccumulateArguments, a))
    y = mul(mul(convert(acc, torch.float32), a.token_scale), view(a.row_scale, [a.out_features]))
    if a.bias is not None:
        y = lowerings[aten.add.Tensor](y, convert(a.bias, torch.float32))
    return convert(y, a.dtype)


def register_lowerings() -> None:
    """Register both ops with Inductor: the template for CUDA (and ROCm) tensors, the CPU path for all others."""
    accumulate_extern = fallback_handler(ACCUMULATE_OP, add_to_fallback_set=False)
    linear_extern = fallback_handler(LINEAR_OP, add_to_fallback_set=False)

    # Whole: the activation is in the kernel's epilogue, and what follows is a quantization of whole rows.
    register_lowering(GATED_OP, type_promotion_kind=None)(fallback_handler(GATED_OP, add_to_fallback_set=False))

    # Whole: emitted only where the op is called rather than the template.
    register_lowering(LINEAR_ADD_OP, type_promotion_kind=None)(
        fallback_handler(LINEAR_ADD_OP, add_to_fallback_set=False)
    )

    # Whole: the kernel gathers and scatters rows itself, and is launched for the worst routing.
    register_lowering(GROUPED_OP, type_promotion_kind=None)(fallback_handler(GROUPED_OP, add_to_fallback_set=False))

    @register_lowering(ACCUMULATE_OP, type_promotion_kind=None)
    @takes(AccumulateArguments)
    def accumulate(a):
        on_gpu = a.xq.get_device().type == "cuda"
        return lower_w4a8_accumulate(a) if on_gpu else accumulate_extern(*a)

    @register_lowering(LINEAR_OP, type_promotion_kind=None)
    @takes(LinearArguments)
    def linear(a):
        a = a._replace(ste_input=None)  # it only carries gradients: left unread, it vanishes
        if a.xq.get_device().type != "cuda":
            return decompose_w4a8_linear(a)
        asymmetric = a.zero_point is not None
        if prefers_op(a.xq, a.qdata, a.scale, a.group_size, a.scale_bits, a.packing, asymmetric, a.out_features):
            return linear_extern(*a)
        return lower_w4a8_linear(a)
