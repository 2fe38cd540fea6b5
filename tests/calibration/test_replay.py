"""What is kept instead of being computed again changes no bit of a calibration."""

import copy
from functools import partial

import pytest
import torch
from torch import nn

from intscale_compile import CalibrationConfig, IntScaleTensor, calibrate
from intscale_compile.calibration import pipeline
from intscale_compile.calibration.capture import batches_of, capture, statistics
from intscale_compile.calibration.layers import stacks, weights_of
from intscale_compile.calibration.replay import Replay


def calibrated_bits(model, data, preset):
    model = copy.deepcopy(model)
    report = calibrate(model, data, preset, progress=False)
    weights = [p for p in model.parameters() if isinstance(p, IntScaleTensor)]
    return report.losses, [part for w in weights for part in (w.qdata, w.scale, w.per_tensor_scale)]


@pytest.mark.parametrize("preset, changes", [("gptq", {}), ("best", {"tuning_steps": 2})])
def test_calibration_has_the_same_bits(model, data, preset, changes, monkeypatch):
    preset, data = CalibrationConfig.from_preset(preset, **changes), data.repeat(6, 1)  # two batches
    losses, kept = calibrated_bits(model, data, preset)
    monkeypatch.setattr(pipeline, "Replay", lambda block: Replay(block, max_bytes=0))
    again, computed = calibrated_bits(model, data, preset)
    assert losses == again and all(torch.equal(a, b) for a, b in zip(kept, computed, strict=True))


class Parts(nn.Module):
    """A part that runs twice, and one inside of another whose result is changed in place."""

    def __init__(self):
        super().__init__()
        self.twice, self.outer = nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.ReLU())
        self.calls: list[str] = []
        for name, part in self.named_modules():
            forward = part.forward
            if name:
                part.forward = lambda *args, name=name, forward=forward: self.calls.append(name) or forward(*args)

    def forward(self, x):
        y = self.outer(self.twice(x))
        y += 1
        return self.twice(y)


def test_each_part_is_computed_once_for_each_batch():
    block = Parts()
    again, batches = Replay(block), [torch.randn(3, 4) for _ in range(2)]
    wanted = [block(x) for x in batches]
    for _ in range(3):
        block.calls.clear()
        for number, x in enumerate(batches):
            with again.batch(number):
                assert torch.equal(block(x), wanted[number])
        first = [] if _ else ["twice", "outer", "outer.0", "outer.1", "twice"] * 2
        assert block.calls == first
    assert not any(part._forward_hooks for part in block.modules())
    assert torch.equal(block(batches[0]), wanted[0]) and len(block.calls) == 5


@pytest.mark.parametrize("room", [0, 48, 100])
def test_what_has_no_room_is_computed(room):
    block = Parts()
    again, x = Replay(block, max_bytes=room), torch.randn(3, 4)
    wanted = block(x)
    for _ in range(3):
        with again.batch(0):
            assert torch.equal(block(x), wanted)


def test_parts_with_hooks_of_others_are_computed():
    """The hook would see its own result."""
    block = Parts()
    block.outer.register_forward_hook(lambda module, args, result: 2 * result)
    again, x = Replay(block), torch.randn(3, 4)
    wanted = block(x)
    for _ in range(2):
        with again.batch(0):
            assert torch.equal(block(x), wanted)


def test_a_later_batch_does_not_run_the_blocks(model, data):
    """Their arguments are those of a run through the model; the output embedding runs for the first batch only."""
    ran: list[str] = []
    model.model.layers[0].mlp.register_forward_hook(lambda *args: ran.append("block"))
    model.lm_head.register_forward_hook(lambda *args: ran.append("head"))
    batches = [{"input_ids": part} for part in data.split(2)]
    kept = capture(model, stacks(model)[0], batches)
    assert ran == ["block", "head"]
    whole = [capture(model, stacks(model)[0], [batch]) for batch in batches]
    for place, one in enumerate(whole):
        assert torch.equal(kept.hidden[place], one.hidden[0])
        for (args, kwargs), (wanted_args, wanted_kwargs) in zip(kept.calls[place], one.calls[0], strict=True):
            assert args == wanted_args and kwargs.keys() == wanted_kwargs.keys()
            for name, value in kwargs.items():
                wanted = wanted_kwargs[name]
                pairs = zip(value, wanted) if isinstance(value, tuple) else [(value, wanted)]
                assert all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in pairs)


def test_blocks_whose_arguments_depend_on_hidden_states_run(model, data, monkeypatch):
    """Here a block is told the mean of what it reads; such blocks run for every batch."""
    for layer in model.model.layers:
        forward = layer.forward
        layer.forward = lambda hidden, mean=None, forward=forward, **kwargs: forward(hidden, **kwargs)
    ran = []
    model.model.layers[0].mlp.register_forward_hook(lambda *args: ran.append("block"))

    def with_mean(module, args, kwargs):
        return args, {**kwargs, "mean": args[0].mean() if args else kwargs["hidden_states"].mean()}

    for layer in model.model.layers:
        layer.register_forward_pre_hook(with_mean, with_kwargs=True)
    kept = capture(model, stacks(model)[0], [{"input_ids": part} for part in data.split(2)])
    assert len(ran) == len(kept.hidden) == 4 and not torch.equal(
        kept.calls[1][1][1]["mean"], kept.calls[1][0][1]["mean"]
    )


def test_padding_counts_nowhere(model):
    """Statistics and losses of padded sequences are those of the sequences."""
    short, long = torch.randint(0, 128, (1, 20)), torch.randint(0, 128, (1, 50))
    padded = torch.cat([torch.cat([short, torch.full((1, 30), 5)], 1), long])
    mask = torch.ones(2, 50, dtype=torch.int64)
    mask[0, 20:] = 0
    found = []
    for data in ([short, long], [{"input_ids": padded, "attention_mask": mask}], [{"input_ids": padded}]):
        kept = capture(model, stacks(model)[0], batches_of(data))
        block = stacks(model)[0][0][1]
        cpu = torch.device("cpu")
        runs = [partial(kept.inputs, b, 0, hidden, cpu) for b, hidden in enumerate(kept.hidden)]
        found.append(statistics(block, weights_of(block)["mlp.down_proj"], runs, masks=kept.masks))
    assert [int(one.tokens) for one in found] == [70, 70, 100]
    torch.testing.assert_close(found[1].hessian, found[0].hessian, rtol=1e-3, atol=1e-6)
    losses = [
        calibrate(copy.deepcopy(model), data, "rtn", progress=False).losses
        for data in ([short, long], [{"input_ids": padded, "attention_mask": mask}])
    ]
    for name, loss in losses[0].items():
        assert loss == pytest.approx(losses[1][name], rel=1e-2)
