"""Quantized collectives between GPUs: one process per GPU, NCCL and the fused kernel on symmetric memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.support.ranks import run_ranks

SCRIPT = Path(__file__).with_name("_communication_main.py")
pytestmark = [pytest.mark.gpu, pytest.mark.two_gpus]


RANKS = [ranks for ranks in (2, 4, 8) if ranks <= torch.cuda.device_count()]


@pytest.mark.parametrize("ranks", RANKS)
def test_several_ranks_get_the_bits_of_the_reference(ranks, tmp_path):
    assert run_ranks(SCRIPT, ranks, tmp_path / "exact", "exact", "3", "300001", fork=False) == [{}] * ranks
    assert run_ranks(SCRIPT, ranks, tmp_path / "queued", "queued", fork=False) == [[]] * ranks


@pytest.mark.parametrize("ranks", RANKS)
def test_lossless_sums_are_rounded_once(ranks, tmp_path):
    assert run_ranks(SCRIPT, ranks, tmp_path / "lossless", "lossless", fork=False) == [{}] * ranks


@pytest.mark.parametrize("ranks", RANKS)
def test_lossless_forms_compiled_with_cuda_graphs(ranks, tmp_path):
    """Beside NCCL's sum, which rounds to bf16 more than once: near, and the same on every rank."""
    for result in run_ranks(SCRIPT, ranks, tmp_path, "compiled", "auto", fork=False):
        assert result["forms"] in (["one_shot"], ["two_shot"], []) and result["same"] and result["error"] <= 0.004


@pytest.mark.parametrize("name", ["exact", "captured", "queued"])
def test_bits_are_those_of_the_reference(name, tmp_path):
    expected = {"exact": [{}] * 2, "captured": [True] * 2, "queued": [[]] * 2}
    assert run_ranks(SCRIPT, 2, tmp_path, name, fork=False) == expected[name]


def test_reduce_scatter_and_all_gather(tmp_path):
    results = run_ranks(SCRIPT, 2, tmp_path, "others", fork=False)
    assert all(error <= 0.01 for errors in results for error in errors.values())


def test_compiled_with_cuda_graphs(tmp_path):
    for result in run_ranks(SCRIPT, 2, tmp_path, "compiled", fork=False):
        assert result["same"] and 0 < result["error"] <= 0.01
