"""The two trained models: counts, perplexity, both doors, saving, and the table of DESIGN section 8.6."""

import copy

import pytest
import torch
from torchao.quantization import quantize_

import intscale_compile
from benchmarks.perplexity import held_out_tokens, perplexity
from intscale_compile import IntScaleConfig

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def tiny_llama(models_dir):
    folder = models_dir / "tiny-llama"
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)
    model.config.use_cache = False
    return model, held_out_tokens(folder)
