"""Run decode attention in Triton's interpreter; prints ``{"case": ..., "error": null | text}``, one line per case.

A process of its own, because ``TRITON_INTERPRET`` is read when triton is imported.
"""

from __future__ import annotations

import itertools
import sys

from tests.support.interpreter import interpret, run_cases

interpret()

import torch  # noqa: E402

from intscale_compile.kernels.triton_attention import decode_attention_cuda, parts_of  # noqa: E402

SCALE = 0.1
MASKS = ("none", "bool", "bool-one", "heads", "float", "float-heads")
# batch, query heads, key heads, keys, features: 1, 4 and 8 query heads to a key head; ragged keys; one and several parts
SHAPES = {
    "one-tile": (1, 8, 2, 64, 64),
    "ragged": (2, 8, 1, 37, 128),
    "two-parts": (2, 4, 1, 65, 128),
    "features-80": (3, 4, 4, 200, 80),
    "two-steps": (1, 8, 2, 32 * 64 + 5, 64),
}
QUICK = "one-tile/|ragged/bool$|two-parts/(none|bool|float)$|features-80/heads|two-steps/(none|bool)$|[^/]*$"


def mask_of(kind: str, batch: int, heads: int, keys: int):
    """A mask in which each row sees its first key."""
    if kind == "none":
        return None
    shape = {"bool": (batch, 1, 1, keys), "bool-one": (1, 1, 1, keys), "heads": (batch, heads, 1, keys)}.get(
        kind, (batch, heads if kind == "float-heads" else 1, 1, keys)
    )
    mask = torch.rand(shape) > 0.5 if "float" not in kind else torch.randn(shape)
    if "float" in kind:
        mask[..., 1::3] = float("-inf")
    mask[..., 0] = 1
    return mask


def operands(batch, heads, key_heads, keys, features, dtype=torch.float16):
    """q, k and v; the query strided as a view of a linear layer's output."""
    q = torch.randn(batch, 1, heads, features, dtype=dtype).transpose(1, 2)
    return q, *(torch.randn(batch, key_heads, keys, features, dtype=dtype) for _ in range(2))


def expected(q, k, v, mask, scale=SCALE):
    """PyTorch's attention in fp64."""
    mask = mask if mask is None or mask.dtype is torch.bool else mask.double()
    q, k, v = (x.double() for x in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=True)


def close(y, reference) -> None:
    torch.testing.assert_close(y.double(), reference, rtol=2.0**-9, atol=2.0**-10)


def check(shape, kind) -> None:
    q, k, v = operands(*shape)
    mask = mask_of(kind, shape[0], shape[1], shape[3])
    y = decode_attention_cuda(q, k, v, mask, SCALE)
    assert y.shape == q.shape and y.is_contiguous() and y.dtype is q.dtype
    close(y, expected(q, k, v, mask))


def check_strided() -> None:
    """Caches that are views: of a longer one, of one laid out by token, of every second feature."""
    q, *_ = operands(2, 8, 2, 150, 64)
    caches = torch.randn(2, 2, 2, 300, 64, dtype=torch.float16)
    by_token = torch.randn(2, 2, 150, 2, 64, dtype=torch.float16).transpose(2, 3)
    wide = torch.randn(2, 2, 2, 150, 128, dtype=torch.float16)
    for k, v in (caches[:, :, :, :150], by_token, wide[..., ::2]):
        mask = mask_of("bool", 2, 8, 300)[..., ::2]
        close(decode_attention_cuda(q, k, v, mask, SCALE), expected(q, k, v, mask))


def check_hidden_tail() -> None:
    """The filled beginning of a static cache; what lies behind it may be anything, NaN as well."""
    q, k, v = operands(2, 8, 2, 200, 64)
    visible = torch.arange(200) < torch.tensor([3, 90])[:, None]
    mask = visible[:, None, None]
    k_dirty, v_dirty = (x.masked_fill(~visible[:, None, :, None], float("nan")) for x in (k, v))
    close(decode_attention_cuda(q, k_dirty, v_dirty, mask, SCALE), expected(q, k, v, mask))
    added = torch.zeros(mask.shape).masked_fill(~mask, float("-inf"))
    close(decode_attention_cuda(q, k, v, added, SCALE), expected(q, k, v, mask))


def check_nothing_visible() -> None:
    """Zeros, as in PyTorch; the other sequences are not touched."""
    for keys in (40, 150):
        q, k, v = operands(2, 8, 2, keys, 64)
        mask = torch.ones(2, 1, 1, keys, dtype=torch.bool)
        mask[1] = False
        for one in (mask, torch.zeros(mask.shape).masked_fill(~mask, float("-inf"))):
            y = decode_attention_cuda(q, k, v, one, SCALE)
            assert not y[1].any()
            close(y[:1], expected(q[:1], k[:1], v[:1], None))


def check_alone() -> None:
    """A sequence alone gets the bits that it gets in a batch."""
    for keys, kind in ((60, "float"), (200, "none"), (200, "bool")):
        q, k, v = operands(3, 2, 1, keys, 64)
        mask = mask_of(kind, 3, 2, keys)
        whole = decode_attention_cuda(q, k, v, mask, SCALE)
        for i in (0, 2):
            own = None if mask is None else mask[i : i + 1]
            alone = decode_attention_cuda(q[i : i + 1], k[i : i + 1], v[i : i + 1], own, SCALE)
            assert torch.equal(alone[0], whole[i]), f"{keys} keys, mask {kind}, sequence {i}"


def check_parts() -> None:
    """Each key in one part, never more parts than there is room for."""
    for keys in (*range(1, 300), 2048, 2049, 4096, 8192, 16384, 16385, 131072, 1 << 20):
        parts, steps = parts_of(keys)
        assert 1 <= parts <= (32 if keys <= 16384 else 64) and (parts - 1) * steps * 64 < keys <= parts * steps * 64


def check_empty() -> None:
    """No sequences at all."""
    q, k, v = operands(0, 8, 2, 40, 64)
    assert decode_attention_cuda(q, k, v, None, SCALE).shape == (0, 8, 1, 64)


SINGLE = {
    "strided": check_strided,
    "hidden-tail": check_hidden_tail,
    "nothing-visible": check_nothing_visible,
    "alone": check_alone,
    "number-of-parts": check_parts,
    "no-sequences": check_empty,
}


def main() -> int:
    torch.manual_seed(0)
    checks = dict(SINGLE)
    for (name, shape), kind in itertools.product(SHAPES.items(), MASKS):
        checks[f"{name}/{kind}"] = lambda shape=shape, kind=kind: check(shape, kind)
    return run_cases(checks.items(), QUICK)


if __name__ == "__main__":
    sys.exit(main())
