"""Saves that end early: a full disk, an error of the system, a process that is killed. Nothing half new is left to load."""

from __future__ import annotations

import contextlib
import re
import resource
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import nn

from intscale_compile import IntScaleConfig, load_safetensors, quantize, save_safetensors, tensor_parallel
from intscale_compile.errors import CheckpointError
from intscale_compile.tensors.stored_files import whole_file, whole_folder

OLD = {"config.json": "old", "model-00001-of-00002.safetensors": "old", "model-00002-of-00002.safetensors": "old",
       "model.safetensors.index.json": "old", "tokenizer.json": "old", "notes.txt": "mine"}  # fmt: skip
NEW = {"config.json": "new", "model.safetensors": "new", "tokenizer.json": "new", "more/part.txt": "new"}
HIDDEN = re.compile(r"[.](part|old)/")  # what is on its way
AFTER = {**NEW, "notes.txt": "mine"}


def model():
    torch.manual_seed(0)
    return quantize(nn.Sequential(nn.Linear(256, 512)), IntScaleConfig())


def write(folder, files):
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def read(folder):
    files = (path for path in folder.rglob("*") if path.is_file())
    return {name: path.read_text() for path in files if not HIDDEN.search(name := str(path.relative_to(folder)))}


@contextlib.contextmanager
def full_disk(size):
    """No file grows beyond ``size`` bytes: what a full disk says comes from the system, with another number."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_leaves_the_old_file_and_names_the_new_one(tmp_path):
    path, layers = tmp_path / "m.safetensors", model()
    save_safetensors(layers, path)
    before = path.read_bytes()
    with full_disk(20_000), pytest.raises(CheckpointError, match=f"^{path}: it cannot be written: .*large"):
        save_safetensors(layers, path)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == [path.name]
    said = pytest.raises(CheckpointError, match="^.*step.pt: it cannot be written")
    with full_disk(20_000), said, whole_file(tmp_path / "step.pt") as part:  # as a calibration keeps its blocks
        torch.save(torch.zeros(100_000), part)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_a_full_disk_leaves_the_old_folder_and_names_it(tmp_path):
    folder = tmp_path / "out"
    write(folder, OLD)
    said = pytest.raises(CheckpointError, match=f"^{folder}: it cannot be written: .*large")
    with full_disk(20_000), said as caught, whole_folder(folder) as part:
        save_file({"x": torch.zeros(100_000)}, part / "model.safetensors")
    assert ".part" not in str(caught.value) and read(folder) == OLD and len(list(tmp_path.iterdir())) == 1
    with pytest.raises(ConnectionResetError), whole_folder(folder):
        raise ConnectionResetError("of the hub: nothing to do with files")


class Renames:
    """Looks before each rename, and ends number ``last`` with an error, with ``broken`` all later ones too."""

    def __init__(self, monkeypatch, look=lambda: None, error=KeyboardInterrupt, last=10**6, broken=False):
        self.count, rename = 0, Path.replace

        def replace(path, target):
            look()
            self.count += 1
            if self.count == last or (broken and self.count > last):
                raise error
            return rename(path, target)

        monkeypatch.setattr(Path, "replace", replace)


def test_a_folder_is_never_half_new(tmp_path, monkeypatch):
    """Killed anywhere, a folder has no config.json, or files of one model only."""
    folder = tmp_path / "out"
    write(folder, OLD)
    seen = []

    def look():
        files = {name: text for name, text in read(folder).items() if text != "mine"}
        seen.append(files)
        assert "config.json" not in files or files == {k: v for k, v in OLD.items() if v != "mine"}
        assert not {"old", "new"} <= set(files.values())

    renames = Renames(monkeypatch, look)
    with whole_folder(folder) as part:
        write(part, NEW)
    assert renames.count == len(seen) == 5 + 4 and read(folder) == AFTER and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_a_move_that_fails_is_taken_back(tmp_path, monkeypatch, error):
    folder = tmp_path / "out"
    for last in range(1, 10):
        write(folder, OLD)
        with monkeypatch.context() as patch:
            Renames(patch, error=error, last=last)
            with pytest.raises(CheckpointError if isinstance(error, OSError) else error), whole_folder(folder) as part:
                write(part, NEW)
        assert read(folder) == OLD and [p.name for p in tmp_path.iterdir()] == ["out"], last
        assert not [p for p in folder.iterdir() if p.name.startswith(".")]


@pytest.mark.parametrize("interrupted", [False, True])
def test_old_files_that_cannot_be_put_back_are_kept_and_named(tmp_path, monkeypatch, interrupted):
    """They were removed with the folder that they had been moved to."""
    error = KeyboardInterrupt() if interrupted else OSError(5, "Input/output error")
    for last in range(2, 10):
        folder = tmp_path / str(last)
        write(folder, OLD)
        with monkeypatch.context() as patch:
            Renames(patch, error=error, last=last, broken=True)
            with pytest.raises(type(error) if interrupted else CheckpointError) as caught, whole_folder(folder) as part:
                write(part, NEW)
        (kept,) = (p for p in folder.iterdir() if p.name.endswith(".old"))
        there, aside = {n: t for n, t in read(folder).items() if ".old" not in n}, read(kept)
        assert {n: t for n, t in (there | aside).items() if n in OLD} == OLD
        assert not [p for p in folder.iterdir() if p.name.endswith(".part")]
        if not interrupted:
            assert f"config.json is in {kept}" in str(caught.value) and "move them back" in str(caught.value)


def test_a_folder_that_is_there_needs_no_room_beside_it(tmp_path):
    """It may be a mount point, or in a folder that others own."""
    (tmp_path / "out").mkdir()
    with whole_folder(tmp_path / "out") as part:
        assert part.parent == tmp_path / "out"
    with whole_folder(tmp_path / "other") as part:
        assert part.parent == tmp_path
    assert sorted(p.name for p in tmp_path.iterdir()) == ["other", "out"] and not list((tmp_path / "out").iterdir())


def test_shards_that_were_not_saved_are_not_loaded(tmp_path, monkeypatch):
    layers = model()
    tensor_parallel.save_shards(layers, tmp_path)

    def failing(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(dcp, "save", failing)
    with pytest.raises(CheckpointError, match=f"^{tmp_path}: it cannot be written: .*No space"):
        tensor_parallel.save_shards(layers, tmp_path)
    with pytest.raises(CheckpointError):
        tensor_parallel.load_shards(layers, tmp_path)


def test_safetensors_by_itself_says_what_to_call(tmp_path):
    layers = model()
    with pytest.raises(CheckpointError, match="save_safetensors"):
        save_file(layers.state_dict(), tmp_path / "m.safetensors")
    assert not list(tmp_path.iterdir())
    save_safetensors(layers, tmp_path / "m.safetensors")
    assert set(load_safetensors(tmp_path / "m.safetensors")) == set(layers.state_dict())
