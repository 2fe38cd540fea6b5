"""Gluon kernels assembled without a GPU: descriptors of their operands, and what their machine code must not hold."""

from __future__ import annotations

from typing import Optional

import triton

from intscale_compile.kernels.gluon_launch import loop_body
from intscale_compile.kernels.gluon_tiles import shared_limit
from intscale_compile.kernels.tile import Tile

RELEASE = tuple(int(part) for part in triton.__version__.split(".")[:2])
# Local memory behind the K loop, once a tile or once a part of K, in bytes a thread.
SPILLS_BEHIND_LOOP = 768
# Triton 3.7 and later assemble with --regAllocOptLevel=2 against a bug of ptxas. With ptxas 13.4, which Triton 3.9 takes for
# Hopper, that leaves one word of some cooperative tiles in local memory: one load in a loop's body.
RELOADS_IN_LOOP = 1 if RELEASE >= (3, 9) else 0
POINTERS = {"row_scale_ptr": "*fp32", "token_scale_ptr": "*fp32"}


def descriptor(shape: list[int], dtype: str, swizzled: bool = True) -> str:
    from triton.experimental.gluon import language as gl

    bits = {"i8": 8, "u8": 8, "bf16": 16, "fp16": 16, "fp32": 32}[dtype]
    layout = (
        gl.NVMMASharedLayout.get_default_for(shape, {8: gl.int8, 16: gl.int16}[bits])
        if swizzled
        else gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=bits, rank=len(shape))
    )
    return f"tensordesc<{dtype}{shape},{layout!r}>"


def check(
    code,
    tile: Tile,
    schedule: Optional[str] = None,
    spill_bytes: int = SPILLS_BEHIND_LOOP,
    float_sums: bool = False,
    summed: int = 0,
    words: int = 0,
) -> None:
    """Tensor cores at work without waits between them, no local memory in a loop over K, no conversions to float there.

    ``schedule`` is given where stages may be read ahead.
    ``summed`` is the number of products after which the sum of a group is waited for, or 0; up to ``words`` of a loop may
    be in local memory.
    """
    loops, reloads = code.k_loops(), RELOADS_IN_LOOP if tile.kernel == "cooperative" else 0
    assert loops and all(code.count("STL", loop) <= words for loop in loops)
    assert all(code.count("LDL", loop) <= reloads + words for loop in loops)
    assert code.spill_bytes <= spill_bytes and code.shared <= shared_limit(tile)
    ahead = schedule in ("fold", "none") and loop_body(tile, schedule, False, blocks=8).ahead
    one_later = tile.kernel == "specialized" or tile.kernel == "decode" and tile.num_stages > 2 or ahead
    assert not code.late_loads(stages_behind=int(one_later))
    dot = "IMMA" if tile.kernel == "decode" else "IGMMA"
    assert code.count(dot) > 0
    if tile.kernel != "decode":
        # ptxas waits after every wgmma (C7510, C7512) where it cannot keep their operands apart.
        waits = sum(i.opcode.startswith("WARPGROUP.DEPBAR") for i in code.instructions)
        assert waits <= code.count(dot) / summed if summed else waits < code.count(dot) / 2
    assert (
        float_sums or code.count("I2F") <= tile.block_m * tile.block_n // (32 * tile.num_warps) + 8
    )  # the epilogue alone
