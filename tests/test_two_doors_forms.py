"""Both doors choose the same weights whichever function, operator or helper a product is written with."""

import functools
import operator
import types

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.functional import linear as linear_by_name

from intscale_compile import IntScaleConfig, explain, quantize
from intscale_compile.reasons import Reason
from intscale_compile.tensors.weight_reads import weight_reads
from tests.support.compiled import rewritten
from tests.support.doors import chosen_by_quantize, compiler_choices, quantized

aten = torch.ops.aten
CONFIG = IntScaleConfig(group_size=32, scale_search="absmax")
X = torch.randn(3, 64)
ROWS = torch.arange(64)


def layers(*names, bias=()):
    """A module with square linear layers of these names."""

    class Layers(nn.Module):
        def __init__(self):
            super().__init__()
            for name in names:
                setattr(self, name, nn.Linear(64, 64, bias=name in bias))
            self.requires_grad_(False)

    return Layers


def rows_of(model):
    return {row.name: (row.quantized, row.reason) for row in explain(model, X).layers}


def of_layers(reasons):
    """Expected rows of layers that are left alone."""
    return {f"{name}.weight": (False, reason) for name, reason in reasons.items()}


# --- functions and operators ----------------------------------------------------------------------------------------------

SERVED = (
    "einsum_list", "einsum_operator", "einsum_overload", "einsum_left", "tensordot_operator", "tensordot", "inner_operator",
    "inner_method", "linalg", "linalg_operator", "reflected", "reflected_function", "augmented", "mm_operator", "matmul_method",
    "mm_method", "by_operator", "addmm_bias", "by_name",
)  # fmt: skip


class Served(layers(*SERVED, bias=("addmm_bias",))):
    def forward(self, x):
        ys = [
            torch.einsum("bk,nk->bn", [x, self.einsum_list.weight]),
            aten.einsum("bk,nk->bn", [x, self.einsum_operator.weight]),
            aten.einsum.default("...k,nk->...n", [x, self.einsum_overload.weight]),
            torch.einsum("nk,bk->bn", self.einsum_left.weight, x),
            aten.tensordot(x, self.tensordot_operator.weight, [-1], [1]),
            torch.tensordot(x, self.tensordot.weight.t(), dims=1),
            aten.inner(x, self.inner_operator.weight),
            x.inner(self.inner_method.weight),
            torch.linalg.matmul(x, self.linalg.weight.t()),
            aten.linalg_matmul(x, self.linalg_operator.weight.t()),
            self.reflected.weight.t().__rmatmul__(x),
            torch.Tensor.__rmatmul__(self.reflected_function.weight.t(), x),
            aten.mm.default(x, aten.t(self.mm_operator.weight)),
            x.matmul(self.matmul_method.weight.t()),
            x.mm(self.mm_method.weight.T),
            operator.matmul(x, self.by_operator.weight.t()),
            torch.addmm(self.addmm_bias.bias, x, self.addmm_bias.weight.t()),
            linear_by_name(x, self.by_name.weight),
        ]
        x = x.clone()
        x @= self.augmented.weight.t()
        return torch.cat([*ys, x], dim=-1)


def test_linear_layers_however_they_are_spelled():
    """aten's einsum and tensordot, and x.matmul(weight), were chosen by one door; __rmatmul__ was said to be in no graph."""
    model = Served()
    everything = {f"{name}.weight" for name in SERVED}
    assert weight_reads(Served) == {}
    assert quantized(compiler_choices(model, X)) == chosen_by_quantize(model) == everything
    plain = rewritten(model, **{"intscale.config": CONFIG})(X)
    quantize(model, CONFIG)
    assert torch.equal(model(X), plain) and torch.equal(rewritten(model)(X), plain)
    assert rows_of(model) == dict.fromkeys(everything, (True, None))


UNSERVED = {
    **dict.fromkeys(
        ("einsum_kn", "einsum_labels", "tensordot_kn", "tensordot_place", "chained", "chained_operator", "chained_old", "batched",
         "batched_operator", "in_place", "into"), "UNKNOWN_FORM",
    ),
    "dense": "BIAS_SHAPE", "left_inner": "LEFT_OPERAND", "left_linear": "LEFT_OPERAND", "reflected": "LEFT_OPERAND",
}  # fmt: skip


class Unserved(layers(*UNSERVED)):
    def forward(self, x):
        y = aten.einsum("bk,kn->bn", [x, self.einsum_kn.weight])
        y = y + torch.einsum(x, [0, 1], self.einsum_labels.weight, [2, 1], [0, 2])
        y = y + torch.tensordot(x, self.tensordot_kn.weight, dims=1)
        y = y + aten.tensordot(x, self.tensordot_place.weight, [1], [1])  # of three dimensions it would be another
        y = (
            y
            + torch.linalg.multi_dot([x, self.chained.weight.t()])
            + aten.chain_matmul([x, self.chained_old.weight.t()])
        )
        y = y + aten.linalg_multi_dot([x, self.chained_operator.weight.t()])
        y = y + torch.baddbmm(x[None], x[None], self.batched.weight.t().unsqueeze(0))[0]
        y = y + aten.bmm(x[None], aten.unsqueeze(aten.t(self.batched_operator.weight), 0))[0]
        y = (
            y
            + x.clone().addmm_(x, self.in_place.weight.t())
            + torch.mm(x, self.into.weight.t(), out=torch.empty(3, 64))
        )
        y = y + torch.addmm(x, x, self.dense.weight.t()) + torch.inner(self.left_inner.weight, x).t()
        y = y + F.linear(self.left_linear.weight, x).t()
        return y + x.t().__rmatmul__(self.reflected.weight).t()


def test_products_that_are_no_linear_layer_are_left_alone_by_both_with_a_reason():
    """quantize took them, and the first call failed, or was 16 dB from the compiled one."""
    model = Unserved()
    assert {name: reason.name for name, reason in weight_reads(Unserved).items()} == UNSERVED
    assert quantized(compiler_choices(model, X)) == chosen_by_quantize(model) == set()
    rows = rows_of(model)
    assert rows.keys() == of_layers(UNSERVED).keys() and not any(taken for taken, _ in rows.values())
    assert {reason for _, reason in rows.values()} <= {"UNKNOWN_FORM", "BIAS_SHAPE", "LEFT_OPERAND", "UNKNOWN_VIEW"}


# --- helpers --------------------------------------------------------------------------------------------------------------


def gathered(weight, index):
    return weight[index]


def multiplied(x, w):
    return x @ w


def through(x, w):
    w = w.to(x.dtype)
    return twice(x, w)


def twice(x, w):
    w = w * 2
    return F.linear(x, w)


def of_layer(x, layer):
    return F.linear(x, layer.weight[ROWS])


def served(x, weight, bias=None):
    return F.linear(x, weight.to(x.dtype), bias)


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        return x @ (weight + weight).t()


class Base(layers("above")):
    def forward(self, x):
        return F.linear(x, self.above.weight[ROWS])


HELPED = (
    "gather", "kn", "chain", "module", "static", "method", "by_keyword", "listed", "one_of", "other_of", "checked", "own",
    "applied", "inner", "little", "named", "got", "walrus", "columns", "flat", "alias",
)  # fmt: skip


class Helped(Base):
    def __init__(self):
        super().__init__()
        for name in (*HELPED, "kept"):
            setattr(self, name, nn.Linear(64, 64, bias=False))
        self.many, self.table = (
            nn.ModuleList([nn.Linear(64, 64), nn.Linear(64, 64)]),
            nn.ModuleDict({"a": nn.Linear(64, 64)}),
        )
        self.requires_grad_(False)

    @staticmethod
    def static_part(x, weight):
        return F.linear(x, weight[ROWS])

    def method_part(self, x, weight):
        return F.linear(x, weight * 2)

    def checked_part(self, x):
        return F.linear(x, self.checked.weight[ROWS])

    @property
    def own_part(self):
        return self.own.weight * 2

    def forward(self, x):
        def inner(w):
            return F.linear(x, w[ROWS])

        little = lambda w: F.linear(x, w[ROWS])  # noqa: E731
        y = super().forward(x) + F.linear(x, gathered(self.gather.weight, ROWS)) + multiplied(x, self.kn.weight)
        y = y + through(x, self.chain.weight) + of_layer(x, self.module) + self.static_part(x, self.static.weight)
        y = y + self.method_part(x, self.method.weight) + self.method_part(weight=self.by_keyword.weight, x=x)
        y = (
            y
            + torch.utils.checkpoint.checkpoint(self.checked_part, x, use_reentrant=False)
            + F.linear(x, self.own_part)
        )
        y = y + Doubled.apply(x, self.applied.weight) + inner(self.inner.weight) + little(self.little.weight)
        y = y + F.linear(x, getattr(self, "named").weight[ROWS]) + F.linear(x, self.get_parameter("got.weight") * 2)  # noqa: B009
        y = y + F.linear(x, (w := self.walrus.weight) * 2) + served(x, self.kept.weight) + w.shape[0]
        for weight in (self.one_of.weight, self.other_of.weight):
            y = y + F.linear(x, weight[ROWS])
        for layer in self.many:
            y = y + (layer.weight @ x.t()).t()
        first, second = self.columns.weight.chunk(2, dim=1)
        y = y + F.linear(x[:, :32], first) + F.linear(x, self.flat.weight.reshape(-1).view(64, 64))
        alias = self.alias
        y = y + F.linear(x, alias.weight[ROWS]) + F.linear(x, self.table["a"].weight[ROWS])
        return y + F.linear(x, self.listed.weight[[0, 1] * 32])


def test_what_helper_functions_do_with_weights_is_seen():
    """A gather in a function outside of the class was quantized by one door and not by the other."""
    model = Helped()
    left = {"above", *HELPED, "many.*", "table.a"}
    assert weight_reads(Helped).keys() == left
    assert quantized(compiler_choices(model, X)) == chosen_by_quantize(model) == {"kept.weight"}
    quantize(model, CONFIG)
    assert torch.equal(rewritten(model)(X), model(X))


class Attending(layers("q")):
    def attend(self, x):
        return F.linear(x, self.q.weight[ROWS])


class Around(nn.Module):
    def __init__(self):
        super().__init__()
        self.part = Attending()

    def forward(self, x):
        return self.part.attend(x)


def replaced_forward(self, x):
    return F.linear(x, self.q.weight[ROWS])


@pytest.mark.parametrize("kind", ["of another module", "of an instance", "wrapped"])
def test_methods_of_other_modules_and_of_instances(kind):
    if kind == "of another module":
        model = Around()
    else:
        model = Attending()
        model.forward = types.MethodType(replaced_forward, model)
        if kind == "wrapped":  # as accelerate's hooks do
            model.forward = functools.update_wrapper(functools.partial(model.forward), model.forward)
    assert quantized(compiler_choices(model, X)) == chosen_by_quantize(model) == set()


# --- vmap -----------------------------------------------------------------------------------------------------------------


class Mapped(layers("q")):
    def forward(self, x):
        return torch.vmap(lambda row: F.linear(row, self.q.weight))(x)


def test_vmap_in_a_compiled_function():
    """The passes computed with the values of a batch outside of vmap: an internal assertion of PyTorch."""
    model = Mapped()
    assert compiler_choices(model, X) == {"q.weight": Reason.DIFFERENTIATED}
    assert torch.equal(rewritten(model)(X), model(X))
    assert rows_of(model) == {"q.weight": (False, "DIFFERENTIATED")}
    quantize(model, CONFIG)
    assert torch.equal(rewritten(model)(X), model(X))


class MappedBeside(layers("q", "r")):
    """As Mamba's scan, which maps a function of two elements, between products that have nothing to do with it."""

    def forward(self, x):
        return self.r(torch.vmap(lambda row: row.cumsum(0) * 0.1)(self.q(x)))


def test_products_beside_vmap_are_quantized():
    assert (
        quantized(compiler_choices(MappedBeside(), X)) == chosen_by_quantize(MappedBeside()) == {"q.weight", "r.weight"}
    )
