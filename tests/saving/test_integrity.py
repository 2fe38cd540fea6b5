"""Format version and checksums: what was changed after it was saved is found, by whichever reader."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torchao.quantization import FqnToConfig, quantize_

from intscale_compile import (
    IntScaleConfig,
    IntScaleTensor,
    __version__,
    load_safetensors,
    save_pretrained,
    save_safetensors,
    verify_checkpoint,
)
from intscale_compile.errors import CheckpointError
from intscale_compile.saving.shard_reading import read_shards

transformers = pytest.importorskip("transformers")

QUICK = IntScaleConfig(group_size=32, scale_search="absmax")
SAVED_BY_0_1_0 = Path(__file__).parents[1] / "fixtures" / "saved_by_0_1_0"
UP = "model.layers.0.mlp.up_proj"


def small_llama():
    torch.manual_seed(0)
    shape = dict(
        hidden_size=64, intermediate_size=80, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1
    )
    config = transformers.LlamaConfig(**shape, vocab_size=48, tie_word_embeddings=True)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval().requires_grad_(False)
    quantize_(model, QUICK)
    return model


@pytest.fixture(scope="module")
def folder_once(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "model"
    save_pretrained(small_llama(), folder, QUICK)
    return folder


@pytest.fixture
def folder(folder_once, tmp_path):
    return shutil.copytree(folder_once, tmp_path / "model")


def load_folder(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder)


@pytest.fixture
def file(tmp_path):
    """A file of ``save_safetensors`` with the weight ``0.weight``, 70 x 200, padded to 256 features."""
    model = nn.Sequential(nn.Linear(200, 70), nn.LayerNorm(70))
    quantize_(model, QUICK)
    save_safetensors(model, tmp_path / "m.safetensors")
    return tmp_path / "m.safetensors"


def rewrite(path, change):
    """Let ``change(tensors, metadata)`` alter a safetensors file."""
    with safe_open(path, framework="pt") as opened:
        metadata = dict(opened.metadata())
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    change(tensors, metadata)
    save_file(tensors, path, metadata=metadata)


def set_attribute(name, **values):
    def change(tensors, metadata):
        header = json.loads(metadata[name])
        header["_data"].update(values)
        metadata[name] = json.dumps(header)

    return change


def without_entry(change):
    """As a file of version 0.1.0, which had no checksums."""

    def changed(tensors, metadata):
        change(tensors, metadata)
        del metadata["intscale"]

    return changed


def newer(tensors, metadata):
    metadata["intscale"] = json.dumps({**json.loads(metadata["intscale"]), "format_version": 2, "written_by": "7.0"})


READERS = {"load_safetensors": load_safetensors, "read_shards": lambda path: read_shards(path, {}, 0, 1)}


@pytest.mark.parametrize("reader", READERS)
def test_what_is_written(reader, file):
    with safe_open(file, framework="pt") as opened:
        entry = json.loads(opened.metadata()["intscale"])
        keys = set(opened.keys())
    assert (entry["format_version"], entry["written_by"]) == (1, __version__)
    assert set(entry["tensors"]) == keys and set(entry["headers"]) >= {"0.weight", "0.bias", "tensor_names"}
    assert isinstance(READERS[reader](file)["0.weight"], IntScaleTensor)
    assert verify_checkpoint(file).tensors == len(keys) == 6


@pytest.mark.parametrize("reader", READERS)
def test_a_newer_format_is_refused_by_name(reader, file):
    rewrite(file, newer)
    wanted = f"format version 2, written by intscale_compile 7.0; this is {__version__}, which reads versions up to 1"
    with pytest.raises(CheckpointError, match=wanted):
        READERS[reader](file)


def test_a_newer_format_in_a_folder_and_in_a_torch_file(folder, tmp_path, monkeypatch):
    rewrite(folder / "model.safetensors", newer)
    with pytest.raises(CheckpointError, match="format version 2, written by intscale_compile 7.0"):
        load_folder(folder)
    monkeypatch.setattr("intscale_compile.format.VERSION", 3)
    torch.save(IntScaleTensor.from_hp(torch.randn(32, 64), QUICK), tmp_path / "w.pt")
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="format version 3; this release reads versions up to 1"):
        torch.load(tmp_path / "w.pt", weights_only=True)


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("attribute", [{"rotation": 8}, {"transposed": True}, {"in_features": 201}])
def test_an_attribute_that_was_changed(reader, attribute, file):
    """Each of these fits the data: only the checksum knows. Files of version 0.1.0 have none."""
    original = load_safetensors(file)["0.weight"]
    rewrite(file, set_attribute("0.weight", **attribute))
    with pytest.raises(CheckpointError, match="0.weight: its header differs from its checksum"):
        READERS[reader](file)
    rewrite(file, lambda tensors, metadata: metadata.pop("intscale"))
    (name, value), changed = *attribute.items(), READERS[reader](file)["0.weight"]
    assert getattr(changed, name) == value != getattr(original, name)


@pytest.mark.parametrize("reader", READERS)
def test_headers_that_are_gone(reader, file):
    def lost(tensors, metadata):
        header = json.loads(metadata["0.weight"])
        del header["_data"]["rotation"]
        metadata["0.weight"] = json.dumps(header)

    rewrite(file, without_entry(lost))
    with pytest.raises(CheckpointError, match=r"0.weight: a stored IntScaleTensor lacks \['rotation'\]"):
        READERS[reader](file)


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("packing", ["plain", "tiled"])
def test_input_features_lowered_within_the_padding(reader, bits, packing, tmp_path):
    """Codes where there should be padding, even in a file without checksums."""
    weight = IntScaleTensor.from_hp(torch.randn(70, 200), IntScaleConfig(weight_bits=bits, packing_format=packing))
    path = tmp_path / "m.safetensors"
    save_safetensors(nn.ParameterDict({"w": nn.Parameter(weight, requires_grad=False)}), path)
    assert torch.equal(READERS[reader](path)["w"].codes, weight.codes)
    rewrite(path, without_entry(set_attribute(".w", in_features=199)))
    with pytest.raises(CheckpointError, match="w: codes beyond its 199 input features are not 0"):
        READERS[reader](path)


def flip(key):
    def change(tensors, metadata):
        tensors[key].view(-1)[7] ^= 1

    return change


def test_data_changed_within_their_range(file):
    """Loads, as nothing contradicts it; whoever asks is told."""
    rewrite(file, flip("0._weight_qdata"))
    assert isinstance(load_safetensors(file)["0.weight"], IntScaleTensor)
    for ask in (verify_checkpoint, lambda path: load_safetensors(path, verify=True)):
        with pytest.raises(
            CheckpointError, match=r"m.safetensors: 0.weight: qdata: the data differ from their checksum"
        ):
            ask(file)
    rewrite(file, lambda tensors, metadata: tensors["1.bias"].add_(1))
    with pytest.raises(CheckpointError, match="0.weight: qdata, 1.bias: the data differ"):
        verify_checkpoint(file)


def test_files_without_checksums_are_said(tmp_path):
    found = verify_checkpoint(SAVED_BY_0_1_0 / "llama")
    assert (found.files, found.tensors, found.without_checksums) == (1, 0, ["model.safetensors"])
    with pytest.raises(CheckpointError, match="it has no checksums, as files of version 0.1.0"):
        load_safetensors(SAVED_BY_0_1_0 / "formats.safetensors", verify=True)
    with pytest.raises(FileNotFoundError):
        verify_checkpoint(tmp_path / "nothing.safetensors")


def test_folders_are_verified(tmp_path):
    """Tied weights are written once, shards have the digests of what is in them."""
    model = small_llama()
    save_pretrained(model, tmp_path, QUICK, max_shard_size="15KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    found = verify_checkpoint(tmp_path)
    assert found.files == len(shards) > 2 and not found.without_checksums
    with safe_open(shards[-1], framework="pt") as opened:
        key = next(key for key in sorted(opened.keys()) if key.endswith("_qdata"))
    rewrite(shards[-1], flip(key))
    with pytest.raises(
        CheckpointError, match=f"{shards[-1].name}: {key.partition('._')[0]}.weight: qdata: the data differ"
    ):
        verify_checkpoint(tmp_path)
    shards[0].unlink()
    with pytest.raises(CheckpointError, match="it is missing"):
        verify_checkpoint(tmp_path)


# --- transformers -------------------------------------------------------------------------------------------------------


def config_change(change):
    def apply(folder):
        config = json.loads((folder / "config.json").read_text())
        change(config)
        (folder / "config.json").write_text(json.dumps(config))

    return apply


def file_change(change):
    return lambda folder: rewrite(folder / "model.safetensors", change)


def outside(folder):
    (folder / "model.safetensors").rename(folder.parent / "elsewhere.safetensors")
    with safe_open(folder.parent / "elsewhere.safetensors", framework="pt") as opened:
        index = {"metadata": {}, "weight_map": dict.fromkeys(opened.keys(), "../elsewhere.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


DAMAGED_FOLDERS = {
    "no quantization_config": (config_change(lambda c: c.pop("quantization_config")), "config.json has no quantization_config"),
    "rotation": (file_change(set_attribute(f"{UP}.weight", rotation=8)), f"{UP}.weight: its header differs from its checksum"),
    "rotation is gone": (file_change(without_entry(lambda t, m: m.update({f"{UP}.weight": m[f"{UP}.weight"].replace(
        '"rotation": 0, ', "")}))), f"{UP}.weight: a stored IntScaleTensor lacks \\['rotation'\\]"),
    "a part is gone": (file_change(lambda t, m: t.pop(f"{UP}._weight_scale")), f"{UP}.weight: scale is missing"),
    "a weight is gone": (file_change(lambda t, m: [t.pop(key) for key in list(t) if key.startswith(f"{UP}.")]),
                         f"{UP}.weight: its data are missing"),
    "a norm is gone": (file_change(lambda t, m: t.pop("model.norm.weight")), "model.norm.weight: its data are missing"),
    "no names": (file_change(lambda t, m: m.update(tensor_names="[1]")), "the list of its tensors in the header is damaged"),
    "no metadata": (file_change(lambda t, m: m.clear()), "no list of tensors in its header"),
    "header no JSON": (file_change(lambda t, m: m.update({f"{UP}.weight": "{"})), f"{UP}.weight: its header cannot be read"),
    "a scale of 0": (file_change(lambda t, m: t[f"{UP}._weight_scale"].zero_()), f"{UP}.weight: a group scale is 0"),
    "a part too short": (file_change(lambda t, m: t.update({f"{UP}._weight_scale": t[f"{UP}._weight_scale"][:4].clone()})),
                         f"{UP}.weight: scale has shape"),
    "other sizes": (config_change(lambda c: c.update(intermediate_size=96)),
                    r"weight: it has shape \(64, 80\) where config.json makes"),
    "a file elsewhere": (outside, "the index of the checkpoint names a file outside of its folder"),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGED_FOLDERS)
def test_from_pretrained_ends_in_our_error(case, folder):
    change, message = DAMAGED_FOLDERS[case]
    change(folder)
    with pytest.raises(CheckpointError, match=message):
        load_folder(folder)


def test_a_whole_folder_loads(folder):
    """The control: the same weights, and nothing is said."""
    loaded, wanted = load_folder(folder), small_llama()
    for name, value in wanted.state_dict().items():
        found = loaded.state_dict()[name]
        parts = value.data_names if isinstance(value, IntScaleTensor) else []
        assert all(torch.equal(getattr(found, part), getattr(value, part)) for part in parts), name
        assert parts or torch.equal(found, value)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_a_loaded_model_is_saved_again(folder, tmp_path):
    load_folder(folder).save_pretrained(tmp_path / "again")
    verify_checkpoint(tmp_path / "again")
    with (
        safe_open(folder / "model.safetensors", "pt") as one,
        safe_open(tmp_path / "again/model.safetensors", "pt") as two,
    ):
        assert sorted(one.keys()) == sorted(two.keys())
        assert all(torch.equal(one.get_tensor(key), two.get_tensor(key)) for key in one.keys())  # noqa: SIM118


def test_a_loaded_model_with_experts_is_saved_again(tmp_path):
    """Experts that are not quantized are taken apart as transformers took them together."""
    shape = dict(
        hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1
    )
    model = transformers.MixtralForCausalLM(
        transformers.MixtralConfig(**shape, vocab_size=48, num_local_experts=2)
    ).eval()
    quantize_(model, FqnToConfig({r"re:.*self_attn\.[qkvo]_proj": QUICK}), filter_fn=None)
    save_pretrained(model, tmp_path / "first", QUICK)
    load_folder(tmp_path / "first").save_pretrained(tmp_path / "again")
    for folder in ("first", "again"):
        verify_checkpoint(tmp_path / folder)
    keys = []
    for folder in ("first", "again"):
        with safe_open(tmp_path / folder / "model.safetensors", "pt") as opened:
            keys.append(sorted(opened.keys()))
    assert keys[0] == keys[1] and any(".experts.1.w1" in key for key in keys[0])
    ids = torch.arange(8)[None]
    assert torch.equal(load_folder(tmp_path / "again")(ids).logits, model(ids).logits)


# --- writing ------------------------------------------------------------------------------------------------------------


def test_a_save_that_fails_leaves_the_old_file(file, monkeypatch):
    before, there = file.read_bytes(), sorted(os.listdir(file.parent))

    def failing(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr("safetensors.torch.save_file", failing)
    with pytest.raises(KeyboardInterrupt):
        save_safetensors(nn.Linear(3, 3), file)
    assert file.read_bytes() == before and sorted(os.listdir(file.parent)) == there


def test_where_nothing_can_be_written(file):
    model = nn.Linear(3, 3)
    with pytest.raises(CheckpointError, match="it cannot be written"):
        save_safetensors(model, file.parent / "no folder" / "m.safetensors")
    with pytest.raises(CheckpointError, match="it cannot be written"):
        save_safetensors(model, file.parent)
    assert sorted(os.listdir(file.parent)) == [file.name]


def test_a_new_file_has_the_rights_of_any_other(file):
    other = file.parent / "other"
    other.write_text("")
    assert file.stat().st_mode == other.stat().st_mode


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
@pytest.mark.parametrize("reader", READERS)
def test_only_regular_files_are_opened(reader, make, tmp_path):
    make(tmp_path / "m.safetensors")
    with pytest.raises(CheckpointError, match="it is not a regular file"):
        READERS[reader](tmp_path / "m.safetensors")


KIND = ("quant_type", "default")
DAMAGED_CONFIG = {
    "empty": ((), {}),
    "method": (("quant_method",), None),
    "type": (("quant_type",), 3),
    "default": (KIND, None),
    "class": ((*KIND, "_type"), 3),
    "other class": ((*KIND, "_type"), "Nothing"),
    "data": ((*KIND, "_data"), []),
    "group size": ((*KIND, "_data", "group_size"), [1]),
    "unknown field": ((*KIND, "_data", "what"), 1),
    "modules": (("modules_to_not_convert",), 3),
}


@pytest.mark.parametrize("name", DAMAGED_CONFIG)
def test_a_damaged_quantization_config_is_our_error(folder, name):
    """Wrong types there made transformers raise what it met, which says neither the file nor what to do."""
    path, value = DAMAGED_CONFIG[name]
    config = json.loads((folder / "config.json").read_text())
    place = config
    for key in ("quantization_config", *path)[:-1]:
        place = place[key]
    place[("quantization_config", *path)[-1]] = value
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        CheckpointError, match="config.json: its quantization_config cannot be used .*save the model again"
    ):
        load_folder(folder)


def test_a_mistake_in_the_call_is_no_damage(folder):
    """What is wrong with other arguments than the stored configuration stays transformers' to say."""
    with pytest.raises(Exception) as error:
        transformers.AutoModelForCausalLM.from_pretrained(folder, quantization_config="nothing")
    assert "cannot be used" not in str(error.value)
