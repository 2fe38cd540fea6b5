"""Triton device functions for weights with zero points, as source text also part of the Inductor template (``triton_tile``)."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def center_codes(packed, factors, PTX: tl.constexpr):
    """Expand uint8 ``[BLOCK_N, P/2]`` into ``(code - zero point) * scale`` of its two halves, int8 each.

    ``factors`` is int32 ``[BLOCK_N]`` of :func:`load_factors`: for each half the scale ``s``, at most 7, and ``s`` times the
    zero point, both unsigned and a byte each.
    """
    # Four bytes at once, as in fold_codes: u * s + (128 - s * zero) lies in [23, 233].
    if PTX:
        low, high = tl.inline_asm_elementwise(
            """{
            .reg .b32 t, u, a, b, c, d;
            and.b32 a, $3, 0xFF;
            bfe.u32 c, $3, 8, 8;
            bfe.u32 b, $3, 16, 8;
            shr.u32 d, $3, 24;
            mad.lo.u32 c, c, 0xFEFEFEFF, 0x80808080;
            mad.lo.u32 d, d, 0xFEFEFEFF, 0x80808080;
            shr.u32 u, $2, 4;
            and.b32 t, $2, 0x0F0F0F0F;
            and.b32 u, u, 0x0F0F0F0F;
            mad.lo.u32 t, t, a, c;
            mad.lo.u32 u, u, b, d;
            xor.b32 $0, t, 0x80808080;
            xor.b32 $1, u, 0x80808080;
            }""",
            "=&r,=r,r,r,r,r,r",
            [packed, tl.broadcast_to(factors[:, None], packed.shape)],
            dtype=(tl.int8, tl.int8),
            is_pure=True,
            pack=4,
        )
    else:
        low = ((packed & 15).to(tl.int32) * (factors & 255)[:, None] - (factors >> 8 & 255)[:, None]).to(tl.int8)
        high = ((packed >> 4).to(tl.int32) * (factors >> 16 & 255)[:, None] - (factors >> 24)[:, None]).to(tl.int8)
    return low, high


@triton.jit
def load_factors(scale_pointers, zero_pointers, FOLD: tl.constexpr, TWO_GROUPS: tl.constexpr, STRIDE: tl.constexpr):
    """``factors`` of :func:`center_codes` for one step: scale and scale * zero of the low half and, above, of the high.

    Without FOLD the scale in there is 1. Zero points are stored signed; ``+ 8`` puts them on the scale of packed codes.
    """
    zero = tl.load(zero_pointers).to(tl.int32) + 8
    scale = tl.load(scale_pointers).to(tl.int32) if FOLD else zero * 0 + 1
    low = scale | (scale * zero << 8)
    if TWO_GROUPS:
        zero = tl.load(zero_pointers + STRIDE).to(tl.int32) + 8
        scale = tl.load(scale_pointers + STRIDE).to(tl.int32) if FOLD else scale
        return low | (scale << 16) | (scale * zero << 24)
    return low | (low << 16)


@triton.jit
def offset_product(pointers, x):
    """Offsets ``[BLOCK_N]`` times the sums of int8 activations ``[DEPTH, BLOCK_M]`` over DEPTH."""
    return tl.load(pointers).to(tl.int32)[:, None] * tl.sum(x.to(tl.int32), 0)[None, :]
