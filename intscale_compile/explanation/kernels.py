"""What runs a product: the kernel and its tile, and why a GPU runs plain Triton."""

from __future__ import annotations

from typing import Optional

from .. import format as fmt
from ..tensors.intscale_tensor import IntScaleTensor


def kernel_name(packed: IntScaleTensor, tokens: str, cuda_graphs: bool, behind: Optional[str] = None) -> str:
    """The kernel for a weight ``[N, K]`` or a stack, with its schedule and tile, for so many rows of the activation.

    ``behind`` is what its epilogue does: the activation of a gated linear, ``"residual"`` or nothing.
    """
    scale_bits = fmt.schedule_bits(packed.scale_bits, packed.zero_point is not None)
    schedule = "int8" if packed.weight_bits == 8 else "fold" if scale_bits <= 4 else "accumulate"
    grouped, also = packed.dim() == 3, f" + {behind}" if behind else ""
    if packed.device.type != "cuda":
        return f"oneDNN {'grouped ' if grouped else ''}{schedule}{also}"
    # Imports Triton, which only GPUs need.
    from ..kernels.gluon_tiles import for_output, scales_in_block
    from ..kernels.template import GLUON_TOKENS
    from ..kernels.tiles import choose_tile
    from ..kernels.triton_gated import pick_gated_tile
    from ..kernels.triton_gemm import capability, pick_tile

    rows = int(tokens) if tokens.isdigit() else 1024
    if grouped:
        # Imports Triton, which only GPUs need.
        from ..kernels.triton_grouped import pick_grouped_tile

        tile = pick_grouped_tile(
            rows, packed.shape[0], packed.out_features, packed.in_features, packed.group_size, packed.scale_bits,
            packed.weight_bits, packed.packing_format, packed.device, packed.zero_point is not None,
        )  # fmt: skip
        name = "triton" if tile.kernel == "triton" else f"gluon {tile.kernel}"
        return f"{name} grouped {schedule} {tile.block_n}x{tile.block_m}"
    gluon = _gluon_obstacle(packed) is None and (cuda_graphs or rows >= GLUON_TOKENS or behind is not None)
    shape = (packed.out_features, packed.in_features)
    form = (rows, *shape, packed.group_size, scale_bits, packed.weight_bits, packed.device, gluon)
    gated = behind not in (None, "residual")
    tile = pick_gated_tile(*form, packed.dtype.itemsize) if gated else pick_tile(*form)
    if tile.kernel == "triton" and not (gated or gluon or cuda_graphs):  # the template shares no K among programs
        tile = choose_tile(rows, *shape, packed.group_size, scale_bits, packed.weight_bits, capability(packed.device))
    if tile.kernel != "triton":
        tile = for_output(tile, schedule, packed.dtype.itemsize, scales_in_block(packed.group_size))
    name = "triton" if tile.kernel == "triton" else f"gluon {tile.kernel}"
    parts = f", K in {tile.split_k} parts" if tile.kernel == "triton" and tile.split_k > 1 and not gated else ""
    return f"{name} {schedule} {tile.block_n}x{tile.block_m}{parts}{also}"


def _gluon_obstacle(packed: IntScaleTensor) -> Optional[str]:
    # Imports Triton, which only GPUs need.
    from ..kernels.triton_gemm import gluon_obstacle

    return gluon_obstacle(
        packed.in_features,
        packed.group_size,
        packed.scale_bits,
        packed.weight_bits,
        packed.packing_format,
        packed.device,
        packed.zero_point is not None,
    )


def kernel_notes(packed: IntScaleTensor) -> set[str]:
    """Why a weight on a GPU runs in plain Triton although Gluon kernels exist."""
    obstacle = _gluon_obstacle(packed) if packed.device.type == "cuda" else None
    return {f"plain Triton instead of Gluon: {obstacle}."} if obstacle else set()
