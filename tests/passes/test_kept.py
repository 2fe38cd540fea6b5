"""Copies of weights in compiled graphs: every dense change of a weight is seen by the next call, whatever it went through."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torchao.quantization import quantize_

import intscale_compile
from intscale_compile import IntScaleConfig
from intscale_compile.backend import intscale
from intscale_compile.kernels import fingerprint
from intscale_compile.kernels.fingerprint import PIECE_BYTES, SAMPLED_BYTES, pieces_of, sample_of, state_of
from intscale_compile.passes import kept
from intscale_compile.passes.gpu_samples import GpuSamples
from tests.support.compiled import rewritten

CONFIG = IntScaleConfig(group_size=32, scale_search="absmax")


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def network(layers=1, features=64, bias=True):
    return nn.Sequential(*[nn.Linear(features, features, bias=bias) for _ in range(layers)]).requires_grad_(False)


def quantized(model):
    """What the compiled graph of a plain model has to give: the model quantized now."""
    model = copy.deepcopy(model)
    quantize_(model, CONFIG)
    return model


def move_average(module):
    for parameter in module.parameters():
        parameter.data.copy_(0.5 * parameter.data + torch.randn_like(parameter))


def write_numpy(module):
    module[0].weight.numpy()[:] *= -2


def from_vector(module):
    size = sum(p.numel() for p in module.parameters())
    nn.utils.vector_to_parameters(torch.randn(size) / 8, module.parameters())


def assign_data(module):
    module[0].weight.data = torch.randn(64, 64) / 8


def load(module):
    module.load_state_dict(network().state_dict())


def exchange(module):
    module[0].weight = nn.Parameter(torch.randn(64, 64) / 8, requires_grad=False)


CHANGES = {
    "data": lambda m: m[0].weight.data.mul_(-2),
    "data-bias": lambda m: m[0].bias.data.add_(3.0),
    "detach": lambda m: m[0].weight.detach().mul_(-2),
    "no-grad": lambda m: m[0].weight.mul_(-2),
    "average": move_average,
    "vector": from_vector,
    "assign": assign_data,
    "numpy": write_numpy,
    "load": load,
    "exchange": exchange,
}


@pytest.mark.parametrize("inference", [False, True], ids=["plain", "inference"])
def test_changes_of_a_plain_weight_are_seen(inference):
    """One compilation for all of them; every call has the bits of the model quantized at that moment."""
    with torch.inference_mode(inference), torch.no_grad():
        model, x = network(), torch.randn(3, 64)
        run = rewritten(model, **{"intscale.config": CONFIG})
        assert torch.equal(run(x), quantized(model)(x))
        for name, change in CHANGES.items():
            before = run(x)
            change(model)
            expected = quantized(model)(x)
            assert not torch.equal(before, expected), name
            assert torch.equal(run(x), expected), name


@pytest.mark.parametrize("fused", [False, True])
def test_steps_of_an_optimizer_are_seen(fused):
    model, x = network(), torch.randn(16, 64)
    model.requires_grad_(True)
    run = rewritten(model, **{"intscale.config": CONFIG})
    optimizer = torch.optim.AdamW(model.parameters(), 3e-2, fused=fused)
    for _ in range(3):
        with torch.no_grad():
            assert torch.equal(run(x), quantized(model)(x))
        (model(x) - 1).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def test_a_step_is_noticed_by_its_hook_also_where_no_sample_shows_it(monkeypatch):
    monkeypatch.setattr(kept, "samples_of", lambda tensors: [])
    test_steps_of_an_optimizer_are_seen(True)


def test_load_state_dict_is_noticed_by_its_hook_also_where_no_sample_shows_it(monkeypatch):
    monkeypatch.setattr(kept, "samples_of", lambda tensors: [])
    monkeypatch.setattr("intscale_compile.compile.binding.samples_of", lambda tensors: [])
    with torch.inference_mode():
        model, x = network(), torch.randn(3, 64)
        run = rewritten(model, **{"intscale.config": CONFIG})
        run(x)
        load(model)
        assert torch.equal(run(x), quantized(model)(x))


class Merged(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k = nn.Linear(64, 64), nn.Linear(64, 32)
        self.requires_grad_(False)

    def forward(self, x):
        return torch.cat([self.q(x), self.k(x)], -1)


@pytest.mark.parametrize("inference", [False, True], ids=["plain", "inference"])
def test_changes_of_merged_weights_and_biases_are_seen_with_quantized_weights(inference):
    with torch.inference_mode(inference), torch.no_grad():
        model, x = Merged(), torch.randn(3, 64)
        quantize_(model, CONFIG)
        run = rewritten(model)
        assert torch.equal(run(x), model(x))
        changes = (
            lambda: model.q.bias.data.add_(3.0),
            lambda: model.k.bias.add_(1.0),
            lambda: model.q.weight.qdata.data.fill_(0x99),
            lambda: model.k.weight.scale.data.fill_(3),
            lambda: model.k.weight.per_tensor_scale.data.mul_(2),
        )
        for i, change in enumerate(changes):
            before = run(x)
            change()
            assert not torch.equal(model(x), before), i
            assert torch.equal(run(x), model(x)), i
            assert torch.equal(model(x), copy.deepcopy(model)(x)), "eager calls keep unpacked codes too"


def test_reset_and_refresh_forget():
    """A write to one row is seen by neither version nor sample, which the docs say, until one of the two is called."""
    model, x = network(features=256), torch.randn(8, 256)  # few tokens are multiplied with the weight as it is stored
    run = rewritten(model, **{"intscale.config": CONFIG})
    with torch.no_grad():
        for forget in (lambda: intscale_compile.refresh(model), intscale.reset):
            old = run(x)
            model[0].weight.data[100, :] *= 5
            assert torch.equal(run(x), old), "noticed: say so in kept.py and in the docs"
            forget()
            assert torch.equal(run(x), quantized(model)(x))
        quantized_model = quantized(model)
        first = quantized_model(x)
        quantized_model[0].weight.qdata.data[100] = 0x99
        assert torch.equal(quantized_model(x), first)
        intscale_compile.refresh(quantized_model)
        assert torch.equal(quantized_model(x), copy.deepcopy(quantized_model)(x))


def test_dynamo_reset_calls_the_reset_of_the_backend(monkeypatch):
    called = []
    monkeypatch.setattr(intscale, "reset", lambda: called.append(1), raising=True)
    monkeypatch.setattr(torch._dynamo.eval_frame, "cached_backends", {id(intscale): intscale})
    torch._dynamo.reset()
    assert called == [1]


def test_nothing_is_quantized_again_without_a_change(monkeypatch):
    model, x = network(2), torch.randn(3, 64)
    run = rewritten(model, **{"intscale.config": CONFIG})
    with torch.no_grad():
        run(x)
        monkeypatch.setattr(intscale_compile.IntScaleTensor, "from_hp", None)
        other = network()
        torch.optim.SGD(other.requires_grad_().parameters(), 0.1).step()
        other.load_state_dict(network().state_dict())
        for _ in range(3):
            run(x)


# --- samples --------------------------------------------------------------------------------------------------------


def test_pieces_lie_in_the_memory_of_the_tensor():
    for tensor in (
        torch.zeros(1000, 1000),
        torch.zeros(64, 64, dtype=torch.bfloat16)[1:, 1:],
        torch.zeros(4, dtype=torch.bfloat16)[1:],
        torch.zeros(8, 8).t(),
        torch.zeros(1).expand(70, 70),
        torch.zeros(SAMPLED_BYTES + 4, dtype=torch.uint8),
        torch.zeros(2, 40, 50, dtype=torch.float64),
    ):
        pieces = pieces_of(tensor)
        begin, storage = tensor.data_ptr(), tensor.untyped_storage()
        word = pieces.words - 1
        end = pieces.address + word // (PIECE_BYTES // 4) * pieces.step + word % (PIECE_BYTES // 4) * 4 + 4
        assert begin <= pieces.address and end <= storage.data_ptr() + storage.nbytes()
        assert pieces.address % 4 == pieces.step % 4 == 0 and 0 < 4 * pieces.words <= SAMPLED_BYTES
    assert pieces_of(torch.zeros(1, dtype=torch.uint8)) is None and pieces_of(torch.zeros(0)) is None
    assert pieces_of(torch.zeros(4, 4, device="meta")) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize("shape", [(5,), (300,), (64, 64), (1000, 1000), (4, 100, 64)])
def test_a_dense_write_changes_the_sample(dtype, shape):
    tensor = torch.randint(1, 100, shape).to(dtype)
    sample, state = sample_of(tensor), state_of(tensor)
    assert sample.same()
    tensor.data.add_(1)
    assert not sample.same() and state_of(tensor) == state
    tensor.data.sub_(1)
    assert sample.same()
    tensor.add_(1)
    assert state_of(tensor) != state


# --- weights on a GPU, with a GPU made of a CPU ---------------------------------------------------------------------


class Event:
    def __init__(self):
        self.ended = False

    def query(self):
        return self.ended

    def synchronize(self):
        self.ended = True


class Gpu:
    """Runs the kernel at once, by numpy; results are there when the event has ended."""

    words = SAMPLED_BYTES // 4

    def __init__(self):
        self.runs = 0

    def flags(self, count):
        flags = torch.zeros(count, dtype=torch.int32)
        return flags, flags.numpy()

    def capturing(self):
        return False

    def run(self, table, flags, compare):
        self.runs += compare
        for i, (address, step, count, known) in enumerate(table.tolist()):
            word = np.arange(count)
            places = address + word // (PIECE_BYTES // 4) * step + word % (PIECE_BYTES // 4) * 4
            now = [fingerprint.ctypes.c_int32.from_address(int(place)).value for place in places]
            before = np.ctypeslib.as_array((fingerprint.ctypes.c_int32 * count).from_address(known))
            if not compare:
                before[:] = now
            elif (before != now).any():
                flags[0] = flags[1 + i] = 1
        return Event()


@pytest.fixture
def watched():
    """Three weights and what watches them; ``changed`` collects what it reports."""
    changed = []
    samples = GpuSamples(torch.device("cpu"), changed.extend, Gpu())
    weights = [nn.Parameter(torch.randn(n, 64), requires_grad=False) for n in (2, 64, 100)]
    for weight in weights:
        samples.add(weight)
    return samples, weights, changed


def test_a_write_on_a_gpu_is_reported_at_the_second_call_after_it(watched):
    samples, weights, changed = watched
    seen = samples.look(samples.started)
    weights[1].data.mul_(2)
    seen = samples.look(seen)
    assert changed == []
    seen = samples.look(seen)
    assert [id(t) for t in changed] == [id(weights[1])]
    samples.add(weights[1])
    for _ in range(3):
        seen = samples.look(seen)
    assert len(changed) == 1


def test_graphs_that_take_turns_share_one_start_for_all_weights(watched):
    samples, weights, changed = watched
    seen = [samples.started] * 4
    for turn in range(3):
        if turn == 1:
            weights[2].data.mul_(2)
        seen = [samples.look(one) for one in seen]
        assert samples._gpu.runs == turn + 1
    assert [id(t) for t in changed] == [id(weights[2])], "noticed before the first graph of the turn after"


def test_weights_that_died_or_moved_are_not_looked_at(watched):
    samples, weights, changed = watched
    seen = samples.look(samples.started)
    weights[0].data = torch.randn(2, 64)
    del weights[2]
    seen = samples.look(samples.look(seen))
    assert [entry.tensor() for entry in samples._watched.values()] == [weights[1]] and changed == []
