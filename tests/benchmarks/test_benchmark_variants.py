"""benchmarks/variants.py without a GPU: every form runs and is checked, and the table's ratios are those of its times."""

from __future__ import annotations

import json

import pytest
import torch

from tests.support.benchmarks import load


@pytest.fixture(scope="module")
def bench():
    return load(("variants", "gemm_peers.base"))


def test_every_form_runs(bench, tmp_path, capsys):
    path = tmp_path / "out.json"
    argv = ["--device", "cpu", "--shapes", "96x224", "--tokens", "2", "3", "--json", str(path)]
    bench.variants.main(argv)
    rows = json.loads(path.read_text())["rows"]
    counts = {kind: sum(row["kind"] == kind and row["tokens"] == 3 for row in rows) for kind in bench.variants.KINDS}
    assert counts == {"product": 4, "quantization and product": 5, "quantization": 4}
    assert len(rows) == 26 and all(row["us"] > 0 and row["in_features"] == 224 for row in rows)
    table = capsys.readouterr().out
    assert table.count("| Hadamard of 32, static |") == 1 and table.count("| zero points, 8-bit scales |") == 1


def test_ratios_are_to_bf16_and_to_the_symmetric_form(bench):
    def row(kind, form, us):
        return bench.variants.Row(8, 8, 1, kind, form, us)

    rows = [row("product", "bf16", 12.0), row("product", "symmetric", 4.0), row("product", "zero points", 6.0)]
    rows += [row("quantization and product", "symmetric, per token", 5.0), row("quantization and product", "x", 10.0)]
    rows += [row("quantization", "per token", 2.0), row("quantization", "static", 1.0)]
    assert "| zero points | 6.00 (2.00, 0.67) |" in bench.variants.table(rows, "product")
    assert "| x | 10.00 (1.20, 0.50) |" in bench.variants.table(rows, "quantization and product")
    assert "| static | 1.00 (2.00) |" in bench.variants.table(rows, "quantization")


def test_a_wrong_kernel_is_found(bench, monkeypatch):
    weight = bench.variants.weights((64, 256), "cpu")["zero points, 8-bit scales"]
    xq, token_scale = bench.variants.QUANTIZE_OP(torch.randn(3, 256))
    bench.variants.check_product(weight, xq, token_scale)
    right = bench.variants.product
    monkeypatch.setattr(bench.variants, "product", lambda w, *x: right(w.replaced(zero_point=None), *x))
    with pytest.raises(bench.base.WrongResult, match="product is wrong"):
        bench.variants.check_product(weight, xq, token_scale)
    x = torch.randn(3, 256).bfloat16()
    with pytest.raises(bench.base.WrongResult, match="per token"):
        bench.variants.check_quantizer("per token", lambda x: bench.variants.STATIC_OP(x, torch.ones(1, 1)), x)


@pytest.mark.parametrize("argv", [["--shapes", "8x"], ["--tokens", "0"]])
def test_unusable_arguments_end_with_a_message(bench, argv):
    with pytest.raises(SystemExit):
        bench.variants.parse_arguments(argv)


def test_without_a_gpu_it_says_so(bench, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="no CUDA device"):
        bench.variants.main([])
