"""What a tile is: the shape and meta-parameters of a launch, and the names that tables of tiles go by."""

from __future__ import annotations

from dataclasses import dataclass

# Streaming multiprocessors that a grid should at least cover. 108 (A100) to 148 (B200); 132 is the H100 of the sweep.
SM_COUNT = 132


@dataclass(frozen=True)
class Tile:
    """Kernel and meta-parameters of a launch.

    Attributes:
        block_m, block_n: output tile, tokens by output features.
        num_warps: warps that compute.
        num_stages: stages of the ring in shared memory.
        group_n: tile columns that are visited together.
        kernel: ``"triton"``, or a Gluon kernel (Hopper): ``"decode"``, ``"specialized"``, ``"pipelined"``,
            ``"cooperative"`` (two or three groups of 4 computing warps).
        split_k: parts of K that different programs sum (all kernels but decode; ``"triton"``: ``triton_split``).
        steps: depth of a stage, in units of 4 blocks of 128 features (decode).
        programs_per_sm: persistent programs on an SM, which sets their register budget (decode, specialized).
    """

    block_m: int
    block_n: int
    num_warps: int = 4
    num_stages: int = 3
    group_n: int = 8
    kernel: str = "triton"
    split_k: int = 1
    steps: int = 4
    programs_per_sm: int = 1


def tile_count(size: int, block: int) -> int:
    """Tiles of ``block`` that cover ``size``."""
    return -(-size // block)


def schedule_name(group_size: int, scale_bits: int, weight_bits: int) -> str:
    """How group scales enter: ``fold``, ``accumulate``, ``none`` (per channel) or ``int8`` (8-bit weights)."""
    if weight_bits == 8:
        return "int8"
    if group_size == -1:
        return "none"
    return "fold" if scale_bits <= 4 else "accumulate"


def table_schedule(group_size: int, scale_bits: int, weight_bits: int) -> str:
    """Schedule as the tables key it: groups other than 128 are named, ``fold/64``, since their tiles differ."""
    name = schedule_name(group_size, scale_bits, weight_bits)
    return name if name in ("none", "int8") or group_size == 128 else f"{name}/{group_size}"
