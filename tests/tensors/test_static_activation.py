"""Static activation scales and rotated weights: eager, compiled and by the definition, to the bit."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from intscale_compile import IntScaleTensor, explain, load_safetensors, save_safetensors
from intscale_compile.errors import CompileError, InputError
from intscale_compile.kernels.hadamard import hadamard_transform
from intscale_compile.kernels.quantize_static import STATIC_OP
from intscale_compile.tensors.experts import grouped_linear
from intscale_compile.tensors.linear import linear
from tests.support.compiled import rewritten
from tests.support.static import FORMATS, Siblings, outlying, prepared

CASES = [(0, 0.05), (32, None), (32, 0.05)]  # rotation, static scale
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def compiled(function):
    """The rewritten graph, op by op."""
    torch._dynamo.reset()
    return rewritten(function)


def through_inductor(function, **options):
    torch._dynamo.reset()
    return torch.compile(function, backend="intscale", **options)


# --- the quantizer ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_quantizer_is_the_documented_one(dtype):
    x, scale = outlying(40, 333, dtype=dtype), torch.full((1, 1), 0.0625)  # a power of two: the quotient is exact
    xq, token_scale = STATIC_OP(x, scale)
    assert xq.dtype == torch.int8 and token_scale.shape == (40, 1) and torch.equal(token_scale, scale.expand(40, 1))
    exact = (x.double() * 16).round().clamp(-127, 127)
    assert torch.equal(xq.double(), exact) and (xq.abs() == 127).any() and xq.min() >= -127


def test_quantizer_at_the_ends_of_fp32():
    x = torch.tensor([[3.4e38, -3.4e38, 0.0, 0.5, 1.5, -2.5, 1e-45]])
    assert STATIC_OP(x, torch.ones(1, 1))[0].tolist() == [[127, -127, 0, 0, 2, -2, 0]]  # ties to even
    xq, token_scale = STATIC_OP(x, torch.full((1, 1), 1e-44))  # its reciprocal is not finite
    assert xq[0, :3].tolist() == [127, -127, 0] and token_scale.isfinite().all()


@pytest.mark.parametrize("rotation, static", CASES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_rows_that_are_not_finite_stay_alone(bad, rotation, static):
    weight, x = prepared(torch.randn(64, 96), rotation, static), outlying(6, 96)
    clean = F.linear(x, weight)
    x[1, 7], x[4, 0] = bad, bad
    x[4, 95] = 1e38
    with torch.no_grad():
        compiles = bad != bad and rotation and static
        found = [F.linear(x, weight), compiled(F.linear)(x, weight)] if compiles else [F.linear(x, weight)]
    for y in found:
        assert y[[1, 4]].isnan().all() and torch.equal(y[[0, 2, 3, 5]], clean[[0, 2, 3, 5]])


@pytest.mark.parametrize("rotation, static", CASES)
def test_large_entries_saturate_and_zero_rows_are_zero(rotation, static):
    weight, x = prepared(torch.randn(64, 96), rotation, static), outlying(3, 96)
    x[0], x[2, 5] = 0.0, 1e30
    y = F.linear(x, weight)
    assert not y[0].any() and y.isfinite().all()


def test_scales_that_do_not_fit():
    x = torch.randn(4, 32)
    with pytest.raises(InputError, match="activation scale is torch.float64"):
        STATIC_OP(x, torch.ones(1, 1).double())
    with pytest.raises(InputError, match=r"shape \(3, 1\)"):
        STATIC_OP(x, torch.ones(3, 1))
    with pytest.raises(InputError, match="int32"):
        STATIC_OP(x.int(), torch.ones(1, 1))


@pytest.mark.parametrize("shape", [(3, 64), (2, 3, 64), (64,)])
def test_opcheck(shape):
    x = torch.randn(shape)
    torch.library.opcheck(STATIC_OP, (x, torch.full((1, 1), 0.1)))
    torch.library.opcheck(STATIC_OP, (x, torch.rand((*shape[:-1], 1)) + 0.1))


# --- the layer ----------------------------------------------------------------------------------------------------------


def by_definition(x, weight: IntScaleTensor, bias=None):
    """The layer in int64 and the documented order of operations."""
    x = hadamard_transform(x, weight.rotation) if weight.rotation else x
    wide = x.float()
    if weight.activation_scale is None:
        amax = wide.abs().amax(-1, keepdim=True)
        token_scale, factor = amax * (1.0 / 127.0), 127.0 / amax
    else:
        token_scale, factor = weight.activation_scale.view(()), 1.0 / weight.activation_scale.view(())
    xq = (wide * factor).round().clamp(-127, 127).long()
    groups = weight.group_scale.shape[-1]
    width = weight.in_features if groups == 1 else weight.group_size
    scales = weight.group_scale.long().repeat_interleave(width, dim=-1)[:, : weight.in_features]
    integers = weight.codes.long() * scales
    y = (xq @ integers.t()).float() * token_scale * weight.row_scale.view(-1)
    return (y if bias is None else y + bias.float()).to(x.dtype)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("rotation, static", CASES)
def test_eager_is_the_definition(name, rotation, static):
    weight, bias = prepared(torch.randn(72, 96), rotation, static, FORMATS[name]), torch.randn(72)
    for dtype in DTYPES:
        x = outlying(2, 5, 96, dtype=dtype)
        for b in (None, bias.to(dtype)):
            assert torch.equal(linear(x, weight, b), by_definition(x, weight, b))
            assert torch.equal(F.linear(x, weight.to_packing("tiled"), b), by_definition(x, weight, b))


@pytest.mark.parametrize(
    "rotation, static, backend",
    [
        *((*case, "rewritten") for case in CASES[:-1]),
        (*CASES[-1], "intscale"),
        *(pytest.param(*case, "inductor", marks=pytest.mark.slow) for case in CASES[:-1]),
        (*CASES[-1], "inductor"),
    ],
)
def test_compiled_with_a_producer_is_near_eager(rotation, static, backend):
    """silu differs in the last bit, and codes then by one; also the backend that knows nothing of our passes."""
    torch._dynamo.reset()
    model, x = Siblings(rotation, static, bias=True), outlying(5, 96)
    with torch.no_grad():
        function = lambda x: model(F.silu(x) * 2)  # noqa: E731
        run = rewritten(function) if backend == "rewritten" else torch.compile(function, backend=backend)
        found = run(x)
        for a, b in zip(found, model(F.silu(x) * 2)):
            assert (a - b).norm() <= 2e-3 * b.norm()


@pytest.mark.parametrize(
    "rotation, static, dtype",
    [
        *((*case, torch.float32) for case in CASES[:-1]),
        pytest.param(*CASES[-1], torch.float32, marks=pytest.mark.vectorized),
        (*CASES[-1], torch.bfloat16),
    ],
)
def test_compiled_is_eager_to_the_bit(rotation, static, dtype, request):
    """Where the activation itself has the same bits; any number of tokens in one graph. With Inductor where it writes C++."""
    inductor = request.node.get_closest_marker("vectorized") is not None
    model = Siblings(rotation, static, bias=True, config=FORMATS["w8a8"] if static and rotation else None)
    run = through_inductor(model, dynamic=True) if inductor else compiled(model)
    for tokens in (5, 17) if inductor else (1, 5, 17):
        x = outlying(tokens, 96, dtype=dtype)
        with torch.no_grad():
            assert all(torch.equal(a, b) for a, b in zip(run(x), model(x)))


def test_rotated_product_is_the_product():
    """In high precision the rotation cancels; quantized, it is closer to the original where there are outliers."""
    weight, x = torch.randn(64, 256), torch.randn(20, 256)
    x[:, 17] *= 60.0
    exact = x.double() @ weight.double().t()
    rotated = hadamard_transform(x, 256) @ hadamard_transform(weight, 256).t()
    assert (rotated - exact).norm() <= 1e-6 * exact.norm()
    config = FORMATS["w8a8"]
    plain, turned = (F.linear(x, prepared(weight, r, None, config)) for r in (0, 256))
    errors = [(y - exact).norm() / exact.norm() for y in (plain, turned)]
    assert errors[1] < 0.02 and errors[1] < 0.5 * errors[0], errors


@pytest.mark.parametrize("rotation, static", CASES)
def test_gradients_go_straight_through(rotation, static):
    model = Siblings(rotation, static, bias=True)
    dense = torch.cat([part.weight.dequantize() for part in model.parts])
    grad = torch.randn(5, dense.shape[0])
    for run in (model, through_inductor(model) if rotation and static else compiled(model)):
        x = outlying(5, 96).requires_grad_()
        y = torch.cat(run(x), dim=-1)
        with torch.no_grad():
            assert torch.equal(y, torch.cat(model(x), dim=-1))
        y.backward(grad)
        torch.testing.assert_close(x.grad, grad @ dense, rtol=1e-4, atol=1e-5)


# --- scales that siblings share -----------------------------------------------------------------------------------------


def expect(run, model, x):
    with torch.no_grad():
        found = run(x)
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(found, model(x)))


def rescaled(model, *scales) -> dict:
    """A state dict of ``model`` with other activation scales."""
    state = model.state_dict()
    pairs = zip(list(state), scales)
    return state | {name: state[name].with_activation_scale(scale) for name, scale in pairs}


def test_saved_siblings_are_merged_and_keep_their_bits(tmp_path):
    model, x = Siblings(32, 0.05), outlying(5, 96)
    with torch.no_grad():
        expected = model(x)
    torch.save(model.state_dict(), tmp_path / "state.pt")
    save_safetensors(model, tmp_path / "model.safetensors")
    first, second = Siblings(32, 0.05), Siblings(32, 0.05)
    first.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    second.load_state_dict(load_safetensors(tmp_path / "model.safetensors"), assign=True)
    for loaded in (first, second, copy.deepcopy(model)):
        weights = [part.weight for part in loaded.parts]
        assert all(w.rotation == 32 and torch.equal(w.activation_scale, torch.full((1, 1), 0.05)) for w in weights)
        report = explain(loaded, x)
        assert report.gemms == report.activation_quantizations == 1
        with torch.no_grad():
            assert all(torch.equal(a, b) for a, b in zip(compiled(loaded)(x), expected))


def test_new_scales_are_seen():
    """A graph follows its weights: a new scale for all siblings, by exchange of the state and in place."""
    model, x = Siblings(0, 0.05), outlying(5, 96)
    run = compiled(model)
    expect(run, model, x)
    model.load_state_dict(rescaled(model, 0.09, 0.09, 0.09))
    expect(run, model, x)
    assert len({id(part.weight.activation_scale) for part in model.parts}) == 1, "one tensor for all siblings"
    model.parts[1].weight.activation_scale.mul_(2)
    expect(run, model, x)
    assert model.parts[0].weight.activation_scale.item() == pytest.approx(0.18)


def test_scales_that_part_are_an_error_not_a_wrong_result():
    model, x = Siblings(0, 0.05), outlying(5, 96)
    run = compiled(model)
    expect(run, model, x)
    model.load_state_dict(rescaled(model, 0.05, 0.2, 0.05))
    assert [part.weight.activation_scale.item() for part in model.parts] == pytest.approx([0.05, 0.2, 0.05])
    with (
        pytest.raises(CompileError, match=r"parts.*static activation scale.*calibrate them on one input"),
        torch.no_grad(),
    ):
        run(x)
    expect(compiled(model), model, x)


@pytest.mark.parametrize("change", ["static", "dynamic", "rotation"])
def test_a_graph_does_not_serve_other_forms(change):
    """Dynamo compiles again for a weight of another form."""
    layer = Siblings(0 if change == "rotation" else 32, None if change == "static" else 0.05, sizes=(64,))
    x = outlying(5, 96)
    run = compiled(layer)
    expect(run, layer, x)
    other = Siblings(32, None if change == "dynamic" else 0.05, sizes=(64,))
    layer.parts[0].weight = other.parts[0].weight
    expect(run, layer, x)
    with torch.no_grad():
        assert torch.equal(layer(x)[0], other(x)[0])


# --- experts ------------------------------------------------------------------------------------------------------------


def stack(rotation: int, static: bool) -> IntScaleTensor:
    scales = (torch.rand(4, 1, 1) + 0.5) * 0.05 if static else None
    return prepared(torch.randn(4, 32, 96), rotation, scales)


@pytest.mark.parametrize("gather", [False, True])
@pytest.mark.parametrize("rotation, static", [(32, False), (0, True), (32, True)])
def test_experts_have_scales_of_their_own(rotation, static, gather):
    """Each position as a linear layer of its expert; positions behind the last are zeros."""
    weight, offsets = stack(rotation, static), torch.tensor([2, 2, 7, 9], dtype=torch.int32)
    x = outlying(6 if gather else 10, 96)
    row_index = torch.randint(0, 6, (10,)) if gather else None
    found = grouped_linear(x, weight, offsets, row_index=row_index)
    experts = [0, 0, 2, 2, 2, 2, 2, 3, 3]
    for position, expert in enumerate(experts):
        row = x[position if row_index is None else row_index[position]]
        assert torch.equal(found[position], linear(row, weight[expert])), position
    assert not found[9].any()


@pytest.mark.parametrize("rotation, static", [pytest.param(32, False, marks=pytest.mark.slow), (32, True)])
@pytest.mark.parametrize("form", ["gathered", "in order", "chosen"])
def test_compiled_experts(form, rotation, static):
    weight = stack(rotation, static).transpose(-2, -1)
    offsets, ids = torch.tensor([2, 2, 7, 10], dtype=torch.int32), torch.tensor([3, 0, 0, 2, 1, 3])
    rows = torch.randint(0, 6, (10,))

    def model(x):
        if form == "gathered":
            return F.grouped_mm(x[rows], weight, offs=offsets)
        if form == "in order":
            return torch.bmm(x[:4].unsqueeze(1).expand(-1, 3, -1), weight)
        return torch.bmm(x.unsqueeze(1), weight[ids])

    x = outlying(6, 96, dtype=torch.bfloat16 if form == "gathered" else torch.float32)
    with torch.no_grad():
        expected = model(x)
        run = through_inductor(model, fullgraph=True) if form == "gathered" else compiled(model)
        assert torch.equal(run(x), expected)


# --- explain ------------------------------------------------------------------------------------------------------------


def test_explain_says_how_activations_are_quantized():
    model = Siblings((0, 32, 32), (0.1, None, 0.1))
    report = explain(model, outlying(5, 96))
    assert [layer.activation for layer in report.layers] == ["static", "hadamard 32, per token", "hadamard 32, static"]
    assert "hadamard 32, static" in str(report)
    assert report.gemms == report.activation_quantizations == 3
