"""Tensor parallelism over two ranks: PyTorch's engine with DTensors, ours with local shards, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.ranks import run_ranks

SCRIPT = Path(__file__).with_name("_engine_main.py")


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    return run_ranks(SCRIPT, 2, folder, str(folder))


def test_parallelize_module_equals_the_shards_by_hand(seen):
    for rank in seen:
        for source in (0, None):
            assert rank[f"local type {source}"] == "IntScaleTensor"
            assert rank[f"eager {source}"] and rank[f"inference mode {source}"]
        assert rank["unsharded"] < 0.03  # token scales of each shard: rounding of int8, nothing else


def test_compiled_shards_run_in_our_kernels(seen):
    for rank in seen:
        assert rank["compiled"] < 1e-2 and rank["compiled after a write"] < 1e-2
        assert rank["layers"] == [
            ("gate.weight", (256, 256), True),
            ("up.weight", (256, 256), True),
            ("down.weight", (256, 256), True),
        ]
        assert rank["gemms"] == 2  # gate and up in one
        assert rank["passes"]["local_shards"] == 3 and rank["passes"]["merge_siblings"] == 1
        quantized, total = rank["fraction"]
        assert quantized == 3 * 256 * 256 and total == quantized + 256 + 256  # of this rank


def test_gradients_are_refused(seen):
    for rank in seen:
        assert "UnsupportedOpError" in rank["gradient of a DTensor"]
        assert "InputError" in rank["gradient of a shard"] and "torch.no_grad()" in rank["gradient of a shard"]
        assert not rank["trained"] and rank["no gradient wanted"] < 1e-2


def test_distributed_weights(seen):
    for rank in seen:
        assert "ShardingError" in rank["cut by distribute_tensor"] and "group of 64" in rank["cut by distribute_tensor"]
        assert rank["replicated"] and rank["replicated product"]
    assert "load the same quantized weights on every rank" in seen[1]["ranks that disagree"]


def test_parallelize_with_local_shards(seen):
    for rank in seen:
        assert rank["own NoneType"] and rank["own DeviceMesh"] and rank["own ProcessGroup"]
        assert rank["own compiled"] < 1e-2
        assert rank["loaded"] and rank["loaded shapes"] == [(256, 256), (256,), (256, 256), (256, 256), (256,)]
        assert rank["gathered"] < 0.03 and rank["packed"]


def test_refusals_name_the_mend_and_change_nothing(seen):
    for rank in seen:
        assert "ShardingError: down.weight: input features" in rank["cut"] and "group_size=128" in rank["cut"]
        assert rank["untouched"]
        assert "plan['gate']='columns' is not supported" in rank["style"] and "rowwise" in rank["style"]
        assert "no module or parameter of that name" in rank["name"]
        assert "give a dict" in rank["no plan"]
        assert "without a weight to divide" in rank["module"]
        assert "one dimension" in rank["mesh"]
        assert "the model lacks" in rank["lacking"]
