"""Folders of ``save_shards``: format version, checksums, shared parameters; by one process, whose shards are the whole model."""

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn

import intscale_compile
from intscale_compile import IntScaleConfig, tensor_parallel, verify_checkpoint
from intscale_compile.commands import verify_folder
from intscale_compile.errors import CheckpointError
from intscale_compile.saving import shard_writing


def tied(seed):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64, bias=False)).requires_grad_(False)
    model[1].weight = model[0].weight
    return intscale_compile.quantize(model, IntScaleConfig(group_size=32))


def test_shared_once_with_version_and_checksums(tmp_path):
    model, other, x = tied(0), tied(1), torch.randn(3, 64)
    tensor_parallel.save_shards(model, tmp_path)
    stored = dcp.FileSystemReader(tmp_path).read_metadata().state_dict_metadata
    assert {key for key in stored if key.startswith(("0.", "1."))} == {
        "0.bias", *(f"0.weight/{part}" for part in ("qdata", "scale", "per_tensor_scale", "layout"))
    }  # fmt: skip
    version = intscale_compile.versions.__version__
    assert [key for key in stored if "format" in key] == [f"intscale/format_version=1/written_by={version}/0of1"]
    tensor_parallel.load_shards(other, tmp_path, verify=True)
    assert torch.equal(other(x), model(x)) and other[0].weight is other[1].weight


def test_newer_formats_damage_and_folders_without_checksums(tmp_path, monkeypatch):
    model, other, x = tied(0), tied(1), torch.randn(3, 64)
    before = other(x)
    entries = shard_writing._entries(model)
    dcp.save({**entries, "intscale/format_version=2/written_by=9.0/0of1": "{}"}, checkpoint_id=tmp_path / "newer")
    with pytest.raises(CheckpointError, match="format version 2, written by intscale_compile 9.0"):
        tensor_parallel.load_shards(other, tmp_path / "newer")
    dcp.save(entries, checkpoint_id=tmp_path / "old")
    with pytest.raises(CheckpointError, match="no checksums"):
        tensor_parallel.load_shards(other, tmp_path / "old", verify=True)
    monkeypatch.setattr(shard_writing, "tensor_digest", lambda tensor: "another")
    tensor_parallel.save_shards(model, tmp_path / "damaged")
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="0.bias, 0.weight/per_tensor_scale.*differ from their checksum"):
        tensor_parallel.load_shards(other, tmp_path / "damaged", verify=True)
    assert torch.equal(other(x), before)
    tensor_parallel.load_shards(other, tmp_path / "old")
    assert torch.equal(other(x), model(x))


def test_inspect_verifies_them(tmp_path):
    """Every entry of every rank, without a model: a changed byte, a cut file, a lost rank, a newer release."""
    tensor_parallel.save_shards(tied(0), tmp_path / "m")
    found = verify_folder(tmp_path / "m")
    assert (found.files, found.tensors, found.without_checksums) == (1, 4, [])
    data = next((tmp_path / "m").glob("*.distcp"))
    whole = data.read_bytes()
    codes = tied(0)[0].weight.qdata.numpy().tobytes()
    place = whole.index(codes) + 5
    data.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    with pytest.raises(
        CheckpointError, match=rf"m: 0.weight/qdata \({data.name}\): the data differ from their checksum"
    ):
        verify_folder(tmp_path / "m")
    tensor_parallel.load_shards(tied(1), tmp_path / "m")  # nothing contradicts it
    data.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=rf"\({data.name}\) cannot be read"):
        verify_checkpoint(tmp_path / "m")
    data.write_bytes(whole)
    index = tmp_path / "m" / ".metadata"
    index.write_bytes(index.read_bytes()[:100])
    for door in (verify_folder, lambda path: tensor_parallel.load_shards(tied(1), path)):
        with pytest.raises(CheckpointError, match="no checkpoint of save_shards can be read there"):
            door(tmp_path / "m")
    entries = shard_writing._entries(tied(0))
    records = {"old": {}, "newer": {"intscale/format_version=2/written_by=9.0/0of1": "{}"}}
    records["lost"] = {"intscale/format_version=1/written_by=1.0/0of2": "{}"}
    for name, record in records.items():
        dcp.save({**entries, **record}, checkpoint_id=tmp_path / name)
    assert verify_folder(tmp_path / "old").without_checksums == ["__0_0.distcp"]
    with pytest.raises(CheckpointError, match="format version 2, written by intscale_compile 9.0"):
        verify_folder(tmp_path / "newer")
    with pytest.raises(CheckpointError, match="1 of 2 ranks stored checksums"):
        verify_folder(tmp_path / "lost")


def test_weights_saved_apart_are_not_loaded_into_one(tmp_path):
    """Half of what was saved would be lost, whichever it is."""
    apart, shared = tied(0), tied(1)
    apart[1].weight = nn.Parameter(tied(2)[0].weight.detach().clone(), requires_grad=False)
    before = shared(torch.ones(2, 64))
    tensor_parallel.save_shards(apart, tmp_path)
    with pytest.raises(CheckpointError, match=r"1\.weight was saved as a tensor of its own.* shares it with 0\.weight"):
        tensor_parallel.load_shards(shared, tmp_path)
    assert torch.equal(shared(torch.ones(2, 64)), before)
