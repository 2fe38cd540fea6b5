"""Commands that the documentation shows exist, and planned bytes are those of quantized weights."""

from __future__ import annotations

import shlex

import pytest
import torch
from torchao.quantization import quantize_

from intscale_compile import IntScaleConfig, IntScaleTensor, linears_and_experts
from intscale_compile.commands import (
    plan,
)
from intscale_compile.commands.inspection import packed_bytes
from tests.support.cli import CHECKOUT

typer = pytest.importorskip("typer", reason="typer is not installed: pip install 'intscale-compile[cli]'")


@pytest.mark.parametrize(
    "weight_bits, group_size, amplifier", [(4, 32, "row"), (4, 128, "layer"), (4, -1, "row"), (8, -1, "row")]
)
@pytest.mark.parametrize("shape", [(48, 200), (130, 384)])
def test_planned_bytes(shape, weight_bits, group_size, amplifier):
    config = IntScaleConfig(group_size, weight_bits, amplifier=amplifier, packing_format="plain")
    assert packed_bytes(*shape, config) == IntScaleTensor.from_hp(torch.randn(shape), config).nbytes_packed()


def test_planned_experts():
    """Stacks count every expert, as a quantized model does."""
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = MixtralForCausalLM(MixtralConfig(**sizes, num_key_value_heads=1, num_local_experts=4, vocab_size=64)).eval()
    planned = {layer.name: layer.bytes_after for layer in plan(model) if layer.quantized}
    quantize_(model, IntScaleConfig(), filter_fn=linears_and_experts)
    assert planned == {n: p.nbytes_packed() for n, p in model.named_parameters() if isinstance(p, IntScaleTensor)}
    assert sum("experts" in name for name in planned) == 2


def examples() -> list[str]:
    """Every command that the documentation or a help text shows."""
    from intscale_cli.app import app

    shown = [line.strip() for command in app.registered_commands for line in (command.epilog or "").splitlines()]
    shown += (CHECKOUT / "docs" / "cli.md").read_text().splitlines()
    return list(dict.fromkeys(line for line in shown if line.startswith("intscale ")))


@pytest.mark.parametrize("line", examples())
def test_documented_commands_exist(line):
    """Names and options are parsed; nothing is run."""
    from intscale_cli.app import app

    _, name, *rest = shlex.split(line)
    command = typer.main.get_command(app).commands[name]
    command.make_context(name, rest)
