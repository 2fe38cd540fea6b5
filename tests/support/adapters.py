"""Small models with adapters of peft."""

from __future__ import annotations

import peft
import torch
from torch import nn


def adapted(model: nn.Module, **options) -> peft.PeftModel:
    """The model with a LoRA adapter on every linear layer but the output embedding, in eval mode."""
    options = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", **options}
    return peft.get_peft_model(model, peft.LoraConfig(**options)).eval()


def change(peft_model: peft.PeftModel, size: float = 0.03) -> peft.PeftModel:
    """Give an adapter an effect: ``B`` random."""
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, size)
    return peft_model
