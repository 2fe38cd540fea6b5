"""Exported programs and packages: the passes ran, and a process without the model computes the same bits."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.export import Dim
from torchao.quantization import quantize_

from intscale_compile import IntScaleConfig, compile_package, export_program
from intscale_compile.errors import ConfigError
from tests.support import forks

ROOT = Path(__file__).parents[2]
MODEL = Path(os.environ.get("INTSCALE_MODELS", ROOT / "../shared/models")) / "tiny-llama"
# What docs/export.md tells a process to do that has the package and nothing else.
FRESH = """
import sys, torch, intscale_compile
package, inputs, outputs = sys.argv[1:]
run = torch._inductor.aoti_load_package(package)
torch.save([run(*one) for one in torch.load(inputs)], outputs)
"""


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(64)
        self.gate, self.up, self.down = (nn.Linear(64, 128, bias=False), nn.Linear(64, 128), nn.Linear(128, 64))
        self.lm_head = nn.Linear(64, 40, bias=False)
        self.requires_grad_(False)

    def forward(self, x, scale=None):
        y = self.norm(x)
        y = x + self.down(torch.nn.functional.silu(self.gate(y)) * self.up(y))
        return {"logits": self.lm_head(y if scale is None else y * scale)}


def called(program, name):
    return [n for n in program.graph.nodes if n.op == "call_function" and f"intscale.{name}." in str(n.target)]


@pytest.mark.parametrize("quantized", [True, False])
def test_the_passes_ran_on_an_exported_program(quantized, tmp_path):
    torch.manual_seed(0)
    model, x = Block(), torch.randn(2, 5, 64)
    if quantized:
        quantize_(model, IntScaleConfig())
    program = export_program(model, (x,), {"scale": torch.tensor(2.0)})
    assert len(called(program, "w4a8_linear")) == 2 and len(called(program, "quantize_per_token")) == 2
    names = set(program.state_dict) | set(program.constants)
    assert {"gate_weight_qdata", "down_weight_scale"} <= names and "lm_head.weight" in names
    assert not any(name in names for name in ("gate.weight", "up.weight", "down.weight"))
    torch.export.save(program, tmp_path / "program.pt2")
    loaded = torch.export.load(tmp_path / "program.pt2")
    with torch.no_grad():
        expected = program.module()(x, scale=torch.tensor(2.0))["logits"]
        assert torch.equal(loaded.module()(x, scale=torch.tensor(2.0))["logits"], expected)
        near = torch.compile(model, backend="intscale")(x, scale=torch.tensor(2.0))["logits"]
    torch.testing.assert_close(expected, near, rtol=1e-2, atol=1e-2)


def same_in_a_fresh_process(model, inputs, tmp_path, dynamic_shapes=None, forward=lambda y: y):
    program = export_program(model, inputs[0], dynamic_shapes=dynamic_shapes)
    package = compile_package(program, tmp_path / "package.pt2")
    torch.save(inputs, tmp_path / "inputs.pt")
    (tmp_path / "script.py").write_text(FRESH)
    files = (package, str(tmp_path / "inputs.pt"), str(tmp_path / "outputs.pt"))
    done = forks.run("plain", tmp_path / "script.py", *files, timeout=300, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    compiled = torch.compile(model, backend="intscale", dynamic=dynamic_shapes is not None)
    with torch.no_grad():
        for given, found in zip(inputs, torch.load(tmp_path / "outputs.pt")):
            assert torch.equal(forward(found), forward(compiled(*given)))
    return program


@pytest.mark.generated
def test_a_package_computes_the_bits_of_the_backend_in_a_fresh_process(tmp_path):
    torch.manual_seed(0)
    model = Block()
    quantize_(model, IntScaleConfig())
    inputs = [(torch.randn(2, t, 64),) for t in (7, 19)]
    shapes = {"x": {1: Dim("t", min=2, max=64)}}
    program = same_in_a_fresh_process(model, inputs, tmp_path, shapes, lambda y: y["logits"])
    assert len(called(program, "w4a8_linear")) == 2


class Logits(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, token_ids):
        return self.model(input_ids=token_ids, use_cache=False).logits


@pytest.mark.slow
@pytest.mark.generated
@pytest.mark.skipif(not MODEL.exists(), reason="needs tiny-llama")
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_a_package_of_tiny_llama(dynamic, tmp_path):
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval().requires_grad_(False)
    quantize_(model, IntScaleConfig())
    inputs = [(torch.randint(0, 200, (2, t)),) for t in ((16, 37) if dynamic else (16,))]
    shapes = {"token_ids": {1: Dim("t", min=2, max=256)}} if dynamic else None
    program = same_in_a_fresh_process(Logits(model), inputs, tmp_path, shapes)
    assert len(called(program, "w4a8_linear")) == 32, "q, k, v and gate, up are merged"


def test_what_is_refused(tmp_path):
    model, x = Block(), torch.randn(2, 64)
    with pytest.raises(ConfigError, match="max_autotune: options of Inductor are arguments of compile_package"):
        export_program(model, (x,), options={"max_autotune": True})
    with pytest.raises(ConfigError, match="no process groups"):
        export_program(model, (x,), options={"intscale.communication": "int8"})
    with pytest.raises(ConfigError, match="arguments of export_program"):
        compile_package(None, tmp_path / "x.pt2", {"intscale.skip": "gate"})
    with pytest.raises(ConfigError, match="ends in .pt2"):
        compile_package(None, tmp_path / "x.zip")
