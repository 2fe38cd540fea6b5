"""What parts of a block returned is kept while the block is run again and again, up to one stage more each time.

A run that observes the weights of a stage stops at their product. All that came before is settled: the weights of earlier
stages are quantized, so each part that has returned would return the same in every later run. Keeping that saves most of
the products and half of the attention of a calibration.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Optional

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from .layers import weights_of

MAX_BYTES = 2 << 30  # of what is kept; the rest is computed again


class Replay:
    """Results of the parts of one block, batch by batch.

    Args:
        block: whose runs repeat; in it products with a weight that is not quantized yet end the run.
        max_bytes: how much is kept.
    """

    def __init__(self, block: nn.Module, max_bytes: int = MAX_BYTES):
        whole = all(
            weight.weight.dim() == 2 for weight in weights_of(block).values()
        )  # a run for experts does not stop
        self.parts = [part for part in block.modules() if whole and part is not block and _may_be_kept(part)]
        self._kept: dict[int, dict[nn.Module, list[Any]]] = {}
        self._room, self._full = max_bytes, False

    @contextlib.contextmanager
    def batch(self, number: int) -> Iterator[None]:
        """While the block runs on a batch: parts that are known return what they did, others are kept when they return."""
        known = self._kept.setdefault(number, {})
        own = {part: part.__dict__.get("forward") for part in known}
        handles = [part.register_forward_hook(self._returned(known)) for part in self.parts if part not in known]
        try:
            for part, results in known.items():
                part.forward = _answering(part.forward, results)
            yield
        finally:
            for handle in handles:
                handle.remove()
            for part, forward in own.items():
                del part.forward
                if forward is not None:
                    part.forward = forward

    def _returned(self, known: dict[nn.Module, list[Any]]):
        def keep(module: nn.Module, args, result) -> None:
            for part in module.modules():
                if part is not module and part in known:
                    self._room += _bytes(known.pop(part))
            copied = tree_map(_copied, result)
            size = _bytes(copied)
            self._full |= size > self._room  # from here on nothing, or a later call would pass for an earlier one
            if not self._full:
                self._room -= size
                known.setdefault(module, []).append(copied)

        return keep


def replayed(replay: Optional[Replay], number: int) -> contextlib.AbstractContextManager:
    """``replay.batch(number)``, or nothing."""
    return contextlib.nullcontext() if replay is None else replay.batch(number)


def _may_be_kept(part: nn.Module) -> bool:
    """Whether a part is worth it, and nothing else changes what it returns."""
    return any(True for _ in part.parameters()) and not part._forward_hooks


def _answering(forward: Callable, results: list[Any]) -> Callable:
    """``results`` one after the other, then what ``forward`` gives."""
    left = list(results)

    def answer(*args, **kwargs):
        return tree_map(_copied, left.pop(0)) if left else forward(*args, **kwargs)

    return answer


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value  # the block may write to it


def _bytes(results: Any) -> int:
    return sum(leaf.nbytes for leaf in tree_leaves(results) if isinstance(leaf, Tensor))
