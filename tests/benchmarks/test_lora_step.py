"""The benchmark of one training step of an adapter, on a CPU and small."""

import pytest

pytest.importorskip("peft")

from tests.support.benchmarks import load  # noqa: E402


@pytest.mark.slow  # compiles two training steps
def test_lora_step(capsys):
    load(("lora_step",)).lora_step.main(
        ["--shape", "tiny", "--device", "cpu", "--rounds", "1", "--layers", "1", "--tokens", "32"]
    )
    printed = capsys.readouterr().out
    assert "| bf16 | eager |" in printed and "| intscale | compiled |" in printed
