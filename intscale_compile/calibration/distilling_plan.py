"""Whether a calibration ends with distilling, on which part of its data, and the sentence that says so."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Optional

import torch
from torch import nn

from ..errors import CalibrationError
from ..tensors.stored_files import first_line
from .capture import Data, batches_of
from .config import CalibrationConfig
from .distilling import STEP_TOKENS, Distillation, Step, distill_steps, trained_on
from .dividing import grouped, tokens_of

LEAST_STEPS = 100  # with fewer steps of fresh text the held-out loss rose at the rate of ``best``: that is left out
FAILURES = (CalibrationError, torch.OutOfMemoryError)

log = logging.getLogger("intscale_compile")


@dataclass(frozen=True)
class DistillingPlan:
    """What is done to the whole model once its blocks are quantized.

    Attributes:
        options: of the calibration.
        steps: 0: nothing.
        parts: the batches of each step.
        how: why nothing is done; "" where nothing was asked for, or something is done.
    """

    options: CalibrationConfig
    steps: int = 0
    parts: Sequence[Step] = ()
    how: str = ""

    @classmethod
    def of(cls, first: Data, rest: Data, options: CalibrationConfig) -> DistillingPlan:
        """Of the two parts of the data: what statistics look at, and what is behind it. A refusal is logged."""
        if not options.distillation_steps:
            return cls(options)
        if options.distillation == "always":
            return cls(options, options.distillation_steps, _parts(rest if len(rest) else first, options))
        parts = _parts(rest, options) if len(rest) else []
        if why := _too_little(first, parts, options):
            log.info("%s", why)
            return cls(options, how=why)
        plan = cls(options, min(options.distillation_steps, len(trained_on(parts))), parts)
        log.info("behind the blocks the model will be distilled: %s (distillation_steps=0 leaves that out)", plan._size)
        return plan

    def prepared(self, model: nn.Module) -> tuple[DistillingPlan, Optional[nn.Module]]:
        """The plan and a copy of the model as it is now, which is the original then; None where it needs none."""
        if not self.steps:
            return self, None
        try:
            return self, copy.deepcopy(model)
        except FAILURES as error:
            return self._refused(error), None

    def run(self, model: nn.Module, original: Optional[nn.Module], shown: bool) -> tuple[Optional[Distillation], str]:
        """Distill as planned; the losses and what is to be said."""
        if original is None:
            return None, self.how
        options = self.options
        settings: dict[str, Any] = {"rate": options.distillation_rate, "seed": options.seed, "progress": shown}
        try:
            done = distill_steps(model, original, self.parts, self.steps, **settings)
        except FAILURES as error:
            return None, self._refused(error).how
        held = "" if done.before is None else f"; loss of held-out text {done.before:.4f} -> {done.after:.4f}"
        kept = "" if done.kept else ", which is no gain, so the model is as the blocks were left"
        how = f"distilled: {self._size}{held}{kept}"
        log.info("%s", how)
        return done, how

    @property
    def _size(self) -> str:
        return f"{self.steps} steps of about {_tokens(self.parts) / max(1, len(self.parts)):.0f} tokens"

    def _refused(self, error: BaseException) -> DistillingPlan:
        """Without a step; raises the error anew where the steps were to be taken whatever happens."""
        if self.options.distillation == "always":
            raise error
        how = f"not distilled, which failed: {first_line(error)}; the blocks are calibrated all the same"
        log.warning("%s", how)
        return replace(self, steps=0, parts=(), how=how)


def _parts(data: Data, options: CalibrationConfig) -> list[Step]:
    tokens = options.distillation_tokens
    if not tokens:
        return [[batch] for batch in batches_of(data, STEP_TOKENS)]
    return list(grouped(batches_of(data, min(tokens, STEP_TOKENS)), tokens))


def _too_little(first: Data, parts: Sequence[Step], options: CalibrationConfig) -> str:
    """Why the text behind the statistics does not do; "" where it does."""
    if options.scales == "float":
        return "not distilled: group scales are floats"
    if not options.statistics_tokens:
        return "not distilled: statistics_tokens=0, statistics look at all of the data, and none is fresh"
    seen, behind = sum(map(tokens_of, batches_of(first))), _tokens(parts)
    steps, size = min(LEAST_STEPS, options.distillation_steps), options.distillation_tokens or STEP_TOKENS
    if behind < steps * size:
        wanted = max(seen, options.statistics_tokens) + steps * size - seen - behind
        return (
            f"not distilled: that takes {steps * size} tokens behind the first {options.statistics_tokens}, which statistics "
            f"look at, and {seen + behind} tokens leave {behind}; with {wanted} tokens more it is done"
        )
    if len(parts) < steps / 2:
        return f"not distilled: {behind} tokens in {len(parts)} batches are too few steps; batches of {size} tokens would do"
    return ""


def _tokens(parts: Sequence[Step]) -> int:
    return sum(tokens_of(batch) for part in parts for batch in part)
