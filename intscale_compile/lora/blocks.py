"""The blocks of a quantized model and of its original, each with what it reads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Optional, Union

import torch
from torch import Tensor, nn

from ..calibration.capture import StackInputs, capture
from ..calibration.layers import Inputs, eager_experts, run_block, stacks
from ..calibration.tuning import token_error
from ..errors import CalibrationError, ConfigError

ORTHOGONAL = 1e-2  # largest relative error of an embedding turned by the rotation that was found


def load_original(original: Union[nn.Module, str, Path]) -> nn.Module:
    """A model as it is, or read from its folder, in eval mode.

    Raises:
        ConfigError: it is in training mode, or neither a model nor a folder.
    """
    if isinstance(original, (str, Path)):
        # Slow to import.
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(original, dtype="auto").eval()
    if not isinstance(original, nn.Module):
        raise ConfigError(
            f"original is a {type(original).__name__}: pass the model before it was quantized, or its folder."
        )
    if original.training:
        raise ConfigError("original is in training mode, where dropout may be active: call original.eval() first.")
    return original


class BlockPair:
    """A block of the quantized model beside the original one, and the hidden states that each of them reads.

    Attributes:
        name: of the block in the quantized model.
        block, original: the two.
        targets: what the original block makes of the original inputs, in the space of the quantized model.
    """

    def __init__(self, name: str, block: nn.Module, original: nn.Module, streams: Streams, place: int):
        self.name, self.block, self.original = name, block, original
        self.streams, self.place = streams, place
        self.device = next(block.parameters()).device
        with torch.no_grad():
            self._original_outputs = [run_block(original, self.original_inputs(b)).cpu() for b in range(len(self))]
        self.targets = [streams.turned(y) for y in self._original_outputs]

    def __len__(self) -> int:
        return len(self.streams.quantized)

    def inputs(self, batch: int) -> Inputs:
        """What the quantized block is called with."""
        return self.streams.base.inputs(batch, self.place, self.streams.quantized[batch], self.device)

    def original_inputs(self, batch: int) -> Inputs:
        """What the original block is called with."""
        device = next(self.original.parameters()).device
        return self.streams.source.inputs(batch, self.place, self.streams.original[batch], device)

    def original_of_quantized(self, batch: int) -> Tensor:
        """What the original block makes of the quantized model's hidden states, in the space of the quantized model."""
        device = next(self.original.parameters()).device
        hidden = self.streams.turned_back(self.streams.quantized[batch])
        with torch.no_grad():
            return self.streams.turned(
                run_block(self.original, self.streams.source.inputs(batch, self.place, hidden, device)).cpu()
            )

    def error(self) -> float:
        """Mean relative squared error of a token behind the block."""
        with torch.no_grad():
            errors = [float(token_error(run_block(self.block, self.inputs(b)), t)) for b, t in enumerate(self.targets)]
        mean = sum(errors) / len(errors)
        if not mean == mean:
            raise CalibrationError(
                f"the output of {self.name} is not finite: look for NaN or Inf in the model or the data."
            )
        return mean

    def move_on(self) -> None:
        """Move both streams of hidden states behind the block."""
        with torch.no_grad():
            self.streams.quantized = [run_block(self.block, self.inputs(b)).cpu() for b in range(len(self))]
        self.streams.original = self._original_outputs


class Streams:
    """Hidden states of every batch before the current block, of both models; ``rotation`` turns the one into the other."""

    def __init__(self, base: StackInputs, source: StackInputs, rotation: Optional[Tensor]):
        self.base, self.source, self.rotation = base, source, rotation
        self.quantized, self.original = list(base.hidden), list(source.hidden)

    def turned(self, hidden: Tensor) -> Tensor:
        """From the original model's space to the quantized one's."""
        return hidden if self.rotation is None else (hidden.double() @ self.rotation).to(hidden.dtype)

    def turned_back(self, hidden: Tensor) -> Tensor:
        """The other way."""
        return hidden if self.rotation is None else (hidden.double() @ self.rotation.mT).to(hidden.dtype)


def block_pairs(
    base: nn.Module, original: nn.Module, batches: Sequence[Mapping[str, Any]], same_space: bool
) -> Iterator[BlockPair]:
    """Every block of a quantized model beside the original one, in order; call ``move_on`` of each before the next.

    Raises:
        ConfigError: the models have other blocks, or with ``same_space`` the quantized one is rotated.
        CalibrationError: as for ``calibrate``.
    """
    ours, theirs = stacks(base), stacks(original)
    if [len(stack) for stack in ours] != [len(stack) for stack in theirs]:
        raise ConfigError(
            "original has another number of layers than the quantized model: pass the model that was quantized."
        )
    with eager_experts(base):
        for stack, other in zip(ours, theirs):
            source, inputs = capture(original, other, batches), capture(base, stack, batches)
            rotation = _rotation_between(source.hidden, inputs.hidden)
            if rotation is not None and same_space:
                raise ConfigError(
                    "the quantized model is rotated, its layers are not the original ones: use method='apiq'."
                )
            streams = Streams(inputs, source, rotation)
            for place, ((name, block), (_, before)) in enumerate(zip(stack, other)):
                yield BlockPair(name, block, before, streams, place)


def _rotation_between(original: list[Tensor], turned: list[Tensor]) -> Optional[Tensor]:
    """The orthogonal matrix, fp64 ``[D, D]``, that turns the hidden states of one model into those of the other; None: equal.

    Raises:
        ConfigError: there is none, or the data is too little to find it.
    """
    if all(torch.equal(a, b) for a, b in zip(original, turned)):
        return None
    x = torch.cat([h.reshape(-1, h.shape[-1]) for h in original]).double().unique(dim=0)
    y = torch.cat([h.reshape(-1, h.shape[-1]) for h in turned]).double()
    all_x = torch.cat([h.reshape(-1, h.shape[-1]) for h in original]).double()
    if (all_x - y).norm() < ORTHOGONAL * all_x.norm():
        return None
    left, sizes, right = torch.linalg.svd(all_x.mT @ y)
    if len(x) < x.shape[-1] or float(sizes[-1]) < 1e-9 * float(sizes[0]):
        raise ConfigError(
            f"the quantized model is rotated, and {len(x)} different tokens are too few to find out how: pass more token_ids."
        )
    rotation = left @ right
    if (all_x @ rotation - y).norm() > ORTHOGONAL * y.norm():
        raise ConfigError(
            "original and the quantized model read the data differently: pass the model that was quantized."
        )
    return rotation
