"""The comparison that integer scales have to win: the same kernels with fp32 group scales, tuned as carefully.

``part * scale`` is then one conversion and one multiply-add in floating point for each element and group, which is what
float-scale W4A8 kernels do. The tile is the fastest of the tuner's candidates, found when a shape is first seen.
"""

from __future__ import annotations

from typing import Any, Optional

import torch
from timing import median_us
from torch import Tensor

TILES: dict[tuple[int, int, int], Any] = {}  # (M bucket, N, K) to the fastest tile
_ones: dict[int, Tensor] = {}


def linear_float_scale(
    xq: Tensor,
    token_scale: Tensor,
    qdata: Tensor,
    float_scale: Tensor,
    out_features: int,
    group_size: int,
    dtype: torch.dtype,
    tile: Optional[Any] = None,
) -> Tensor:
    """``token_scale * sum_g scale[n, g] * part_g`` of int8 ``xq`` ``[M, K]``; fp32 ``float_scale`` is tiled as ``scale`` is.

    Raises:
        RuntimeError: the GPU or Triton has no Gluon kernels; there is no plain-Triton variant with float scales.
    """
    from intscale_compile.kernels.gluon_launch import launch_gluon, missing_feature
    from intscale_compile.kernels.triton_gemm import capability

    obstacle = missing_feature(capability(xq.device))
    if obstacle:
        raise RuntimeError(obstacle)
    if out_features not in _ones:  # row scales of one: our epilogue multiplies by them all the same
        _ones[out_features] = torch.ones(out_features, dtype=torch.float32, device=xq.device)
    out = xq.new_empty((xq.shape[0], out_features), dtype=dtype)
    operands = (out, xq, token_scale.reshape(-1), qdata, float_scale, _ones[out_features], None, group_size, 4)
    launch_gluon(*operands, tile or _fastest(operands, out_features), overlap=True)
    return out


def _fastest(operands: tuple, n: int) -> Any:
    from intscale_compile.kernels.gluon_launch import launch_gluon
    from intscale_compile.kernels.gluon_tiles import gluon_candidates

    m, k = operands[1].shape
    key = (1 << (m - 1).bit_length(), n, k)
    if key not in TILES:
        copies = [(operands[3].clone(), operands[4].clone()) for _ in range(max(2, int(1.2e8 / operands[3].numel())))]
        times = {}
        for tile in gluon_candidates(m, n, k, "float"):
            calls = [
                lambda q=q, s=s, tile=tile: launch_gluon(*operands[:3], q, s, *operands[5:], tile, overlap=True)
                for q, s in copies
            ]
            times[tile] = median_us(calls)
        TILES[key] = min(times, key=times.__getitem__)
    return TILES[key]
