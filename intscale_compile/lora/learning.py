"""ApiQ's block-wise start: adapters of a block by gradient descent on the block's output (arXiv 2402.05147)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..calibration.layers import run_block
from ..calibration.tuning import token_error
from .blocks import BlockPair


def learn_block(pair: BlockPair, parameters: list[Tensor], steps: int, lr: float, aug_loss: bool, seed: int) -> None:
    """Adam with a cosine schedule, one sequence a step; deterministic.

    The error of a token counts relative to the token's size: that is what the next norm passes on.

    Args:
        pair: the block and its original.
        parameters: what is learned, in place.
        steps: how many.
        lr: where the learning rate begins.
        aug_loss: add the error against what the original block makes of the quantized model's input.
        seed: of the order of the sequences.
    """
    optimizer = torch.optim.Adam(parameters, lr=lr)  # type: ignore[arg-type]
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    for _ in range(steps):
        order = order or torch.randperm(len(pair), generator=generator).tolist()
        batch = order.pop()
        with torch.enable_grad():
            output = run_block(pair.block, pair.inputs(batch))
            loss = token_error(output, pair.targets[batch])
            if aug_loss:
                loss = loss + token_error(output, pair.original_of_quantized(batch))
            optimizer.zero_grad()
            loss.backward()
        optimizer.step()
        schedule.step()
