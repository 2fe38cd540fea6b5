"""Whole models and the quantizer on a GPU."""

import copy

import pytest
import torch
from torch import nn
from torchao.quantization import quantize_

import intscale_compile
from intscale_compile import IntScaleConfig, IntScaleTensor
from intscale_compile.tensors import scale_search as search

pytestmark = pytest.mark.gpu


class Mlp(nn.Module):
    def __init__(self, width=512, inner=1408):
        super().__init__()
        self.norm = nn.RMSNorm(width)
        self.gate, self.up = (nn.Linear(width, inner, bias=False) for _ in range(2))
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x):
        h = self.norm(x)
        return x + self.down(nn.functional.silu(self.gate(h)) * self.up(h))


def sqnr(reference, value):
    reference, value = reference.float(), value.float()
    return (10 * torch.log10(reference.square().mean() / (reference - value).square().mean())).item()


def make(dtype=torch.bfloat16):
    return nn.Sequential(Mlp(), Mlp()).to("cuda", dtype).eval().requires_grad_(False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_doors_agree_and_eager_is_near(dtype):
    model = make(dtype)
    quantized = copy.deepcopy(model)
    quantize_(quantized, IntScaleConfig())
    assert all(p.packing_format == "tiled" for p in quantized.parameters() if isinstance(p, IntScaleTensor))
    for tokens in (1, 7, 200):
        x = torch.randn(2, tokens, 512, device="cuda", dtype=dtype)
        torch._dynamo.reset()
        plain_door = torch.compile(model, backend="intscale", fullgraph=True)(x)
        torch._dynamo.reset()
        tensor_door = torch.compile(quantized, backend="intscale", fullgraph=True)(x)
        assert torch.equal(plain_door, tensor_door)
        assert sqnr(model(x), plain_door) > 15
        assert sqnr(quantized(x), tensor_door) > 35


@pytest.mark.parametrize("lead", [(64,), (2, 32)])
def test_generated_mlp_has_four_kernels(lead):
    from torch._inductor.utils import run_and_get_triton_code

    model = make()[0]
    run = torch.compile(model, backend="intscale", fullgraph=True)
    torch._dynamo.reset()
    code = run_and_get_triton_code(run, torch.randn(*lead, 512, device="cuda", dtype=torch.bfloat16))
    assert code.count("async_compile.triton(") == 4
    assert code.count(".run(") == 4


@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune-no-cudagraphs", "max-autotune"])
def test_modes_and_cuda_graphs(mode):
    model = make()
    x = torch.randn(16, 512, device="cuda", dtype=torch.bfloat16)
    torch._dynamo.reset()
    expected = torch.compile(model, backend="intscale", fullgraph=True)(x)
    torch._dynamo.reset()
    run = torch.compile(model, backend="intscale", fullgraph=True, mode=mode)
    for _ in range(4):
        y = run(x).clone()
    assert sqnr(expected, y) > 50
    with torch.no_grad():
        model[0].down.weight.mul_(2.0)
    assert sqnr(model(x), run(x).clone()) > 15


def test_dynamic_tokens_on_one_graph():
    from torch._dynamo.testing import CompileCounterWithBackend

    model = make()
    counter = CompileCounterWithBackend("intscale")
    run = torch.compile(model, backend=counter, dynamic=True, fullgraph=True)
    for tokens in (3, 64, 1000):
        x = torch.randn(tokens, 512, device="cuda", dtype=torch.bfloat16)
        assert sqnr(model(x), run(x)) > 15
    assert counter.frame_count == 1


def test_batch_invariance_of_a_compiled_linear():
    layer = nn.Linear(512, 384, bias=False, device="cuda", dtype=torch.bfloat16).requires_grad_(False)
    run = torch.compile(layer, backend="intscale", dynamic=True, fullgraph=True)
    x = torch.randn(300, 512, device="cuda", dtype=torch.bfloat16)
    whole = run(x)
    for tokens in (2, 5, 64, 200):
        assert torch.equal(run(x[:tokens]), whole[:tokens])


def test_gradients():
    model = make(torch.float32).requires_grad_(True)
    quantize_(model, IntScaleConfig())
    x = torch.randn(8, 512, device="cuda", requires_grad=True)
    model(x).square().sum().backward()
    eager, x.grad = x.grad, None
    torch.compile(model, backend="intscale", fullgraph=True)(x).square().sum().backward()
    assert sqnr(eager, x.grad) > 25


@pytest.mark.parametrize("group", [32, 64, 128, 256])
def test_scale_search_kernel_agrees_with_pytorch(group):
    groups = torch.randn(64, 8, group, device="cuda")
    groups /= groups.abs().amax((1, 2), keepdim=True)
    steps, scales = search.search_integer_scales(groups, 15)
    cpu_steps, cpu_scales = search.search_integer_scales(groups.cpu(), 15)

    def error(steps, scales):
        t = (steps * scales).unsqueeze(-1)
        return (groups - (groups / t).round().clamp(-8, 7) * t).square().sum()

    assert torch.equal((steps * 1e6).round(), (cpu_steps.cuda() * 1e6).round()) or error(
        steps, scales
    ) <= 1.0001 * error(cpu_steps.cuda(), cpu_scales.cuda())
    assert (scales.cpu() != cpu_scales).float().mean() < 0.01


def test_moving_between_devices_repacks():
    weight = torch.randn(200, 300)
    on_cpu = IntScaleTensor.from_hp(weight)
    on_gpu = on_cpu.to("cuda")
    assert on_gpu.packing_format == "tiled" and on_gpu.to("cpu").packing_format == "plain"
    assert torch.equal(on_gpu.to("cpu").qdata, on_cpu.qdata)
    x = torch.randn(5, 300)
    torch.testing.assert_close(nn.functional.linear(x.cuda(), on_gpu).cpu(), nn.functional.linear(x, on_cpu))


def test_tiny_llama_perplexity_on_the_gpu(models_dir):
    transformers = pytest.importorskip("transformers")
    from tests.support.benchmarks import load

    bench = load(("perplexity",)).perplexity
    held_out_sequences, perplexity = bench.held_out_sequences, bench.perplexity

    folder = models_dir / "tiny-llama"
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).cuda().eval()
    model.requires_grad_(False).config.use_cache = False
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    sequences = held_out_sequences(tokenizer, models_dir / "heldout_stdlib_modules.txt", 24, 512).cuda()
    report = intscale_compile.explain(model, sequences[:1])
    assert (report.gemms, report.activation_quantizations, len(report.fallbacks)) == (32, 32, 1)
    torch._dynamo.reset()
    before = perplexity(torch.compile(model), sequences)
    after = perplexity(torch.compile(model, backend="intscale", fullgraph=True), sequences)
    print(f"tiny-llama on {torch.cuda.get_device_name()}: bf16 {before:.3f}, W4A8 {after:.3f}")
    assert before < after < 1.085 * before
