"""Checkpoints for the tests, made of the small models."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from engines import load_model

from intscale_compile import IntScaleConfig, IntScaleTensor, save_pretrained
from intscale_compile.commands.quantizing import quantize_folder
from intscale_compile.kernels.hadamard import hadamard_transform
from tests.support.quantized_checkpoints import (
    awq_parts,
    compressed_parts,
    compressed_scheme,
    gptq_parts,
    quantize_groups,
    write_checkpoint,
)


def every_format(llama, folder):
    """The small Llama with a format of its own in each layer, also several in one merged layer."""
    model, _ = load_model(llama, dtype=torch.float32)
    layers = model.model.layers

    def put(layer, config=None, change=lambda w: w, values=None):
        weight = layer.weight.detach() if values is None else values
        layer.weight = torch.nn.Parameter(change(IntScaleTensor.from_hp(weight, config)), requires_grad=False)

    special = {
        "0.self_attn.v_proj": {"config": IntScaleConfig(-1, 8)},
        "1.mlp.gate_proj": {"change": lambda w: w.with_activation_scale(0.05)},
        "1.mlp.up_proj": {"change": lambda w: w.with_activation_scale(0.05)},
        "2.mlp.up_proj": {"change": lambda w: w.with_activation_scale(0.04)},
        "3.self_attn.o_proj": {"config": IntScaleConfig(64)},
        "4.mlp.down_proj": {"config": IntScaleConfig(-1)},
        "5.mlp.down_proj": {"config": IntScaleConfig(256, scale_bits=8)},
        "6.self_attn.q_proj": {"config": IntScaleConfig(32)},
    }
    for name, module in list(model.named_modules()):
        if name.endswith("_proj") and name != "model.layers.7.self_attn.k_proj":
            put(module, **special.get(name.removeprefix("model.layers."), {}))
    down = load_model(llama, dtype=torch.float32)[0].model.layers[3].mlp.down_proj.weight
    put(layers[3].mlp.down_proj, None, lambda w: w.with_rotation(256), hadamard_transform(down.detach(), 256))
    save_pretrained(model, folder)
    copy_tokenizer(llama, folder)


def imported(llama, folder, kind):
    """The small Llama as GPTQ, AWQ or compressed-tensors stores it."""
    model, _ = load_model(llama, dtype=torch.float32)
    order = torch.Generator().manual_seed(0)
    scheme = compressed_scheme()

    def parts(name, weight):
        if kind == "gptq with activation order":
            # Siblings read one activation and have one order.
            order.manual_seed(len(name.rpartition(".")[0]) * 7 + weight.shape[1] + int(name.split(".")[2]))
            layer = quantize_groups(weight, 128, False, order=torch.randperm(weight.shape[1], generator=order))
            return layer, gptq_parts(layer)
        layer = quantize_groups(weight, 128, kind not in ("gptq", "awq"))
        made = {"gptq": gptq_parts, "awq": awq_parts}.get(kind)
        return layer, (made(layer) if made else compressed_parts(layer, weight, scheme))

    config = {
        "awq": {"bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"},
        "compressed-tensors": {"config_groups": {"group_0": scheme}, "format": "pack-quantized", "ignore": ["lm_head"]},
    }.get(kind, {"bits": 4, "group_size": 128, "sym": False, "desc_act": kind != "gptq"})
    write_checkpoint(model, folder, kind.partition(" ")[0], parts, config, shards=2)
    copy_tokenizer(llama, folder)


def untied(llama, folder):
    """The small Llama with output embeddings of their own, quantized by ``intscale quantize``."""
    plain = folder.with_name(f"{folder.name}-plain")
    model, _ = load_model(llama, dtype=torch.float32)
    noise = torch.randn(model.lm_head.weight.shape, generator=torch.Generator().manual_seed(0))
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight * (1 + 0.01 * noise))
    model.config.tie_word_embeddings = False
    model.save_pretrained(plain)
    copy_tokenizer(llama, plain)
    quantize_folder(plain, folder, progress=False)


def rotated(llama, folder):
    """The small Llama with its residual stream and the input of its down projections rotated, a little calibrated."""
    settings = {"rotation": "hadamard"}
    text = Path(shutil.__file__)
    quantize_folder(
        llama, folder, settings, preset="gptq", data=[text], sequences=2, tokens=64, dtype=torch.float32, progress=False
    )


def copy_tokenizer(source, folder):
    for path in source.glob("tokenizer*"):
        shutil.copy(path, folder)
