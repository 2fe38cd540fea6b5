"""The int8 cache with static scales: its codes, what generate makes of them, and what is refused."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo.testing
from torchao.quantization import quantize_

from intscale_compile import IntScaleConfig, kv_cache, prepare_for_generation, save_pretrained
from intscale_compile.errors import CalibrationError, ConfigError, InputError

transformers = pytest.importorskip("transformers")
from transformers.cache_utils import DynamicCache  # noqa: E402

IDS = torch.arange(1, 33).mul(37).remainder(64).view(2, 16)
SIZES = {
    "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": 64,
}  # fmt: skip


def llama(**changes):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**{**SIZES, "pad_token_id": 0, "eos_token_id": None, **changes})
    return transformers.LlamaForCausalLM(config).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def model():
    """A quantized model and the floats of its cache on ``IDS``: for each layer keys and values ``[2, 2, 16, 16]``."""
    model = llama()
    quantize_(model, IntScaleConfig(group_size=32))
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(IDS, past_key_values=cache)
    return model, [(layer.keys, layer.values) for layer in cache.layers]


def test_scales_are_the_largest_magnitudes_of_each_head(model):
    model, floats = model
    scales = kv_cache.measure_cache(model, IDS)
    for layer, kept in enumerate(floats):
        for found, part in zip((scales.keys[layer], scales.values[layer]), kept):
            assert list(found) == (part.abs().amax((0, 2, 3)) / 127).tolist()
    half = kv_cache.measure_cache(model, [IDS[:1], IDS[1:]])  # batch by batch
    assert torch.allclose(torch.tensor(half.keys), torch.tensor(scales.keys), rtol=1e-5)
    assert kv_cache.int8_cache(model).layers[1].scales[0].flatten().tolist() == list(half.keys[1])


def test_padding_does_not_count(model):
    model, _ = model
    wanted = kv_cache.measure_cache(model, IDS[:, :8])
    padded = torch.cat([IDS[:, :8], torch.full((2, 8), 63)], 1)
    mask = (torch.arange(16) < 8).long().expand(2, -1)
    found = kv_cache.measure_cache(model, [{"input_ids": padded, "attention_mask": mask}])
    for name in ("keys", "values"):
        torch.testing.assert_close(torch.tensor(getattr(found, name)), torch.tensor(getattr(wanted, name)))


def test_codes_and_values_of_a_prompt_and_a_step(model):
    model, floats = model
    kv_cache.measure_cache(model, IDS)
    for length in (None, 20):
        cache = kv_cache.int8_cache(model, length)
        layer = cache.layers[0]
        keys, values = floats[0]
        got = [layer.update(keys[:, :, part], values[:, :, part])[1] for part in (slice(0, 15), slice(15, 16))][-1]
        scale = layer.scales[1]
        wanted = (values / scale).round()
        assert layer.values.dtype == torch.int8 and int(layer.get_seq_length()) == 16
        assert torch.equal(layer.values[:, :, :16].float(), wanted) and int(wanted.abs().max()) == 127
        assert torch.equal(got[:, :, :16], wanted * scale)
        assert layer.keys.shape[2] == (16 if length is None else 20)


def test_generate_with_the_cache(model):
    model, _ = model
    kv_cache.measure_cache(model, IDS)
    options = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    plain = model.generate(IDS, attention_mask=torch.ones_like(IDS), **options)
    for cache in (kv_cache.int8_cache(model), kv_cache.int8_cache(model, 24)):
        coded = model.generate(
            IDS, attention_mask=torch.ones_like(IDS), past_key_values=cache, disable_compile=True, **options
        )
        change = (coded.logits[0] - plain.logits[0]).norm() / plain.logits[0].norm()
        assert 1e-4 < float(change) < 0.03  # the cache is rounded, and used
    beams = kv_cache.int8_cache(model)
    model.generate(IDS, num_beams=2, do_sample=False, max_new_tokens=3, past_key_values=beams)
    assert beams.layers[0].keys.dtype == torch.int8 and beams.layers[0].keys.shape[:2] == (4, 2)


def test_generate_of_a_prepared_model_takes_the_cache():
    """It was refused, as every cache of the user's own: the model's static one was asked for as well."""
    model = llama()
    kv_cache.measure_cache(model, IDS)
    options = {"attention_mask": torch.ones_like(IDS), "max_new_tokens": 4, "do_sample": False, "disable_compile": True}
    wanted = model.generate(IDS, past_key_values=kv_cache.int8_cache(model), **options)
    prepare_for_generation(model)
    for cache in (kv_cache.int8_cache(model), kv_cache.int8_cache(model, 24)):
        assert torch.equal(model.generate(IDS, past_key_values=cache, **options), wanted)
        assert cache.layers[0].keys.dtype == torch.int8 and int(cache.get_seq_length()) == 19
    assert model.generation_config.cache_implementation == "static"  # for the next call


def test_saturates_beyond_what_was_measured(model):
    model, floats = model
    kv_cache.measure_cache(model, IDS)
    layer = kv_cache.int8_cache(model).layers[0]
    keys, _ = layer.update(3 * floats[0][0], floats[0][1])
    assert int(layer.keys.abs().max()) == 127
    torch.testing.assert_close(keys.abs().amax((0, 2, 3)), 127 * layer.scales[0].flatten())


def test_scales_are_saved_with_the_model(model, tmp_path):
    model, _ = model
    scales = kv_cache.measure_cache(model, IDS)
    save_pretrained(model, tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    for layer, keys in zip(kv_cache.int8_cache(loaded).layers, scales.keys):
        assert torch.equal(layer.scales[0].flatten(), torch.tensor(keys))


def test_what_is_refused():
    model = llama()
    with pytest.raises(ConfigError, match="LlamaForCausalLM has no scales for its cache: call kv_cache.measure_cache"):
        kv_cache.int8_cache(model)
    with pytest.raises(CalibrationError, match="Linear has no cache to measure"):
        kv_cache.measure_cache(torch.nn.Linear(4, 4), IDS)
    with pytest.raises(CalibrationError, match="no calibration data"):
        kv_cache.measure_cache(model, [])
    windows = transformers.MistralForCausalLM(transformers.MistralConfig(**SIZES, sliding_window=4)).eval()
    with pytest.raises(CalibrationError, match="layer 0 keeps something else than the keys and values of all tokens"):
        kv_cache.measure_cache(windows, IDS)
    kv_cache.measure_cache(model, IDS)
    cache = kv_cache.int8_cache(model)
    with pytest.raises(InputError, match="a cache with scales of 2 heads got keys of 4"):
        cache.update(torch.zeros(1, 4, 1, 16), torch.zeros(1, 4, 1, 16), 0)
    model.model.layers[0].self_attn.v_proj.weight[0, 0] = float("nan")
    with pytest.raises(CalibrationError, match="keys or values of layer 0 are not finite"):
        kv_cache.measure_cache(model, IDS)
    assert model.config.intscale_cache_scales  # as they were


@pytest.mark.slow
def test_compiled_steps_over_a_static_cache(model):
    """A prompt eagerly, then steps compiled once: the logits of eager steps, and codes written in place."""
    model, _ = model
    kv_cache.measure_cache(model, IDS)
    caches = [kv_cache.int8_cache(model, 24) for _ in range(2)]
    counter = torch._dynamo.testing.CompileCounterWithBackend("intscale")
    compiled = torch.compile(model, backend=counter, dynamic=False)
    with torch.no_grad():
        for cache in caches:
            model(IDS, past_key_values=cache)
        memory = caches[1].layers[0].keys.data_ptr()
        for step in range(4):
            token = IDS[:, step : step + 1]
            wanted, found = (f(token, past_key_values=c).logits for f, c in zip((model, compiled), caches))
            assert (found - wanted).norm() < 0.02 * wanted.norm()
    assert counter.frame_count == 1 and caches[1].layers[0].keys.data_ptr() == memory
    assert int(caches[1].layers[1].get_seq_length()) == 20
    different = (caches[0].layers[0].values.int() - caches[1].layers[0].values.int()).abs()
    assert int(different.max()) <= 1 and float((different > 0).double().mean()) < 0.05
