"""GGUF files: blocks as the package ``gguf`` reads them, models as transformers reads them, codes unchanged."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from intscale_compile import IntScaleTensor, from_quantized
from intscale_compile.errors import CheckpointError, ConfigError
from intscale_compile.importing.gguf import READERS
from intscale_compile.tensors.selection import DECIDED
from tests.support.compiled import rewritten

gguf = pytest.importorskip("gguf", reason="gguf is not installed: pip install gguf")
transformers = pytest.importorskip("transformers")

BYTES = {"Q4_0": 18, "Q4_1": 20, "Q4_K": 144}
SIZES = dict(
    vocab_size=256, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4, head_dim=16
)


@pytest.mark.parametrize("kind", READERS)
def test_blocks(kind):
    """Any bits but NaN scales: the same floats as the package's own reader, to the bit; the layer is the same weight."""
    blocks = np.random.default_rng(0).integers(0, 256, (6, 4, BYTES[kind]), dtype=np.uint8)
    halves = 1 if kind == "Q4_0" else 2
    blocks[..., : 2 * halves] = np.random.default_rng(1).normal(0, 0.01, (6, 4, halves)).astype("<f2").view(np.uint8)
    data = blocks.reshape(6, -1)
    found = READERS[kind](data)
    wanted = gguf.quants.dequantize(data, gguf.GGMLQuantizationType[kind])
    assert np.array_equal(found.dense().numpy(), wanted)
    layer = found.layer(kind)
    minimum = 0 if layer.minimum is None else layer.minimum.repeat_interleave(32, 1)
    dense = layer.codes.double() * layer.scale.double().repeat_interleave(32, 1) + minimum
    torch.testing.assert_close(dense, torch.from_numpy(wanted).double(), rtol=1e-6, atol=1e-8)


def permuted(weight, heads):
    """Rows of queries and keys as llama.cpp stores them: the halves of a head interleaved."""
    return weight.reshape(heads, 2, -1, weight.shape[-1]).transpose(1, 2).reshape(weight.shape)


def write(path, kind, output="F32"):
    """A small Llama, linear layers in ``kind``; the model that it was written from."""
    config = transformers.LlamaConfig(num_key_value_heads=2, tie_word_embeddings=False, **SIZES)
    model = transformers.LlamaForCausalLM(config).eval().requires_grad_(False)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 1)
    writer = gguf.GGUFWriter(path, "llama")
    for name, value in [
        ("block_count", 1), ("context_length", 64), ("embedding_length", 64), ("feed_forward_length", 96),
        ("head_count", 4), ("head_count_kv", 2), ("layer_norm_rms_eps", 1e-6), ("vocab_size", 256),
    ]:  # fmt: skip
        getattr(writer, f"add_{name}")(value)
    for name, tensor in model.state_dict().items():
        heads = {"q_proj": 4, "k_proj": 2}.get(name.split(".")[-2])
        data = (tensor if heads is None else permuted(tensor, heads)).numpy()
        quantized = tensor.dim() == 2 and "embed" not in name and "lm_head" not in name
        chosen = gguf.GGMLQuantizationType[kind if quantized else output if "lm_head" in name else "F32"]
        data = gguf.quants.quantize(np.ascontiguousarray(data), chosen)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), data, raw_dtype=chosen)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def snr(wanted, found):
    return float(10 * torch.log10(wanted.square().sum() / (wanted - found).square().sum()))


@pytest.mark.parametrize("kind, least", [("Q4_0", 55), ("Q4_1", 55), ("Q8_0", 38)])
def test_model(kind, least, tmp_path):
    path = tmp_path / "model.gguf"
    original = write(path, kind)
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32)
    model, report = from_quantized(path, dtype=torch.float32)
    weights = {n: p for n, p in model.named_parameters() if isinstance(p, IntScaleTensor)}
    assert DECIDED in vars(model.lm_head)  # however its graph is cut, the compiler quantizes nothing more
    assert len(weights) == 7 == len(report.layers) and report.unquantized == ["lm_head"]
    for name, weight in weights.items():
        stored = plain.get_parameter(name)
        assert snr(stored, weight.dequantize()) > least, name
        assert weight.weight_bits == (8 if kind == "Q8_0" else 4) and weight.dtype == torch.float32
        if kind == "Q4_1":  # every code of the file, whatever the order of rows
            group = weight.codes.unflatten(1, (-1, 32))
            assert (group.amin(-1) == -8).all() and (group.amax(-1) == 7).all()
    assert all(row.snr_db > least for row in report.layers) and original is not model
    ids = torch.arange(24)[None]
    assert snr(plain(ids).logits, model(ids).logits) > 25  # activations have 8 bits
    assert {row.symmetric for row in report.layers} == {"Q4_1": {False}, "Q8_0": {True}}.get(
        kind, {False}
    )  # -d with code 0


def test_saved_and_loaded(tmp_path):
    """As ``save_pretrained`` of any imported model."""
    from intscale_compile import save_compressed_tensors, save_pretrained

    write(tmp_path / "model.gguf", "Q4_1")
    model, _ = from_quantized(tmp_path / "model.gguf", dtype=torch.float32)
    save_pretrained(model, tmp_path / "ours")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    ids = torch.arange(24)[None]
    assert torch.equal(again(ids).logits, model(ids).logits)
    with pytest.raises(ConfigError, match="minima that are no multiples"):
        save_compressed_tensors(model, tmp_path / "theirs")
    with torch.no_grad():
        torch.testing.assert_close(rewritten(model)(ids).logits, model(ids).logits, rtol=1e-3, atol=1e-3)


def test_command(tmp_path):
    """``intscale quantize model.gguf OUT`` and what else takes a model's name."""
    from intscale_compile.commands import load_model, quantize_folder
    from intscale_compile.commands.inspection import verify_folder

    path = tmp_path / "model.gguf"
    write(path, "Q4_0")
    summary = quantize_folder(path, tmp_path / "out", dtype=torch.float32)
    assert summary.method == "gguf" and summary.weights == 7 and summary.bytes_before == path.stat().st_size
    assert summary.notes == ["no tokenizer: the model has none that transformers can read"]
    ids = torch.arange(24)[None]
    (model, report), (again, _) = load_model(path, dtype=torch.float32), load_model(tmp_path / "out")
    assert len(report.layers) == 7 and torch.equal(model(ids).logits, again(ids).logits)
    with pytest.raises(ConfigError, match="a GGUF file has no checksums"):
        verify_folder(path)
    with pytest.raises(ConfigError, match="quantized already"):
        quantize_folder(path, tmp_path / "other", preset="gptq", data=[__file__])


def test_refusals(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="there is no such file"):
        from_quantized(tmp_path / "missing.gguf")
    path = tmp_path / "model.gguf"
    write(path, "Q4_0")
    with monkeypatch.context() as patch:
        patch.delitem(READERS, "Q4_0")
        with pytest.raises(
            ConfigError, match="layers.0.self_attn.q_proj is stored as Q4_0, which our formats cannot hold"
        ):
            from_quantized(path)
    with monkeypatch.context() as patch:  # another weight than transformers made of it
        original = READERS["Q4_0"]
        patch.setitem(READERS, "Q4_0", lambda data: original(data)._replace(scale=original(data).scale * 2))
        with pytest.raises(CheckpointError, match="not those of the weight"):
            from_quantized(path)
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(path.read_bytes()[:500])
    with pytest.raises(CheckpointError, match="transformers cannot read this file"):
        from_quantized(damaged)
    with monkeypatch.context() as patch:
        patch.setitem(__import__("sys").modules, "gguf", None)
        with pytest.raises(ConfigError, match="pip install gguf"):
            from_quantized(path)
