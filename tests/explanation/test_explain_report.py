"""``explain`` as data: folding, graphs in every stage, several graphs, dynamic shapes, times, and differences."""

import copy
import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torchao.quantization import quantize_

from intscale_compile import IntScaleConfig, explain
from intscale_compile.errors import ConfigError, InputError
from intscale_compile.explanation.folding import numbers
from intscale_compile.explanation.graphs import together
from intscale_compile.explanation.roofline import GPUS, gpu_of_device, predict_us


class Block(nn.Module):
    def __init__(self, features=64, breaks=False):
        super().__init__()
        self.q, self.k, self.out = (nn.Linear(features, features) for _ in range(3))
        self.breaks = breaks

    def forward(self, x):
        y = self.q(x) * self.k(x)
        if self.breaks:
            torch._dynamo.graph_break()
        return x + self.out(torch.relu(y))


class Model(nn.Module):
    def __init__(self, blocks=3, breaks=False):
        super().__init__()
        self.layers = nn.ModuleList(Block(breaks=breaks) for _ in range(blocks))
        self.lm_head = nn.Linear(64, 32)
        self.requires_grad_(False)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(x)


def x(rows=4):
    return torch.randn(rows, 64)


def by_name(report):
    return {layer.name: layer for layer in report.layers}


@pytest.fixture(scope="module")
def explained():
    """A model, what it is called with, and its report."""
    torch.manual_seed(0)
    model, rows = Model(), x()
    return model, rows, explain(model, rows)


# --- text and data ------------------------------------------------------------------------------------------------------


def test_text_folds_layers_that_are_alike(explained):
    report = explained[2]
    lines = str(report).splitlines()
    assert [line.split()[0] for line in lines[2:6]] == [
        *(f"layers.0..2.{n}.weight" for n in ("q", "k", "out")),
        "lm_head.weight",
    ]
    assert lines[2].split()[-3:] == ["1..5", "oneDNN", "fold"]
    assert len(report.table(fold=False).splitlines()) == len(lines) + 6
    lows, highs = zip(*(layer.scale_range for layer in report.layers if ".q." in layer.name))
    assert f" {min(lows)}..{max(highs)} " in lines[2]


def test_layers_with_another_decision_are_not_folded_in():
    text = str(explain(Model(4), x(), options={"intscale.skip": r"layers\.2\.out\.weight"}))
    assert "layers.0..1,3.out.weight" in text and "layers.2.out.weight" in text and "layers.2.q.weight" in text


def test_two_blocks_are_not_folded_in_the_text():
    assert "layers.1.q.weight" in str(explain(Model(2), x()))


def test_numbers():
    assert numbers([5, 0, 1, 2, 7]) == "0..2,5,7" and numbers([3]) == "3"


def test_dict_is_json_and_complete():
    report = explain(Model(), x(), options={"intscale.group_size": 32})
    data = report.to_dict()
    assert json.loads(json.dumps(data)) == data
    assert data["schema"] == 1 and data["settings"] == {"intscale.group_size": 32}
    layer = data["layers"][0]
    assert sum(layer["scale_counts"].values()) == 64 * 64 // 32
    assert layer["bytes_before"] == 64 * 64 * 4 and layer["bytes_after"] == 64 * 64 // 2 + 64 * 2 + 64 * 4
    assert data["modules"][""] == "Model" and data["modules"]["layers.0"] == "Block"
    assert data["blocks"] == [f"layers.{i}" for i in range(3)]


def test_bytes_of_a_model_that_quantize_stored(explained):
    model, plain = copy.deepcopy(explained[0]), explained[2]
    quantize_(model, IntScaleConfig())
    stored = explain(model, x())
    assert (plain.bytes_before, plain.bytes_after) == (stored.bytes_before, stored.bytes_after)
    held = sum(
        sum(getattr(p, n).nbytes for n in p.data_names) if hasattr(p, "data_names") else p.nbytes
        for p in model.parameters()
    )
    assert stored.bytes_after == held


# --- graphs -------------------------------------------------------------------------------------------------------------


def part_of(report, name):
    return next(part for part in report.parts if part.name == name)


def test_stages_of_a_layer(explained):
    report = explained[2]
    part = part_of(report, "layers.0")
    assert part.alike == tuple(f"layers.{i}" for i in range(3))
    assert part.changed_by()[:4] == ["insert_qdq", "share_quantize", "merge_siblings", "fuse"]
    stages = dict(part.stages)
    count = lambda stage, word: sum(word in line for line in stages[stage])  # noqa: E731
    assert count("dynamo", "F.linear(") == count("match", "F.linear(") == 3
    assert count("insert_qdq", "intscale.quantize_per_token(") == 3
    assert count("share_quantize", "intscale.quantize_per_token(") == 2
    assert count("fuse", "intscale.w4a8_linear(") == 2
    assert any("{q,k}.weight.qdata" in line for line in stages["fuse"])
    assert stages["dynamo"][0] == "linear = F.linear(input_0, q.weight, q.bias)  # f32[4, 64]"
    assert stages["dynamo"][-1].startswith("return ")


def test_last_stage_is_what_the_backend_compiles(monkeypatch):
    import torch._inductor.compile_fx as inductor

    compiled = []
    monkeypatch.setattr(inductor, "compile_fx", lambda gm, *_, **__: compiled.append(gm) or gm.forward)
    model = Model(2)
    report = explain(model, x())
    torch._dynamo.reset()
    torch.compile(model, backend="intscale")(x())
    lines = sum(len(p.alike) * (len(p.stages[-1][1]) - 1) for p in report.parts)  # without their returns
    assert lines == sum(n.op.startswith("call") for gm in compiled for n in gm.graph.nodes)


def test_parts_that_differ_are_kept_apart():
    report = explain(Model(), x(), options={"intscale.skip": r"layers\.1\..*"})
    assert part_of(report, "layers.0").alike == ("layers.0", "layers.2")
    assert part_of(report, "layers.1").changed_by() == []


def test_graph_that_breaks_in_every_layer():
    model = Model(3, breaks=True)
    report = explain(model, x())
    layers = by_name(report)
    ended, *left = report.graph_breaks
    assert report.graphs == 2 and "graph_break" in ended
    assert all("not compiled" in place for place in left)  # the function with the loop over the layers
    quantized = {name for name, layer in layers.items() if layer.quantized}
    assert quantized == {f"layers.{i}.{n}.weight" for i in range(3) for n in ("q", "k", "out")}
    assert layers["layers.0.q.weight"].scale_counts != layers["layers.1.q.weight"].scale_counts  # its own weight
    assert "graph 1 runs for 3 layers" in str(report)
    assert all(part.alike == ("layers.0", "layers.1", "layers.2") for part in report.parts)


def test_dynamic_shapes():
    rows = x(6)
    torch._dynamo.mark_dynamic(rows, 0)
    report = explain(Model(1), rows)
    assert not report.layers[0].tokens.isdigit() and report.gemms == 2
    assert report.gemm_reports[0].predicted_us == explain(Model(1), x(6)).gemm_reports[0].predicted_us
    assert "f32[s" in part_of(report, "layers.0").stages[0][1][0]
    assert not explain(Model(1), x(6), dynamic=True).layers[0].tokens.isdigit()


def test_model_without_a_linear():
    class Double(nn.Module):
        def forward(self, x):
            return x * 2

    report = explain(Double(), x())
    assert report.layers == () and report.gemms == 0 and "NOTHING WAS QUANTIZED" in str(report)
    assert report.to_dict()["bytes_before"] == 0


def test_options_of_a_compiled_module_are_known():
    options = {"intscale.disable_passes": ["merge_siblings"]}
    compiled = torch.compile(Model(1), backend="intscale", options=options, dynamic=True)
    report = explain(compiled, x(5))
    assert report.gemms == 3 and report.settings == {
        "dynamic": True,
        **{name: str(value) for name, value in options.items()},
    }
    assert explain(compiled, x(5), options={}).gemms == 2
    assert explain(torch.compile(Model(1), backend="eager"), x(5)).gemms == 2


def test_compiled_layers_inside_of_a_model():
    model = Model()
    for i, layer in enumerate(model.layers):
        model.layers[i] = torch.compile(layer, backend="intscale")
    report = explain(model, x())
    assert {layer.name for layer in report.layers if layer.quantized} == {
        f"layers.{i}.{n}.weight" for i in range(3) for n in ("q", "k", "out")
    }
    assert "layers.0..2.q.weight" in str(report)


def test_note_where_autograd_would_leave_weights_alone():
    model = Model(1).requires_grad_(True)
    assert "3 of the quantized weights require grad" in str(explain(model, x()))
    with torch.no_grad():
        assert "require grad" not in str(explain(model, x()))


def test_together():
    assert together(["a.q.weight", "a.k.weight"]) == "a.{q,k}.weight"
    assert together(["a.weight"]) == "a.weight"
    assert together(["q", "k"]) == "{q,k}"


# --- time ---------------------------------------------------------------------------------------------------------------


def test_roofline_is_the_larger_of_two_floors():
    report = explain(Model(), x(4), gpu="H200")
    gpu = next(gpu for gpu in GPUS if gpu.name == "H200")
    gemm = report.gemm_reports[0]  # q and k together
    packed = 2 * by_name(report)["layers.0.q.weight"].bytes_after
    assert gemm.moved_bytes == packed + 4 * (64 + 4) + 4 * 128 * 4
    assert gemm.predicted_us == pytest.approx(gemm.moved_bytes / gpu.bandwidth * 1e6) and gemm.limit == "memory"
    assert predict_us(gpu, 1.0, gpu.int8) == (1e6, "int8")
    assert report.gpu_assumed and report.gpu["name"] == "H200"
    with pytest.raises(ConfigError, match="use one of.*H100"):
        explain(Model(1), x(), gpu="Voodoo")


def test_measured_prediction_of_the_h100_is_near_what_was_measured():
    """benchmarks/results/2026-11-22-h100-gemm.md, 28672 x 4096: 27.4 us at one token, 816 us at 4096."""
    gpu, weight = GPUS[0], 28672 * 4096 // 2 + 28672 * 32 + 28672 * 4
    assert gpu.measured and predict_us(gpu, weight, 2.0 * 28672 * 4096)[0] == pytest.approx(27.4, rel=0.15)
    moved = weight + 4096 * (4096 + 4) + 4096 * 28672 * 2
    assert predict_us(gpu, moved, 2.0 * 4096 * 28672 * 4096)[0] == pytest.approx(816, rel=0.02)


@pytest.mark.parametrize(
    "device, name",
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA A100-SXM4-40GB", "A100 40GB"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA A10G", None),
        ("NVIDIA L40", None),
    ],
)
def test_devices_are_told_apart(device, name):
    found = gpu_of_device(device)
    assert (found and found.name) == name


def test_measured_on_this_device(explained):
    report = explain(Model(1), x(4), measure=True)
    assert all(gemm.measured_us > 0.5 for gemm in report.gemm_reports)
    assert explained[2].gemm_reports[0].measured_us is None


def test_stacks_of_experts_are_measured_too():
    from tests.support.moe import experts_module, routing

    module, inputs = experts_module("mixtral", "grouped_mm"), routing(4)
    report = explain(module, *inputs, measure=True)
    assert report.gemms == 2 and all(gemm.measured_us > 0.5 and gemm.predicted_us for gemm in report.gemm_reports)


# --- diff ---------------------------------------------------------------------------------------------------------------


def test_nothing_differs(explained):
    model, _, report = explained
    difference = explain.diff(report, explain(model, x()))
    assert not difference and str(difference) == "nothing differs."


def test_diff_of_two_configurations(explained):
    model, rows, a = explained
    b = explain(model, rows, options={"intscale.group_size": 32, "intscale.skip": r"layers\.\d\.out\.weight"})
    difference = explain.diff(a, b)
    text = str(difference)
    assert "setting intscale.group_size: none -> 32" in text and "gemms: 6 -> 3" in text
    assert "pass insert_qdq: 9 -> 6" in text
    decisions = [c for c in difference.layers if c.what == "decision"]
    assert [(c.name, c.before, c.after) for c in decisions] == [
        (f"layers.{i}.out.weight", "W4A8", "EXCLUDED") for i in range(3)
    ]
    folded = [c for c in difference.folded() if c.what == "decision"]
    assert [c.name for c in folded] == ["layers.0..2.out.weight"]
    sizes = {c.name: (c.before, c.after) for c in difference.layers if c.what == "group_size"}
    assert sizes["layers.0.q.weight"] == (128, 32)
    saved = json.loads(json.dumps(a.to_dict())), json.loads(json.dumps(b.to_dict()))
    assert explain.diff(*saved) == difference
    data = difference.to_dict()
    assert json.loads(json.dumps(data)) == data


def test_diff_sees_scales_and_merging(explained):
    model, rows, a = explained
    model = copy.deepcopy(model)
    with torch.no_grad():
        model.layers[2].q.weight[:, :8] *= 20
    changed = explain.diff(a, explain(model, rows)).layers
    assert {c.name for c in changed} == {"layers.2.q.weight"} and "scales" in {c.what for c in changed}
    apart = explain.diff(a, explain(model, rows, options={"intscale.disable_passes": ["merge_siblings"]}))
    merged = {c.name: (c.before, c.after) for c in apart.layers if c.what == "gemm with"}
    assert merged["layers.0.q.weight"] == (["k"], None)


def test_diff_of_something_else_is_refused():
    report = explain(Model(1), x())
    with pytest.raises(InputError, match="b is not an Explanation"):
        explain.diff(report, {"schema": 0})
    with pytest.raises(InputError, match="a is not"):
        explain.diff("text", report)


@pytest.mark.parametrize("group_size, name", [(128, "192x128"), (64, "128x128"), (32, "128x128")])
def test_the_tile_is_the_one_that_is_launched(monkeypatch, group_size, name):
    """Several group scales in a stage leave no registers for three consumers: the launcher takes two, and explain says so."""
    pytest.importorskip("triton")
    from intscale_compile.explanation import kernels
    from intscale_compile.kernels import gluon_launch, triton_gemm

    packed = SimpleNamespace(
        shape=(28672, 4096), out_features=28672, in_features=4096, group_size=group_size, scale_bits=8, weight_bits=4,
        packing_format="tiled", zero_point=None, rotation=0, act_scale=None, device=torch.device("cuda"), dtype=torch.bfloat16,
        dim=lambda: 2,
    )  # fmt: skip
    monkeypatch.setattr(triton_gemm, "capability", lambda device: 90)
    monkeypatch.setattr(triton_gemm, "device_name", lambda device: "")
    monkeypatch.setattr(gluon_launch, "sm_count", lambda device: 132)
    monkeypatch.setattr(kernels, "_gluon_obstacle", lambda packed: None)
    assert kernels.kernel_name(packed, "1024", cuda_graphs=True) == f"gluon cooperative accumulate {name}"


@pytest.mark.parametrize(
    "obstacle, rows, name",
    [
        (None, "4096", "gluon cooperative grouped fold 256x128"),
        (None, "2", "triton grouped fold 128x16"),
        ("groups of 64", "4096", "triton grouped fold 128x128"),
    ],
)
def test_the_kernel_of_experts_is_the_one_that_is_launched(monkeypatch, obstacle, rows, name):
    """The experts of Mixtral on a GPU of capability 9.0, where Gluon can run and where it cannot."""
    pytest.importorskip("triton")
    from intscale_compile.explanation import kernels
    from intscale_compile.kernels import triton_grouped

    stack = SimpleNamespace(
        shape=(8, 28672, 4096), out_features=28672, in_features=4096, group_size=128, scale_bits=4, weight_bits=4,
        packing_format="tiled", zero_point=None, device=torch.device("cuda"), dim=lambda: 3,
    )  # fmt: skip
    monkeypatch.setattr(triton_grouped, "capability", lambda device: 90)
    monkeypatch.setattr(triton_grouped, "gluon_obstacle", lambda *_: obstacle)
    monkeypatch.setattr(kernels, "_gluon_obstacle", lambda packed: obstacle)
    assert kernels.kernel_name(stack, rows, cuda_graphs=True) == name
    assert kernels.kernel_notes(stack) == ({f"plain Triton instead of Gluon: {obstacle}."} if obstacle else set())


@pytest.mark.parametrize(
    "cuda_graphs, tokens, name",
    [
        (True, "4", "triton fold 64x16, K in 4 parts"),
        (False, "4", "triton fold 64x16"),
        (True, "256", "triton fold 128x64"),
    ],
)
def test_parts_of_k_are_named_where_they_run(monkeypatch, cuda_graphs, tokens, name):
    """A layer of Llama-3-8B on an A100: the op with CUDA graphs, the template without."""
    pytest.importorskip("triton")
    from intscale_compile.explanation import kernels
    from intscale_compile.kernels import triton_gemm

    weight = SimpleNamespace(
        out_features=4096, in_features=4096, group_size=128, scale_bits=4, weight_bits=4, zero_point=None,
        device=torch.device("cuda"), dim=lambda: 2,
    )  # fmt: skip
    monkeypatch.setattr(triton_gemm, "capability", lambda device: 80)
    monkeypatch.setattr(triton_gemm, "device_name", lambda device: "")
    monkeypatch.setattr(triton_gemm.gluon_launch, "sm_count", lambda device: 108)
    monkeypatch.setattr(kernels, "_gluon_obstacle", lambda packed: "an older GPU")
    assert kernels.kernel_name(weight, tokens, cuda_graphs) == name
