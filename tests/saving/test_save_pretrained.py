"""``save_pretrained`` and loading with transformers: the same bits, also in a new process; damaged folders."""

from __future__ import annotations

import json
import textwrap

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torchao.quantization import FqnToConfig, quantize_

from intscale_compile import IntScaleConfig, IntScaleTensor, save_pretrained
from intscale_compile.errors import CheckpointError, ConfigError
from tests.support import forks
from tests.support.saved import QUICK, assert_same_state, model_of

transformers = pytest.importorskip("transformers")


def small_llama(tied=False, dtype=torch.float32):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=96,
        tie_word_embeddings=tied,
    )
    return transformers.AutoModelForCausalLM.from_config(
        config, dtype=dtype
    ).eval()  # .to(dtype) would round buffers too


def small_mixtral():
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=96,
        num_local_experts=4,
        pad_token_id=0,
    )
    return transformers.MixtralForCausalLM(config).eval()


IDS = torch.arange(24).reshape(2, 12)


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def quantized_names(model):
    return sorted(name for name, p in model.named_parameters() if isinstance(p, IntScaleTensor))


def test_new_process_gives_the_same_logits(tmp_path):
    """quantize_ + save_pretrained, one file and many, both dtypes; reloaded where nothing was set up
    but our import.
    """
    wanted = {}
    for name, tied, dtype, size, config in [
        ("one", False, torch.float32, "1GB", QUICK),
        ("shards", True, torch.bfloat16, "20KB", IntScaleConfig(group_size=32, scale_bits=6, scale_search="absmax")),
        ("eight", False, torch.float32, "1GB", IntScaleConfig(weight_bits=8, scale_search="absmax")),
    ]:
        model = small_llama(tied, dtype)
        quantize_(model, config)
        assert len(quantized_names(model)) == 14
        save_pretrained(model, tmp_path / name, config, max_shard_size=size)
        wanted[name] = logits(model)
    assert (
        len(list((tmp_path / "shards").glob("*.safetensors"))) > 3
        and len(list((tmp_path / "one").glob("*.safetensors"))) == 1
    )
    script = textwrap.dedent("""
        import sys, torch
        from pathlib import Path
        from transformers import AutoModelForCausalLM
        import intscale_compile
        folder, out = Path(sys.argv[1]), {}
        for name in ("one", "shards", "eight"):
            model = AutoModelForCausalLM.from_pretrained(folder / name).eval()
            kinds = [type(p).__name__ for p in model.parameters()]
            with torch.no_grad():
                logits = model(torch.arange(24).reshape(2, 12)).logits
            out[name] = (logits, kinds.count("IntScaleTensor"), model.config.quantization_config.quant_type)
        torch.save(out, folder / "out.pt")
    """)
    (tmp_path / "script.py").write_text(script)
    run = forks.run("plain", tmp_path / "script.py", str(tmp_path), timeout=300, cwd=tmp_path)
    assert run.returncode == 0, run.stderr[-2000:]
    found = torch.load(tmp_path / "out.pt", weights_only=False)
    for name, y in wanted.items():
        assert found[name][1] == 14
        assert torch.equal(found[name][0], y), name
    assert found["shards"][2].group_size == 32, "config.json says how the model was quantized"


def test_stacks_of_experts_are_saved(tmp_path):
    """3-D weights keep their shape and bits, and the model its logits."""
    model = small_mixtral()
    config = FqnToConfig({r"re:.*experts\.(gate_up_proj|down_proj)": QUICK, r"re:.*self_attn\.[qkvo]_proj": QUICK})
    quantize_(model, config, filter_fn=None)
    stacks = [name for name in quantized_names(model) if "experts" in name]
    assert len(stacks) == 2 and model.get_parameter(stacks[0]).dim() == 3
    save_pretrained(model, tmp_path, config)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    for name in quantized_names(model):
        assert_same_state({name: again.get_parameter(name).data}, {name: model.get_parameter(name).data})
    assert torch.equal(logits(again), logits(model))


def test_stacks_of_experts_are_quantized_on_load(tmp_path):
    """TorchAoConfig takes patterns; a stack that is kept as [E, K, N] comes back so."""
    shape = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4, head_dim=16)
    shape |= dict(num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, vocab_size=64, pad_token_id=0)
    gpt_oss = transformers.GptOssConfig(**shape, layer_types=["full_attention"])
    config = FqnToConfig({r"re:.*experts\.(gate_up_proj|down_proj)": QUICK})
    for name, model in (("mixtral", small_mixtral()), ("gpt_oss", transformers.GptOssForCausalLM(gpt_oss).eval())):
        folder = tmp_path / name
        model.save_pretrained(folder)
        loaded = transformers.AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=transformers.TorchAoConfig(config)
        )
        assert len(quantized_names(loaded)) == 2
        loaded.save_pretrained(tmp_path / "again" / name)
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again" / name)
        assert quantized_names(again) == quantized_names(loaded)
        assert torch.equal(logits(again), logits(loaded))


def test_quantize_on_load_is_the_same_as_quantize_(tmp_path):
    """from_pretrained(..., quantization_config=...) quantizes layer by layer; lm_head stays as it is."""
    model = small_llama()
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=transformers.TorchAoConfig(QUICK)
    )
    quantize_(model, QUICK)
    assert quantized_names(loaded) == quantized_names(model) and not isinstance(loaded.lm_head.weight, IntScaleTensor)
    assert torch.equal(logits(loaded), logits(model))
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again")), logits(model))


def test_trained_model_on_load(models_dir):
    """The tied head of a trained model stays tied and in high precision."""
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        models_dir / "tiny-llama", quantization_config=transformers.TorchAoConfig(QUICK)
    )
    assert len(quantized_names(loaded)) == 8 * 7
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_save_pretrained_refuses_what_it_cannot_save(tmp_path):
    with pytest.raises(ConfigError, match="not Sequential: use save_safetensors"):
        save_pretrained(model_of(), tmp_path)
    with pytest.raises(ConfigError, match="call quantize_ first"):
        save_pretrained(small_llama(), tmp_path)


def damaged_pretrained(folder, change):
    """A saved model whose first MLP weight is altered, in a file without checksums, as version 0.1.0 wrote them."""
    model = small_llama()
    quantize_(model, QUICK)
    save_pretrained(model, folder, QUICK)
    path = folder / "model.safetensors"
    with safe_open(path, framework="pt") as file:
        metadata = dict(file.metadata())
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    name = "model.layers.0.mlp.up_proj"
    header = json.loads(metadata[f"{name}.weight"])
    change(tensors, f"{name}._weight_", header["_data"])
    metadata[f"{name}.weight"] = json.dumps(header)
    del metadata["intscale"]
    save_file(tensors, path, metadata=metadata)


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("zero scale", lambda tensors, prefix, fields: tensors[f"{prefix}scale"].zero_(), "a group scale is 0"),
        (
            "row scale",
            lambda tensors, prefix, fields: tensors[f"{prefix}per_tensor_scale"].fill_(float("nan")),
            "a row scale is not",
        ),
        ("block size", lambda tensors, prefix, fields: fields.update(block_size=[1, 32]), "groups of 32 need"),
        ("scale bits", lambda tensors, prefix, fields: fields.update(scale_bits=1), "over the 1 bits declared"),
        ("in_features", lambda tensors, prefix, fields: fields.update(in_features=640), "160 x 640"),
        ("field", lambda tensors, prefix, fields: fields.pop("transposed"), "lacks \\['transposed'\\]"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_damaged_pretrained_says_what_is_wrong(name, change, message, tmp_path):
    """transformers catches errors of single weights and goes on; ours, with the weight's name, ends the loading."""
    damaged_pretrained(tmp_path, change)
    with pytest.raises(CheckpointError, match=message) as caught:
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert "model.layers.0.mlp.up_proj.weight" in str(caught.value)
