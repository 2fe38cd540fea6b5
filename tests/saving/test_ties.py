"""A parameter that several names share is stored once, and shared again when it is loaded."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import intscale_compile
from intscale_compile import IntScaleConfig, load_safetensors, save_safetensors
from intscale_compile.errors import CheckpointError
from intscale_compile.saving.integrity import with_checksums, with_version
from intscale_compile.saving.shard_reading import read_shards

CONFIG = IntScaleConfig(group_size=32)


class Tied(nn.Module):
    """Two linear layers with one weight, a tied output embedding, and a buffer under two names."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(64, 64, bias=False), nn.Linear(64, 64)
        self.b.weight = self.a.weight
        self.embed, self.head = nn.Embedding(10, 64), nn.Linear(64, 10, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("steps", torch.arange(4))
        self.register_buffer("again", self.steps)

    def forward(self, x):
        return self.head(self.b(torch.tanh(self.a(x))))


def tied():
    torch.manual_seed(0)
    return intscale_compile.quantize(Tied().requires_grad_(False), CONFIG)


def test_one_copy_is_stored_and_the_tie_kept(tmp_path):
    model, path = tied(), tmp_path / "m.safetensors"
    save_safetensors(model, path)
    with safe_open(path, "pt") as file:
        stored = set(file.keys())
        assert json.loads(file.metadata()["tied_names"]) == {"b.weight": "a.weight", "head.weight": "embed.weight"}
    parts = {f"a._weight_{part}" for part in ("qdata", "scale", "per_tensor_scale")}
    assert stored == {*parts, "b.bias", "embed.weight", ".steps", ".again"}
    state = load_safetensors(path, verify=True)
    assert set(state) == set(model.state_dict())
    with torch.device("meta"):
        fresh = Tied()
    fresh.load_state_dict(state, assign=True)
    assert fresh.a.weight is fresh.b.weight and fresh.embed.weight is fresh.head.weight
    assert isinstance(fresh.steps, torch.Tensor) and "steps" in dict(fresh.named_buffers())
    x = torch.randn(3, 64)
    assert torch.equal(fresh(x), model(x))
    other = tied()
    with torch.no_grad():
        other.a.weight.per_tensor_scale.mul_(2)
    other.load_state_dict(state)  # copied into the parameters that are there
    assert torch.equal(other(x), model(x)) and other.a.weight is other.b.weight


def test_shards_of_tied_names(tmp_path):
    save_safetensors(tied(), tmp_path / "m.safetensors")
    whole = load_safetensors(tmp_path / "m.safetensors")
    state = read_shards(tmp_path / "m.safetensors", {"b.weight": (-2, 1, 1)}, 1, 2)  # the rank has rows 32 to 64 of it
    assert set(state) == set(whole)
    assert torch.equal(state["a.weight"].dequantize(), whole["a.weight"].dequantize())
    assert torch.equal(state["b.weight"].dequantize(), whole["a.weight"].dequantize()[32:])


@pytest.mark.parametrize(
    "table", ["[", "[]", '{"b.weight": 3}', '{"b.weight": "c.weight"}', '{"a.weight": "a.weight"}']
)
def test_a_damaged_table_is_refused(tmp_path, table):
    path = tmp_path / "m.safetensors"
    save_safetensors(tied(), path)
    with safe_open(path, "pt") as file:
        metadata, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    metadata["tied_names"] = table
    save_file(tensors, path, metadata)
    with pytest.raises(CheckpointError, match="tied_names: its header differs|tied names"):
        load_safetensors(path)
    del metadata["intscale"]
    save_file(tensors, path, with_checksums(tensors, with_version(metadata)))  # as one who writes a digest too
    for read in (load_safetensors, lambda path: read_shards(path, {}, 0, 1)):
        with pytest.raises(CheckpointError, match="the table of its tied names"):
            read(path)


def test_transformers_saves_once_and_ties_again(tmp_path):
    hf = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    config = hf.BertConfig(**sizes, vocab_size=48, max_position_embeddings=16)
    model = hf.BertForMaskedLM(config).eval().requires_grad_(False)
    layers = model.bert.encoder.layer
    layers[1].intermediate.dense.weight = layers[0].intermediate.dense.weight
    intscale_compile.quantize(model, CONFIG)
    intscale_compile.save_pretrained(model, tmp_path / "m")
    with safe_open(tmp_path / "m" / "model.safetensors", "pt") as file:
        stored = [key for key in file.keys() if key.endswith("intermediate.dense._weight_qdata")]  # noqa: SIM118
    assert stored == ["bert.encoder.layer.0.intermediate.dense._weight_qdata"]
    ids = torch.arange(8)[None]
    loaded = hf.AutoModelForMaskedLM.from_pretrained(tmp_path / "m").eval()
    layers = loaded.bert.encoder.layer
    assert layers[1].intermediate.dense.weight is layers[0].intermediate.dense.weight
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    intscale_compile.save_pretrained(loaded, tmp_path / "again")
    again = hf.AutoModelForMaskedLM.from_pretrained(tmp_path / "again").eval().bert.encoder.layer
    assert again[1].intermediate.dense.weight is again[0].intermediate.dense.weight
