"""Rotated and statically quantized activations in the graph: Q/DQ form, sharing, merging, and one kernel on a GPU."""

from __future__ import annotations

import logging
import operator

import pytest
import torch
from torch import fx
from torch.nn import functional as F

from intscale_compile import ops
from intscale_compile.compile.inductor_settings import inductor_defaults
from intscale_compile.compile.options import parse_options
from intscale_compile.kernels.hadamard import HADAMARD_OP, HADAMARD_QUANTIZE_OP
from intscale_compile.kernels.quantize_per_token import OP as QUANTIZE_OP
from intscale_compile.kernels.quantize_static import STATIC_OP
from intscale_compile.kernels.w4a8_linear import LINEAR_OP
from intscale_compile.passes import PASSES, GraphRewrite, apply_passes
from intscale_compile.passes.base import EXAMPLE
from intscale_compile.passes.rotate_quantize import ROTATE_QUANTIZE
from intscale_compile.reasons import log_once
from tests.kernels.test_inductor_codegen import weight_shapes
from tests.support.graphs import arguments, assert_true_metadata, capture, count, run
from tests.support.static import Siblings, outlying

pytestmark = pytest.mark.generated

COUNTED = (HADAMARD_OP, QUANTIZE_OP, STATIC_OP, LINEAR_OP)


def apply_until(rewrite, last):
    names = [p.name for p in PASSES]
    apply_passes(rewrite, PASSES[: names.index(last) + 1])


def counts(rewrite) -> tuple[int, ...]:
    return tuple(count(rewrite, op) for op in COUNTED)


FORMS = [(32, None, (3, 3, 0, 0)), (0, 0.1, (0, 0, 3, 0)), (32, 0.1, (3, 0, 3, 0))]  # rotation, static, counts


@pytest.mark.parametrize("rotation, static, expected", FORMS)
def test_the_readable_form_runs_in_plain_pytorch(rotation, static, expected):
    model, x = Siblings(rotation, static, bias=True), outlying(2, 5, 96)
    rewrite = capture(model, x)
    apply_until(rewrite, "insert_qdq")
    assert counts(rewrite) == expected and rewrite.counts["insert_qdq"] == 3
    assert len(rewrite.packed_inputs) == 9 + (3 if static else 0)
    assert_true_metadata(rewrite)
    with torch.no_grad():
        for a, b in zip(run(rewrite), model(x)):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)


# rotations, static scales, bias, GEMMs, and then (hadamard, per token, static) nodes
SHARED = {
    "equal scales": ((0, 0, 0), (0.1, 0.1, 0.1), 1, (0, 0, 1)),
    "equal rotations": ((32, 32, 32), (None,) * 3, 1, (1, 1, 0)),
    "both": ((32, 32, 32), (0.1,) * 3, 1, (1, 0, 1)),
    "one scale of its own": ((0, 0, 0), (0.1, 0.2, 0.1), 2, (0, 0, 2)),
    "static and dynamic": ((0, 0, 0), (0.1, None, 0.1), 2, (0, 1, 1)),
    "sizes of their own": ((32, 16, 32), (None,) * 3, 2, (2, 2, 0)),
    "one transform, two quantizers": ((32, 32, 32), (0.1, None, 0.2), 3, (1, 1, 2)),
    "rotated and not": ((32, 0, 0), (0.1,) * 3, 2, (1, 0, 2)),
}


@pytest.mark.parametrize("name", SHARED)
def test_what_is_shared_and_merged(name):
    rotation, static, gemms, nodes = SHARED[name]
    model, x = Siblings(rotation, static, bias=True), outlying(3, 96)
    with torch.no_grad():
        expected = model(x)
    rewrite = capture(model, x)
    apply_passes(rewrite, PASSES)
    assert counts(rewrite) == (*nodes, gemms)
    assert_true_metadata(rewrite)
    assert all(torch.equal(a, b) for a, b in zip(run(rewrite), expected))
    text = rewrite.gm.code
    again = GraphRewrite(rewrite.gm, arguments(rewrite), rewrite.settings)
    apply_passes(again, PASSES)
    assert set(again.counts.values()) == {0} and rewrite.gm.code == text


def test_siblings_get_one_tensor_for_equal_scales_and_a_word_otherwise(caplog):
    model = Siblings(0, (0.1, 0.1, 0.2))
    log_once.cache_clear()
    with caplog.at_level(logging.INFO, "intscale_compile"):
        rewrite = capture(model, outlying(3, 96))
        apply_until(rewrite, "share_quantize")
    first, second, third = (part.weight.activation_scale for part in model.parts)
    assert first is second and third.item() == pytest.approx(0.2)
    assert "parts.0.weight and parts.2.weight read one activation with different static scales" in caplog.text
    assert rewrite.counts["share_quantize"] == 1


def test_writes_in_place_keep_transforms_apart():
    model = Siblings(32, 0.1, sizes=(64, 64))

    def written(x):
        x = x * 1.0
        first = model.parts[0](x)
        x.add_(1.0)
        return first, model.parts[1](x)

    rewrite = capture(written, outlying(3, 96))
    apply_passes(rewrite, PASSES)
    assert counts(rewrite) == (2, 0, 2, 2)


def test_a_transform_on_a_cpu_stays_apart_from_the_quantizer():
    rewrite = capture(Siblings(32), outlying(3, 96))
    apply_passes(rewrite, PASSES)
    assert rewrite.counts["rotate_quantize"] == 0 and count(rewrite, HADAMARD_QUANTIZE_OP) == 0


# --- on a GPU that is not there -----------------------------------------------------------------------------------------


def on_a_gpu(static: bool, between=None, dynamic=False) -> GraphRewrite:
    """hadamard, ``between``, quantize, on fake CUDA tensors; the transform is an output too if ``between`` is "read"."""
    from tests.support import fake_cuda

    shapes = [((6, 96), torch.bfloat16), ((1, 1), torch.float32)]
    (x_value, scale_value), mode = fake_cuda.fake_inputs(shapes, dynamic)
    graph = fx.Graph()
    x, scale = graph.placeholder("x"), graph.placeholder("scale")
    x.meta[EXAMPLE], scale.meta[EXAMPLE] = x_value, scale_value
    output = graph.output(x)
    rewrite = GraphRewrite(fx.GraphModule({}, graph), [x_value, scale_value], parse_options(None, {})[0])
    with graph.inserting_before(output):
        rotated = rewrite.call(HADAMARD_OP, (x, 32))
        if between == "written":
            graph.call_method("add_", (x, 1.0))
        quantized = rewrite.call(STATIC_OP, (rotated, scale)) if static else rewrite.call(QUANTIZE_OP, (rotated,))
        outputs = [rewrite.call(operator.getitem, (quantized, i)) for i in range(2)]
    output.args = ((*outputs, rotated) if between == "read" else tuple(outputs),)
    apply_passes(rewrite, [ROTATE_QUANTIZE])
    return rewrite


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("static", [False, True])
def test_transform_and_quantizer_become_one(static, dynamic):
    pytest.importorskip("triton")
    rewrite = on_a_gpu(static, dynamic=dynamic)
    assert rewrite.counts == {"rotate_quantize": 1} and counts(rewrite) == (0, 0, 0, 0)
    (fused,) = [n for n in rewrite.graph.nodes if n.target is HADAMARD_QUANTIZE_OP]
    inputs = [n for n in rewrite.graph.nodes if n.op == "placeholder"]
    assert fused.args == (inputs[0], 32, inputs[1] if static else None)
    xq, token_scale = fused.meta[EXAMPLE]
    assert xq.dtype == torch.int8 and tuple(token_scale.shape[1:]) == (1,) and xq.device.type == "cuda"
    apply_passes(rewrite, [ROTATE_QUANTIZE])
    assert rewrite.counts == {"rotate_quantize": 1}


def test_a_transform_with_other_readers_stays_as_well():
    """Where autograd watches: the fused linear passes its gradient to it."""
    pytest.importorskip("triton")
    rewrite = on_a_gpu(False, "read")
    assert rewrite.counts == {"rotate_quantize": 1} and counts(rewrite) == (1, 0, 0, 0)


def test_a_transform_whose_input_is_written_since_is_left_alone():
    pytest.importorskip("triton")
    rewrite = on_a_gpu(True, "written")
    assert rewrite.counts == {"rotate_quantize": 0} and counts(rewrite) == (1, 0, 1, 0)


def generate(run, k: int, tokens: int = 8, dynamic: bool = False) -> tuple[str, dict[str, str]]:
    """Inductor's code and its Triton kernels for ``run(x, norm, scale, qdata, scales, row_scale)`` on a fake H100."""
    pytest.importorskip("triton")
    from tests.support import fake_cuda

    ops.register_inductor()
    shapes = [((tokens, k), torch.bfloat16), ((k,), torch.bfloat16), ((1, 1), torch.float32), *weight_shapes(128, k)]
    code = fake_cuda.generate(run, *fake_cuda.fake_inputs(shapes, dynamic), **inductor_defaults(()))
    return code, fake_cuda.triton_sources(code)


def product(xq, token_scale, *weight):
    return LINEAR_OP(xq, token_scale, *weight, None, 128, 128, 4, "tiled", torch.bfloat16, ops.KERNEL_ABI)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("static", [False, True])
def test_one_launch_before_the_gemm(static, dynamic):
    def run(x, norm, scale, *weight):
        return product(*HADAMARD_QUANTIZE_OP(x, 256, scale if static else None), *weight)

    code, kernels = generate(run, 512, dynamic=dynamic)
    assert code.count("torch.ops.intscale.hadamard_quantize.default(") == 1 and len(kernels) == 1
    assert "triton_tem" in next(iter(kernels))


@pytest.mark.parametrize("producer", ["norm", "silu"])
def test_static_quantization_joins_its_producer(producer):
    """One kernel before the GEMM, in one pass over its row where nothing else needs two."""

    def run(x, norm, scale, *weight):
        if producer == "norm":
            wide = x.float()
            y = (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)).to(x.dtype) * norm
        else:
            y = F.silu(x) * norm
        return product(*STATIC_OP(y, scale), *weight)

    _, kernels = generate(run, 4096)
    assert len(kernels) == 2 and sum("triton_tem" in name for name in kernels) == 1
    (source,) = [source for name, source in kernels.items() if "triton_tem" not in name]
    assert source.count("for r0_offset") == (2 if producer == "norm" else 1) and "libdevice.nearbyint" in source
