"""Strides of rewritten values: every pass keeps them, or its readers do not look; what reads them makes it copy or decline."""

from __future__ import annotations

import logging

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from intscale_compile.kernels.w4a8_gated import GATED_OP
from intscale_compile.kernels.w4a8_linear import LINEAR_OP
from intscale_compile.kernels.w4a8_residual import LINEAR_ADD_OP
from intscale_compile.passes import PASSES, apply_passes
from intscale_compile.passes.layout import is_contiguous, same_layout
from intscale_compile.reasons import Reason, log_once
from tests.support.graphs import Together, assert_true_metadata, capture, count
from tests.support.layouts import checked_rewrite

B, S, N = 2, 6, 64


class Siblings(nn.Module):
    """q and k of one activation, and what reads them."""

    def __init__(self, read, bias=False):
        super().__init__()
        self.read = read
        self.q, self.k = nn.Linear(64, N, bias=bias), nn.Linear(64, N, bias=bias)
        self.requires_grad_(False)

    def forward(self, x):
        return self.read(self.q(x), self.k(x))


def overlapping(k):
    """As Longformer's chunks: ``as_strided`` with strides taken from what it reads."""
    k = k.transpose(0, 1).reshape(S, B, N).transpose(0, 1)
    size, stride = (B, 3, 2, N), k.stride()
    return k.as_strided(size, (stride[0], stride[1], stride[1], stride[2]))


def branch(k):
    return k.view(-1) if k.is_contiguous() else k.reshape(-1) * 0


@torch.library.custom_op("layout_tests::rows", mutates_args=())
def rows(x: torch.Tensor) -> torch.Tensor:
    """Reads memory and not elements, as a foreign kernel may."""
    return x.as_strided((x.numel(),), (1,)).clone()


@rows.register_fake
def _(x):
    return x.new_empty((x.numel(),))


# How q and k are read, and how many of the two are then copied.
READERS = {
    "elements": (lambda q, k: q * k, 0),
    "reshape": (lambda q, k: q.reshape(-1, 2).sum(-1) + k.reshape(-1, 2).sum(-1), 0),
    "heads": (lambda q, k: q.view(B, S, 4, 16).transpose(1, 2) @ k.view(B, S, 4, 16).permute(0, 2, 3, 1), 0),
    "contiguous": (
        lambda q, k: q.contiguous().view(-1) + k.transpose(0, 1).contiguous().transpose(0, 1).reshape(-1),
        0,
    ),
    "softmax": (lambda q, k: torch.softmax(q, -1) + F.layer_norm(k, (N,)), 0),
    "as_strided-k": (lambda q, k: q[:, :3, None].sum() + overlapping(k).mul(1), 1),
    "as_strided-q": (lambda q, k: q.as_strided((B, 3, 2, N), (S * N, N, N, 1)).mul(1) + k.sum(), 1),
    "as_strided-behind-a-view": (lambda q, k: q.view(-1, N).as_strided((3, N), (N, 1), 64).mul(1) + k.sum(), 1),
    "as_strided-idle-dropout": (
        lambda q, k: F.dropout(k, 0.1, False).as_strided((4, N), (N, 1), 0).mul(1) + q.sum(),
        1,
    ),
    "as_strided-offset": (lambda q, k: q.sum() + torch.as_strided(k, (4, N), (N, 1), 0).mul(1), 1),
    "view": (lambda q, k: q.view(-1) + k.sum(), 1),
    "is_contiguous": (lambda q, k: branch(q) + branch(k), 2),
    "stride": (lambda q, k: q * k.stride(0) + k, 0),
    "foreign": (lambda q, k: rows(k) + q.sum(), 1),
    "results": (lambda q, k: (q, k), 2),
    "views-as-results": (lambda q, k: (q.view(B, S, 4, 16).transpose(1, 2), k * 2), 1),
    "written": (lambda q, k: q.add_(1) * k, 0),
    "empty_like": (lambda q, k: torch.zeros_like(q) + k, 0),
}


class Apart(Together):
    def forward(self, *xs):
        return [part for y in super().forward(*xs) for part in (y if isinstance(y, tuple) else (y,))]


@pytest.fixture(scope="module")
def apart():
    """Each model with its activation, and its results without merging: all of them in one graph."""
    torch.manual_seed(0)
    model, xs = Apart(Siblings(read) for read, _ in READERS.values()), [torch.randn(B, S, 64) for _ in READERS]
    rewrite, _, found = checked_rewrite(model, *xs, **{"intscale.disable_passes": ("merge_siblings",)})
    assert count(rewrite, LINEAR_OP) == 2 * len(READERS)
    values = iter(found)
    sizes = {name: 2 if name in ("results", "views-as-results") else 1 for name in READERS}
    results = {name: [next(values) for _ in range(size)] for name, size in sizes.items()}
    assert next(values, None) is None
    return dict(zip(READERS, zip(model.models, xs, results.values())))


@pytest.mark.parametrize("name", READERS)
def test_merged_siblings_are_copied_where_a_reader_may_look_at_strides(name, apart):
    model, x, same = apart[name]
    rewrite, expected, found = checked_rewrite(model, x)
    assert rewrite.counts["merge_siblings"] == 1 and count(rewrite, torch.clone) == READERS[name][1]
    assert_true_metadata(rewrite)
    assert len(found) == len(same) == len(expected)
    for one, other in zip(found, same):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_one_token_is_never_copied_but_for_its_memory():
    """Strides of dimensions of one element say nothing; the offset in a larger memory does."""
    model = Siblings(lambda q, k: (q.view(-1) * 2, k.as_strided((1, N), (N, 1), 0) * 2))
    rewrite, _, _ = checked_rewrite(model, torch.randn(1, 1, 64))
    assert count(rewrite, torch.clone) == 1


def test_dynamic_sizes_are_compared_without_guards():
    rewrite, _, _ = checked_rewrite(Siblings(lambda q, k: q.view(-1) + k.sum()), torch.randn(B, S, 64), dynamic=True)
    assert rewrite.counts["merge_siblings"] == 1 and count(rewrite, torch.clone) == 1


@pytest.mark.generated
def test_strides_behind_a_graph_break_are_those_of_eager_mode():
    """``data_ptr`` and what follows run outside of the graph, on its results."""
    from tests.support.compiled import rewritten

    seen = []

    def read(q, k):
        torch._dynamo.graph_break()
        seen.append((q.stride(), k.stride(), k.data_ptr() != q.data_ptr(), k.storage_offset()))
        return q.view(-1) + k.view(-1)

    model, x = Siblings(read), torch.randn(B, S, 64)
    model(x)
    torch._dynamo.reset()
    run = rewritten(model, fullgraph=False)
    with torch.no_grad():
        run(x)
    assert seen[0] == seen[-1] == ((S * N, N, 1), (S * N, N, 1), True, 0) and len(seen) == 2


def fused(x):
    return x[..., :128], x[..., 128:]


class Transposed(nn.Module):
    """A product whose result Dynamo has seen with the strides of its transposed addend."""

    def __init__(self, read):
        super().__init__()
        self.linear, self.read = nn.Linear(64, 64, bias=False), read
        self.requires_grad_(False)

    def forward(self, x, residual):
        return self.read(residual.transpose(0, 1) + self.linear(x))


def test_a_residual_addition_with_other_strides_is_left_alone_where_they_are_read():
    inputs = torch.randn(16, 32, 64), torch.randn(32, 16, 64)
    on = {"intscale.force_passes": ("residual_add",)}
    for read, done in ((lambda y: y * 2 + 1, None), (lambda y: y.as_strided((4,), (1,)), 0), (lambda y: y, 0)):
        rewrite, expected, found = checked_rewrite(Transposed(read), *inputs, **on)
        (node,) = [n for n in rewrite.graph.nodes if n.op == "output"]
        assert done is None or count(rewrite, LINEAR_ADD_OP) == done
        assert all(map(same_layout, expected, found))


def test_a_gated_product_with_its_own_strides_is_taken():
    class Mlp(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.Linear(64, 256, bias=False)
            self.requires_grad_(False)

        def forward(self, x):
            gate, up = fused(self.up(x))
            return F.silu(gate) * up

    rewrite, _, _ = checked_rewrite(Mlp(), torch.randn(256, 64), **{"intscale.force_passes": ("gated_activation",)})
    assert count(rewrite, GATED_OP) == 1


def test_a_product_that_is_not_contiguous_is_left_alone_with_a_reason_where_its_strides_are_read(caplog):
    weight = nn.Parameter(torch.randn(64, 64), requires_grad=False)

    def model(x):
        return torch.matmul(x, weight)

    rewrite = capture(model, torch.randn(8, 64))
    (node,) = [n for n in rewrite.graph.nodes if n.target is torch.matmul]
    with rewrite.fake_mode:  # as another version of PyTorch may record it
        node.meta["example_value"] = torch.empty_strided((8, 64), (1, 8))
    log_once.cache_clear()
    with caplog.at_level(logging.INFO, "intscale_compile"):
        apply_passes(rewrite, PASSES)
    assert [c.reason for c in rewrite.candidates] == [Reason.STRIDES] and count(rewrite, LINEAR_OP) == 0
    assert "as_strided" in caplog.text


def test_is_contiguous_ignores_dimensions_of_one_element():
    assert is_contiguous(torch.empty_strided((1, 3, 1, 4), (7, 4, 9, 1)))
    assert is_contiguous(torch.empty(())) and is_contiguous(torch.empty(0, 3))
    assert not is_contiguous(torch.empty(3, 4).t())
    assert same_layout((torch.empty(1, 3), 2), (torch.empty_strided((1, 3), (99, 1)), 2))
    assert not same_layout(torch.empty(2, 3), torch.empty(3, 2).t())
