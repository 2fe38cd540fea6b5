"""What Inductor generates for the W4A8 ops on a GPU, checked without one: kernel counts, assembly, and values."""

from __future__ import annotations

import json
from unittest import mock

import pytest
import torch

pytest.importorskip("triton")
from intscale_compile import format as fmt
from intscale_compile import ops
from intscale_compile.compile.inductor_settings import code_generation, inductor_defaults
from tests.support import fake_cuda, forks, interpreter_works, sass

pytestmark = pytest.mark.generated

HIDDEN, INTERMEDIATE = 4096, 11008  # deep enough that ptxas keeps the K loop
quantize = torch.ops.intscale.quantize_per_token
linear = torch.ops.intscale.w4a8_linear
accumulate = torch.ops.intscale.w4a8_accumulate


@pytest.fixture(autouse=True, scope="module")
def lowerings():
    ops.register_inductor()


def weight_shapes(n: int, k: int, group_size: int = 128, packing: str = "tiled"):
    """Shapes and dtypes of qdata, scale and row_scale."""
    rows = fmt.padded_out_features(n) if packing == "tiled" else n
    packed, groups = fmt.padded_in_features(k, group_size) // 2, fmt.num_groups(k, group_size)
    return [((rows, packed), torch.uint8), ((rows, groups), torch.uint8), ((n, 1), torch.float32)]


def llama_mlp(x, norm, gate_up_q, gate_up_s, gate_up_r, down_q, down_s, down_r):
    """RMSNorm, merged gate and up projections, SiLU * mul, down projection, residual."""
    arguments = (128, 4, "tiled", x.dtype, ops.KERNEL_ABI)
    wide = x.float()
    h = (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)).to(x.dtype) * norm
    gate, up = linear(*quantize(h), gate_up_q, gate_up_s, gate_up_r, None, 2 * INTERMEDIATE, *arguments, h).chunk(2, -1)
    z = torch.nn.functional.silu(gate) * up
    return x + linear(*quantize(z), down_q, down_s, down_r, None, HIDDEN, *arguments, z)


def generate_mlp(lead: tuple[int, ...], dynamic: bool) -> dict[str, str]:
    shapes = [((*lead, HIDDEN), torch.bfloat16), ((HIDDEN,), torch.bfloat16)]
    shapes += weight_shapes(2 * INTERMEDIATE, HIDDEN) + weight_shapes(HIDDEN, INTERMEDIATE)
    tensors, mode = fake_cuda.fake_inputs(shapes, dynamic)
    with fake_cuda.fake_cuda():
        defaults = inductor_defaults(tensors)
    with code_generation():
        return fake_cuda.triton_sources(fake_cuda.generate(llama_mlp, tensors, mode, **defaults))


@pytest.mark.parametrize(
    "lead, dynamic",
    [((1,), False), ((3, 8), True)]
    + [
        pytest.param(*case, marks=pytest.mark.slow)
        for case in (((256,), False), ((64,), False), ((30,), True), ((2, 32), False))
    ],
)
def test_llama_mlp_is_four_kernels(lead, dynamic, tmp_path):
    sources = generate_mlp(lead, dynamic)
    assert len(sources) == 4, list(sources)
    templates = {name: source for name, source in sources.items() if "triton_tem" in name}
    assert len(templates) == 2, list(sources)
    if lead == (64,) or dynamic:
        # Quick: the product with the residual behind it.
        for name, source in list(templates.items())[1 if lead == (3, 8) else 0 :]:
            function, arguments = fake_cuda.load_kernel(name, source, tmp_path)
            code = sass.disassemble(sass.assemble_generated(function, arguments))
            body = code.k_loop()
            assert code.count("IGMMA", body) > 0 and code.count("I2F", body) + code.count("I2FP", body) == 0
            assert code.spill_bytes == 0


def test_bias_is_added_before_the_only_rounding():
    def run(xq, token_scale, *weight):
        return linear(xq, token_scale, *weight, 128, 128, 4, "tiled", torch.bfloat16, ops.KERNEL_ABI)

    shapes = [((8, 256), torch.int8), ((8, 1), torch.float32), *weight_shapes(128, 256), ((128,), torch.bfloat16)]
    (source,) = fake_cuda.triton_sources(fake_cuda.generate(run, *fake_cuda.fake_inputs(shapes))).values()
    kernel = source[source.index("def triton_tem") : source.index("def tile_position")]
    # The rounding stands in the template, so that a value does not depend on what Inductor fuses behind it.
    order = [kernel.index(text) for text in ("add_bias(", ".to(OUT_DTYPE)", "tl.store")]
    assert order == sorted(order) and kernel.count(".to(OUT_DTYPE)") == 1 and kernel.count("bfloat16") == 1


@pytest.mark.parametrize(
    "tokens, cudagraphs, dynamic, called",
    [
        (64, False, False, False), (64, True, False, True), (511, False, False, False), (512, False, False, True),
        (31, False, True, False), (32, False, True, True),
    ],
)  # fmt: skip
def test_the_op_is_called_where_gluon_pays(tokens, cudagraphs, dynamic, called):
    """With CUDA graphs, for a GEMM longer than a launch, or where other numbers of tokens follow; always with overlap."""

    def run(x, *weight):
        return linear(*quantize(x), *weight, None, 128, 128, 4, "tiled", torch.bfloat16, ops.KERNEL_ABI, None, True)

    shapes = [((tokens, 256), torch.bfloat16), *weight_shapes(128, 256)]
    with mock.patch("intscale_compile.kernels.template.gluon_obstacle", return_value=None):
        code = fake_cuda.generate(run, *fake_cuda.fake_inputs(shapes, dynamic), **{"triton.cudagraphs": cudagraphs})
    calls = [line for line in code.splitlines() if "torch.ops.intscale.w4a8_linear.default(" in line]
    assert len(calls) == called
    assert any("triton_tem" in name for name in fake_cuda.triton_sources(code)) != called
    assert not called or calls[0].rstrip().endswith(("None, True)", "None, True, None)"))


@pytest.mark.parametrize(
    "tokens, cudagraphs, out_features, called",
    [
        (1, True, 128, True),
        (64, True, 128, True),
        (65, True, 128, False),
        (1, False, 128, False),
        (17, True, 1 << 17, False),
    ],
)
def test_the_op_is_called_where_programs_share_k(tokens, cudagraphs, out_features, called):
    """Without Gluon: few tokens, CUDA graphs, and fewer tiles than SMs or a word of scales."""
    from intscale_compile.kernels.template import op_is_faster

    features, dtypes = (4096, out_features), (torch.uint8, torch.uint8)
    with mock.patch("intscale_compile.kernels.template.gluon_obstacle", return_value="an older GPU"):
        form = (128, 4, "tiled", torch.device("cuda"), False)
        assert op_is_faster(tokens, cudagraphs, *features, dtypes, *form) == called


def test_straight_through_input_is_not_computed():
    def run(x, *weight):
        source = torch.relu(x) * 3
        return linear(*quantize(x), *weight, None, 128, 128, 4, "tiled", torch.bfloat16, ops.KERNEL_ABI, source)

    shapes = [((8, 256), torch.bfloat16), *weight_shapes(128, 256)]
    code = fake_cuda.generate(run, *fake_cuda.fake_inputs(shapes))
    assert len(fake_cuda.triton_sources(code)) == 2 and "* 3" not in code


def test_no_rows_is_no_kernel():
    shapes = [((0, 256), torch.int8), *weight_shapes(128, 256)[:2]]
    run = _accumulate_only(128, 128, 4, "tiled")
    code = fake_cuda.generate(run, *fake_cuda.fake_inputs(shapes))
    assert not any("triton_tem" in name for name in fake_cuda.triton_sources(code))


def test_generated_source_is_self_contained():
    sources = generate_mlp((16,), False)
    for name, source in sources.items():
        if "triton_tem" in name:
            assert "intscale_compile" not in source.replace("intscale_compile/", "")
            assert "def accumulate_tile" in source and "def fold_codes" in source


def _accumulate_only(n, group_size, scale_bits, packing):
    def run(xq, qdata, scale, *zero_point):
        return accumulate(xq, qdata, scale, n, group_size, scale_bits, packing, ops.KERNEL_ABI, *zero_point) + 1

    return run


def _linear_with_epilogue(n, group_size, scale_bits, packing):
    def run(xq, token_scale, qdata, scale, row_scale, bias, residual, *zero_point):
        arguments = (n, group_size, scale_bits, packing, torch.float32, ops.KERNEL_ABI, None, False)
        return residual + linear(xq, token_scale, qdata, scale, row_scale, bias, *arguments, *zero_point)

    return run


# m, n, k, group_size, scale_bits, packing, dynamic m, and whether there are zero points
INTERPRETED = [
    ("accumulate", 70, 200, 512, 128, 4, "tiled", False),
    ("accumulate", 70, 200, 512, 128, 4, "tiled", True),
    ("accumulate", 5, 77, 300, 32, 8, "plain", True),
    ("accumulate", 17, 130, 520, -1, 4, "tiled", False),
    ("linear", 70, 200, 512, 128, 4, "tiled", False),
    ("linear", 5, 77, 300, 32, 4, "plain", False),
    ("linear", 33, 64, 768, 256, 8, "tiled", False),
    ("accumulate", 70, 200, 512, 128, 4, "tiled", False, True),
    ("linear", 5, 77, 300, 32, 8, "plain", True, True),
    ("linear", 17, 130, 520, -1, 1, "tiled", False, True),
]


def generate_case(op, m, n, k, group_size, scale_bits, packing, dynamic, asymmetric=False) -> dict:
    """Generate the one kernel of a case; the request that ``_generated_main`` takes."""
    qdata, scale, row_scale = weight_shapes(n, k, group_size, packing)
    xq, token_scale, bias = ((m, k), torch.int8), ((m, 1), torch.float32), ((n,), torch.float32)
    if op == "accumulate":
        run, shapes = _accumulate_only(n, group_size, scale_bits, packing), [xq, qdata, scale]
    else:
        run = _linear_with_epilogue(n, group_size, scale_bits, packing)
        shapes = [xq, token_scale, qdata, scale, row_scale, bias, ((m, n), torch.float32)]
    shapes += [(scale[0], torch.int8)] if asymmetric else []
    with mock.patch("intscale_compile.kernels.template.use_ptx", lambda device: False):
        code = fake_cuda.generate(run, *fake_cuda.fake_inputs(shapes, dynamic))
    ((name, source),) = fake_cuda.triton_sources(code).items()
    form = dict(group_size=group_size, scale_bits=scale_bits, packing=packing, asymmetric=asymmetric)
    problem = dict(m=m, n=n, k=k, **form)
    return dict(op=op, name=name, source=source, problem=problem)


@pytest.fixture(scope="module")
def interpreted(lowerings) -> list[str | None]:
    """Error of each case of INTERPRETED, run in one process of its own (see ``_interpreter_main``)."""
    requests = json.dumps([generate_case(*case) for case in INTERPRETED])
    done = forks.run("interpreter", "tests.kernels._generated_main", input=requests, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@interpreter_works
@pytest.mark.parametrize("index", range(len(INTERPRETED)), ids=[str(case) for case in INTERPRETED])
def test_generated_kernel_computes_the_reference(interpreted, index):
    """The generated kernel, epilogue included, in Triton's interpreter."""
    assert interpreted[index] is None, interpreted[index]
