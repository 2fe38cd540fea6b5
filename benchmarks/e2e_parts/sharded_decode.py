"""One decoded token of a sharded model: a step over a static cache that holds a prompt, timed with others queued behind it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

STEPS = {"cuda": 8, "cpu": 2}  # queued behind each other in one time
ROUNDS = 5
SPIN_CYCLES = 8_000_000  # a few milliseconds in which the host queues the steps


def decoding(model: Any, batch: int, context: int, device: torch.device) -> tuple[Callable, Callable]:
    """A function ``step(forward)`` that gives the logits of one token for each of ``batch`` sequences, and one that rewinds.

    The cache holds ``context`` tokens, the same for every sequence.
    """
    from transformers import StaticCache

    cache = StaticCache(config=model.config, max_batch_size=batch, max_cache_len=context + 8 * STEPS[device.type])
    generator = torch.Generator().manual_seed(context)
    vocabulary = model.config.vocab_size
    prompt = torch.randint(0, vocabulary, (1, context), generator=generator).to(device).expand(batch, -1)
    with torch.no_grad():
        for start in range(0, context, 512):  # the logits of all positions at once need not fit
            position = torch.arange(start, min(start + 512, context), device=device).unsqueeze(0)
            model(
                prompt[:, start : start + 512],
                past_key_values=cache,
                use_cache=True,
                position_ids=position,
                logits_to_keep=1,
            )
    token = torch.randint(0, vocabulary, (batch, 1), generator=generator).to(device)
    position = torch.full((1, 1), context, device=device)

    def step(forward: Callable) -> torch.Tensor:
        return forward(token, past_key_values=cache, use_cache=True, position_ids=position).logits

    def rewind() -> None:
        for layer in cache.layers:
            if isinstance(getattr(layer, "cumulative_length", None), torch.Tensor):
                layer.cumulative_length.fill_(context)

    return step, rewind


def seconds_of_a_step(run: Callable, rewind: Callable, device: torch.device) -> float:
    """Seconds of one of several steps that are queued behind each other, from when all ranks are ready."""
    rewind()
    count = STEPS[device.type]
    if device.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        dist.barrier()
        torch.cuda._sleep(SPIN_CYCLES)
        begin.record()
        for _ in range(count):
            run()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 1e3 / count
    dist.barrier()
    start = time.perf_counter()
    for _ in range(count):
        run()
    return (time.perf_counter() - start) / count
