"""``bisect`` finds a wrong pass, and wrong layers, by name."""

import copy

import pytest
import torch
from torch import nn
from torchao.quantization import quantize_

from intscale_compile import IntScaleConfig, bisect
from intscale_compile.compile import binding
from intscale_compile.errors import ConfigError, InputError
from intscale_compile.kernels.w4a8_linear import LINEAR_OP
from intscale_compile.passes import PASSES, Pass
from tests.debug.test_trace import Model


def wrong_fuse(rewrite, name="layers.1.o_proj"):
    """Fuses, and mixes up the row scales of one layer."""
    count = next(one for one in PASSES if one.name == "fuse").run(rewrite)
    for node in list(rewrite.graph.nodes):
        names = [c.name for c in node.meta.get("intscale_candidates", ())]
        if node.target is LINEAR_OP and any(name in one for one in names):
            with rewrite.graph.inserting_before(node):
                rolled = rewrite.call(torch.roll, (node.args[4], 7, 0))
                node.update_arg(4, rewrite.call(torch.mul, (rolled, 1.5)))
    return count


def with_pass(name, run):
    return tuple(Pass(name, run) if one.name == name else one for one in PASSES)


@pytest.fixture(autouse=True)
def _reset():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_nothing_is_found_where_nothing_is_wrong():
    model, x = Model(), torch.randn(4, 64)
    result = bisect(torch.compile(model, backend="intscale"), x)
    assert not result.found and result.responsible_pass is None and result.layer_trials == ()
    assert [trial.name for trial in result.passes] == ["dynamo", *(one.name for one in PASSES)]
    assert all(trial.step > 60 for trial in result.passes[4:]) and 10 < result.passes[-1].sqnr < 40
    assert "nothing is wrong" in str(result)


def test_a_wrong_pass_of_the_backend_is_found_with_its_layer(monkeypatch):
    monkeypatch.setattr(binding, "PASSES", with_pass("fuse", wrong_fuse))
    result = bisect(Model(), torch.randn(4, 64))
    assert result.responsible_pass == "fuse"
    assert [culprit.name for culprit in result.layers] == ["layers.1.o_proj.weight"]
    assert "pass: fuse; layers: layers.1.o_proj.weight" in str(result)


def test_a_wrong_pass_is_found_by_a_bound_of_ones_own():
    result = bisect(Model(), {"x": torch.randn(4, 64)}, bound=12, passes=with_pass("fuse", wrong_fuse))
    assert result.responsible_pass == "fuse" and result.bound == 12
    assert [culprit.name for culprit in result.layers] == ["layers.1.o_proj.weight"]


def test_a_pass_that_raises_or_leaves_a_broken_graph_is_named():
    def raises(rewrite):
        raise KeyError("gone")

    def breaks(rewrite):
        node = next(n for n in rewrite.graph.nodes if n.target is LINEAR_OP)
        node.update_arg(2, node.args[3])
        return 1

    result = bisect(Model(), torch.randn(4, 64), passes=with_pass("rotate_quantize", raises))
    assert result.responsible_pass == "rotate_quantize" and "KeyError: 'gone'" in str(result)
    result = bisect(Model(), torch.randn(4, 64), passes=with_pass("rotate_quantize", breaks))
    assert result.responsible_pass == "rotate_quantize" and result.passes[-1].error


def test_a_wrong_pass_that_has_nothing_to_do_with_layers():
    def doubles(rewrite):
        (output,) = [n for n in rewrite.graph.nodes if n.op == "output"]
        with rewrite.graph.inserting_before(output):
            output.args = ((rewrite.call(torch.mul, (output.args[0][0], 2.0)),),)
        return 1

    result = bisect(Model(), torch.randn(4, 64), passes=with_pass("causal_attention", doubles))
    assert result.responsible_pass == "causal_attention" and result.layers == ()
    assert "not the quantization of a layer" in str(result)


def test_layers_that_do_not_survive_quantization_are_found_among_plain_ones():
    """Outliers in two weights: insert_qdq is where it happens, the layers are the answer."""
    model = Model()
    for layer in model.layers:
        layer.o_proj.weight.copy_(0.5 * torch.randn(64, 48))
        layer.o_proj.weight[:, 3] = 50.0
        layer.q_proj.weight[3] = 0  # so that the outliers meet a zero
    result = bisect(model, torch.randn(4, 64))
    assert result.responsible_pass == "insert_qdq"
    assert {c.name for c in result.layers} == {"layers.0.o_proj.weight", "layers.1.o_proj.weight"}


@pytest.mark.parametrize("layer", ["layers.1.k_proj", pytest.param("layers.0.q_proj", marks=pytest.mark.slow)])
def test_a_corrupted_layer_of_a_quantized_model_is_found(layer):
    model, x = Model(), torch.randn(4, 64)
    other = copy.deepcopy(model)
    quantize_(other, IntScaleConfig())
    assert not bisect(other, x, reference=model).found
    other.get_submodule(layer).weight.per_tensor_scale *= 6
    result = bisect(other, x, reference=model)
    assert result.responsible_pass is None and [c.name for c in result.layers] == [f"{layer}.weight"]
    assert "the model is wrong before any pass" in str(result)
    assert not bisect(other, x).found  # what is stored is the reference then


def test_graph_breaks_and_two_culprits():
    model = Model()

    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, x):
            x = self.inner.layers[0](x)
            torch._dynamo.graph_break()
            return self.inner.layers[1](x)

    def wrong(rewrite):
        return wrong_fuse(rewrite, "o_proj")

    result = bisect(Broken(), torch.randn(4, 64), passes=with_pass("fuse", wrong))
    assert [c.name for c in result.layers] == ["inner.layers.0.o_proj.weight", "inner.layers.1.o_proj.weight"]


def test_misuse_is_an_error():
    with pytest.raises(ConfigError, match="intscale.group_sice"):
        bisect(Model(), torch.randn(4, 64), options={"intscale.group_sice": 3})
    with pytest.raises(InputError, match="nothing to compile"):
        bisect(nn.Identity(), torch.randn(4, 64))
