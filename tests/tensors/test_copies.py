"""Comparison of quantized weights, pinned memory, construction from another, and what is refused by name."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torchao.quantization import FqnToConfig, quantize_

import intscale_compile
from intscale_compile import IntScaleConfig, IntScaleTensor
from intscale_compile.errors import UnsupportedOpError
from tests.support.tensors import PACKINGS, make


@pytest.mark.parametrize("packing", PACKINGS)
def test_equal(packing):
    weight = make(128, 256, packing=packing)
    assert torch.equal(weight, weight.clone()) and torch.equal(weight, weight.to_packing("plain"))
    other = weight.clone()
    other.qdata[3, 5] ^= 1
    assert not torch.equal(weight, other)
    assert not torch.equal(weight, weight.dequantize()) and not torch.equal(weight.dequantize(), weight)
    assert not torch.equal(weight, weight.t()) and not torch.equal(weight, weight[:64])
    assert not torch.equal(weight, weight.to(torch.bfloat16))
    assert not torch.equal(weight, weight.with_activation_scale(0.5))
    assert not torch.equal(weight.with_activation_scale(0.25), weight.with_activation_scale(0.5))


def test_pinned_memory(monkeypatch):
    """The parts are asked and copied, each; a machine without an accelerator pins nothing."""
    weight = make(64, 256)
    assert weight.is_pinned() is False
    asked = []
    pin = lambda part: (asked.append(part), part.clone())[1]  # noqa: E731
    monkeypatch.setattr(IntScaleTensor, "_ATEN_OP_TABLE", IntScaleTensor._ATEN_OP_TABLE)
    handler = IntScaleTensor._ATEN_OP_TABLE[IntScaleTensor][torch.ops.aten._pin_memory.default]
    pinned = handler(pin, None, (weight,), {})
    assert torch.equal(pinned, weight) and [part is getattr(weight, n) for part, n in zip(asked, weight.data_names)]
    assert len(asked) == len(weight.data_names)


@pytest.mark.parametrize("requires_grad", [False, True])
def test_made_of_another(requires_grad):
    """As ``type(parameter)(value, requires_grad=...)``, which accelerate writes."""
    weight = make(64, 256).with_activation_scale(0.5)
    made = IntScaleTensor(weight, requires_grad=requires_grad)
    assert type(made) is IntScaleTensor and made.requires_grad is requires_grad
    assert torch.equal(made, weight) and made.qdata is weight.qdata


def test_what_repeats_or_loses_data_is_refused():
    weight = make(64, 256)
    assert torch.equal(weight.expand(-1, 256), weight) and torch.equal(weight.expand_as(weight), weight)
    with pytest.raises(
        UnsupportedOpError, match=r"expand of \(64, 256\) to \(3, 64, 256\), which repeats packed data; use"
    ):
        weight.expand(3, 64, 256)
    with pytest.raises(UnsupportedOpError, match="cat along input features: every part has row scales of its own"):
        torch.cat([weight, weight], 1)
    with pytest.raises(UnsupportedOpError, match="no NumPy array, so accelerate's disk_offload cannot store it"):
        weight.cpu().numpy()


def test_assignment_to_data():
    """PyTorch carried it out on the empty wrapper: the weight stayed as it was, and nothing was said."""
    layer, x = nn.Linear(64, 32).requires_grad_(False), torch.randn(3, 64)
    quantize_(layer, IntScaleConfig(group_size=32))
    other = IntScaleTensor.from_hp(torch.randn(32, 64), IntScaleConfig(group_size=64))
    weight, before = layer.weight, layer(x)
    plain = {"plain tensor as .data": lambda: setattr(weight, "data", torch.randn(32, 64))}
    plain["as .data of"] = lambda: nn.utils.vector_to_parameters(torch.randn(32 * 65), [weight])
    plain["of shape"] = lambda: setattr(weight, "data", other[:16])
    plain["of dtype"] = lambda: setattr(weight, "data", other.half())
    for message, write in plain.items():
        with pytest.raises(UnsupportedOpError, match=f"{message}.*give the module a new parameter"):
            write()
        assert torch.equal(layer(x), before)
    weight.data = other
    assert layer.weight is weight and torch.equal(layer(x), nn.functional.linear(x, other, layer.bias))


def test_an_empty_model_on_another_device():
    model = nn.Sequential(nn.Linear(64, 32)).requires_grad_(False)
    quantize_(model, IntScaleConfig(group_size=32))
    state, x = copy.deepcopy(model.state_dict()), torch.randn(3, 64)
    wanted = model(x)
    again = model.to("meta").to_empty(device="cpu")
    again.load_state_dict(state)
    assert torch.equal(again(x), wanted)


def test_accelerate_offloads_to_the_cpu():
    accelerate = pytest.importorskip("accelerate")
    model = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64)).eval().requires_grad_(False)
    quantize_(model, IntScaleConfig(group_size=32))
    x = torch.randn(4, 64)
    expected = model(x)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    for _ in range(2):
        assert model[0].weight.device.type == "meta" and type(model[0].weight) is IntScaleTensor
        with torch.no_grad():
            assert torch.equal(model(x), expected)


class TwoTies(nn.Module):
    """Two weights that two layers each share, and one by itself."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(64, 64, bias=False) for _ in range(5)])
        self.layers[1].weight, self.layers[3].weight = self.layers[0].weight, self.layers[2].weight
        self.requires_grad_(False)

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


def test_dispatched_ties_are_told_apart():
    """accelerate knows weights by data_ptr(), 0 for every wrapper: all layers computed with the weight of one, silently."""
    accelerate = pytest.importorskip("accelerate")
    model, x = TwoTies(), torch.randn(3, 64)
    quantize_(model, IntScaleConfig(group_size=32, scale_search="absmax"))
    assert model.layers[0].weight is model.layers[1].weight
    expected = model(x)
    accelerate.dispatch_model(model, {f"layers.{i}": "cpu" for i in range(5)}, main_device="cpu", force_hooks=True)
    assert torch.equal(model(x), expected) and torch.equal(model(x), expected)


def test_data_ptr_tells_weights_apart_and_is_no_address():
    weight, other = make(64, 128).detach(), make(64, 128).detach()
    address = weight.data_ptr()
    assert address == weight.t().data_ptr() != other.data_ptr()
    assert address - weight.qdata.data_ptr() == 2**62 and weight.to("meta").data_ptr() == 0
    with pytest.raises(RuntimeError, match="invalid python storage"):  # torch's own
        weight.untyped_storage().data_ptr()
    assert not hasattr(weight, "__cuda_array_interface__")


def test_new_tensors_are_plain():
    """Code asks a weight for a tensor of its dtype and on its device."""
    weight = make(64, 128).detach().to(torch.bfloat16)
    plain = weight.new_zeros(64, 128)
    assert type(plain) is torch.Tensor and torch.equal(plain, torch.zeros(64, 128, dtype=torch.bfloat16))
    assert weight.new_ones((2, 3), dtype=torch.float32).sum().item() == 6
    assert weight.new_empty(3).shape == (3,) and weight.new_full((2,), 7).tolist() == [7, 7]


def test_quantized_head_of_a_tied_model_is_saved_and_loaded(tmp_path):
    """By the mend that docs/reasons.md gives for an output embedding."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2, vocab_size=96,
        num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval().requires_grad_(False)
    quantize_(model, FqnToConfig({"lm_head": IntScaleConfig(weight_bits=8)}), filter_fn=None)
    assert isinstance(model.lm_head.weight, IntScaleTensor)
    assert not isinstance(model.model.embed_tokens.weight, IntScaleTensor)
    ids = torch.randint(0, 96, (2, 8))
    expected = model(ids).logits
    intscale_compile.save_pretrained(model, tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert isinstance(loaded.lm_head.weight, IntScaleTensor)
    assert torch.equal(loaded(ids).logits, expected)


@pytest.mark.parametrize(
    "read",
    [
        lambda w: w.apply_(abs),
        lambda w: w.map_(w, max),
        lambda w: w.__dlpack__(),
        torch.from_dlpack,
        torch.to_dlpack,
        torch.utils.dlpack.to_dlpack,
    ],
)
def test_memory_that_is_not_there_is_not_read(read):
    """apply_ ended the process."""
    with pytest.raises(UnsupportedOpError, match="use weight.dequantize"):
        read(make(64, 128).detach())
