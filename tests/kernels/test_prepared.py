"""Prepared launches: what the driver is given, on a CPU with a driver that starts nothing (``support.fake_driver``)."""

from __future__ import annotations

import copy
import shutil
import threading

import pytest
import torch
from torchao.quantization import quantize_

pytest.importorskip("triton")
from intscale_compile import IntScaleConfig, IntScaleTensor  # noqa: E402
from intscale_compile.kernels import (  # noqa: E402
    gluon_grouped_launch,
    gluon_launch,
    prepared,
    split_k,
    tile_tables,
    triton_gemm,
    triton_grouped,
)
from intscale_compile.kernels.c_launcher import CannotPrepare  # noqa: E402
from intscale_compile.kernels.tiles import Tile  # noqa: E402
from intscale_compile.tensors import eager, experts  # noqa: E402
from intscale_compile.tensors.linear import linear  # noqa: E402

if shutil.which("gcc") is None:
    pytest.skip("no C compiler", allow_module_level=True)
from tests.support.fake_driver import FakeDriver  # noqa: E402

N, K = 192, 1024


@pytest.fixture(scope="module")
def made():
    return FakeDriver()


@pytest.fixture
def driver(made, monkeypatch):
    made.install(monkeypatch)
    made.compilations, made.extra = 0, (8, 8)
    yield made
    prepared.forget_all()


def weight(packing="tiled", **config):
    torch.manual_seed(0)
    return IntScaleTensor.from_hp(torch.randn(N, K), IntScaleConfig(packing_format=packing, **config))


def test_linear_is_two_launches_with_the_addresses_of_this_call(driver):
    w, bias = weight(), torch.randn(N, dtype=torch.bfloat16)
    for rows in (2, 2, 48):
        x = torch.randn(3, rows, K, dtype=torch.bfloat16)
        y = linear(x, w, bias)
        quantize, gemm = driver.started()
        assert y.shape == (3, rows, N) and y.dtype == torch.bfloat16
        assert quantize.kernel == "quantize_kernel" and quantize.grid == (3 * rows, 1, 1) and quantize.stream == 7
        assert quantize.arguments["x_ptr"] == x.data_ptr()
        few = 3 * rows <= 64  # then programs share the sum over K
        assert gemm.kernel == ("w4a8_split_kernel" if few else "w4a8_kernel") and gemm.grid[0] >= 3
        assert gemm.threads == 128 and not gemm.overlap
        arguments = gemm.arguments
        assert not few or (arguments["parts_ptr"] and arguments["counters_ptr"])
        assert arguments["xq_ptr"] == quantize.arguments["xq_ptr"] and arguments["xq_ptr"] % 64 == 0
        assert arguments["token_scale_ptr"] == quantize.arguments["scale_ptr"]
        assert abs(arguments["token_scale_ptr"] - arguments["xq_ptr"]) >= 3 * rows * K * (
            arguments["token_scale_ptr"] > arguments["xq_ptr"]
        )
        assert [arguments[name] for name in ("qdata_ptr", "scale_ptr", "row_scale_ptr", "bias_ptr", "out_ptr")] == [
            t.data_ptr() for t in (w.qdata, w.scale, w.per_tensor_scale, bias, y)
        ]
        assert (arguments["M"], arguments["N"], arguments["K"], arguments["xq_stride"]) == (3 * rows, N, K, K)
    assert driver.compilations == 4, "the second call compiled something"


def test_weights_of_one_form_share_a_sequence_and_keep_their_own_addresses(driver):
    first, second = weight(), weight()
    x = torch.randn(4, K)
    for w in (first, second):
        linear(x, w, None)
        assert driver.started()[1].arguments["qdata_ptr"] == w.qdata.data_ptr()
    assert driver.compilations == 2


def test_exchanged_and_rewritten_parts_are_noticed(driver):
    """Every way to change a weight behind its back that leaves it a weight of this shape."""
    w, x = weight(), torch.randn(4, K)

    def seen():
        linear(x, w, None)
        arguments = driver.started()[1].arguments
        return [arguments[name] for name in ("qdata_ptr", "scale_ptr", "row_scale_ptr")]

    def now():
        return [t.data_ptr() for t in (w.qdata, w.scale, w.per_tensor_scale)]

    assert seen() == now()
    w.qdata = w.qdata.clone()
    assert seen() == now()
    w.scale.data = w.scale.data.clone()
    assert seen() == now()
    w.per_tensor_scale.set_(w.per_tensor_scale.clone())
    assert seen() == now()
    other = weight()
    torch.utils.swap_tensors(w, other)
    assert seen() == now()
    w.copy_(other)
    assert seen() == now()
    wide = torch.zeros(w.qdata.shape[0], 2 * w.qdata.shape[1], dtype=torch.uint8)
    wide[:, ::2] = w.qdata
    w.qdata.data = wide[:, ::2]  # rows with gaps, which the kernels do not read: the ordinary path copies them
    with pytest.raises(Exception):  # noqa: B017  (Triton finds no GPU here)
        linear(x, w, None)


def test_what_is_kept_is_neither_copied_nor_stored(driver):
    w = weight()
    linear(torch.randn(4, K), w, None)
    assert "_eager" in w.__dict__
    for other in (copy.deepcopy(w), w.detach(), w.to_packing("plain")):
        assert other.__dict__.get("_eager") is None
    assert "_eager" not in w.__getstate__()


def test_forms_of_activation_and_weight(driver):
    x = torch.randn(6, K)
    cases = {
        "static": weight().with_activation_scale(0.02), "rotated": weight().with_rotation(64),
        "8 bits": weight(weight_bits=8, group_size=-1), "per channel": weight(group_size=-1),
        "plain packing": weight("plain"),
    }  # fmt: skip
    for name, w in cases.items():
        linear(x, w, None)
        quantize, gemm = driver.started()
        expected = "quantize_kernel" if w.activation_scale is None and not w.rotation else "hadamard_quantize_kernel"
        assert (quantize.kernel, gemm.kernel) == (expected, "w4a8_split_kernel"), name
        if w.activation_scale is not None:
            assert quantize.arguments["activation_scale_ptr"] == w.activation_scale.data_ptr()


def test_the_activation_may_have_gaps(driver):
    wide = torch.randn(6, 2 * K)
    linear(wide[:, :K], weight(), None)
    quantize, _ = driver.started()
    assert quantize.arguments["x_stride"] == K and quantize.arguments["x_ptr"] != wide.data_ptr()


def gluon_tile(monkeypatch, tile):
    monkeypatch.setattr(triton_gemm, "pick_tile", lambda *_: tile)
    monkeypatch.setattr(gluon_launch, "sm_count", lambda device: 132)


@pytest.mark.parametrize(
    "tile",
    [Tile(16, 64, kernel="decode"), Tile(64, 64, kernel="specialized"), Tile(128, 64, kernel="pipelined", split_k=2)],
    ids=lambda tile: tile.kernel,
)
def test_tensor_maps_move_to_the_addresses_of_the_call(driver, monkeypatch, tile):
    pytest.importorskip("triton.experimental.gluon.nvidia.hopper")
    if gluon_launch.missing_feature(90) is not None:
        monkeypatch.setattr(triton_gemm, "gluon_obstacle", lambda *_: "other Triton")
    gluon_tile(monkeypatch, tile)
    rows = 32
    taken = []
    monkeypatch.setattr(prepared, "take_counters", lambda device, count: taken.append(torch.zeros(count)) or taken[-1])
    for w in (weight(), weight()):
        x = torch.randn(rows, K)
        y = linear(x, w, None)
        quantize, gemm = driver.started()
        arguments = gemm.arguments
        maps = {name: value for name, value in arguments.items() if isinstance(value, tuple)}
        assert [values[0] for values in maps.values()] == [
            quantize.arguments["xq_ptr"], w.qdata.data_ptr(), w.scale.data_ptr(),
        ]  # fmt: skip
        assert arguments["out_ptr"] == y.data_ptr()
        if tile.split_k > 1:
            assert arguments["counter_ptr"] == taken[-1].data_ptr()
            assert arguments["partial_ptr"] != quantize.arguments["xq_ptr"]
    assert driver.compilations == 2


def test_new_tables_of_tiles_are_followed(driver):
    w, x = weight(), torch.randn(4, K)
    linear(x, w, None)
    tile_tables.reload()
    linear(x, w, None)
    assert driver.compilations == 4


def test_ordinary_path_where_more_than_the_result_is_wanted(driver):
    from torch.utils.flop_counter import FlopCounterMode

    w, x = weight(), torch.randn(4, K)
    with FlopCounterMode(display=False):
        assert eager.eager_linear(x, w, None) is None
    assert eager.eager_linear(x.requires_grad_(), w, None) is None
    with torch.no_grad():
        assert eager.eager_linear(x, w, None) is not None
    assert eager.eager_linear(x.detach(), w, torch.zeros(N + 1)) is None
    assert eager.eager_linear(x.detach()[:, 1:], w, None) is None
    seen = []
    torch.vmap(lambda row: seen.append(eager.eager_linear(row, w, None)) or row)(x.detach())
    assert seen == [None]


def test_errors_are_those_of_the_ordinary_path(driver):
    from intscale_compile.errors import InputError

    with pytest.raises(InputError, match="features"):
        linear(torch.randn(4, K + 1), weight(), None)
    with pytest.raises(InputError, match="bias"):
        linear(torch.randn(4, K), weight(), torch.zeros(3))


def test_a_refused_launch_is_an_error(driver, monkeypatch):
    w, x = weight(), torch.randn(4, K)
    compile_kernel = driver.compile

    def refused(*args):
        compiled = compile_kernel(*args)
        driver.kernels[255] = driver.kernels[compiled.function]
        compiled.function = 255
        return compiled

    monkeypatch.setattr(prepared, "_compiled", refused)
    driver.extra = ()
    with pytest.raises(Exception):  # noqa: B017
        linear(x, w, None)


def test_other_parameters_than_expected_are_not_started(driver):
    """A release of Triton that passes something else: the driver says so, and the ordinary path is taken."""
    made_by = driver.library
    x = torch.randn(4, K)
    for extra in ((4,), (8, 8, 8)):
        driver.extra = extra
        with pytest.raises(CannotPrepare, match="other parameters"):
            prepared.prepare(eager.linear_from_activation, arguments(x, weight()), made_by)
    assert driver.started() == []


def arguments(x, w):
    return (x, *eager.WeightForm(w).parts, None, *eager.WeightForm(w).numbers, x.dtype)


@pytest.mark.parametrize(
    ("function", "why"),
    [
        (lambda x: x + 1, "aten.add"),
        (lambda x: x, "did not allocate"),
        (lambda x: torch.empty(4), "no kernel"),
        (lambda x: torch.empty(4).copy_(x), "copy_"),
    ],
)
def test_functions_that_do_more_than_launch(driver, function, why):
    with pytest.raises(CannotPrepare, match=why):
        prepared.prepare(function, (torch.ones(4),), driver.library)


def test_operands_that_share_memory_keep_their_places(driver):
    """The first call gives one tensor twice; a later one of that form gives two."""
    stack = torch.stack([torch.randn(N, K)] * 2)
    w = IntScaleTensor.from_hp(stack, IntScaleConfig(packing_format="tiled"))
    x, offsets = torch.randn(4, K), torch.tensor([2, 4], dtype=torch.int32)
    order, other = torch.tensor([1, 0, 3, 2], dtype=torch.int32), torch.tensor([3, 2, 1, 0], dtype=torch.int32)
    for gather, scatter in ((order, order), (order, other)):
        y = experts.grouped_linear(x, w, offsets, row_index=gather, out_index=scatter)
        _, gemm = driver.started()
        names = ("row_index_ptr", "out_index_ptr", "offsets_ptr", "out_ptr", "qdata_ptr")
        expected = [t.data_ptr() for t in (gather, scatter, offsets, y, w.qdata)]
        assert [gemm.arguments[name] for name in names] == expected
    assert driver.compilations == 2


@pytest.mark.parametrize("kernel", ["cooperative", "decode"])
def test_experts_rows_are_gathered_for_the_tensor_memory_accelerator(driver, monkeypatch, kernel):
    """Where the rows come by number: a copy of them in the workspace, which the tensor map of the activations describes."""
    pytest.importorskip("triton.experimental.gluon.nvidia.hopper")
    tile = Tile(64, 128, 8, kernel=kernel) if kernel == "cooperative" else Tile(8, 32, kernel=kernel)
    monkeypatch.setattr(triton_grouped, "pick_grouped_tile", lambda *_: tile)
    monkeypatch.setattr(gluon_grouped_launch, "sm_count", lambda device: 132)
    w = IntScaleTensor.from_hp(torch.randn(2, N, K), IntScaleConfig(packing_format="tiled"))
    offsets, order = torch.tensor([2, 4], dtype=torch.int32), torch.tensor([1, 0, 3, 2], dtype=torch.int32)
    for gather in (order, order.flip(0).contiguous(), None):
        x = torch.randn(4, K)
        y = experts.grouped_linear(x, w, offsets, row_index=gather, out_index=order)
        quantize, *copy, gemm = driver.started()
        arguments = gemm.arguments
        rows = quantize.arguments["xq_ptr"]
        if gather is not None:
            assert copy[0].arguments["index_ptr"] == arguments["row_index_ptr"] == gather.data_ptr()
            assert copy[0].arguments["x_ptr"] == rows and copy[0].grid == (4, 1, 1)
            rows = copy[0].arguments["out_ptr"]
        maps = [value[0] for value in arguments.values() if isinstance(value, tuple)]
        assert maps == [rows, w.qdata.data_ptr(), w.scale.data_ptr()] and gemm.overlap
        assert arguments["token_scale_ptr"] == quantize.arguments["scale_ptr"]
        assert (arguments["out_index_ptr"], arguments["out_ptr"]) == (order.data_ptr(), y.data_ptr())
        assert (arguments["rows"], arguments["experts"], arguments["row_tiles"]) == (4, 2, N // 64)
    assert driver.compilations == 5, "calls of one form share their launches"


def test_threads_start_the_same_sequence_at_once(driver):
    w = weight()
    linear(torch.randn(4, K), w, None)
    driver.started()
    failures = []

    def work():
        for _ in range(200):
            x = torch.randn(4, K)
            if linear(x, w, None).shape != (4, N):
                failures.append(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert not failures and driver.compilations == 2


def test_counters_of_a_stream_are_looked_up_by_their_size(monkeypatch):
    monkeypatch.setattr(split_k, "_zeros_outside_pools", lambda device: torch.zeros(split_k.CHUNK, dtype=torch.int32))
    monkeypatch.setattr(split_k, "raw_stream", lambda index: 3)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    counters = split_k.Counters(torch.device("cpu"), 0)
    first, second, large = counters.take(5), counters.take(9), counters.take(split_k.STREAM_RANGE + 1)
    assert first.data_ptr() == second.data_ptr() != large.data_ptr() and len(large) > split_k.STREAM_RANGE


def test_modules_take_the_path(driver):
    model = torch.nn.Linear(K, N).requires_grad_(False)
    quantize_(model, IntScaleConfig(packing_format="tiled"))
    model(torch.randn(5, K))
    assert [s.kernel for s in driver.started()] == ["quantize_kernel", "w4a8_split_kernel"]
