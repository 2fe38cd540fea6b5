"""A weight is found through its views, under whichever name this torch gives them."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torchao.quantization import quantize_

from intscale_compile import IntScaleConfig, IntScaleTensor
from intscale_compile.kernels.w4a8_linear import LINEAR_OP
from intscale_compile.passes import PASSES, apply_passes
from intscale_compile.reasons import Reason, log_once
from intscale_compile.tensors.linear import linear
from tests.support.graphs import capture, count, run

QUANTIZED = {
    "T": lambda x, w: x @ w.T,
    "mT": lambda x, w: x @ w.mT,
    "H": lambda x, w: torch.matmul(x, w.H),
    "adjoint": lambda x, w: x @ w.adjoint(),
    "movedim": lambda x, w: x @ w.movedim(0, 1),
    "data": lambda x, w: x @ w.data.T,
    "view": lambda x, w: F.linear(x, w.view(32, 64)),
    "select": lambda x, w: x @ w.unsqueeze(0)[0].t(),
    "strides": lambda x, w: x.mm(w.as_strided((64, 32), (1, 64))),
    "inner": lambda x, w: torch.inner(x, w),
    "tensordot": lambda x, w: torch.tensordot(x, w.mT, 1),
    "einsum": lambda x, w: torch.einsum("...k,nk->...n", x, w),
    "einsum-transposed": lambda x, w: torch.einsum("kn,bk->bn", [w.T, x]),
    "linalg": lambda x, w: torch.linalg.matmul(x, w.t()),
    "twice": lambda x, w: F.linear(x, w.T.reshape(64, 32).movedim(1, 0)),
}
LEFT_ALONE = {
    "halves-exchanged": lambda x, w: x @ w.view(64, 32),
    "columns": lambda x, w: F.linear(x, w.view(16, 2, 64).movedim(1, 0).flatten(1).view(32, 64)),
}


class Product(nn.Module):
    def __init__(self, form):
        super().__init__()
        self.form, self.weight = form, nn.Parameter(torch.randn(32, 64), requires_grad=False)

    def forward(self, x):
        return self.form(x, self.weight)


@pytest.mark.parametrize("form", QUANTIZED)
def test_the_weight_and_its_transpose_are_quantized_however_they_are_written(form):
    model, x = Product(QUANTIZED[form]), torch.randn(4, 64)
    rewrite = capture(model, x)
    apply_passes(rewrite, PASSES)
    assert [(c.name, c.reason, c.shape) for c in rewrite.candidates] == [("weight", None, (32, 64))]
    assert count(rewrite, LINEAR_OP) == 1
    # Nothing else is left of the graph: quantize, linear.
    assert [n.op for n in rewrite.graph.nodes if n.users or n.op == "output"].count("call_function") <= 4
    (y,) = run(rewrite)
    assert torch.equal(y, linear(x, IntScaleTensor.from_hp(model.weight, IntScaleConfig()), None))


def test_a_quantized_weight_is_found_through_T():
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(64, 32, bias=False).requires_grad_(False)

        def forward(self, x):
            return x @ self.inner.weight.T

    model, x = Layer(), torch.randn(4, 64)
    quantize_(model, IntScaleConfig())
    rewrite = capture(model, x)
    apply_passes(rewrite, PASSES)
    assert [c.reason for c in rewrite.candidates] == [None] and count(rewrite, LINEAR_OP) == 1
    assert torch.equal(run(rewrite)[0], F.linear(x, model.inner.weight))


def test_a_view_that_is_neither_is_named_and_logged(caplog):
    log_once.cache_clear()
    with caplog.at_level("INFO", logger="intscale_compile"):
        rewrite = capture(Product(LEFT_ALONE["halves-exchanged"]), torch.randn(4, 64))
        apply_passes(rewrite, PASSES)
    assert [(c.name, c.reason) for c in rewrite.candidates] == [("weight", Reason.UNKNOWN_VIEW)]
    assert f"weight: {Reason.UNKNOWN_VIEW.value}" in [record.getMessage() for record in caplog.records]


def test_a_copy_in_another_order_is_computed():
    rewrite = capture(Product(LEFT_ALONE["columns"]), torch.randn(4, 64))
    apply_passes(rewrite, PASSES)
    assert [c.reason for c in rewrite.candidates] == [Reason.NOT_CONSTANT]


def test_a_view_that_is_written_to_is_not_the_weight():
    def form(x, w):
        view = w.movedim(0, 1)
        view.mul_(2.0)
        return x @ view

    rewrite = capture(Product(form), torch.randn(4, 64))
    apply_passes(rewrite, PASSES)
    assert count(rewrite, LINEAR_OP) == 0 and [c.reason for c in rewrite.candidates] == [Reason.NOT_CONSTANT]
