"""Families of models with small random configurations, and what the compiler must find in each.

Nothing is downloaded. Hidden sizes are multiples of the group size (128) except in GPT-2, Qwen2 and ViT, where the last
group of each row is padded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Optional

import torch
import transformers as hf
from torch import nn

VOCABULARY = 160
TOKENS = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
ATTENTION = {"hidden_size": 128, "num_attention_heads": 4}
TOWER = {**ATTENTION, "intermediate_size": 256}
TEXT = {**TOKENS, **TOWER, "max_position_embeddings": 64, "use_cache": False}
GROUPED = {**TEXT, "num_key_value_heads": 2}
WINDOW = {**GROUPED, "head_dim": 32, "sliding_window": 8, "query_pre_attn_scalar": 32}
IMAGE = {**TOWER, "image_size": 32, "patch_size": 8}


def token_ids(rows: int = 2, columns: int = 12) -> torch.Tensor:
    """Token ids ``[rows, columns]`` without the special ones."""
    return torch.arange(rows * columns).mul(7).remainder(VOCABULARY - 3).add(3).view(rows, columns)


def _text() -> dict[str, Any]:
    return {"input_ids": token_ids()}


def _two_texts() -> dict[str, Any]:
    return {"input_ids": token_ids(), "decoder_input_ids": token_ids(2, 5)}


def _image() -> dict[str, Any]:
    return {"pixel_values": torch.linspace(-50, 50, 2 * 3 * 32 * 32).sin().view(2, 3, 32, 32)}


def _sound() -> dict[str, Any]:
    features = torch.linspace(-50, 50, 2 * 8 * 32).sin().view(2, 8, 32)
    return {"input_features": features, "decoder_input_ids": token_ids(2, 5)}


@dataclass(frozen=True)
class Family:
    """One kind of model.

    Attributes:
        model: builds it for a number of layers.
        linears: weights that are quantized, by number of layers.
        gemms: products that they become after merging, by number of layers.
        snr: least signal-to-noise ratio (dB) of the outputs, some dB below what was measured.
        rest: name and reason of every product that is not quantized.
        inputs: what the model is called with.
        gain: factor on the random weights, so that what a layer adds is not small against its input.
        layers: how many to build; 2 where layers differ or share something.
        to_reference: least ratio (dB) to the same integers with the other operations in float64, whose rounding turns codes over.
    """

    model: Callable[[int], nn.Module]
    linears: Callable[[int], int]
    gemms: Callable[[int], int]
    snr: float
    rest: dict[str, str] = field(default_factory=dict)
    inputs: Callable[[], dict[str, Any]] = _text
    gain: float = 2.0
    layers: int = 1
    to_reference: float = 45

    def build(self, layers: Optional[int] = None) -> nn.Module:
        """The model with random weights, biases and norms, which the constructors leave at 0 and 1."""
        model = self.model(layers or self.layers).eval()
        embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(0.1 * torch.randn_like(parameter))
            for module in linear_modules(model).values():
                if id(module.weight) not in embeddings:
                    module.weight.mul_(self.gain)
        return model


def linear_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Every linear layer of a model by name, found without the compiler."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, hf.pytorch_utils.Conv1D))
    }


def _without(config: dict[str, Any], *names: str) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in names}


def _gpt2(layers: int) -> nn.Module:
    config = hf.GPT2Config(n_layer=layers, n_embd=96, n_head=4, n_positions=64, use_cache=False, **TOKENS)
    return hf.GPT2LMHeadModel(config)


def _distilbert(layers: int) -> nn.Module:
    return hf.DistilBertForMaskedLM(hf.DistilBertConfig(n_layers=layers, dim=128, hidden_dim=256, n_heads=4, **TOKENS))


def _qwen2(layers: int) -> nn.Module:
    config = {**GROUPED, "hidden_size": 192, "intermediate_size": 320}
    return hf.Qwen2ForCausalLM(hf.Qwen2Config(num_hidden_layers=layers, **config))


def _qwen3(layers: int) -> nn.Module:
    config = hf.Qwen3Config(num_hidden_layers=layers, head_dim=32, tie_word_embeddings=True, **GROUPED)
    return hf.Qwen3ForCausalLM(config)


def _opt(layers: int) -> nn.Module:
    config = _without(TEXT, "intermediate_size")
    return hf.OPTForCausalLM(hf.OPTConfig(num_hidden_layers=layers, ffn_dim=256, word_embed_proj_dim=64, **config))


def _vit(layers: int) -> nn.Module:
    config = {**IMAGE, "hidden_size": 80, "intermediate_size": 160}
    return hf.ViTForImageClassification(hf.ViTConfig(num_hidden_layers=layers, num_labels=20, **config))


def _t5(layers: int) -> nn.Module:
    sizes = {"d_model": 128, "d_kv": 32, "d_ff": 256, "num_heads": 4, "vocab_size": VOCABULARY}
    stacks = {"num_layers": 1, "num_decoder_layers": layers}
    config = hf.T5Config(**stacks, decoder_start_token_id=0, use_cache=False, feed_forward_proj="gated-gelu", **sizes)
    return hf.T5ForConditionalGeneration(config)


def _whisper(layers: int) -> nn.Module:
    sides = {}
    for side in ("encoder", "decoder"):
        sides |= {f"{side}_layers": layers, f"{side}_attention_heads": 4, f"{side}_ffn_dim": 256}
    lengths = {"num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 32}
    return hf.WhisperForConditionalGeneration(
        hf.WhisperConfig(d_model=128, use_cache=False, decoder_start_token_id=1, **sides, **lengths, **TOKENS)
    )


def _simple(name: str, head: str, config: dict[str, Any], config_name: str = "", **more: Any):
    """Builder of transformers' ``<name><head>`` from ``<name>Config``."""

    def build(layers: int) -> nn.Module:
        made = getattr(hf, f"{config_name or name}Config")(num_hidden_layers=layers, **config, **more)
        return getattr(hf, name + head)(made)

    return build


TIED, OUTPUT, CONVOLUTION = "TIED_EMBEDDING", "OUTPUT_EMBEDDING", "CONVOLUTION"
UNTIED_HEAD = {"lm_head.weight": OUTPUT}
TIED_HEAD = {"model.embed_tokens.weight": TIED}
CAUSAL = "ForCausalLM"
# Attention with separate q, k and v is 2 GEMMs a layer, the gated feed-forward 2, the plain one 2.
FAMILIES: dict[str, Family] = {
    "gpt2": Family(_gpt2, lambda n: 4 * n, lambda n: 4 * n, 16, {"transformer.wte.weight": TIED}),
    "bert": Family(
        _simple("Bert", "ForSequenceClassification", TEXT, num_labels=3),
        lambda n: 6 * n + 1,  # and the pooler
        lambda n: 4 * n + 1,
        19,
        {"classifier.weight": "TOO_SMALL"},
    ),
    "roberta": Family(
        _simple("Roberta", "ForMaskedLM", TEXT),
        lambda n: 6 * n + 1,  # and the dense layer of the head
        lambda n: 4 * n + 1,
        17,
        {"roberta.embeddings.word_embeddings.weight": TIED},
    ),
    "distilbert": Family(
        _distilbert,
        lambda n: 6 * n + 1,
        lambda n: 4 * n + 1,
        17,
        {"distilbert.embeddings.word_embeddings.weight": TIED},
    ),
    "llama": Family(_simple("Llama", CAUSAL, GROUPED), lambda n: 7 * n, lambda n: 4 * n, 11, UNTIED_HEAD),
    "mistral": Family(
        _simple("Mistral", CAUSAL, GROUPED, sliding_window=8), lambda n: 7 * n, lambda n: 4 * n, 11, UNTIED_HEAD
    ),
    "qwen2": Family(_qwen2, lambda n: 7 * n, lambda n: 4 * n, 11, UNTIED_HEAD),
    "qwen3": Family(_qwen3, lambda n: 7 * n, lambda n: 4 * n, 10, TIED_HEAD),
    "gemma2": Family(_simple("Gemma2", CAUSAL, WINDOW), lambda n: 7 * n, lambda n: 4 * n, 10, TIED_HEAD, layers=2),
    "gemma3": Family(
        _simple("Gemma3", CAUSAL, WINDOW, config_name="Gemma3Text"),
        lambda n: 7 * n,
        lambda n: 4 * n,
        8,
        TIED_HEAD,
        layers=2,
    ),
    "opt": Family(
        _opt,
        lambda n: 6 * n + 2,  # and the projections between the embedding's width and the model's
        lambda n: 4 * n + 2,
        11,
        {"model.decoder.embed_tokens.weight": TIED},
    ),
    # The feed-forward reads what attention reads: q, k, v and fc1 are one GEMM.
    "phi": Family(_simple("Phi", CAUSAL, TEXT), lambda n: 6 * n, lambda n: 3 * n, 16, UNTIED_HEAD),
    "phi3": Family(_simple("Phi3", CAUSAL, GROUPED), lambda n: 4 * n, lambda n: 4 * n, 12, UNTIED_HEAD),
    "gpt_neox": Family(_simple("GPTNeoX", CAUSAL, TEXT), lambda n: 4 * n, lambda n: 4 * n, 15, UNTIED_HEAD),
    "falcon": Family(
        _simple("Falcon", CAUSAL, _without(TEXT, "intermediate_size")),
        lambda n: 4 * n,
        lambda n: 3 * n,  # query_key_value and dense_h_to_4h are one
        13,
        {"transformer.word_embeddings.weight": TIED},
    ),
    "vit": Family(
        _vit,
        lambda n: 6 * n + 1,  # and the classifier
        lambda n: 4 * n + 1,
        16,
        {"vit.embeddings.patch_embeddings.projection.weight": CONVOLUTION},
        _image,
    ),
    "clip_vision": Family(
        _simple("CLIPVisionModel", "WithProjection", IMAGE, config_name="CLIPVision", projection_dim=64),
        lambda n: 6 * n + 1,
        lambda n: 4 * n + 1,
        14,
        {"vision_model.embeddings.patch_embedding.weight": CONVOLUTION},
        _image,
        1.0,
    ),
    "siglip_vision": Family(
        _simple("SiglipVision", "Model", IMAGE),
        lambda n: 6 * n + 2,  # and the feed-forward of the pooling head
        lambda n: 4 * n + 2,
        15,
        {
            "embeddings.patch_embedding.weight": CONVOLUTION,
            "head.probe": "ONE_OPERATOR",
            "head.attention.in_proj_weight": "ONE_OPERATOR",
            "head.attention.out_proj.weight": "ONE_OPERATOR",
        },
        _image,
        1.0,
    ),
    # Keys and values of all cross attentions read one activation, the encoder's output: one GEMM for all layers.
    "t5": Family(
        _t5,
        lambda n: 7 + 11 * n,  # one layer of the encoder
        lambda n: 4 + 6 * n + 1,
        11,
        {"encoder.embed_tokens.weight": TIED},
        _two_texts,
        1.0,
        layers=2,
    ),
    "whisper": Family(
        _whisper,
        lambda n: 6 * n + 10 * n,
        lambda n: 4 * n + 6 * n + 1,
        13,
        {
            "model.decoder.embed_tokens.weight": TIED,
            "model.encoder.conv1.weight": CONVOLUTION,
            "model.encoder.conv2.weight": CONVOLUTION,
        },
        _sound,
        layers=2,
        to_reference=40,  # 44.2 dB on a processor without AVX-512
    ),
}
