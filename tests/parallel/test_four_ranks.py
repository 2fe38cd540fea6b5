"""Four ranks: sequence parallelism on a mesh of 2 x 2, divided models saved and loaded, fewer key heads than ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from intscale_compile import load_safetensors
from tests.support.ranks import run_ranks

pytest.importorskip("transformers")
SCRIPT = Path(__file__).with_name("_four_ranks_main.py")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def seen(folder):
    return run_ranks(SCRIPT, 4, folder, str(folder))


def test_norms_on_parts_of_the_sequence(seen):
    """Gathers before column-parallel layers and the scatter after row-parallel ones, along dimension 1."""
    for rank in seen:
        assert rank["sequence"] < 0.03  # token scales of each shard
    for rank in seen[2:]:
        assert 0 < rank["compiled"] < 0.02 and rank["group"]
        assert rank["collectives"] == [
            ("all_gather", 2, "int8"),
            ("reduce_scatter", 2, "int8"),
            ("all_gather", 2, "int8"),
            ("all_gather", 2, "COLLECTIVE_NOT_MULTIPLIED"),
        ]
        assert rank["passes"]["local_shards"] == 4 and rank["passes"]["merge_siblings"] == 1


def test_gathered_models_are_what_was_divided(seen, folder):
    """On the first rank of each pair; the others get nothing."""
    for what in ("gathered DTensors", "loaded DTensors", "gathered shards"):
        assert [rank[what] for rank in seen] == [True, "empty", True, "empty"], what
    before, after = (load_safetensors(folder / f"{name}.safetensors") for name in ("before", "after"))
    assert [f"deep.er.{name}" for name in before] == list(after)
    for name, value in before.items():
        found = after[f"deep.er.{name}"]
        parts = [(found, value)]
        if hasattr(value, "data_names"):
            parts = [(getattr(found, part), getattr(value, part)) for part in value.data_names]
        assert all(torch.equal(a, b) for a, b in parts), name


def test_checkpoints_of_shards(seen):
    for rank in seen:
        assert not rank["before loading"] and rank["after loading"]
        assert "block.mlp.gate.weight/0of2" in rank["not divided so"] and "by as many ranks" in rank["not divided so"]
        assert "has shape" in rank["quantized otherwise"] and "CheckpointError" in rank["quantized otherwise"]
        assert "CheckpointError" in rank["no checkpoint"]
        assert "down.bias: only the first rank has this bias" in rank["bias"]


def test_what_cannot_be_gathered_says_so_on_every_rank(seen):
    for rank in seen:
        for what in ("full_tensor", "plain dcp"):
            assert "tensor_parallel.gather_shards" in rank[what]
        assert rank["quantized apart"].startswith("ShardingError: block.mlp.down.weight")
        assert "quantize the whole model before" in rank["quantized apart"]
        assert "only tensors that one dimension of a mesh" in rank["two dimensions"]


def test_ranks_share_key_heads_where_there_are_fewer(seen):
    for rank in seen:
        assert rank["head shapes"] == [(64, 256), (32, 256), (32, 256), (256, 64)]
        assert rank["heads"] < 0.03 and rank["loaded heads"]
        assert "k_proj.weight: 3 heads cannot be divided evenly among 4 ranks" in rank["uneven heads"]
        assert "q_proj.weight: 2 heads cannot be divided evenly" in rank["too few queries"]
    assert [rank["gathered heads"] for rank in seen] == [True, "empty", "empty", "empty"]


def test_wide_group_scales_are_sent(seen):
    assert all(rank["int16"] for rank in seen)
