"""What the layers of a model see: inputs of a stack of blocks, kept on the CPU, and Hessians of the inputs of a weight."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Optional, Union

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from ..errors import CalibrationError
from .layers import Inputs, LinearWeight, observe_inputs, run_block, without_cache
from .replay import Replay, replayed

BATCH_TOKENS = 2048  # tokens that go through a block at once
FEW_TOKENS = 1.0  # an expert's own Hessian counts fully from this many tokens for each input channel on

Data = Union[Tensor, Sequence[Union[Tensor, Mapping[str, Tensor]]]]


def batches_of(data: Data, batch_tokens: int = BATCH_TOKENS) -> list[dict[str, Any]]:
    """Calibration data as keyword arguments of the model, a few sequences each.

    Args:
        data: token ids ``[S, T]``; a list of token ids ``[T]`` or ``[B, T]``; or a list of dictionaries of model inputs.
        batch_tokens: about how many tokens of ``[S, T]`` go together.

    Raises:
        CalibrationError: there is no data, or it is none of these.
    """
    if isinstance(data, Mapping):
        data = [data]
    if isinstance(data, Tensor):
        if data.dim() != 2:
            raise CalibrationError(f"data has shape {tuple(data.shape)}: token ids [sequences, tokens] are needed.")
        data = list(data.split(max(1, batch_tokens // max(1, data.shape[1])))) if data.numel() else []
    if not isinstance(data, Sequence) or not len(data):
        raise CalibrationError("there is no calibration data: pass token ids [S, T], or a list of model inputs.")
    return [_batch(item, place) for place, item in enumerate(data)]


def _batch(item: Any, place: int) -> dict[str, Any]:
    if isinstance(item, Mapping):
        for name, value in item.items():
            if isinstance(value, Tensor) and value.is_floating_point() and not bool(torch.isfinite(value).all()):
                raise CalibrationError(f"data[{place}][{name!r}] has NaN or Inf entries.")
        return dict(item)
    if not isinstance(item, Tensor) or item.is_floating_point() or item.dim() not in (1, 2) or not item.numel():
        found = f"{item.dtype} {tuple(item.shape)}" if isinstance(item, Tensor) else type(item).__name__
        raise CalibrationError(f"data[{place}] is {found}: integer token ids [T] or [B, T] are needed.")
    return {"input_ids": item if item.dim() == 2 else item.unsqueeze(0)}


def digest_of(batches: Sequence[Mapping[str, Any]]) -> str:
    """A fingerprint of calibration data."""
    total = hashlib.sha256()
    for batch in batches:
        for name in sorted(batch):
            value = batch[name]
            total.update(name.encode())
            if isinstance(value, Tensor):
                total.update(f"{value.dtype}{tuple(value.shape)}".encode())
                total.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
            else:
                total.update(repr(value).encode())
    return total.hexdigest()


@dataclass
class StackInputs:
    """Inputs of the blocks of one stack: hidden states of the first, and what else each block is called with.

    Attributes:
        hidden: one tensor for each batch, on the CPU.
        calls: for each batch and block, positional and keyword arguments with the hidden states left out.
        by_keyword: whether the hidden states are passed as ``hidden_states=``.
        masks: for each batch which of its tokens count, bool ``[B * T]`` on the CPU; None: all of them.
    """

    hidden: list[Tensor] = field(default_factory=list)
    calls: list[list[Inputs]] = field(default_factory=list)
    by_keyword: bool = False
    masks: list[Optional[Tensor]] = field(default_factory=list)

    def inputs(self, batch: int, block: int, hidden: Tensor, device: torch.device) -> Inputs:
        """Arguments of a block for a batch whose hidden states are ``hidden``, on ``device``."""
        args, kwargs = tree_map(lambda v: v.to(device) if isinstance(v, Tensor) else v, self.calls[batch][block])
        dtype = self.hidden[batch].dtype
        hidden = hidden.to(device=device, dtype=dtype)
        return (args, {**kwargs, "hidden_states": hidden}) if self.by_keyword else ((hidden, *args), kwargs)


def capture(model: nn.Module, stack: list[tuple[str, nn.Module]], batches: Sequence[Mapping[str, Any]]) -> StackInputs:
    """Run the model on every batch and keep what the blocks of a stack are called with.

    Tensors that repeat (masks, position embeddings) are kept once. Only the hidden states of the first block are kept.
    The first batch goes through the whole model. The others stop behind the last block of the stack, and where what blocks
    are called with does not depend on hidden states (tried out on the first batch), the blocks are not computed for them.

    Raises:
        CalibrationError: hidden states are not finite, a block is not called exactly once, or the output of a block is
            not the input of the next.
    """
    recorder = _Recorder(stack)
    device = next(stack[0][1].parameters()).device
    moved = ({k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()} for batch in batches)
    with torch.no_grad(), without_cache(model), recorder.hooks():
        first = next(moved)
        recorder.run(model, first)
        if len(batches) > 1:
            recorder.whole = False
            recorder.passing = recorder.keeps_shape and recorder.same_without_blocks(model, first)
        for batch in moved:
            recorder.run(model, batch)
    kept = recorder.kept
    kept.masks = [_counted(batch, hidden) for batch, hidden in zip(batches, kept.hidden)]
    return kept


def _counted(batch: Mapping[str, Any], hidden: Tensor) -> Optional[Tensor]:
    """Which tokens of ``hidden [B, T, K]`` are no padding, bool ``[B * T]``; None: all, or nothing says so.

    Of an encoder-decoder's data nothing is left out: two masks, and which stack a mask belongs to is not known.
    """
    mask = batch.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.shape != hidden.shape[:2] or any(k.startswith("decoder_") for k in batch):
        return None
    counted = mask.detach().cpu().bool().flatten()
    return None if bool(counted.all()) or not bool(counted.any()) else counted


class _Recorder:
    """Records what the blocks of a stack are called with.

    Attributes:
        kept: what was recorded.
        whole: run the model to its end, so that a block that runs twice is seen.
        passing: blocks return the hidden states that they read.
        keeps_shape: every block that ran returned one tensor like its input.
    """

    def __init__(self, stack: list[tuple[str, nn.Module]]):
        self.stack = stack
        self.kept = StackInputs()
        self.whole, self.passing, self.keeps_shape = True, False, True
        self._pool: dict = {}
        self._left: Tensor

    @contextlib.contextmanager
    def hooks(self) -> Iterator[None]:
        """Hooks on the blocks for a while."""
        handles = [
            block.register_forward_pre_hook(self._entered(place), with_kwargs=True)
            for place, (_, block) in enumerate(self.stack)
        ]
        handles += [
            block.register_forward_hook(self._behind(place), with_kwargs=True)
            for place, (_, block) in enumerate(self.stack)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def run(self, model: nn.Module, batch: Mapping[str, Any]) -> None:
        """Record one batch."""
        self.kept.calls.append([])
        with _passing([block for _, block in self.stack] if self.passing else []), contextlib.suppress(_Enough):
            model(**batch)
        if len(self.kept.calls[-1]) != len(self.stack):
            raise CalibrationError(f"only {len(self.kept.calls[-1])} of {len(self.stack)} blocks ran on the data.")

    def same_without_blocks(self, model: nn.Module, batch: Mapping[str, Any]) -> bool:
        """Whether blocks that return what they read are called with the same: ``batch`` was recorded just before."""
        self.passing = True
        try:
            self.run(model, batch)
        finally:
            self.passing = False
        found, wanted = self.kept.calls.pop(), self.kept.calls[-1]
        self.kept.hidden.pop()
        a, b = tree_flatten(found), tree_flatten(wanted)
        return a[1] == b[1] and all(x is y or _same_value(x, y) for x, y in zip(a[0], b[0]))

    def _entered(self, place: int) -> Callable:
        def remember(module, args, kwargs):
            kept = self.kept
            kept.by_keyword = "hidden_states" in kwargs
            hidden = kwargs["hidden_states"] if kept.by_keyword else args[0]
            rest = (args if kept.by_keyword else args[1:], {k: v for k, v in kwargs.items() if k != "hidden_states"})
            calls, name = kept.calls[-1], self.stack[place][0]
            if len(calls) != place:
                raise CalibrationError(f"{name} does not run after the block before it, once for each input.")
            if place:
                _check_chain(self._left, hidden, name)
            else:
                if not bool(torch.isfinite(hidden).all()):
                    raise CalibrationError(
                        "hidden states before the first block are not finite: look for NaN in the data."
                    )
                kept.hidden.append(hidden.detach().cpu())
            calls.append(tree_map(lambda v: _interned(v, self._pool), rest))

        return remember

    def _behind(self, place: int) -> Callable:
        def left(module, args, kwargs, result):
            hidden = kwargs["hidden_states"] if self.kept.by_keyword else args[0]
            self._left = result if isinstance(result, Tensor) else result[0]
            like = isinstance(result, Tensor) and result.shape == hidden.shape and result.dtype == hidden.dtype
            self.keeps_shape &= like
            if place == len(self.stack) - 1 and not self.whole:
                raise _Enough

        return left


@contextlib.contextmanager
def _passing(blocks: Sequence[nn.Module]) -> Iterator[None]:
    """``blocks`` return the hidden states that they read, for a while."""

    def forward(*args, **kwargs):
        return kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]

    kept = [block.__dict__.get("forward") for block in blocks]
    try:
        for block in blocks:
            block.forward = forward
        yield
    finally:
        for block, own in zip(blocks, kept):
            del block.forward
            if own is not None:
                block.forward = own


def _same_value(a: Any, b: Any) -> bool:
    """Whether two arguments that are no tensors (those are interned) are equal."""
    return not isinstance(a, Tensor) and not isinstance(b, Tensor) and type(a) is type(b) and bool(a == b)


def _check_chain(left: Tensor, entered: Tensor, name: str) -> None:
    if left.shape != entered.shape or not torch.equal(left, entered):
        raise CalibrationError(
            f"what {name} reads is not what the block before it returns: its model is not supported."
        )


def _interned(value: Any, pool: dict) -> Any:
    """The CPU copy of a tensor, the same object for equal tensors."""
    if not isinstance(value, Tensor):
        return value
    key = (value.dtype, tuple(value.shape))
    copy = value.detach().cpu()
    for known in pool.setdefault(key, []):
        if torch.equal(known, copy):
            return known
    pool[key].append(copy if copy is not value else copy.clone())
    return pool[key][-1]


def relative_error(output: list[Tensor], target: list[Tensor], name: str, masks: Sequence[Optional[Tensor]]) -> float:
    """Squared error of a block's outputs relative to what they should be, over the tokens that count.

    Raises:
        CalibrationError: an output is not finite.
    """

    def counted(part: Tensor, mask: Optional[Tensor]) -> Tensor:
        return part.double() if mask is None else part.flatten(0, 1)[mask].double()

    parts = [(counted(o, m), counted(t, m)) for o, t, m in zip(output, target, masks)]
    error = sum(float((o - t).square().sum()) for o, t in parts)
    power = sum(float(t.square().sum()) for _, t in parts)
    if not error == error:
        raise CalibrationError(f"the output of {name} is not finite after it was quantized.")
    return error / max(power, 1e-300)


class _Enough(Exception):
    """What was looked for has been seen; the rest of the block or of the model need not run."""


@dataclass
class Statistics:
    """What one weight reads.

    Attributes:
        hessian: sums of ``x x^T``, fp32 ``[K, K]`` or ``[E, K, K]``; empty where it was not wanted.
        absmax: largest magnitude.
        tokens: how many there were (for each expert), int64 ``[1]`` or ``[E]``.
        lost: sums of ``(x0 - x) x^T``, fp32 ``[K, K]``, ``x0`` being the inputs in the original model.
    """

    hessian: Tensor
    absmax: float
    tokens: Tensor
    lost: Optional[Tensor] = None


def statistics(
    block: nn.Module,
    weight: LinearWeight,
    runs: Sequence[Callable[[], Inputs]],
    original: Optional[tuple[nn.Module, LinearWeight, Sequence[Callable[[], Inputs]]]] = None,
    replays: tuple[Optional[Replay], Optional[Replay]] = (None, None),
    masks: Sequence[Optional[Tensor]] = (),
) -> Statistics:
    """Run a block on every input and sum up what one of its weights sees.

    Args:
        block: where ``weight`` is still a plain parameter.
        weight: ``[N, K]`` or ``[E, N, K]``; with experts there is one Hessian for each, from its own tokens.
        runs: callables that give the inputs of the block, batch by batch.
        original: the block, weight (``[N, K]``) and inputs of the original model, for ``lost``.
        replays: what parts of ``block``, and of the original one, returned in earlier runs.
        masks: for each batch which tokens count, as ``StackInputs.masks``; experts count all.

    Raises:
        CalibrationError: the input is not finite, or the weight is never reached.
    """
    experts, size = (weight.weight.shape[0] if weight.weight.dim() == 3 else 0), weight.weight.shape[-1]
    total = torch.zeros((max(1, experts), size, size), device=weight.weight.device)
    lost = torch.zeros_like(total[0]) if original is not None else None
    tokens, largest = torch.zeros(max(1, experts), dtype=torch.int64), total.new_zeros(())
    with torch.no_grad():
        for batch, inputs in enumerate(runs):
            before = torch.empty(0)
            if original is not None:
                with replayed(replays[1], batch):
                    before = next(_seen(*original[:2], original[2][batch]))[1]
            with replayed(replays[0], batch):
                seen = list(_seen(block, weight, inputs))
            mask = masks[batch] if masks else None
            for expert, rows in seen:
                if mask is not None and not experts and len(rows) == len(mask):
                    counted = mask.to(rows.device)
                    rows, before = rows[counted], before[counted] if len(before) else before
                largest = torch.maximum(largest, rows.abs().amax().float())
                tokens[expert] += len(rows)
                total[expert] += second_moments(rows)
                if lost is not None:
                    rows = rows.float()
                    lost.addmm_((before.float() - rows).mT, rows)
    if not int(tokens.sum()):
        raise CalibrationError(f"{weight.name} is not reached by the calibration data.")
    if not bool(torch.isfinite(largest)):
        raise CalibrationError(f"the input of {weight.name} is not finite: look for NaN or Inf in the data.")
    if experts:
        _blend(total, tokens, size)
    return Statistics(total if experts else total[0], float(largest), tokens, lost)


def second_moments(rows: Tensor) -> Tensor:
    """Sum of ``x x^T`` over rows ``[T, K]``, fp32 ``[K, K]``.

    Products of two 16-bit floats are exact in fp32, so on a GPU 16-bit activations go through its tensor cores as they are.
    """
    if rows.is_cuda and rows.dtype.itemsize == 2:
        return torch.mm(rows.mT, rows, out_dtype=torch.float32)
    rows = rows.float()
    return rows.mT @ rows


def _seen(block: nn.Module, weight: LinearWeight, inputs: Callable[[], Inputs]) -> Iterator[tuple[int, Tensor]]:
    """Number of the expert (0 where there are none) and its rows ``[T, K]``, for one run of the block."""
    found: list[tuple[int, Tensor]] = []

    def remember(name: str, expert: Optional[int], x: Tensor) -> None:
        if x.numel():
            found.append((expert or 0, x.reshape(-1, x.shape[-1])))
        if expert is None:
            raise _Enough

    with observe_inputs(block, [weight], remember), contextlib.suppress(_Enough):
        run_block(block, inputs())
    yield from found


def _blend(hessians: Tensor, tokens: Tensor, size: int) -> None:
    """Experts that few tokens reached lean on the mean of all: an expert with no token has it alone. In place."""
    mean = hessians.sum(0) / tokens.sum().clamp(min=1)
    for expert, count in enumerate(tokens.tolist()):
        missing = FEW_TOKENS * size - count
        if missing > 0:
            hessians[expert].add_(mean, alpha=missing)
