"""Peak memory: quantize_ takes the original model, which it may have to put back, the packed one, and a layer; loading with
transformers never holds the original model.
"""

from __future__ import annotations

import sys
import textwrap
import weakref

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torchao.quantization import quantize_

from intscale_compile import IntScaleConfig, IntScaleTensor
from tests.support import forks

QUICK = IntScaleConfig(scale_search="absmax")


class LiveMemory(TorchDispatchMode):
    """Bytes of all storages that operators made and that still live, and their peak."""

    def __init__(self, model):
        super().__init__()
        self.storages, self.now, self.peak = {}, 0, 0
        for parameter in model.parameters():
            self.note(parameter.data)

    def note(self, tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in self.storages:
            self.storages[storage._cdata] = storage.nbytes()
            weakref.finalize(storage, self.forget, storage._cdata)
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)

    def forget(self, key):
        self.now -= self.storages.pop(key)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if type(tensor) in (torch.Tensor, nn.Parameter):
                self.note(tensor)
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", [QUICK, IntScaleConfig(weight_bits=8, scale_search="absmax")], ids=["4", "8"])
@pytest.mark.parametrize("largest_first", [True, False])
def test_quantize_takes_the_model_packed_weights_and_a_layer(dtype, config, largest_first):
    width = 512 if config.weight_bits == 4 else 256  # an exact grid is looked for in 8 bits, which takes longer
    layers = [nn.Linear(width, 4 * width, bias=False), *(nn.Linear(width, width, bias=False) for _ in range(6))]
    model = nn.Sequential(*(layers if largest_first else layers[::-1])).to(dtype).requires_grad_(False)
    largest = 4 * width**2
    del layers
    memory = LiveMemory(model)
    original = memory.now
    with memory:
        quantize_(model, config)
    packed = sum(layer.weight.nbytes_packed() for layer in model)
    # int8 codes, joined and packed: up to 3.5 bytes for each weight of the one layer that is being quantized
    assert packed < memory.peak - original < packed + 3.5 * largest
    assert memory.now < original * (0.6 if config.weight_bits == 4 else 1.1) / dtype.itemsize * 2


def test_device_argument_of_torchao():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 32)).requires_grad_(False)
    wanted = IntScaleTensor.from_hp(model[1].weight, QUICK)
    quantize_(model, QUICK, device="cpu")
    assert torch.equal(model[1].weight.qdata, wanted.qdata)


@pytest.mark.gpu
def test_device_argument_moves_layer_by_layer():
    layers = [nn.Linear(4096, 4096, bias=False) for _ in range(8)]
    model = nn.Sequential(*layers).bfloat16().requires_grad_(False)
    original = sum(p.nbytes for p in model.parameters())
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    start = torch.cuda.memory_allocated()
    quantize_(model, IntScaleConfig(), device="cuda")
    assert {p.device.type for p in model.parameters()} == {"cuda"}
    assert all(p.packing_format == "tiled" for p in model.parameters())
    working = 1 << 30  # the search takes rows in blocks of 2**25 weights in fp32
    assert torch.cuda.max_memory_allocated() - start < original * 0.3 + working


LOAD = textwrap.dedent(
    """
    import sys, threading, time
    import torch, transformers
    from torch import nn
    from torchao.quantization import quantize_
    import transformers.models.llama.modeling_llama
    import intscale_compile

    def anonymous():  # files that are mapped into memory do not count: the system takes those pages back
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon"))

    def watch():
        while not done:
            peak[0] = max(peak[0], anonymous())
            time.sleep(0.002)

    config = intscale_compile.IntScaleConfig(scale_search="absmax")
    quantize_(nn.Linear(512, 512), config)
    done, start = [], anonymous()
    peak = [start]
    thread = threading.Thread(target=watch)
    thread.start()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        sys.argv[1], quantization_config=transformers.TorchAoConfig(config), dtype=torch.float32
    )
    done.append(1)
    thread.join()
    weight = model.model.layers[-1].mlp.down_proj.weight
    print("RESULT", type(weight).__name__, peak[0] - start, model.model.rotary_emb.inv_freq.sum().item())
    """
)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_transformers_quantizes_parameter_by_parameter_on_load(tmp_path):
    """No loader of our own: the original weights are never in memory together; the bits are compared in ``test_checkpoint``."""
    from transformers import LlamaConfig, LlamaForCausalLM

    size = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 6, "vocab_size": 64}
    model = LlamaForCausalLM(LlamaConfig(num_attention_heads=8, **size))
    model.save_pretrained(tmp_path, max_shard_size="30MB")
    original = sum(p.nbytes for p in model.parameters())
    script = tmp_path / "load.py"
    script.write_text(LOAD)
    out = forks.run("plain", script, str(tmp_path), timeout=300)
    assert out.returncode == 0, out.stderr
    _, kind, growth, frequencies = next(x for x in out.stdout.splitlines() if x.startswith("RESULT")).split()
    assert kind == "IntScaleTensor" and int(growth) < 0.6 * original
    assert float(frequencies) == model.model.rotary_emb.inv_freq.sum().item()  # a buffer that no checkpoint holds
