"""Stages of a compilation: each is Python that runs and computes what the graph computed; nothing keeps weights alive."""

import gc
import weakref

import pytest
import torch
import torch.utils.checkpoint
from torch import nn
from torchao.quantization import quantize_

import intscale_compile
from intscale_compile import IntScaleConfig
from intscale_compile.compile.binding import bind, rewrite_graph
from intscale_compile.compile.options import parse_options
from intscale_compile.compile.recorder.compilation import FINAL, remember
from intscale_compile.compile.recorder.stages import StageRecorder
from intscale_compile.debug import last_compilation
from intscale_compile.errors import CompileError
from intscale_compile.passes import PASSES
from tests.support.graphs import arguments, capture


class Block(nn.Module):
    """Siblings with and without a bias, an activation, a constant, and a product that is too small."""

    def __init__(self):
        super().__init__()
        self.q, self.k = nn.Linear(64, 64), nn.Linear(64, 32, bias=False)
        self.o, self.small = nn.Linear(64, 64), nn.Linear(64, 8)
        self.requires_grad_(False)

    def forward(self, x):
        return self.o(self.q(x).relu()), self.k(x) * torch.tensor([2.0, 3.0]).repeat(16), self.small(x)


def recorded(model, *inputs, dynamic=None, **options):
    """The only compilation of a model, without Inductor, and what ran: graph and arguments of every stage."""
    settings, _ = parse_options(None, options)
    made = []

    def backend(gm, example_inputs):
        recorder, kept = StageRecorder(), {}

        def observe(name, rewrite):
            recorder(name, rewrite)
            kept[name] = (rewrite.graph.python_code("self").src, arguments(rewrite))

        rewrite = rewrite_graph(gm, example_inputs, settings, observer=observe)
        run = bind(rewrite, lambda graph, _: (observe(FINAL, rewrite), graph.forward)[1])
        made.append((remember(recorder, rewrite, None, {}, []), kept))
        return run

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, backend=backend, dynamic=dynamic)(*inputs)
    torch._dynamo.reset()
    ((compilation, kept),) = made
    return compilation, kept


def executed(code):
    names = {"__name__": "stage"}
    exec(compile(code, "stage", "exec"), names)
    return names


@pytest.mark.parametrize("dynamic", [None, True])
def test_every_stage_runs_and_computes_what_the_graph_computed(dynamic):
    model, x = Block(), torch.randn(3, 5, 64)
    expected = model(x)
    compilation, kept = recorded(model, x, dynamic=dynamic)
    assert [stage.name for stage in compilation.stages] == ["dynamo", *(one.name for one in PASSES), FINAL]
    for stage in compilation.stages:
        names = executed(stage.code)
        with torch.no_grad():
            examples = names["example_inputs"]()
            assert [type(v) for v in examples] == [
                torch.Tensor if isinstance(v, torch.Tensor) else int for v in examples
            ]
            names["forward"](*examples)
            if stage.name != FINAL:  # there, weights that were replaced are gone from the inputs
                result = names["forward"](
                    *(a.detach() if isinstance(a, torch.Tensor) else a for a in kept[stage.name][1])
                )
                for a, b in zip(expected, result):
                    assert a.shape == b.shape
                    noise = (a - b).square().sum() / a.square().sum()
                    assert noise == 0 if stage.name in ("dynamo", "match") else noise < 0.02


def test_stages_say_what_changed():
    compilation, _ = recorded(Block(), torch.randn(3, 64))
    changed = [stage.name for stage in compilation.stages if stage.changed]
    assert changed == ["insert_qdq", "share_quantize", "merge_siblings", "fuse", FINAL]
    assert [compilation.stage(name).count for name in changed[:4]] == [3, 1, 1, 2]
    diff = compilation.stage("fuse").diff().split("\n")
    assert sum(line.startswith("+") and "= torch.ops.intscale.w4a8_linear" in line for line in diff) == 2
    assert sum(line.startswith("-") and "= torch._C._nn.linear" in line for line in diff) == 2
    assert compilation.stage("match").diff() == ""


def test_a_pass_that_reports_no_match_changes_nothing():
    for model, inputs in ((Block(), (torch.randn(3, 64),)), (nn.Linear(64, 64), (torch.randn(2, 64),))):
        compilation, kept = recorded(model, *inputs)
        before = kept["dynamo"][0]
        for stage in compilation.stages[1:-1]:
            after = kept[stage.name][0]
            assert (before != after) == stage.changed, stage.name
            assert not stage.changed or stage.count > 0
            before = after


def test_inputs_are_described_by_the_weights_that_they_come_from():
    compilation, _ = recorded(Block(), torch.randn(3, 64))
    code = compilation.stage(FINAL).code
    assert "qdata of q.weight + k.weight" in code and "argument of the model: l_x_" in code and "q.bias" in code
    assert "def forward(self" not in code and " = None\n" not in code
    reasons = {p.name: p.reason for p in compilation.products}
    assert reasons["q.weight"] is None and reasons["small.weight"].startswith("TOO_SMALL")


def test_quantized_weights_and_constants_are_inputs_of_the_module_text():
    model = nn.Sequential(nn.Linear(64, 32)).requires_grad_(False)
    quantize_(model, IntScaleConfig(group_size=32))
    compilation, _ = recorded(model, torch.randn(3, 64))
    names = executed(compilation.stage("dynamo").code)
    (weight,) = [v for v in names["example_inputs"]() if isinstance(v, intscale_compile.IntScaleTensor)]
    assert weight.shape == (32, 64) and weight.group_size == 32
    assert names["forward"](*names["example_inputs"]())[0].shape == (3, 32)


def test_called_graphs_are_functions_of_the_module():
    linear = nn.Linear(64, 64).requires_grad_(False)

    def model(x):
        return torch.utils.checkpoint.checkpoint(lambda y: linear(y).relu(), x, use_reentrant=False)

    compilation, kept = recorded(model, torch.randn(2, 64))
    code = compilation.stage("dynamo").code
    assert "def forward_wrap_body_0(" in code
    (result,) = executed(code)["forward"](*kept["dynamo"][1])
    torch.testing.assert_close(result, linear(kept["dynamo"][1][0]).relu(), rtol=0, atol=0)


def test_nothing_keeps_the_weights_alive():
    model = Block()
    weight, x = weakref.ref(model.q.weight), torch.randn(3, 64)
    compilation, kept = recorded(model, x)
    kept.clear()
    del model, kept
    gc.collect()
    assert weight() is None and last_compilation()[-1] is compilation
    assert "w4a8_linear" in compilation.stage("fuse").code


def test_the_backend_records_and_names_what_inductor_generated():
    torch._dynamo.reset()
    model, x = Block(), torch.randn(3, 64)
    count = len(last_compilation())
    for _ in range(2):  # the second time Inductor has it in its cache
        with torch.no_grad():
            torch.compile(model, backend="intscale", options={"intscale.group_size": 32})(x)
        torch._dynamo.reset()
    entries = last_compilation()[-2:]
    assert len(last_compilation()) == min(count + 2, 32) and entries[1].number == entries[0].number + 1
    for entry in entries:
        assert entry.options.config.group_size == 32 and entry.pass_counts["merge_siblings"] == 1
        assert any("intscale.w4a8_linear" in kernel.code for kernel in entry.kernels)
        assert [s.name for s in entry.stages][-1] == FINAL and "3 of 4 products" in str(entry)


def test_unknown_stages_and_lost_files_are_errors(tmp_path):
    compilation, _ = recorded(Block(), torch.randn(3, 64))
    with pytest.raises(CompileError, match="no stage 'fused'.*'fuse'"):
        compilation.stage("fused")
    with pytest.raises(CompileError, match="compile the model again"):
        intscale_compile.compile.recorder.compilation.KernelSource(str(tmp_path / "gone.py")).code  # noqa: B018


def test_disabled_passes_do_not_run():
    x = torch.randn(3, 64)
    rewrite = capture(Block(), x)
    assert rewrite.settings.disable_passes == ()
    for name, absent in (("merge_siblings", "split"), ("fuse", "w4a8_linear"), ("insert_qdq", "quantize_per_token")):
        compilation, _ = recorded(Block(), x, **{"intscale.disable_passes": (name,)})
        assert compilation.pass_counts[name] == 0
        assert absent not in compilation.stage(FINAL).code


def test_a_disabled_quantization_is_a_reason_and_runs_in_high_precision():
    model, x = Block(), torch.randn(3, 64)
    options = {"intscale.disable_passes": ["insert_qdq"]}
    compilation, _ = recorded(model, x, **options)
    assert {p.name: p.reason.split(":")[0] for p in compilation.products if p.reason} == {
        **dict.fromkeys(("q.weight", "k.weight", "o.weight", "small.weight"), "PASS_DISABLED")
    }
    torch._dynamo.reset()
    with torch.no_grad():
        for a, b in zip(model(x), torch.compile(model, backend="intscale", options=options)(x)):
            torch.testing.assert_close(a, b)
    quantized = nn.Sequential(nn.Linear(64, 64)).requires_grad_(False)
    quantize_(quantized, IntScaleConfig())
    with torch.no_grad():  # through the tensor subclass
        torch.testing.assert_close(torch.compile(quantized, backend="intscale", options=options)(x), quantized(x))
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "value, message",
    [
        (["merge_sibling"], "no pass is called 'merge_sibling': did you mean 'merge_siblings'"),
        (["match"], "'match' cannot be turned off"),
        (3, "takes a list of names of passes, not 3"),
        ([None], "takes a list of names of passes"),
    ],
)
def test_wrong_names_of_passes_are_errors(value, message):
    with pytest.raises(intscale_compile.errors.ConfigError, match=message):
        parse_options(None, {"intscale.disable_passes": value})
