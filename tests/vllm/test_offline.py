"""Offline engines against transformers: every linear layer has the same bits, tokens agree, each door and format."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from engines import (  # noqa: E402
    engine,
    equal_tokens,
    generate,
    is_quantized,
    layer_output,
    load_model,
    log_likelihood,
    prompts,
    record,
    reference,
    reference_log_likelihood,
)
from made import every_format, imported  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from intscale_compile import IntScaleConfig, IntScaleTensor  # noqa: E402
from intscale_compile.commands.quantizing import quantize_folder  # noqa: E402
from intscale_compile.errors import ConfigError  # noqa: E402

LINEARS = 4 * 8  # merged ones of the small Llama


@pytest.fixture(scope="module")
def quantized(llama, folders):
    """The small Llama as ``intscale quantize`` writes it."""
    quantize_folder(llama, folders / "llama", progress=False)
    return folders / "llama"


def check_layers(llm, model, ids, linears=LINEARS):
    """Every linear layer gives, for the activation that it had in vLLM, the bits that it gives in transformers."""
    calls = record(llm)
    generate(llm, ids, 3)
    assert len(calls) == linears
    for name, seen in calls.items():
        assert len(seen) >= 3  # prompts and single tokens
        for x, y in seen:
            expected = layer_output(model, name, x)
            if is_quantized(model, name):
                assert torch.equal(y, expected), name
            else:
                torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    return calls


def check_agreement(llm, model, ids, at_least=0.01):
    """The likelihood of held-out text: rounding differs around our layers, and codes flip here and there.

    Embeddings that are changed by 1e-7 of themselves move transformers' own by up to 0.4 %; test_tokens.py compares to the bit.
    """
    ours, theirs = log_likelihood(llm, ids), reference_log_likelihood(model, ids)
    assert abs(ours - theirs) < at_least * abs(theirs), (ours, theirs)
    return f"log likelihood of a token {ours:.6f} (transformers {theirs:.6f})"


def report(capsys, name, equal, agreement):
    with capsys.disabled():
        print(f"\n{name}: {agreement}; of 128 tokens equal before the first difference: {equal}")


# --- folders of ours ---------------------------------------------------------------------------------------------------


def test_a_folder_of_ours(quantized, capsys):
    ids, (model, _) = prompts(quantized), load_model(quantized, dtype=torch.float32)
    with engine(quantized) as llm:
        assert llm.llm_engine.model_config.quantization == "intscale"
        tokens = generate(llm, ids)
        agreement = check_agreement(llm, model, ids)
        calls = check_layers(llm, model, ids)
    report(capsys, "llama, folder of ours", equal_tokens(tokens, reference(model, ids)), agreement)
    # What differs is not ours: the first layer has the same activation and output, attention's result is another.
    seen = record_transformers(model, ids[0])
    name = "model.layers.0.self_attn.qkv_proj"
    x = seen["model.layers.0.self_attn.q_proj"]
    assert torch.equal(layer_output(model, name, x), rows_of(calls[name][0][1], ids, 0))
    assert not torch.equal(
        seen["model.layers.0.self_attn.o_proj"], rows_of(calls["model.layers.0.self_attn.o_proj"][0][0], ids, 0)
    )


def record_transformers(model, prompt):
    """The activation of every linear layer of transformers for a prompt."""
    seen, handles = {}, []
    for name, module in model.named_modules():
        if name.endswith("_proj"):
            handles.append(module.register_forward_hook(lambda m, a, o, name=name: seen.update({name: a[0][0]})))
    with torch.no_grad():
        model(torch.tensor([prompt]))
    for handle in handles:
        handle.remove()
    return seen


def rows_of(batch, ids, number):
    """The rows of one prompt in what vLLM computed for several."""
    start = sum(len(prompt) for prompt in ids[:number])
    return batch[start : start + len(ids[number])]


def test_outputs_do_not_depend_on_what_the_scheduler_mixes(quantized):
    ids, (model, _) = prompts(quantized), load_model(quantized, dtype=torch.float32)
    mixed = [prompt[: 5 + 3 * n] for n, prompt in enumerate(ids * 8)]
    name = "model.layers.3.mlp.gate_up_proj"
    with engine(quantized, max_num_batched_tokens=256, max_num_seqs=16, enable_chunked_prefill=True) as llm:
        calls = record(llm, ("gate_up_proj",))
        generate(llm, mixed, 8)
    sizes = {x.shape[0] for x, _ in calls[name]}
    assert len(sizes) > 3 and max(sizes) > 200
    for x, y in calls[name]:
        alone = torch.cat([layer_output(model, name, row) for row in x.split(1)])
        assert torch.equal(y, alone)


def test_compiled(quantized):
    ids, (model, _) = prompts(quantized), load_model(quantized, dtype=torch.float32)
    with engine(quantized, enforce_eager=False) as llm:
        check_agreement(llm, model, ids)


def test_experts(mixtral, folders, capsys):
    quantize_folder(mixtral, folders / "mixtral", dtype=torch.float32, progress=False)
    ids, (model, _) = prompts(folders / "mixtral"), load_model(folders / "mixtral", dtype=torch.float32)
    with engine(folders / "mixtral") as llm:
        tokens = generate(llm, ids)
        agreement = check_agreement(llm, model, ids)
        check_layers(llm, model, ids, linears=2 * 4)
    equal = equal_tokens(tokens, reference(model, ids))
    report(capsys, "mixtral, folder of ours", equal, agreement)
    assert max(equal) == 128  # rounding between our layers decides: 3 of 4 prompts with AVX-512, 2 without
    with engine(mixtral, quantization="intscale") as llm:
        assert generate(llm, ids, 32) == [row[:32] for row in tokens]


# --- formats -----------------------------------------------------------------------------------------------------------


def test_every_format(llama, folders, capsys):
    every_format(llama, folders / "formats")
    ids, (model, _) = prompts(folders / "formats"), load_model(folders / "formats", dtype=torch.float32)
    with engine(folders / "formats") as llm:
        tokens = generate(llm, ids)
        agreement = check_agreement(llm, model, ids)
        check_layers(llm, model, ids)
    report(capsys, "llama, every format", equal_tokens(tokens, reference(model, ids)), agreement)
    with engine(folders / "formats", enforce_eager=False) as llm:
        check_agreement(llm, model, ids)


# --- plain checkpoints -------------------------------------------------------------------------------------------------


def test_a_plain_checkpoint_is_quantized_as_it_is_loaded(llama, quantized):
    ids = prompts(llama)
    with engine(quantized) as llm:
        wanted = generate(llm, ids, 64)
    with engine(llama, quantization="intscale") as llm:
        assert generate(llm, ids, 64) == wanted


def test_how_a_plain_checkpoint_is_quantized_can_be_said(llama):
    ids, (model, _) = prompts(llama), load_model(llama, dtype=torch.float32)
    said = {"group_size": 64, "ignore": ["down_proj", "layers.2"]}
    for name, module in model.named_modules():
        if name.endswith("_proj") and "down_proj" not in name and ".2." not in name:
            weight = IntScaleTensor.from_hp(module.weight.detach(), IntScaleConfig(64))
            module.weight = torch.nn.Parameter(weight, requires_grad=False)
    with engine(
        llama, quantization="intscale", hf_overrides={"quantization_config_dict_json": json.dumps(said)}
    ) as llm:
        check_layers(llm, model, ids)


# --- checkpoints of other tools ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gptq", "gptq with activation order", "awq", "compressed-tensors"])
def test_checkpoints_of_other_tools_keep_their_codes(kind, llama, folders, capsys):
    folder = folders / kind.replace(" ", "-")
    imported(llama, folder, kind)
    ids, (model, _) = prompts(folder), load_model(folder, dtype=torch.float32)
    with engine(folder, quantization="intscale") as llm:
        tokens = generate(llm, ids)
        agreement = check_agreement(llm, model, ids)
        check_layers(llm, model, ids)
    report(capsys, kind, equal_tokens(tokens, reference(model, ids)), agreement)


# --- adapters ----------------------------------------------------------------------------------------------------------


def write_adapter(model, folder):
    """An adapter of rank 8 for every projection, written as peft does; the model computes with it from now on."""
    folder.mkdir()
    tensors, names = {}, set()
    for name, module in model.named_modules():
        if name.endswith("_proj"):
            n, k = module.weight.shape
            a, b = torch.randn(8, k) / k**0.5, 0.02 * torch.randn(n, 8)
            parts = {"lora_A.weight": a, "lora_B.weight": b}
            tensors |= {f"base_model.model.{name}.{part}": tensor for part, tensor in parts.items()}
            names.add(name.rpartition(".")[2])
            module.register_forward_hook(lambda m, x, y, a=a, b=b: y + 2 * (x[0] @ a.t() @ b.t()))
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": sorted(names), "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def test_an_adapter_on_quantized_layers(quantized, folders):
    """One request: vLLM's CPU build fails for several of them, with plain layers too."""
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    torch.manual_seed(0)
    (ids,), (model, _) = prompts(quantized, 1), load_model(quantized, dtype=torch.float32)
    (without,) = reference(model, [ids], 8)
    write_adapter(model, folders / "adapter")
    (wanted,) = reference(model, [ids], 8)
    assert wanted != without
    with engine(quantized, enable_lora=True, max_lora_rank=8) as llm:
        sampling = SamplingParams(temperature=0, max_tokens=8, min_tokens=8)
        adapter = LoRARequest("adapter", 1, str(folders / "adapter"))
        found = llm.generate([{"prompt_token_ids": ids}], sampling, use_tqdm=False, lora_request=adapter)
    assert list(found[0].outputs[0].token_ids) == wanted


# --- refusals ----------------------------------------------------------------------------------------------------------


def refused(folder, said, **changes):
    with pytest.raises(Exception, match=said) as caught, engine(folder, **changes):
        pass
    return str(caught.value)


def test_what_cannot_be_served_is_refused_with_the_mend(quantized, folders):
    broken = folders / "broken"
    shutil.copytree(quantized, broken)
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "fbgemm_fp8"}}))
    refused(broken, "cannot take over a checkpoint with quant_method='fbgemm_fp8'", quantization="intscale")
    (broken / "config.json").write_text(json.dumps(config | {"intermediate_size": 512}))
    refused(broken, "mlp.down_proj: .*another model's")
    (broken / "config.json").write_text(json.dumps(config))
    path = broken / "model.safetensors"
    metadata = _metadata(path)
    tensors = load_file(path)
    del tensors["model.layers.1.self_attn.k_proj._weight_scale"]
    save_file(tensors, path, metadata=metadata)
    refused(broken, "model.layers.1.self_attn.k_proj.weight: ")
    for part in ("qdata", "per_tensor_scale"):
        del tensors[f"model.layers.1.self_attn.k_proj._weight_{part}"]
    save_file(tensors, path, metadata=metadata)
    refused(broken, r"self_attn.qkv_proj: 640 output rows are needed, loaded were .*\(512, 640\)")
    refused(quantized, "--load-format", load_format="dummy")


@pytest.mark.parametrize(
    "fields, said",
    [
        ('{"group_sise": 64}', "unexpected keyword argument 'group_sise'"),
        ("none", "Expecting value"),
        ("[1]", "it is a JSON object of fields of IntScaleConfig"),
        ('{"ignore": "down_proj"}', '"ignore", a list of names'),
        ('{"output_embedding": "w8a8"}', "output embeddings stay plain"),
        ('{"group_size": 48}', "group_size=48 is not supported"),
    ],
)
def test_fields_that_are_wrong_are_refused(fields, said):
    from intscale_compile.integrations.vllm.config import IntScaleVllmConfig

    with pytest.raises(ConfigError, match=said):
        IntScaleVllmConfig.from_config_dict_json(fields)


def test_fields_that_would_change_nothing_are_refused(llama, quantized):
    def given(**fields):
        return {"hf_overrides": {"quantization_config_dict_json": json.dumps(fields)}}

    refused(quantized, "is quantized already, so quantization_config_dict_json", **given(group_size=64))
    # vLLM has one layer for q, k and v.
    refused(
        llama, "LlamaForCausalLM of vLLM has no layer 'q_proj'", quantization="intscale", **given(ignore=["q_proj"])
    )


def test_compiled_models_are_kept_apart_where_only_the_weights_differ(llama, folders):
    from vllm.engine.arg_utils import EngineArgs

    def kept_under(folder, **changes):
        return EngineArgs(model=str(folder), dtype="float32", **changes).create_engine_config().compute_hash()

    folder = folders / "again"
    quantize_folder(llama, folder, dtype=torch.float32, progress=False)
    config, before = (folder / "config.json").read_text(), kept_under(folder)
    assert kept_under(folder) == before
    shutil.rmtree(folder)
    every_format(llama, folder)
    assert (folder / "config.json").read_text() == config and kept_under(folder) != before
    plain = [
        kept_under(llama, quantization="intscale", hf_overrides={"quantization_config_dict_json": fields})
        for fields in ('{"group_size": 128}', '{"group_size": 64}')
    ]
    assert plain[0] != plain[1]


def _metadata(path):
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return file.metadata()
