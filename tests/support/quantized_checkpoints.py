"""Checkpoints in other tools' formats: GPTQ and AWQ packed here word by word from their published layout,
compressed-tensors by the library itself.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass
class Original:
    """What a layer of a checkpoint holds: ``W = scale * (codes - zero)``, groups along the input, codes 0 to 15."""

    codes: Tensor  # int64 [N, K]
    scale: Tensor  # fp16 or bf16 [N, G]
    zero: Tensor  # int64 [N, G]
    group_size: int
    group: Tensor | None = None  # int64 [K], of every feature, where groups are scattered

    @property
    def weight(self) -> Tensor:
        """The dequantized weight in fp64."""
        k = self.codes.shape[1]
        size = k if self.group_size == -1 else self.group_size
        group = torch.arange(k) // size if self.group is None else self.group
        return self.scale.double()[:, group] * (self.codes - self.zero[:, group])


def quantize_groups(
    weight: Tensor, group_size: int, symmetric: bool, dtype=torch.float16, order: Tensor | None = None
) -> Original:
    """Round to nearest in groups, as the simplest quantizer of any of these tools does.

    ``order``: the features in the order in which GPTQ visited them (``desc_act``); each group is made of consecutive ones.
    """
    if order is not None:
        visited = quantize_groups(weight[:, order], group_size, symmetric, dtype)
        back = order.argsort()
        return Original(visited.codes[:, back], visited.scale, visited.zero, group_size, back // group_size)
    n, k = weight.shape
    size = k if group_size == -1 else group_size
    groups = -(-k // size)
    padded = torch.nn.functional.pad(weight.float(), (0, groups * size - k)).view(n, groups, size)
    if symmetric:
        scale = (padded.abs().amax(-1) / 7.5).clamp(min=1e-8).to(dtype)
        zero = torch.full((n, groups), 8)
    else:
        low, high = padded.amin(-1).clamp(max=0), padded.amax(-1).clamp(min=0)
        scale = ((high - low) / 15).clamp(min=1e-8).to(dtype)
        zero = (-low / scale.float()).round().clamp(0, 15).long()
    codes = (padded / scale.float()[..., None]).round().long() + zero[..., None]
    return Original(codes.clamp(0, 15).view(n, -1)[:, :k], scale, zero, group_size)


def pack_words(fields: Tensor, dim: int, order=range(8)) -> Tensor:
    """int32 words of 4-bit fields along ``dim``: bits ``4 i`` hold field ``order[i]`` of the eight."""
    rows = fields.movedim(dim, -1)
    rows = torch.nn.functional.pad(rows, (0, -rows.shape[-1] % 8)).unflatten(-1, (-1, 8))
    word = torch.zeros(rows.shape[:-1], dtype=torch.int64)
    for i, place in enumerate(order):
        word += (rows[..., place] & 15) << (4 * i)
    word = torch.where(word >= 2**31, word - 2**32, word)
    return word.to(torch.int32).movedim(-1, dim).contiguous()


def gptq_parts(layer: Original, version: str = "gptq") -> dict[str, Tensor]:
    k = layer.codes.shape[1]
    stored_zero = layer.zero - (1 if version == "gptq" else 0)  # 0 wraps to 15
    size = k if layer.group_size == -1 else layer.group_size
    return {
        "qweight": pack_words(layer.codes.t(), 0),
        "qzeros": pack_words(stored_zero.t(), 1),
        "scales": layer.scale.t().contiguous(),
        "g_idx": (torch.arange(k) // size if layer.group is None else layer.group).to(torch.int32),
    }


def awq_parts(layer: Original) -> dict[str, Tensor]:
    return {
        "qweight": pack_words(layer.codes.t(), 1, AWQ_ORDER),
        "qzeros": pack_words(layer.zero.t(), 1, AWQ_ORDER),
        "scales": layer.scale.t().contiguous(),
    }


def compressed_scheme(bits=4, group_size=128, symmetric=True, activations=True, storage="pack-quantized") -> dict:
    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, "dynamic": False}
    weights |= {"strategy": "channel"} if group_size == -1 else {"strategy": "group", "group_size": group_size}
    scheme = {"targets": ["Linear"], "weights": weights, "format": storage}
    if activations:
        inputs = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": True, "strategy": "token"}
        scheme["input_activations"] = inputs
    return scheme


def compressed_parts(layer: Original, weight: Tensor, scheme: dict) -> dict[str, Tensor]:
    """Compressed by the library itself from the original weight and the scales and zero points of ``layer``."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    compressor = BaseCompressor.get_value_from_registry(scheme["format"])
    state = {"weight": weight, "weight_scale": layer.scale, "weight_zero_point": (layer.zero - 8).to(torch.int8)}
    return dict(compressor.compress(state, QuantizationScheme(**scheme)))


@dataclass
class Checkpoint:
    """A written checkpoint, and the layers that it was made of."""

    folder: Path
    originals: dict[str, Original] = field(default_factory=dict)


def write_checkpoint(
    model: nn.Module, folder: Path, method: str, parts_of, config: dict, shards: int = 1
) -> Checkpoint:
    """Store a transformers model, its linear layers but ``lm_head`` as ``parts_of(name, weight)`` makes them.

    ``parts_of`` returns the layer and its tensors, or None to leave a layer in high precision.
    """
    checkpoint = Checkpoint(folder)
    state = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear) or name == "lm_head":
            continue
        made = parts_of(name, module.weight.detach())
        if made is not None:
            checkpoint.originals[name] = made[0]
            del state[f"{name}.weight"]
            state |= {f"{name}.{part}": tensor for part, tensor in made[1].items()}
    model.config.architectures = [type(model).__name__]
    save_folder(model.config, folder, state, {"quant_method": method, **config}, shards)
    return checkpoint


def save_folder(config, folder: Path, state: dict[str, Tensor], quantization_config: dict, shards: int = 1) -> None:
    """config.json with a quantization_config, and the tensors in one or several safetensors files."""
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    stored = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(stored | {"quantization_config": quantization_config}))
    if shards == 1:
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map = {}
    for i in range(shards):  # every layer's tensors end up in different files
        name = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = {key: state[key] for key in list(state)[i::shards]}
        save_file(part, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


class FakeQuantLinear(nn.Module):
    """A linear layer with float group scales and int8 activations per token: what an import is compared with."""

    def __init__(self, weight: Tensor, bias):
        super().__init__()
        self.weight, self.bias = weight, bias

    def forward(self, x):
        wide = x.float()
        scale = wide.abs().amax(-1, keepdim=True).clamp(min=1e-12) / 127
        y = (wide / scale).round().clamp(-127, 127) @ self.weight.float().t() * scale
        return (y if self.bias is None else y + self.bias).to(x.dtype)


def with_float_scales(model: nn.Module, originals: dict[str, Original]) -> nn.Module:
    """The plain model with the checkpoint's dequantized weights under the same activation quantization; in place."""
    for name, original in originals.items():
        parent, _, leaf = name.rpartition(".")
        bias = model.get_submodule(name).bias
        setattr(model.get_submodule(parent), leaf, FakeQuantLinear(original.weight, bias))
    return model


def snr_db(reference: Tensor, other: Tensor) -> float:
    reference, other = reference.detach().double(), other.detach().double()
    return float(10 * torch.log10(reference.square().sum() / (reference - other).square().sum()))


def tiny_llama(dtype=torch.float32, **changes):
    """A random Llama with a bias on its attention projections, shapes that need no padding."""
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = {
        "hidden_size": 256,
        "intermediate_size": 384,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 96,
        "attention_bias": True,
        "dtype": dtype,
    }
    config = LlamaConfig(**{**settings, **changes})
    model = LlamaForCausalLM(config).to(dtype).eval().requires_grad_(False)
    for module in model.modules():  # transformers starts biases at 0
        if isinstance(module, nn.Linear) and module.bias is not None:
            module.bias.normal_(std=0.1)
    return model
