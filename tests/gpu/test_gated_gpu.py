"""The gated linear on a GPU: its Gluon and plain-Triton kernels against the exact accumulator, and compiled models."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.support.weights import Problem, make_problem

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
ACTIVATIONS = ("silu", "gelu", "gelu_tanh")
FORMATS = {
    "fold": (128, 4),
    "fold-32": (32, 4),
    "fold-256": (256, 4),
    "accumulate": (128, 8),
    "accumulate-64": (64, 8),
    "per-channel": (-1, 1),
}


def tile(block_m: int, block_n: int, warps: int = 4, stages: int = 4, **fields):
    from intscale_compile.kernels.tile import Tile

    return Tile(block_m, block_n, warps, stages, **fields)


def gluon_tiles(scale_bits: int):
    """One of each shape of the two kernels that has room for a gate and an up half, with and without split K."""
    shapes = [(16, 128), (32, 128), (64, 128)] + ([(128, 128)] if scale_bits <= 4 else [])
    tiles = [tile(*shape, kernel="specialized", split_k=split) for shape in shapes for split in (1, 2)]
    tiles += [tile(m, 128, kernel="pipelined", split_k=split) for m, _ in shapes if m >= 64 for split in (1, 3)]
    return tiles + ([tile(128, 256, 8, kernel="specialized")] if scale_bits <= 4 else [])


def cooperative_tiles(scale_bits: int):
    """Those of the kernel with two consumers, for 16-bit outputs."""
    shapes = [(128, 128)] + ([(256, 128)] if scale_bits <= 4 else [])
    return [tile(*shape, 8, 3, kernel="cooperative", split_k=split) for shape in shapes for split in (1, 2)]


def needs_gluon() -> None:
    from intscale_compile.kernels.gluon_launch import missing_feature
    from intscale_compile.kernels.triton_gemm import capability

    reason = missing_feature(capability(torch.device("cuda")))
    if reason:
        pytest.skip(reason)


def problem(m: int, features: int, k: int, group_size: int = 128, scale_bits: int = 4, **fields) -> Problem:
    """Gates of a few units, where the activation bends."""
    return scaled(make_problem(m, 2 * features, k, group_size, scale_bits, "tiled", **fields)).to("cuda")


def scaled(p: Problem) -> Problem:
    """With token scales that make the typical value 4."""
    scale = 4.0 / (p.accumulator[:8].double().std() * p.row_scale.mean().cpu())
    token_scale = p.token_scale / p.token_scale.mean() * scale.float().to(p.token_scale.device)
    return dataclasses.replace(p, token_scale=token_scale)


def large_problem(m: int, features: int, k: int) -> Problem:
    """As :func:`problem`, but the reference comes from a GPU: fold, groups of 128."""
    from intscale_compile.kernels.w4a8_linear import reference_accumulate

    n, random = 2 * features, functools.partial(torch.randint, device="cuda")
    xq = random(-127, 128, (m, k), dtype=torch.int8)
    qdata, scale = random(0, 256, (n, k // 2), dtype=torch.uint8), random(1, 16, (n, k // 128), dtype=torch.uint8)
    return scaled(
        Problem(
            xq=xq,
            token_scale=torch.rand(m, 1, device="cuda") + 0.1,
            qdata=qdata,
            scale=scale,
            row_scale=torch.rand(n, 1, device="cuda") * 0.01 + 1e-4,
            bias=torch.randn(n, device="cuda"),
            weight_args=(n, 128, 4, "tiled"),
            accumulator=reference_accumulate(xq, qdata, scale, n, 128, "tiled").long().cpu(),
        )
    )


def call(p: Problem, activation: str, dtype=torch.float32, bias: bool = True, tile=None, **options) -> torch.Tensor:
    from intscale_compile.kernels.triton_gated import gated_linear_cuda

    operands = (p.xq, p.token_scale, p.qdata, p.scale, p.row_scale, p.bias if bias else None)
    return gated_linear_cuda(*operands, activation, *p.weight_args, dtype, tile=tile, **options).cpu()


def assert_right(y: torch.Tensor, p: Problem, activation: str, bias: bool = True) -> None:
    """Within one unit in the last place of the output dtype of the fp32 epilogue of the exact accumulator.

    In fp32 itself the GPU's ``exp``, ``erf`` and division are off by some units, and ``1 + erf(x)`` cancels: what is
    left of it, times the up value, is the absolute tolerance.
    """
    gate, up = p.linear(bias).double().chunk(2, dim=-1)
    exact = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}[activation](
        gate
    ) * up
    error, eps = (y.double() - exact).abs(), torch.finfo(y.dtype).eps
    allowed = max(eps, 2.0**-19) * exact.abs() + 2.0**-21 * (1 + gate.abs()) * (1 + up.abs())
    assert y.shape == exact.shape and bool((error <= allowed).all()), (
        f"{(error / allowed).max():.2f} times the tolerance"
    )


@pytest.mark.parametrize("name", FORMATS)
def test_gluon_tiles(name):
    """Every tile shape; 1024 features fill all tiles, 1088 leave the last one of 256 rows half empty."""
    needs_gluon()
    group_size, scale_bits = FORMATS[name]
    for m, features, k in ((150, 1024, 1280), (70, 1088, 1024)):
        p = problem(m, features, k, group_size, scale_bits)
        for t in gluon_tiles(scale_bits):
            assert_right(call(p, "silu", tile=t), p, "silu")
        for dtype, bias in ((torch.bfloat16, True), (torch.float16, False)):
            plain = call(p, "silu", dtype, bias, tile(64, 128, kernel="specialized"))
            for t in cooperative_tiles(scale_bits):
                y = call(p, "silu", dtype, bias, t)
                assert_right(y, p, "silu", bias)
                assert torch.equal(y, plain), str(t)  # the same sums, and the same operations behind them


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_activations_and_dtypes(activation, dtype):
    """The plain-Triton kernel everywhere, the Gluon kernels where they can run; both to the same values."""
    from intscale_compile.kernels.triton_gemm import gluon_obstacle

    p = problem(200, 1024, 1024)
    tiles = [tile(64, 128, stages=3), tile(128, 128, stages=3), tile(16, 64, stages=3)]
    if gluon_obstacle(1024, 128, 4, 4, "tiled", p.xq.device) is None:
        tiles += [tile(128, 128, kernel="pipelined", stages=3), tile(64, 128, kernel="specialized")]
        tiles += cooperative_tiles(4) if dtype.itemsize == 2 else []
    for bias in (True, False):
        results = [call(p, activation, dtype, bias, t) for t in tiles]
        for y in results:
            assert_right(y, p, activation, bias)
            torch.testing.assert_close(y, results[0], rtol=torch.finfo(dtype).eps, atol=2.0**-18)


@pytest.mark.parametrize("features,k", [(1024, 1024), (14336, 4096)])
@pytest.mark.parametrize("m", [1, 16, 17, 64, 256, 300, 2048])
def test_chosen_tiles(m, features, k):
    p = large_problem(m, features, k)
    for overlap in (False, True):
        assert_right(call(p, "silu", torch.bfloat16, overlap=overlap), p, "silu")


@pytest.mark.parametrize("group_size,scale_bits,features", [(32, 4, 77), (64, 8, 96), (128, 4, 77), (128, 8, 96)])
def test_formats_without_gluon(group_size, scale_bits, features):
    p = problem(70, features, 640, group_size, scale_bits)
    assert_right(call(p, "silu"), p, "silu")


def test_eight_bit_weights():
    p = problem(70, 128, 1024, -1, 1, weight_bits=8)
    for t in (None, tile(64, 128, kernel="specialized"), tile(64, 128, kernel="pipelined", stages=3)):
        if t is not None:
            needs_gluon()
        assert_right(call(p, "silu", tile=t), p, "silu")
    for t in cooperative_tiles(4):
        assert_right(call(p, "silu", torch.bfloat16, tile=t), p, "silu")


def test_split_k_leaves_its_counters_zero():
    needs_gluon()
    p = problem(64, 1024, 4096)
    t = tile(64, 128, kernel="specialized", split_k=4)
    first = call(p, "silu", torch.bfloat16, tile=t)
    for _ in range(20):
        assert torch.equal(call(p, "silu", torch.bfloat16, tile=t), first)


class Mlp(nn.Module):
    def __init__(self, hidden: int = 512, features: int = 1024):
        super().__init__()
        self.gate, self.up = (nn.Linear(hidden, features, bias=False) for _ in range(2))
        self.down = nn.Linear(features, hidden, bias=False)

    def forward(self, x):
        return x + self.down(F.silu(self.gate(x)) * self.up(x))


@pytest.mark.parametrize("graphs,tokens,gated", [(False, 1024, 1), (False, 300, 0), (True, 300, 1), (True, 200, 0)])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_is_near_the_unfused_graph(graphs, tokens, gated, dynamic):
    """Where the pass takes the MLP, and what comes out; also at five tokens, which a dynamic graph must serve as well."""
    from torchao.quantization import quantize_

    from intscale_compile import IntScaleConfig, explain

    torch.manual_seed(0)
    model = Mlp().cuda().bfloat16().requires_grad_(False)
    quantize_(model, IntScaleConfig())
    x = torch.randn(2, tokens // 2, 512, device="cuda", dtype=torch.bfloat16)
    results = []
    for disabled, expected in (([], gated), (["gated_activation"], 0)):
        options = {"intscale.disable_passes": disabled, "triton.cudagraphs": graphs}
        assert explain(model, x, options=options).pass_counts["gated_activation"] == expected
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="intscale", dynamic=dynamic, options=options)
        with torch.no_grad():
            results.append([[compiled(rows).clone() for _ in range(3)][-1] for rows in (x, x[:, :5])])
    for gated_result, plain in zip(*results):
        torch.testing.assert_close(gated_result, plain, rtol=2.0**-5, atol=2.0**-5)
