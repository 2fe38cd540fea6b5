"""Inductor's settings for graphs of ours, and the code that it generates under them for an H100 that is not there."""

from __future__ import annotations

import re
from unittest import mock

import pytest
import torch

pytest.importorskip("triton")
from intscale_compile import backend, ops
from intscale_compile.compile import inductor_settings
from intscale_compile.compile.inductor_settings import code_generation, inductor_defaults
from intscale_compile.versions import version_of
from tests.support.fake_cuda import fake_cuda, fake_inputs, generate, triton_sources

pytestmark = pytest.mark.generated

HOPPER_ONLY = {"triton.enable_pdl", "combo_kernels", "combo_kernels_pointwise_only"}
needs_pdl = pytest.mark.skipif(
    not inductor_settings.knows_early_launch(), reason="this torch has no such code generation"
)
quantize = torch.ops.intscale.quantize_per_token


@pytest.fixture(autouse=True, scope="module")
def lowerings():
    ops.register_inductor()


def norm_and_quantize(x, weight):
    wide = x.float()
    return quantize((wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)).to(x.dtype) * weight)


def gate_and_quantize(x):
    gate, up = x.chunk(2, -1)
    return quantize(torch.nn.functional.silu(gate) * up)


def cache_update(cache, index, x):
    return cache.index_copy_(1, index, x), x + 1, torch.full((64,), 3.0, device=x.device)


def long_reduction(x):
    return x.float().cumsum(-1), x.float().var(-1)


BF16 = torch.bfloat16
FUNCTIONS = {
    "norm": (norm_and_quantize, [((1, 4096), BF16), ((4096,), BF16)]),
    "gate": (gate_and_quantize, [((1, 28672), BF16)]),
    "rows": (gate_and_quantize, [((300, 28672), BF16)]),
    "cache": (cache_update, [((8, 64, 128), BF16), ((1,), torch.int64), ((8, 1, 128), BF16)]),
    "loops": (long_reduction, [((4, 100_000), BF16)]),
}


def generated(name: str, dynamic: bool = False, **patches) -> dict[str, str]:
    """Kernels of one of FUNCTIONS under the defaults for an H100."""
    function, shapes = FUNCTIONS[name]
    tensors, mode = fake_inputs(shapes, dynamic)
    with fake_cuda():
        defaults = inductor_defaults(tensors)
    with code_generation():
        return triton_sources(generate(function, tensors, mode, **{**defaults, **patches}))


def first(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    return len(text) if found is None else found.start()


@needs_pdl
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_kernel_waits_before_it_touches_memory(name, dynamic):
    sources = generated(name, dynamic)
    assert sources
    for source in sources.values():
        assert "'launch_pdl': True" in source
        # One function may hold several kernels, one in each branch.
        for body in re.split(r"\n(?=def |@|    (?:if|elif) pid)", source[source.index("@triton.jit") :]):
            touched = first(r"tl\.(load|store|atomic_\w+)\(", body)
            assert touched == len(body) or first(r"gdc_wait\(\)", body) < touched, body
            assert first(r"gdc_launch_dependents\(\)", body) > first(r"gdc_wait\(\)", body) or "gdc_" not in body


@needs_pdl
def test_inductor_alone_leaves_waits_out():
    """The reason for the change: a kernel whose operands the one before it did not write."""
    function, shapes = FUNCTIONS["cache"]
    sources = triton_sources(generate(function, *fake_inputs(shapes), **{"triton.enable_pdl": True}))
    assert any("gdc_wait" not in source for source in sources.values())


def test_the_change_ends_with_the_context():
    from torch._inductor.codegen.triton import TritonKernel
    from torch._inductor.virtualized import V

    before = getattr(TritonKernel, "_handle_pdl_before_access", None), V.choices
    with pytest.raises(ZeroDivisionError), code_generation():
        _ = 1 / 0
    assert (getattr(TritonKernel, "_handle_pdl_before_access", None), V.choices) == before


@pytest.mark.parametrize("name", ["norm", "gate", "rows"])
def test_rows_stay_in_registers(name):
    """Norm or SiLU * mul, maximum and quantization in one kernel that reads each value once."""
    ((_, source),) = generated(name).items()
    assert "@triton_heuristics.persistent_reduction" in source and "for r0_offset in" not in source
    assert len(re.findall(r"= tl\.load\(", source)) == 2


@pytest.mark.parametrize("width, persistent", [(16384, True), (16385, False)])
def test_longer_rows_are_reduced_in_a_loop(width, persistent):
    tensors, mode = fake_inputs([((4, width), BF16)])
    with code_generation():
        sources = triton_sources(generate(quantize, tensors, mode, split_reductions=False))
    assert all(("persistent_reduction(" in source) is persistent for source in sources.values()) and sources


def test_without_the_context_inductor_loops():
    function, shapes = FUNCTIONS["gate"]
    sources = triton_sources(generate(function, *fake_inputs(shapes), split_reductions=False))
    assert not any("triton_heuristics.persistent_reduction" in source for source in sources.values())


@pytest.mark.parametrize("capability, expected", [((8, 0), False), ((8, 9), False), ((9, 0), True), ((10, 0), True)])
def test_hopper_settings_only_from_hopper_on(capability, expected, monkeypatch):
    tensors, _ = fake_inputs([((4,), torch.int64), ((4, 8), BF16)])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    expected = expected and inductor_settings.knows_early_launch()
    assert (inductor_defaults(tensors).keys() & HOPPER_ONLY == HOPPER_ONLY) is expected
    assert (inductor_defaults(tensors).keys() & HOPPER_ONLY == set()) is not expected
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert not inductor_defaults(tensors).keys() & HOPPER_ONLY


@needs_pdl
def test_no_early_launch_where_a_backward_graph_may_follow(monkeypatch):
    """Inductor compiles it later, without the wait that :func:`code_generation` puts into every kernel."""
    monkeypatch.setattr(inductor_settings, "on_hopper_or_later", lambda inputs: True)
    trains = [torch.zeros(2, requires_grad=True)]
    assert not inductor_defaults(trains).keys() & HOPPER_ONLY
    with torch.no_grad():
        assert inductor_defaults(trains).keys() & HOPPER_ONLY == HOPPER_ONLY
    assert inductor_defaults([torch.zeros(2)]).keys() & HOPPER_ONLY == HOPPER_ONLY


def test_nothing_of_it_on_a_cpu():
    defaults = inductor_defaults([torch.empty(2), 3])
    assert defaults.keys() == ({"split_reductions"} | ({"loop_ordering_after_fusion"} if old_torch() else set()))
    with code_generation():
        y = torch.compile(lambda x: x.softmax(-1), backend="inductor")(torch.zeros(2, 4096))
    torch.testing.assert_close(y, torch.full((2, 4096), 1 / 4096))


def old_torch() -> bool:
    return version_of("torch") < (2, 13)


@needs_pdl
def test_options_of_the_user_win(monkeypatch):
    patches = []

    def compile_fx(gm, inputs, config_patches):
        patches.append(config_patches)
        return gm.forward

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", compile_fx)
    monkeypatch.setattr(inductor_settings, "on_hopper_or_later", lambda inputs: True)
    given = {"combo_kernels": False, "split_reductions": True, "triton.enable_pdl": False}
    for options in ({}, given):
        torch._dynamo.reset()
        torch.compile(lambda x: x + 1, backend=backend.intscale, options=options)(torch.zeros(2))
    ours, theirs = patches
    assert ours["combo_kernels"] is ours["triton.enable_pdl"] is True and ours["split_reductions"] is False
    assert {name: theirs[name] for name in given} == given and theirs["combo_kernels_pointwise_only"] is True


def test_dtype_rules_are_filled_once():
    """By the releases that fill them for every operation; in others nothing is touched."""
    from torch._inductor import dtype_propagation

    rules = getattr(dtype_propagation, "DtypePropagationOpsHandler", None)
    if rules is None or "_instance" not in vars(rules):
        with code_generation():
            pass
        return
    original, filled = rules.__init__, []

    def fill(self):
        filled.append(self)
        original(self)

    with mock.patch.object(rules, "__init__", fill):
        with code_generation():
            first, second = rules(), rules()
        assert rules.__init__ is fill
    assert first is second and filled == [first] and hasattr(first, "add")
