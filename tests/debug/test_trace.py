"""``trace_node``: the way of one weight, by its dotted name."""

import pytest
import torch
from torch import nn

import intscale_compile
from intscale_compile import trace_node
from intscale_compile.errors import InputError
from tests.debug.test_stages import recorded


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(64, 48, bias=False), nn.Linear(64, 32, bias=False)
        self.o_proj, self.gate = nn.Linear(48, 64), nn.Linear(64, 4)

    def forward(self, x):
        return 3 * self.o_proj(self.q_proj(x)) + self.k_proj(x).repeat(1, 2) + self.gate(x).repeat(1, 16)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(2))
        self.requires_grad_(False)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.fixture(scope="module")
def compilation():
    return recorded(Model(), torch.randn(3, 64))[0]


def test_a_merged_weight_is_followed_into_its_gemm(compilation):
    trace = trace_node("layers.1.k_proj", graph=compilation.number)
    assert trace.name == "layers.1.k_proj.weight" and trace.changed_by == (
        "insert_qdq",
        "share_quantize",
        "merge_siblings",
        "fuse",
    )
    stages = {stage.name: stage for stage in trace.stages}
    assert stages["share_quantize"].gemm == ("layers.1.k_proj.weight",)
    for name in ("merge_siblings", "fuse", "final"):
        assert stages[name].gemm == ("layers.1.q_proj.weight", "layers.1.k_proj.weight")
        assert stages[name].rows == (48, 80)
    (line,) = [line for line in stages["fuse"].lines if "intscale.w4a8_linear" in line]
    assert "80, 128, 4" in line and stages["fuse"].nodes == (line.partition(" = ")[0],)
    assert "[1]  # float32 [3, 32]" in stages["fuse"].lines[-1]  # its piece of the split
    assert sum("intscale.quantize_per_token" in line for line in stages["fuse"].lines) == 1
    text = str(trace)
    assert "# rows 48:80 of one GEMM: layers.1.q_proj.weight + layers.1.k_proj.weight" in text
    assert "rotate_quantize: unchanged" in text and "32 x 64, 3 tokens" in text


def test_names_are_full_or_the_last_parts(compilation):
    names = ("layers.0.o_proj.weight", "layers.0.o_proj", "0.o_proj", "0.o_proj.weight")
    assert {trace_node(name).name for name in names} == {"layers.0.o_proj.weight"}


def test_a_weight_that_was_left_alone_says_why(compilation):
    trace = trace_node("layers.0.gate")
    assert trace.changed_by == () and "left alone: TOO_SMALL" in str(trace)
    assert all("linear" in stage.lines[-1] for stage in trace.stages)


def test_a_weight_that_is_used_twice_shows_both_products():
    linear = nn.Linear(64, 64).requires_grad_(False)
    recorded(nn.Sequential(linear, nn.ReLU(), linear), torch.randn(2, 64))
    (fused,) = [stage for stage in trace_node("0.weight").stages if stage.name == "fuse"]
    assert len(fused.nodes) == 2


@pytest.mark.parametrize(
    "name, graph, message",
    [
        ("o_proj", None, "fits 2 weights: say which of layers.0.o_proj.weight, layers.1.o_proj.weight"),
        ("layers.9.o_proj", None, "no graph of this process has a product with such a weight: one of "),
        ("layers.0.o_proj", 10**6, "not graph 1000000"),
    ],
)
def test_wrong_names_are_errors(compilation, name, graph, message):
    with pytest.raises(InputError, match=message):
        trace_node(name, graph)
    assert intscale_compile.trace_node is trace_node
