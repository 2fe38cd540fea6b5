"""Adapters in closed form: the singular vectors of what quantization changed, alone or seen through a layer's inputs.

``"svd"`` is LoftQ's step (arXiv 2310.08659): the best approximation of ``R = W - W_q`` of the adapter's rank.
``"apiq-lw"`` minimises ApiQ's layer-wise objective (arXiv 2402.05147) ``sum ||W x0 - (W_q + B A) x||^2`` instead of descending
it, ``x0`` being the inputs in the original model and ``x`` those in the quantized one. With
``H = sum x x^T`` and ``D = sum (x0 - x) x^T``

    R = W + W D H^-1 - W_q,      B A = the best approximation of R in the norm tr(E H E^T): that of R H^1/2, times H^-1/2
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..calibration.capture import second_moments
from ..calibration.gptq import compensated, damped
from ..calibration.layers import run_block
from ..errors import ConfigError
from .blocks import BlockPair
from .layers import Adapted

DAMPING = 0.01
ANOTHER_WEIGHT = 0.5  # relative change of a weight from which on it was not only quantized


def from_singular_vectors(one: Adapted, original: Tensor) -> None:
    """Set an adapter to the best approximation of what quantization changed, of its rank; in place.

    Raises:
        ConfigError: the weight was transformed before it was quantized.
    """
    _set(one, _residual(one, original), None)


def solve_block(pair: BlockPair, layers: list[Adapted]) -> None:
    """Set the adapters of a block layer by layer, in the order in which they are called; in place.

    Layers that read one tensor are set together. Layers that are not reached keep what they have.

    Raises:
        ConfigError: a weight was transformed before it was quantized.
    """
    prefix = len(pair.name) + 1
    with torch.no_grad():
        for stage in _stages(pair, layers):
            hessian, lost = _statistics(pair, stage[0], pair.original.get_submodule(stage[0].name[prefix:]))
            for one in stage:
                weight = pair.original.get_submodule(one.name[prefix:]).weight.detach().float()  # type: ignore[union-attr, operator]
                residual = _residual(one, weight)
                rows = weight.mT if one.weight.transposed else weight
                _set(one, residual + compensated(rows, hessian, lost, DAMPING) - rows, hessian)


def _residual(one: Adapted, original: Tensor) -> Tensor:
    """``W - W_q``, fp32 ``[N, K]``."""
    now = one.weight.dequantize(torch.float32)
    residual = original.float() - now
    if residual.norm() > ANOTHER_WEIGHT * now.norm():
        raise ConfigError(
            f"{one.name}.weight is far from the original one: it was transformed (rotation, smoothing) before it was "
            "quantized, or original is another model: use method='apiq'."
        )
    return residual.mT if one.weight.transposed else residual


def _set(one: Adapted, residual: Tensor, hessian: Any) -> None:
    """``B A`` becomes the best approximation of ``residual``, in the norm of ``hessian`` where there is one."""
    back = None
    if hessian is not None:
        sizes, vectors = torch.linalg.eigh(damped(hessian, DAMPING).double())
        roots = sizes.clamp(min=1e-12 * float(sizes[-1])).sqrt()
        residual = residual.double() @ (vectors * roots) @ vectors.mT
        back = (vectors / roots) @ vectors.mT
    rank = one.down.shape[0]
    left, sizes, right = torch.linalg.svd(residual.double(), full_matrices=False)
    rank = min(rank, len(sizes))
    roots = sizes[:rank].sqrt()
    down = roots[:, None] * right[:rank]
    with torch.no_grad():
        one.down.zero_()
        one.up.zero_()
        one.down[:rank].copy_(down if back is None else down @ back)
        one.up[:, :rank].copy_(left[:, :rank] * roots / one.scaling)


def _stages(pair: BlockPair, layers: list[Adapted]) -> Iterator[list[Adapted]]:
    """Layers in the order of their calls, those that read one tensor together."""
    seen: dict[tuple, list[Adapted]] = {}
    alive: list[Tensor] = []

    def hook_of(one: Adapted):
        def remember(module, args) -> None:
            alive.append(args[0])  # a freed tensor's address may come back
            stage = seen.setdefault((args[0].data_ptr(), tuple(args[0].shape)), [])
            if one not in stage:
                stage.append(one)

        return remember

    handles = [one.layer.register_forward_pre_hook(hook_of(one)) for one in layers]
    try:
        run_block(pair.block, pair.inputs(0))
    finally:
        for handle in handles:
            handle.remove()
    yield from seen.values()


def _statistics(pair: BlockPair, one: Adapted, original: Any) -> tuple[Tensor, Tensor]:
    """``H`` and ``D`` of a layer's inputs, fp32 ``[K, K]``."""
    size = one.down.shape[1]
    hessian = torch.zeros((size, size), device=one.down.device)
    lost = torch.zeros_like(hessian)
    read: dict[str, Tensor] = {}

    def hook_of(kind: str):
        return lambda module, args: read.__setitem__(kind, args[0].reshape(-1, size))

    handles = [
        one.layer.register_forward_pre_hook(hook_of("now")),
        original.register_forward_pre_hook(hook_of("before")),
    ]
    try:
        for batch in range(len(pair)):
            run_block(pair.block, pair.inputs(batch))
            run_block(pair.original, pair.original_inputs(batch))
            now, before = read["now"], read["before"].to(hessian.device)
            hessian += second_moments(now)
            lost.addmm_((before.float() - now.float()).mT, now.float())
    finally:
        for handle in handles:
            handle.remove()
    return hessian, lost
