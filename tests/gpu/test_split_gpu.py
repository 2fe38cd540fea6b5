"""Plain Triton with parts of K on a GPU: every format to the bit, again and again, beside other work and in CUDA graphs."""

from __future__ import annotations

import pytest
import torch

from tests.support.weights import make_problem

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
FORMATS = {
    **{f"g{g}-s{s}": dict(group_size=g, scale_bits=s) for g in (32, 64, 128, 256) for s in (4, 8)},
    "channel": dict(group_size=-1),
    "w8a8": dict(group_size=-1, scale_bits=1, weight_bits=8),
    "zero": dict(group_size=128, scale_bits=8, asymmetric=True),
    "offsets": dict(group_size=32, scale_bits=8, offsets=True),
    "ragged": dict(group_size=128),
}


def on_gpu(problem, *names):
    return [None if (x := getattr(problem, name)) is None else x.cuda() for name in names]


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("m, tile_m", [(1, 16), (16, 16), (50, 32)])
def test_parts_are_exact(name, m, tile_m):
    from intscale_compile.kernels.tile import Tile
    from intscale_compile.kernels.triton_gemm import accumulate_cuda, linear_cuda

    k = 2000 if name == "ragged" else 2048
    problem = make_problem(m, 1000, k, packing="tiled", **FORMATS[name])
    xq, qdata, scale, zero, token, row, bias = on_gpu(
        problem, "xq", "qdata", "scale", "zero_point", "token_scale", "row_scale", "bias"
    )
    expected = problem.accumulator.to(torch.int32).cuda()
    for parts in (1, 2, 4, 8):
        tile = Tile(tile_m, 128, split_k=parts)
        for _ in range(3):  # the counters are zero again after each
            acc = accumulate_cuda(xq, qdata, scale, *problem.weight_args, tile=tile, zero_point=zero)
            assert torch.equal(acc, expected), f"{(acc != expected).sum()} of {acc.numel()} differ in {parts} parts"
        form = (*problem.weight_args, torch.bfloat16)
        residual = torch.randn(m, 1000, device="cuda", dtype=torch.bfloat16)
        whole, split = (
            linear_cuda(xq, token, qdata, scale, row, bias, *form, tile=t, zero_point=zero, residual=residual)
            for t in (Tile(32, 64), tile)
        )
        assert torch.equal(whole, split)


def test_overlapping_launches_in_a_graph_beside_other_work():
    """A thousand launches, each behind the kernel that writes its activations, while another stream keeps the GPU busy."""
    from intscale_compile.kernels.tile import Tile
    from intscale_compile.kernels.triton_gemm import linear_cuda

    problem = make_problem(16, 1024, 4096, group_size=32, packing="tiled")
    xq, qdata, scale, token, row = on_gpu(problem, "xq", "qdata", "scale", "token_scale", "row_scale")
    form, tile = (*problem.weight_args, torch.float32), Tile(16, 128, split_k=8)
    inputs = [torch.randint_like(xq, -127, 128) for _ in range(10)]
    expected = [linear_cuda(x, token, qdata, scale, row, None, *form, tile=Tile(32, 64)) for x in inputs]
    moving = torch.empty_like(xq)

    def step() -> list[torch.Tensor]:
        found = []
        for x in inputs:
            moving.copy_(x)
            found.append(linear_cuda(moving, token, qdata, scale, row, None, *form, tile=tile, overlap=True))
        return found

    step()
    graph, other, noise = torch.cuda.CUDAGraph(), torch.cuda.Stream(), torch.randn(2048, 2048, device="cuda")
    with torch.cuda.graph(graph):
        found = step()
    for _ in range(100):
        with torch.cuda.stream(other):
            noise @ noise
        graph.replay()
        torch.cuda.current_stream().synchronize()
        assert all(map(torch.equal, found, expected))


def test_the_rules_use_parts_where_gluon_has_no_kernel():
    """Features that are no multiple of 128 on Hopper, and a decoding step of a compiled model calls the op."""
    from intscale_compile import IntScaleConfig, quantize

    torch.manual_seed(0)
    model = (
        torch.nn.Sequential(torch.nn.Linear(2112, 1088), torch.nn.ReLU(), torch.nn.Linear(1088, 2112)).cuda().bfloat16()
    )
    quantize(model.eval(), IntScaleConfig(group_size=32))
    x = torch.randn(4, 2112, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        eager = model(x)
        compiled = torch.compile(model, backend="intscale", mode="reduce-overhead")
        for _ in range(3):
            assert torch.equal(compiled(x), eager)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            compiled(x)
            torch.cuda.synchronize()
    assert sum("w4a8_split_kernel" in event.key for event in profile.key_averages()), "no kernel in parts"
