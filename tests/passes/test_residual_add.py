"""``w4a8_linear_add`` and the pass that emits it, on a CPU: bits of the linear and the addition, what is matched and what not."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from intscale_compile import explain
from intscale_compile.errors import InputError
from intscale_compile.kernels.w4a8_linear import LINEAR_OP
from intscale_compile.kernels.w4a8_residual import LINEAR_ADD_OP
from intscale_compile.ops import KERNEL_ABI
from intscale_compile.passes import PASSES, GraphRewrite, apply_passes
from intscale_compile.passes.residual_add import LEAST_TOKENS, RESIDUAL_ADD, _worthwhile
from tests.support.graphs import arguments, assert_true_metadata, capture, count, run
from tests.support.weights import make_problem

SIZE = 64
ON = {"intscale.force_passes": ["residual_add"]}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("group_size,packing", [(128, "tiled"), (32, "plain")])
def test_op_has_the_bits_of_the_linear_and_the_addition(dtype, group_size, packing):
    p = make_problem(9, 77, 300, group_size, packing=packing)
    residual = torch.randn(9, 77, dtype=dtype)
    operands = (p.xq, p.token_scale, p.qdata, p.scale, p.row_scale, p.bias)
    y = LINEAR_OP(*operands, *p.weight_args, dtype, KERNEL_ABI)
    assert torch.equal(LINEAR_ADD_OP(*operands, residual, *p.weight_args, dtype, KERNEL_ABI), y + residual)
    torch.library.opcheck(LINEAR_ADD_OP, (*operands, residual, *p.weight_args, dtype, KERNEL_ABI))


@pytest.mark.parametrize("residual", [torch.zeros(9, 76), torch.zeros(1, 77), torch.zeros(9, 77, dtype=torch.float16)])
def test_op_refuses_a_residual_unlike_the_result(residual):
    p = make_problem(9, 77, 128, 128)
    operands = (p.xq, p.token_scale, p.qdata, p.scale, p.row_scale, None, residual)
    with pytest.raises(InputError, match="residual"):
        LINEAR_ADD_OP(*operands, *p.weight_args, torch.float32, KERNEL_ABI)


class Block(nn.Module):
    """``add(x, linear(x))``."""

    def __init__(self, add, bias=False, features=SIZE):
        super().__init__()
        self.add, self.linear = add, nn.Linear(SIZE, features, bias=bias)
        self.requires_grad_(False)

    def forward(self, x):
        return self.add(x, self.linear(x))


MATCHED = {
    "residual-first": Block(lambda x, y: x + y),
    "residual-last": Block(lambda x, y: y + x, bias=True),
    "torch.add": Block(torch.add),
    "method": Block(lambda x, y: y.add(x)),
}
LEFT_ALONE = {
    "other-reader": (Block(lambda x, y: x + y * y.sum()), {}),
    "alpha": (Block(lambda x, y: torch.add(x, y, alpha=2)), {}),
    "itself": (Block(lambda x, y: y + y), {}),
    "number": (Block(lambda x, y: y + 1.0), {}),
    "in-place": (Block(lambda x, y: y.add_(x)), {}),
    "broadcast": (Block(lambda x, y: x[:1, :1] + y), {}),
    "wider": (Block(lambda x, y: x.double() + y), {}),
    "reshaped": (Block(lambda x, y: y.view(-1, SIZE) + x.view(-1, SIZE)), {}),
    "off": (MATCHED["residual-first"], {"intscale.disable_passes": ["residual_add"]}),
    "cpu-by-default": (MATCHED["residual-first"], {"intscale.force_passes": []}),
}


def activations(tokens: int = LEAST_TOKENS) -> torch.Tensor:
    return torch.randn(2, tokens // 2, SIZE)


def rewritten(model, x, dynamic=None, **options) -> GraphRewrite:
    rewrite = capture(model, x, dynamic=dynamic, **{**ON, **options})
    apply_passes(rewrite, PASSES)
    return rewrite


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", MATCHED)
def test_matched(name, dynamic):
    x = activations()
    rewrite = rewritten(MATCHED[name], x, dynamic)
    assert rewrite.counts["residual_add"] == count(rewrite, LINEAR_ADD_OP) == 1 and not count(rewrite, LINEAR_OP)
    (node,) = (node for node in rewrite.graph.nodes if node.target is LINEAR_ADD_OP)
    assert node.meta["intscale_tensor"] is not None and len(node.meta["intscale_candidates"]) == 1
    assert_true_metadata(rewrite)
    without = rewritten(MATCHED[name], x, dynamic, **{"intscale.disable_passes": ["residual_add"]})
    assert torch.equal(run(rewrite)[0], run(without)[0])
    code = rewrite.gm.code
    again = GraphRewrite(rewrite.gm, arguments(rewrite), rewrite.settings)
    apply_passes(again, (RESIDUAL_ADD,))
    assert again.counts["residual_add"] == 0 and again.gm.code == code


@pytest.mark.parametrize("name", LEFT_ALONE)
def test_left_alone(name):
    model, options = LEFT_ALONE[name]
    rewrite = rewritten(model, activations(), **options)
    assert rewrite.counts["residual_add"] == count(rewrite, LINEAR_ADD_OP) == 0 and count(rewrite, LINEAR_OP) == 1


def test_two_linears_that_are_added():
    """One of them takes the other as its residual."""

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = (nn.Linear(SIZE, SIZE, bias=False).requires_grad_(False) for _ in range(2))

        def forward(self, x, z):
            return self.a(x) + self.b(z)

    model, inputs = Two(), (activations(), activations())
    rewrite = capture(model, *inputs, **ON)
    apply_passes(rewrite, PASSES)
    assert count(rewrite, LINEAR_ADD_OP) == count(rewrite, LINEAR_OP) == 1
    rewrite.graph.lint()
    without = capture(model, *inputs, **{"intscale.disable_passes": ["residual_add"]})
    apply_passes(without, PASSES)
    assert torch.equal(run(rewrite)[0], run(without)[0])


def test_few_tokens_and_no_graphs(monkeypatch):
    """On a GPU only where Inductor calls the op: there the addition costs a kernel of its own traffic."""
    from intscale_compile.kernels import template

    assert rewritten(MATCHED["residual-first"], activations(LEAST_TOKENS - 2)).counts["residual_add"] == 0
    rewrite = rewritten(MATCHED["residual-first"], activations(), **{"intscale.force_passes": []})
    (linear,) = (node for node in rewrite.graph.nodes if node.target is LINEAR_OP)
    shape = linear.meta["example_value"].shape
    linear.meta["example_value"] = type("OnGpu", (), {"device": torch.device("cuda"), "shape": shape})()
    asked = []
    for answer in (True, False):
        monkeypatch.setattr(template, "op_is_faster", lambda *args, answer=answer: asked.append(args[:2]) or answer)
        assert _worthwhile(rewrite, linear) is answer
    assert asked == [(LEAST_TOKENS, False)] * 2


@pytest.mark.generated
def test_compiled_and_explained():
    """Through Inductor, where the op stays whole, at other numbers of tokens too."""
    model, x = MATCHED["residual-first"], activations()
    (expected,) = run(rewritten(model, x, **{"intscale.disable_passes": ["residual_add"], "intscale.force_passes": []}))
    compiled = torch.compile(model, backend="intscale", dynamic=True, options=ON)
    with torch.no_grad():
        assert torch.equal(compiled(x), expected)
        assert torch.equal(compiled(x[:, :7].contiguous()), expected[:, :7])
    report = explain(model, x, options=ON)
    assert report.gemms == 1 and report.pass_counts["residual_add"] == 1
    assert [layer.kernel for layer in report.layers] == ["oneDNN fold + residual"]
