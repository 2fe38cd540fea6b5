"""The Gluon kernels on a Hopper GPU: exact for every shipped tile, split K, overlapped launches and CUDA graphs."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from tests.support.weights import Problem, make_problem

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DECODE = [(8, 16, 4), (8, 32, 8), (16, 32, 4), (16, 64, 8)]


@pytest.fixture(autouse=True)
def hopper():
    from intscale_compile.kernels.gluon_launch import missing_feature
    from intscale_compile.kernels.triton_gemm import capability

    reason = missing_feature(capability(torch.device("cuda")))
    if reason:
        pytest.skip(reason)


def tile(block_m: int, block_n: int, warps: int = 4, stages: int = 4, **fields):
    from intscale_compile.kernels.tile import Tile

    return Tile(block_m, block_n, warps, stages, **fields)


def gemm_tiles():
    """One of each shape of the two GEMM kernels, with and without split K."""
    specialized = [(16, 64), (32, 128), (64, 64), (64, 128), (128, 64)]
    tiles = [tile(*shape, kernel="specialized", split_k=split) for shape in specialized for split in (1, 2, 4)]
    tiles += [tile(128, 256, 8, kernel="specialized"), tile(64, 64, kernel="specialized", programs_per_sm=2)]
    cooperative = [(bm, bn, split) for bm, bn in ((128, 128), (256, 128), (128, 256), (128, 192)) for split in (1, 2)]
    tiles += [
        tile(bm, bn, 12 if bn == 192 else 8, 3, kernel="cooperative", split_k=split) for bm, bn, split in cooperative
    ]
    return tiles + [tile(*shape, kernel="pipelined", split_k=s) for shape in ((64, 64), (128, 128)) for s in (1, 3)]


def narrow(tile, scale_bits: int) -> bool:
    """Accumulating schedules keep two sums and have no tiles above 64x128 for a group of warps, nor parts of K with three."""
    most = 2048 * (tile.num_warps if tile.kernel == "cooperative" and (tile.num_warps, tile.split_k) != (12, 2) else 4)
    return scale_bits <= 4 or tile.block_m * tile.block_n <= most


def accumulate(p: Problem, tile=None, **options) -> torch.Tensor:
    from intscale_compile.kernels.triton_gemm import accumulate_cuda

    return accumulate_cuda(p.xq, p.qdata, p.scale, *p.weight_args, tile=tile, **options)


def assert_exact(p: Problem, tile, **options) -> None:
    assert torch.equal(accumulate(p, tile, **options).long().cpu(), p.accumulator), str(tile)


@pytest.mark.parametrize("scale_bits", [4, 8])
@pytest.mark.parametrize("group_size", [32, 64, 128, 256, -1])
def test_gemm_tiles_are_exact(group_size, scale_bits):
    problems = [(150, 333, 1280, "random"), (70, 64, 4096, "extreme"), (70, 64, 1152, "random")]
    for m, n, k, values in problems if group_size in (32, 128) else problems[:1]:
        p = make_problem(m, n, k, group_size, scale_bits, "tiled", values=values).to("cuda")
        for t in gemm_tiles():
            if narrow(t, scale_bits if group_size != -1 else 1):
                assert_exact(p, t)


@pytest.mark.parametrize("group_size,scale_bits", [(32, 4), (32, 8), (64, 8), (128, 4), (128, 8), (-1, 1)])
def test_decode_tiles_are_exact(group_size, scale_bits):
    for k, values in ((1152, "random"), (4096, "extreme"), (128, "random")):
        p = make_problem(13, 333, k, group_size, scale_bits, "tiled", values=values).to("cuda")
        for block_m, block_n, warps in DECODE:
            for steps in (2, 4):
                for programs in (1, 2):
                    if (warps, programs) != (8, 2) or block_m == 8:
                        fields = dict(kernel="decode", steps=steps, programs_per_sm=programs)
                        assert_exact(p, tile(block_m, block_n, warps, 2, **fields))


def test_eight_bit_weights_are_exact():
    p = make_problem(70, 130, 1024, -1, 1, "tiled", 8, "extreme").to("cuda")
    for t in gemm_tiles():
        if t.block_n < 256:
            assert_exact(p, t)


@pytest.mark.parametrize("m", [1, 8, 9, 17, 33, 64, 65, 127, 128, 129, 192, 255, 257, 300])
def test_every_number_of_tokens_is_exact(m):
    """Halves of tiles that begin early so that no row is missing, in all kernels; the epilogue too."""
    from intscale_compile.kernels.triton_gemm import linear_cuda

    p = make_problem(m, 333, 1280, 128, packing="tiled").to("cuda")
    token_scale = torch.rand(m, 1, device="cuda") + 0.5
    row_scale = torch.rand(333, 1, device="cuda") + 0.5
    wanted = (p.accumulator.to("cuda").float() * token_scale * row_scale.T).bfloat16()
    for t in gemm_tiles():
        assert_exact(p, t)
        y = linear_cuda(
            p.xq, token_scale, p.qdata, p.scale, row_scale, None, *p.weight_args, torch.bfloat16, tile=t, overlap=False
        )
        assert torch.equal(y, wanted), t


def dequantized(p: Problem, dtype: torch.dtype, more: bool):
    """A function of the tile that computes the linear of ``p`` with random scales, and with bias and residual if ``more``."""
    from intscale_compile.kernels.triton_gemm import linear_cuda

    (m, _), n = p.xq.shape, p.weight_args[0]
    token_scale, row_scale = torch.rand(m, 1, device="cuda") * 1e-3, torch.rand(n, 1, device="cuda") * 1e-2
    bias = torch.randn(n, device="cuda", dtype=dtype) if more else None
    residual = torch.randn(m, n, device="cuda", dtype=dtype) if more else None
    operands = (p.xq, token_scale, p.qdata, p.scale, row_scale, bias, *p.weight_args, dtype)
    return lambda tile: linear_cuda(*operands, tile=tile, overlap=True, residual=residual)


@pytest.mark.parametrize("form", [(32, 4), (64, 8), (128, 4), (128, 8), (256, 4), (-1, 1)], ids=str)
def test_results_copied_by_the_accelerator_are_those_of_plain_stores(form):
    """Every cooperative tile: odd widths, tokens beside whole tiles, bias, residual, parts of K, both 16-bit types."""
    from intscale_compile.kernels.tile import Tile

    cooperative = [t for t in gemm_tiles() if t.kernel == "cooperative" and narrow(t, form[1])]
    for n, m in ((1032, 129), (200, 600)):
        p = make_problem(m, n, 1024, *form, "tiled").to("cuda")
        for dtype, more in ((torch.bfloat16, True), (torch.float16, False)):
            linear = dequantized(p, dtype, more)
            expected = linear(Tile(64, 64, 4, 3))
            for t in cooperative:
                for _ in range(2):  # the counters of split K have to be zero again after the first
                    assert torch.equal(linear(t), expected), (str(t), n, m, dtype)


def test_shipped_tiles_are_exact():
    """Every entry of the table of this GPU, on its own K and some of its rows; the last row tile is ragged."""
    from intscale_compile.kernels.tile_tables import active_tiles

    formats = {"fold": (128, 4, 4), "accumulate": (128, 8, 4), "none": (-1, 1, 4), "int8": (-1, 1, 8)}
    cases: dict = {}
    for key, t in active_tiles(torch.cuda.get_device_name()):
        if key.schedule in formats:
            cases.setdefault((key.schedule, key.k), {})[t] = min(key.m, 200)
    assert cases
    for (schedule, k), tiles in cases.items():
        group_size, scale_bits, weight_bits = formats[schedule]
        p = make_problem(200, 700, k, group_size, scale_bits, "tiled", weight_bits).to("cuda")
        for t, m in tiles.items():
            y = accumulate(dataclasses.replace(p, xq=p.xq[:m]), t)
            assert torch.equal(y.long().cpu(), p.accumulator[:m]), f"{schedule}, K = {k}: {t}"


def test_split_k_leaves_its_counters_zero():
    p = make_problem(64, 512, 4096, 128, packing="tiled").to("cuda")
    t = tile(64, 64, kernel="specialized", split_k=4)
    for _ in range(20):
        assert_exact(p, t)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        beside = [accumulate(p, t) for _ in range(20)]
    here = [accumulate(p, t) for _ in range(20)]
    torch.cuda.synchronize()
    for y in (*beside, *here):
        assert torch.equal(y.long().cpu(), p.accumulator)


def test_graphs_with_split_k_replay_beside_each_other():
    p = make_problem(64, 512, 4096, 128, packing="tiled").to("cuda")
    t = tile(64, 64, kernel="specialized", split_k=4)
    accumulate(p, t)
    graphs = []
    for _ in range(2):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = [accumulate(p, t, overlap=True) for _ in range(8)]
        graphs.append((graph, outputs, torch.cuda.Stream()))
    for _ in range(10):
        for graph, _, stream in graphs:
            with torch.cuda.stream(stream):
                graph.replay()
    torch.cuda.synchronize()
    for _, outputs, _ in graphs:
        assert all(torch.equal(y.long().cpu(), p.accumulator) for y in outputs)


@pytest.mark.parametrize("m", [1, 16, 64, 200])
def test_overlapped_chain_reads_what_the_kernel_before_wrote(m):
    """Each linear's activation is written by the kernel before it; a launch that begins too early would read old data."""
    from intscale_compile.kernels.triton_gemm import accumulate_cuda

    p = make_problem(m, 1024, 1024, 128, packing="tiled").to("cuda")
    for _ in range(5):
        x, expected = p.xq.clone(), p.xq.clone()
        for _ in range(10):
            y = accumulate_cuda(x, p.qdata, p.scale, *p.weight_args, overlap=True)
            x = (y >> 9).to(torch.int8)
            expected = (accumulate_cuda(expected, p.qdata, p.scale, *p.weight_args) >> 9).to(torch.int8)
            torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        start = p.xq.clone()
        with torch.cuda.graph(graph):
            x2 = start
            for _ in range(10):
                x2 = (accumulate_cuda(x2, p.qdata, p.scale, *p.weight_args, overlap=True) >> 9).to(torch.int8)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(x, expected)
        assert torch.equal(x2, expected)


@pytest.mark.parametrize("m", [1, 16, 64, 700])
def test_compiled_with_cuda_graphs_calls_the_op(m):
    """mode="reduce-overhead" leaves linears to the op; its results are those of the template."""
    from torchao.quantization import quantize_

    from intscale_compile import IntScaleConfig

    torch.manual_seed(0)
    model = (
        torch.nn.Sequential(torch.nn.Linear(1024, 2048), torch.nn.SiLU(), torch.nn.Linear(2048, 512)).cuda().bfloat16()
    )
    quantize_(model, IntScaleConfig())
    x = torch.randn(m, 1024, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        torch._dynamo.reset()
        plain = torch.compile(model, backend="intscale")(x).clone()
        torch._dynamo.reset()
        graphed = torch.compile(model, backend="intscale", mode="reduce-overhead")
        for _ in range(3):
            y = graphed(x).clone()
    torch.testing.assert_close(y, plain, rtol=2.0**-6, atol=2.0**-6)


@pytest.mark.parametrize("m", [100, 300, 1000])
@pytest.mark.parametrize(
    "packed",
    [dict(group_size=32), dict(group_size=128), dict(group_size=128, scale_bits=8), dict(group_size=-1)],
    ids=str,
)
def test_an_fp32_model_has_its_outputs(m, packed):
    """32-bit outputs take more shared memory in the epilogue; 28672 rows select the largest tiles."""
    from torchao.quantization import quantize_

    from intscale_compile import IntScaleConfig

    torch.manual_seed(0)
    linear = torch.nn.Linear(1024, 28672, bias=False).cuda()
    quantize_(linear, IntScaleConfig(scale_search="absmax", **packed))
    x = torch.randn(m, 1024, device="cuda")
    with torch.no_grad():
        y, few = linear(x), torch.cat([linear(part) for part in x.split(16)])  # small tiles have tests of their own
        reference = torch.nn.functional.linear(x.double(), linear.weight.dequantize().double()).float()
    assert torch.equal(y, few)
    assert (reference - y).norm() < 0.02 * reference.norm()  # the rounding of activations to 8 bits alone


@pytest.mark.parametrize("m", [513, 1000])
@pytest.mark.parametrize(
    "packed",
    [dict(group_size=g, scale_bits=bits) for g in (32, 64, 128) for bits in (4, 8)] + [dict(group_size=-1)],
    ids=str,
)
def test_every_launch_has_the_same_bits(m, packed):
    """Several tiles a program, again and again, launched into the end of other kernels: a stage of the ring that is given back
    to the producer before all warps have its scales makes a sum wrong once in a hundred thousand times."""
    from torchao.quantization import quantize_

    from intscale_compile import IntScaleConfig

    torch.manual_seed(0)
    linear = torch.nn.Linear(1024, 28672, bias=False).cuda()
    quantize_(linear, IntScaleConfig(scale_search="absmax", **packed))
    with torch.no_grad():
        for dtype in (torch.float32, torch.bfloat16):
            layer = linear if dtype == torch.float32 else linear.to(dtype)
            x = torch.randn(m, 1024, device="cuda", dtype=dtype)
            few = torch.cat([layer(part) for part in x.split(16)])
            wrong = sum(not torch.equal(layer(x), few) for _ in range(100))
            assert wrong == 0, f"{wrong} of 100 launches, {dtype}"
