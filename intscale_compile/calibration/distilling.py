"""Distilling a quantized model from the original: row scales, norm weights and biases of all layers together.

Calibration works block by block; here the whole model counts. The target is the original's distribution of the next token
over some text, or its last hidden states where it has no output embedding. Row scales and vectors stay floats in the
quantized model, so gradient descent can move them; codes and group scales stay as they are (as the second phase of
EfficientQAT, arXiv 2407.11062, whose free scales are those of groups). Activations are rounded to int8 as they are when the
model runs, and gradients pass through that rounding. What is learned are two numbers for each output feature of a block or
so, far fewer than tokens, which is why text of another kind gains as well.
"""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Optional

import torch
from torch import Tensor, nn

from ..errors import CalibrationError
from ..integrations.torch import has_amx
from ..kernels.hadamard import hadamard_transform
from ..progress import block_bar
from ..tensors.intscale_tensor import IntScaleTensor
from .capture import Data, batches_of
from .dividing import tokens_of
from .layers import without_cache
from .solve import frozen
from .tuning import token_error

RATE = 1e-3  # of logarithms of row scales, and of vectors relative to their mean magnitude
STEP_TOKENS = 4096
WARM_UP = 0.05  # of the steps
CHUNK_ENTRIES = {"cuda": 1 << 26, "cpu": 1 << 20}  # of logits that are looked at together
HELD_OUT = 16  # every sixteenth batch is only looked at, before and after; of fewer batches than that none

Step = Sequence[Mapping[str, Any]]  # batches that are one step together


@dataclass
class Distillation:
    """What ``distill`` did.

    Attributes:
        first, last: mean loss of the first and of the last tenth of the steps.
        before, after: loss on the batches that were held out; None where there were too few batches.
        kept: whether the model was changed: not where the held-out loss did not fall.
    """

    first: float
    last: float
    before: Optional[float]
    after: Optional[float]
    kept: bool


def distill(
    model: nn.Module,
    original: nn.Module,
    data: Data,
    steps: int = 100,
    *,
    rate: float = RATE,
    seed: int = 0,
    progress: bool = True,
) -> Distillation:
    """Move row scales, norm weights and biases of a quantized model, in place, so that it answers as the original does.

    The whole model runs forward and backward: that takes the memory of both models, a copy of the quantized weights in 16
    bits, and the activations of a step's tokens. On a CPU a step of 4096 tokens takes the time of about six forward passes.

    Args:
        model: with ``IntScaleTensor`` weights of linear layers, in eval mode; from ``calibrate``, ``quantize_`` or an import.
        original: the model that it was made of, in floating point, on the same device.
        data: as for ``calibrate``; one step takes about 4096 tokens of a tensor, or one entry of a list.
        steps: of Adam; data that ends begins again in another order. Fresh text is better than the same text again.
        rate: of the logarithms of row scales, and of vectors relative to their mean magnitude.
        seed: of the order of the data.
        progress: show a bar.

    Returns:
        The losses. Where the loss of the batches held out did not fall, the model is as it was.

    Raises:
        CalibrationError: there is no data, or no quantized linear layer, or a loss is not finite, or the model has no answers
            to compare; the model is as it was.
    """
    parts = [[batch] for batch in batches_of(data, STEP_TOKENS)]
    return distill_steps(model, original, parts, steps, rate=rate, seed=seed, progress=progress)


def distill_steps(
    model: nn.Module,
    original: nn.Module,
    parts: Sequence[Step],
    steps: int,
    *,
    rate: float = RATE,
    seed: int = 0,
    progress: bool = True,
) -> Distillation:
    """``distill`` with the batches of each step given; every sixteenth of them is held out.

    The loss of a step is the mean over the tokens of its batches, which go through the models one by one.
    """
    layers = _layers(model)
    held = parts[HELD_OUT - 1 :: HELD_OUT]
    parts = trained_on(parts)
    vectors = [p for p in model.parameters() if p.dim() == 1 and p.is_floating_point()]
    kept = [vector.detach().clone() for vector in vectors]
    run = _Run(model, original)
    good = False
    try:
        with without_cache(model), without_cache(original), _replaced(layers):
            before = run.mean_loss(held)
            losses = _descend(run, layers, vectors, parts, steps, rate, seed, progress)
            after = run.mean_loss(held)
        if not all(map(math.isfinite, losses)):
            raise CalibrationError(f"a loss was not finite while the model was distilled: use a rate below {rate}.")
        good = before is None or after is None or after < before
    finally:
        if not good:
            _put_back(vectors, kept)
    for layer in layers if good else ():
        layer.finish()
    tenth = max(1, steps // 10)
    first, last = (sum(part) / max(1, len(part)) for part in (losses[:tenth], losses[-tenth:]))
    return Distillation(first, last, before, after, good)


def trained_on(parts: Sequence[Step]) -> list[Step]:
    """The steps' batches without those that are held out."""
    return [part for place, part in enumerate(parts) if place % HELD_OUT != HELD_OUT - 1]


def _layers(model: nn.Module) -> list[_Layer]:
    """Linear layers with a quantized weight of their own; shared weights and stacks of experts keep their row scales."""
    owners = [m for m in model.modules() if isinstance(getattr(m, "weight", None), IntScaleTensor)]
    count = Counter(id(module.weight) for module in owners)
    found = [m for m in owners if m.weight.ndim == 2 and count[id(m.weight)] == 1 and not isinstance(m, nn.Embedding)]
    if not found:
        raise CalibrationError("there is no quantized linear layer to distill: quantize or calibrate the model first.")
    return [_Layer(module) for module in found]


def _put_back(vectors: list[nn.Parameter], kept: list[Tensor]) -> None:
    with torch.no_grad():
        for vector, value in zip(vectors, kept):
            vector.copy_(value)


class _Layer:
    """A linear layer whose row scales are learned."""

    def __init__(self, module: nn.Module):
        weight: Any = module.weight
        self.module, self.weight = module, weight
        plain = weight.replaced(rotation=0, input_order=None, per_tensor_scale=torch.ones_like(weight.per_tensor_scale))
        dense = plain.dequantize(torch.float32)
        self.dense = (dense.mT if weight.transposed else dense).to(_product_dtype(weight.device)).contiguous()
        self.rows = weight.per_tensor_scale.detach().flatten()
        self.free = torch.zeros_like(self.rows).requires_grad_(True)

    def forward(self, x: Tensor) -> Tensor:
        """What the quantized layer makes of ``x [..., K]``, in the dtype of ``x``."""
        if self.weight.rotation:
            x = hadamard_transform(x, self.weight.rotation)
        if self.weight.input_order is not None:
            x = x.index_select(-1, self.weight.input_order.flatten())
        result = _Product.apply(x, self.free.exp(), self.dense, self.rows, self.weight.act_pre_scale)
        bias = self.module.bias
        return result if bias is None else result + bias.to(result.dtype)

    def finish(self) -> None:
        """Give the layer's weight the row scales that were learned."""
        factors = self.free.detach().exp().unsqueeze(-1)
        old = self.weight.per_tensor_scale
        self.module.weight = frozen(self.weight.replaced(per_tensor_scale=old * factors.view_as(old)))


class _Product(torch.autograd.Function):
    """An activation quantized to int8, times integer weights, times scales; the rounding passes gradients as they are.

    Int8 codes, and 4-bit codes times 4-bit scales, are exact in bf16.
    """

    @staticmethod
    def forward(ctx, x: Tensor, factors: Tensor, dense: Tensor, rows: Tensor, static: Optional[Tensor]) -> Tensor:
        wide = x.reshape(-1, x.shape[-1]).float()
        scale = wide.abs().amax(-1, keepdim=True).clamp_(min=2.0**-126) / 127 if static is None else static.flatten()
        codes = (wide / scale).round_().clamp_(-127, 127).to(dense.dtype)
        plain = codes @ dense.mT
        ctx.save_for_backward(plain, scale, factors, dense, rows)
        ctx.shape = x.shape
        return (plain * scale * (rows * factors)).to(x.dtype).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        plain, scale, factors, dense, rows = ctx.saved_tensors
        wide = gradient.reshape(plain.shape).float()
        of_factors = (wide * plain * scale).sum(0) * rows
        of_x = (wide * (rows * factors)).to(dense.dtype) @ dense
        return of_x.view(ctx.shape).to(gradient.dtype), of_factors, None, None, None


class _Divergence(torch.autograd.Function):
    """Mean Kullback-Leibler divergence of distributions ``[T, V]`` from targets, from logits of both."""

    @staticmethod
    def forward(ctx, logits: Tensor, target: Tensor) -> Tensor:
        slope = torch.empty_like(logits)
        loss = torch.zeros((), device=logits.device)
        entries = CHUNK_ENTRIES.get(logits.device.type, 1 << 24)
        rows = max(1, entries // logits.shape[-1])
        for part, wanted, out in zip(logits.split(rows), target.split(rows), slope.split(rows)):
            found, wanted = part.float().log_softmax(-1), wanted.float().log_softmax(-1)
            weights = wanted.exp()
            loss += wanted.sub_(found).mul_(weights).sum()
            out.copy_(found.exp_().sub_(weights).div_(len(logits)))
        ctx.save_for_backward(slope)
        return loss / len(logits)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return ctx.saved_tensors[0] * gradient, None


@contextlib.contextmanager
def _replaced(layers: list[_Layer]) -> Iterator[None]:
    """The layers compute so that row scales have gradients, for a while."""
    kept = [layer.module.__dict__.get("forward") for layer in layers]
    try:
        for layer in layers:
            layer.module.forward = layer.forward  # type: ignore[method-assign]
        yield
    finally:
        for layer, own in zip(layers, kept):
            del layer.module.forward
            if own is not None:
                layer.module.forward = own  # type: ignore[method-assign]


class _Run:
    """Both models on the same data."""

    def __init__(self, model: nn.Module, original: nn.Module):
        self.model, self.original = model, original
        first = next(original.parameters())
        self.device = first.device
        self.narrow = first.dtype == torch.float32 and _product_dtype(self.device) == torch.bfloat16

    def loss(self, batch: Mapping[str, Any]) -> Tensor:
        """How far the model's answer is from the original's, over the tokens that count."""
        moved = {k: v.to(self.device) if isinstance(v, Tensor) else v for k, v in batch.items()}
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.narrow):
            with torch.no_grad():
                target, _ = _answer(self.original(**moved))
            found, is_hidden = _answer(self.model(**moved))
        mask = moved.get("attention_mask")
        if found.dim() == 3 and isinstance(mask, Tensor) and mask.shape == found.shape[:2]:
            found, target = found[mask.bool()], target[mask.bool()]
        if is_hidden:
            return token_error(found, target)
        return _Divergence.apply(found.flatten(0, -2), target.flatten(0, -2))

    def step_loss(self, part: Step) -> Tensor:
        """Mean loss over the tokens of a step's batches; gradients are added up where grad mode is on."""
        counts = [max(1, tokens_of(batch)) for batch in part]
        losses = []
        for batch, count in zip(part, counts):
            loss = self.loss(batch) * (count / sum(counts))
            if loss.requires_grad:
                loss.backward()
            losses.append(loss.detach())
        return torch.stack(losses).sum()

    def mean_loss(self, parts: Sequence[Step]) -> Optional[float]:
        """Mean loss over steps; None where there are none."""
        with torch.no_grad():
            return sum(float(self.step_loss(part)) for part in parts) / len(parts) if parts else None


def _answer(result: Any) -> tuple[Tensor, bool]:
    """Logits of a model with an output embedding, else its last hidden states, and whether it is these."""
    for name in ("logits", "last_hidden_state"):
        if isinstance(found := getattr(result, name, None), Tensor):
            return found, name != "logits"
    raise CalibrationError(f"{type(result).__name__} has neither logits nor last hidden states to compare.")


def _product_dtype(device: torch.device) -> torch.dtype:
    """What products are computed in: bf16 on GPUs and on CPUs that have instructions for it, else fp32."""
    fast = device.type == "cuda" or (device.type == "cpu" and has_amx())
    return torch.bfloat16 if fast else torch.float32


def _descend(
    run: _Run,
    layers: list[_Layer],
    vectors: list[nn.Parameter],
    parts: Sequence[Step],
    steps: int,
    rate: float,
    seed: int,
    progress: bool,
) -> list[float]:
    """Losses of all steps."""
    groups = [{"params": [layer.free for layer in layers], "lr": rate}]
    groups += [{"params": [v], "lr": rate * float(v.detach().abs().mean().clamp(min=1e-3))} for v in vectors]
    wanted = [vector.requires_grad for vector in vectors]
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95))
    warm = max(1.0, WARM_UP * steps)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / warm) * (1 + math.cos(math.pi * step / max(1, steps))) / 2
    )
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    losses: list[Tensor] = []
    try:
        for vector in vectors:
            vector.requires_grad_(True)
        with torch.enable_grad(), block_bar("distill", steps, progress) as bar:
            for _ in range(steps):
                order = order or torch.randperm(len(parts), generator=generator).tolist()
                optimizer.zero_grad()
                losses.append(run.step_loss(parts[order.pop()]))
                optimizer.step()
                schedule.step()
                bar.update(1)
    finally:
        for vector, value in zip(vectors, wanted):
            vector.requires_grad_(value)
            vector.grad = None
    return torch.stack(losses).tolist() if losses else []
