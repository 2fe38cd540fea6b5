"""A residual in the GEMM's epilogue on a GPU: the bits of the linear and an addition, by every kernel, and compiled."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.gpu.test_gated_gpu import FORMATS, gluon_tiles, needs_gluon, tile
from tests.gpu.test_gluon_gpu import DECODE
from tests.support.weights import make_problem

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def assert_same_bits(p, dtype, tile=None, bias=True) -> None:
    from intscale_compile.kernels.triton_gemm import linear_cuda

    operands = (p.xq, p.token_scale, p.qdata, p.scale, p.row_scale, p.bias if bias else None)
    form = (*p.weight_args, dtype)
    y = linear_cuda(*operands, *form, tile=tile)
    residual = torch.randn_like(y)
    assert torch.equal(linear_cuda(*operands, *form, tile=tile, residual=residual), y + residual), tile


@pytest.mark.parametrize("name", FORMATS)
def test_every_tile(name):
    """Tiles of the large kernels with and without parts of K, the decode kernel and plain Triton; rows that do not fill them."""
    needs_gluon()
    group_size, scale_bits = FORMATS[name]
    for m, n, k in ((150, 2048, 1280), (70, 1088, 1024)):
        p = make_problem(m, n, k, group_size, scale_bits, "tiled").to("cuda")
        decode = [] if group_size == 256 else [tile(*DECODE[0], 2, kernel="decode", steps=2)]
        for t in [*gluon_tiles(scale_bits), *decode, tile(32, 64)]:
            assert_same_bits(p, torch.bfloat16, t)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("m", [1, 16, 17, 256, 1000])
def test_chosen_tiles(dtype, m):
    assert_same_bits(make_problem(m, 1000, 1024, 128, 4, "tiled").to("cuda"), dtype, bias=m != 256)


class Block(nn.Module):
    def __init__(self, size: int = 512):
        super().__init__()
        self.norm = nn.RMSNorm(size)
        self.first, self.second = (nn.Linear(size, size, bias=False) for _ in range(2))

    def forward(self, x):
        h = x + self.first(x)
        return h + self.second(self.norm(h))


@pytest.mark.parametrize("graphs,tokens,expected", [(False, 300, 0), (True, 300, 2), (True, 200, 0)])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled(graphs, tokens, expected, dynamic):
    """Where the pass takes the additions; also at five tokens, which a dynamic graph must serve as well."""
    from torchao.quantization import quantize_

    from intscale_compile import IntScaleConfig, explain

    needs_gluon()
    torch.manual_seed(0)
    model = Block().cuda().bfloat16().requires_grad_(False)
    quantize_(model, IntScaleConfig())
    x = torch.randn(2, tokens // 2, 512, device="cuda", dtype=torch.bfloat16)
    results = []
    for disabled, count in (([], expected), (["residual_add"], 0)):
        options = {"intscale.disable_passes": disabled, "triton.cudagraphs": graphs}
        assert explain(model, x, options=options).pass_counts["residual_add"] == count
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="intscale", dynamic=dynamic, options=options)
        with torch.no_grad():
            results.append([[compiled(rows).clone() for _ in range(3)][-1] for rows in (x, x[:, :5])])
    # The norm reads a rounded sum where the GEMM adds, so that some of its int8 differ by one.
    for fused, plain in zip(*results):
        torch.testing.assert_close(fused, plain, rtol=2.0**-5, atol=2.0**-5)
        assert (fused - plain).float().norm() < 2.0**-7 * plain.float().norm()
