"""Small random models of many kinds that transformers has, built from their configurations by one rule.

Each field of a configuration that counts something is set to a small number by its name, in the configurations inside too.
What the rule does not get right for a kind is in ``CHANGES``.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
import transformers as hf
from torch import nn

VOCABULARY = 160
HIDDEN = (
    "hidden_size",
    "d_model",
    "n_embd",
    "dim",
    "embed_dim",
    "word_embed_proj_dim",
    "embedding_size",
    "emb_dim",
    "hidden_dim",
)
FEED = (
    "intermediate_size",
    "ffn_dim",
    "d_ff",
    "n_inner",
    "ffn_hidden_size",
    "encoder_ffn_dim",
    "decoder_ffn_dim",
    "inner_dim",
    "d_inner",
    "dim_ff",
    "ffn_intermediate_size",
)
HEADS = (
    "num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads", "decoder_attention_heads",
    "num_encoder_attention_heads", "num_decoder_attention_heads",
)  # fmt: skip
LAYERS = (
    "num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers", "num_decoder_layers",
    "num_encoder_layers",
)  # fmt: skip
POSITIONS = (
    "max_position_embeddings",
    "n_positions",
    "n_ctx",
    "max_seq_len",
    "context_length",
    "max_source_positions",
    "max_target_positions",
)
OTHER = {
    "vocab_size": VOCABULARY,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "use_cache": False,
    "image_size": 32,
    "patch_size": 8,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 64,
    "n_group": 1,
    "topk_group": 1,
    "sliding_window": 8,
    "q_lora_rank": 48,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 32,
    "type_vocab_size": 2,
    "num_labels": 20,
    "d_kv": 32,
    "kv_channels": 32,
    "state_size": 16,
    "dropout": 0.0,
    "first_k_dense_replace": 1,
    "num_mel_bins": 8,
    "conv_dim": (32, 32, 32),
    "conv_stride": (5, 4, 2),
    "conv_kernel": (10, 4, 2),
    "num_feat_extract_layers": 3,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "relative_attention_num_buckets": 8,
    "hidden_sizes": [32, 64],
    "depths": [1, 1],
    "query_pre_attn_scalar": 32,
    "mamba_expand": 1,
    "mamba_d_state": 16,
    "time_step_rank": 8,
    "projection_dim": 64,
}
CHANGES: dict[str, dict[str, Any]] = {  # by model_type
    "falcon_mamba": {"conv_kernel": 4},
    "mamba": {"conv_kernel": 4},
    "dots1": {"num_key_value_heads": 4},
    "deepseek_v2": {
        "num_key_value_heads": 4
    },  # as all that were published; with fewer, eager attention reads past its queries
    "deepseek_v3": {"num_key_value_heads": 4},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"hidden_size": 128, "ffn_hidden_size": 256, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "qwen2_vl": {
        "image_token_id": 159,
        "video_token_id": 158,
        "vision_start_token_id": 157,
        "vision_end_token_id": 156,
    },
    "qwen2_vl_text": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 6, 6]}},
    "qwen2_vl_vision": {"depth": 2},
    "codegen": {"rotary_dim": 16},
    "gptj": {"rotary_dim": 16},
}

ZOO: dict[str, str] = {  # name: class of transformers
    "bart": "BartForCausalLM",
    "bert": "BertLMHeadModel",
    "big_bird": "BigBirdForCausalLM",
    "bigbird_pegasus": "BigBirdPegasusForCausalLM",
    "biogpt": "BioGptForCausalLM",
    "bitnet": "BitNetForCausalLM",
    "blenderbot": "BlenderbotForCausalLM",
    "bloom": "BloomForCausalLM",
    "codegen": "CodeGenForCausalLM",
    "cohere": "CohereForCausalLM",
    "cohere2": "Cohere2ForCausalLM",
    "cpmant": "CpmAntForCausalLM",
    "ctrl": "CTRLLMHeadModel",
    "cwm": "CwmForCausalLM",
    "data2vec-text": "Data2VecTextForCausalLM",
    "deepseek_v2": "DeepseekV2ForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "diffllama": "DiffLlamaForCausalLM",
    "doge": "DogeForCausalLM",
    "electra": "ElectraForCausalLM",
    "emu3": "Emu3ForCausalLM",
    "ernie": "ErnieForCausalLM",
    "ernie4_5": "Ernie4_5ForCausalLM",
    "ernie4_5_moe": "Ernie4_5_MoeForCausalLM",
    "exaone4": "Exaone4ForCausalLM",
    "falcon": "FalconForCausalLM",
    "falcon_mamba": "FalconMambaForCausalLM",
    "flex_olmo": "FlexOlmoForCausalLM",
    "gemma": "GemmaForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "git": "GitForCausalLM",
    "glm": "GlmForCausalLM",
    "glm4": "Glm4ForCausalLM",
    "glm4_moe": "Glm4MoeForCausalLM",
    "gpt2": "GPT2LMHeadModel",
    "gpt_bigcode": "GPTBigCodeForCausalLM",
    "gpt_neox": "GPTNeoXForCausalLM",
    "gpt_neox_japanese": "GPTNeoXJapaneseForCausalLM",
    "gpt_oss": "GptOssForCausalLM",
    "gptj": "GPTJForCausalLM",
    "granite": "GraniteForCausalLM",
    "granitemoe": "GraniteMoeForCausalLM",
    "granitemoeshared": "GraniteMoeSharedForCausalLM",
    "helium": "HeliumForCausalLM",
    "hunyuan_v1_dense": "HunYuanDenseV1ForCausalLM",
    "hunyuan_v1_moe": "HunYuanMoEV1ForCausalLM",
    "jamba": "JambaForCausalLM",
    "jetmoe": "JetMoeForCausalLM",
    "lfm2": "Lfm2ForCausalLM",
    "llama": "LlamaForCausalLM",
    "llama4_text": "Llama4ForCausalLM",
    "mamba": "MambaForCausalLM",
    "mbart": "MBartForCausalLM",
    "megatron-bert": "MegatronBertForCausalLM",
    "minimax": "MiniMaxForCausalLM",
    "ministral": "MinistralForCausalLM",
    "mistral": "MistralForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "modernbert-decoder": "ModernBertDecoderForCausalLM",
    "mpt": "MptForCausalLM",
    "nemotron": "NemotronForCausalLM",
    "olmo": "OlmoForCausalLM",
    "olmo2": "Olmo2ForCausalLM",
    "olmo3": "Olmo3ForCausalLM",
    "olmoe": "OlmoeForCausalLM",
    "openai-gpt": "OpenAIGPTLMHeadModel",
    "opt": "OPTForCausalLM",
    "pegasus": "PegasusForCausalLM",
    "persimmon": "PersimmonForCausalLM",
    "phi": "PhiForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "phimoe": "PhimoeForCausalLM",
    "prophetnet": "ProphetNetForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen2_moe": "Qwen2MoeForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "qwen3_next": "Qwen3NextForCausalLM",
    "recurrent_gemma": "RecurrentGemmaForCausalLM",
    "rembert": "RemBertForCausalLM",
    "roberta": "RobertaForCausalLM",
    "roberta-prelayernorm": "RobertaPreLayerNormForCausalLM",
    "roformer": "RoFormerForCausalLM",
    "rwkv": "RwkvForCausalLM",
    "seed_oss": "SeedOssForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
    "stablelm": "StableLmForCausalLM",
    "starcoder2": "Starcoder2ForCausalLM",
    "vaultgemma": "VaultGemmaForCausalLM",
    "xglm": "XGLMForCausalLM",
    "xlm": "XLMWithLMHeadModel",
    "xlm-roberta-xl": "XLMRobertaXLForCausalLM",
    "xlnet": "XLNetLMHeadModel",
    "albert": "AlbertForMaskedLM",
    "convbert": "ConvBertForMaskedLM",
    "deberta": "DebertaForMaskedLM",
    "deberta-v2": "DebertaV2ForMaskedLM",
    "distilbert": "DistilBertForMaskedLM",
    "esm": "EsmForMaskedLM",
    "eurobert": "EuroBertForMaskedLM",
    "flaubert": "FlaubertWithLMHeadModel",
    "fnet": "FNetForMaskedLM",
    "funnel": "FunnelForMaskedLM",
    "ibert": "IBertForMaskedLM",
    "longformer": "LongformerForMaskedLM",
    "mobilebert": "MobileBertForMaskedLM",
    "modernbert": "ModernBertForMaskedLM",
    "mra": "MraForMaskedLM",
    "nystromformer": "NystromformerForMaskedLM",
    "squeezebert": "SqueezeBertForMaskedLM",
    "yoso": "YosoForMaskedLM",
    "led": "LEDForConditionalGeneration",
    "longt5": "LongT5ForConditionalGeneration",
    "m2m_100": "M2M100ForConditionalGeneration",
    "mt5": "MT5ForConditionalGeneration",
    "nllb-moe": "NllbMoeForConditionalGeneration",
    "pegasus_x": "PegasusXForConditionalGeneration",
    "switch_transformers": "SwitchTransformersForConditionalGeneration",
    "t5": "T5ForConditionalGeneration",
    "t5gemma": "T5GemmaForConditionalGeneration",
    "umt5": "UMT5ForConditionalGeneration",
    "beit": "BeitForImageClassification",
    "clip": "CLIPForImageClassification",
    "data2vec-vision": "Data2VecVisionForImageClassification",
    "deit": "DeiTForImageClassification",
    "dinov2": "Dinov2ForImageClassification",
    "focalnet": "FocalNetForImageClassification",
    "imagegpt": "ImageGPTForImageClassification",
    "siglip": "SiglipForImageClassification",
    "vit": "ViTForImageClassification",
    "hubert": "HubertForCTC",
    "sew-d": "SEWDForCTC",
    "wav2vec2": "Wav2Vec2ForCTC",
    "wav2vec2-conformer": "Wav2Vec2ConformerForCTC",
    "wavlm": "WavLMForCTC",
    "whisper": "WhisperForCausalLM",
    "splinter": "SplinterModel",
    "visual_bert": "VisualBertModel",
    "vit_mae": "ViTMAEModel",
    "pixtral": "PixtralVisionModel",
    "flava": "FlavaModel",
    "llama-odd": "LlamaForCausalLM",
    "qwen2-odd": "Qwen2ForCausalLM",
    "gpt2-odd": "GPT2LMHeadModel",
    "bert-odd": "BertLMHeadModel",
    "mixtral-odd": "MixtralForCausalLM",
    "t5-odd": "T5ForConditionalGeneration",
    "opt-odd": "OPTForCausalLM",
    "vit-odd": "ViTForImageClassification",
    "phi3-odd": "Phi3ForCausalLM",
    "gemma2-odd": "Gemma2ForCausalLM",
    "olmoe-odd": "OlmoeForCausalLM",
    "deberta-v2-odd": "DebertaV2ForMaskedLM",
    "wav2vec2-odd": "Wav2Vec2ForCTC",
    "dbrx": "DbrxForCausalLM",
    "qwen2_vl": "Qwen2VLForConditionalGeneration",
}
KNOWN: dict[str, str] = {}  # what does not hold yet, and why


def small(kind: type, odd: bool = False, **changes: Any) -> Any:
    """A configuration of a class with small numbers; ``odd`` ones are no multiples of the group size or of one another."""
    hidden, feed, heads = (120, 200, 3) if odd else (128, 256, 4)
    values = {**dict.fromkeys(HIDDEN, hidden), **dict.fromkeys(FEED, feed), **dict.fromkeys(HEADS, heads), **OTHER}
    values |= {**dict.fromkeys(LAYERS, 2), **dict.fromkeys(POSITIONS, 64), "head_dim": hidden // heads}
    values |= dict.fromkeys(("num_key_value_heads", "num_kv_heads", "multi_query_group_num"), 1 if odd else 2)
    values["layer_types"] = None
    known = set(inspect.signature(kind.__init__).parameters) | set(getattr(kind, "__annotations__", ()))
    for base in kind.__mro__[1:]:
        if base.__module__.startswith("transformers.models"):
            known |= set(inspect.signature(base.__init__).parameters) | set(getattr(base, "__annotations__", ()))
    given = {name: value for name, value in values.items() if name in known}
    for name, inner in getattr(kind, "sub_configs", {}).items():
        if isinstance(inner, type) and inner is not hf.PreTrainedConfig and "AutoConfig" not in inner.__name__:
            given[name] = small(inner, odd).to_dict()
    return kind(**{**given, **CHANGES.get(kind.model_type, {}), **changes})


def token_ids(rows: int = 2, columns: int = 12) -> torch.Tensor:
    """Token ids ``[rows, columns]`` without the special ones."""
    return torch.arange(rows * columns).mul(7).remainder(VOCABULARY - 3).add(3).view(rows, columns)


def inputs_of(model: nn.Module) -> dict[str, Any]:
    """What a model is called with, by the name of its main input."""
    main = model.main_input_name
    found: dict[str, Any]
    if main == "pixel_values":
        size = getattr(model.config, "image_size", 32)
        size = size if isinstance(size, int) else 32
        found = {main: torch.linspace(-50, 50, 2 * 3 * size * size).sin().view(2, 3, size, size)}
        if model.config.model_type == "vit_mae":  # which patches are masked: at random otherwise
            found["noise"] = torch.linspace(-50, 50, 2 * (size // model.config.patch_size) ** 2).sin().view(2, -1)
        return found
    if main == "input_values":
        return {main: torch.linspace(-50, 50, 2 * 1600).sin().view(2, 1600)}
    if main == "input_features":
        found = {main: torch.linspace(-50, 50, 2 * 8 * 32).sin().view(2, 8, 32)}
    else:
        found = {"input_ids": token_ids()}
    if model.config.model_type == "qwen2_vl":  # a picture of 4 x 4 patches in each row, merged to 4 tokens
        found["input_ids"].clamp_(max=155)[:, 3:7] = model.config.image_token_id
        found["mm_token_type_ids"] = (found["input_ids"] == model.config.image_token_id).int()
        found["image_grid_thw"] = torch.tensor([[1, 4, 4]] * 2)
        found["pixel_values"] = torch.linspace(-50, 50, 2 * 16 * 3 * 2 * 64).sin().view(32, -1)
    if model.config.is_encoder_decoder:
        found["decoder_input_ids"] = token_ids(2, 5)
    return found


def build(name: str) -> nn.Module:
    """A model of the zoo by its name, with random weights, biases and norms."""
    head, odd = ZOO[name], name.endswith("-odd")
    kind = getattr(hf, head)
    torch.manual_seed(0)
    model = kind(small(kind.config_class, odd)).eval().requires_grad_(False)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
            elif parameter.dim() == 2 and parameter.std() < 0.05:
                parameter.mul_(2)
    return model
