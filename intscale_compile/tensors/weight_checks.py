"""Whether a high-precision weight can be quantized at all."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..errors import WeightError
from ..integrations.torch import is_dtensor

# What torch.nn.utils puts in front of the call of a module: the class of the hook, and how it is taken away for good.
_HOOKS = {
    "WeightNorm": "torch.nn.utils.remove_weight_norm(module)",
    "SpectralNorm": "torch.nn.utils.remove_spectral_norm(module)",
    "BasePruningMethod": 'torch.nn.utils.prune.remove(module, "weight")',
}


def check_module(module: nn.Module, leaf: str, name: str) -> None:
    """Raise ``WeightError`` unless the tensor ``leaf`` of a module, called ``name``, is a weight that can be quantized.

    Refused are weights that are computed when the module is called (parametrizations, weight norm, spectral norm, pruning),
    not there yet (lazy modules), divided among ranks, or of another library's class, and what :func:`check_weight` refuses.
    """
    kind = type(module).__name__
    if parametrize.is_parametrized(module, leaf):
        raise WeightError(
            f"{name} is computed from other parameters by a parametrization of {kind}: call torch.nn.utils.parametrize."
            f"remove_parametrizations(module, {leaf!r}) first, or leave this layer out with filter_fn."
        )
    for hook in module._forward_pre_hooks.values():
        mend = next((_HOOKS[c.__name__] for c in type(hook).__mro__ if c.__name__ in _HOOKS), None)
        if mend is not None and leaf in (getattr(hook, "name", None), getattr(hook, "_tensor_name", None)):
            raise WeightError(
                f"{name} is computed before each call by the hook {type(hook).__name__} of {kind}: call {mend} first, or leave "
                "this layer out with filter_fn."
            )
    parameter: Any = getattr(module, leaf, None)
    if not isinstance(parameter, Tensor) or isinstance(module, nn.Embedding):
        raise WeightError(f"{name}: {kind} has no linear weight of that name; select other modules in filter_fn.")
    if nn.parameter.is_lazy(parameter):
        raise WeightError(f"{name} of {kind} has no shape yet: call the model once with an input first.")
    if is_dtensor(parameter):
        raise WeightError(
            f"{name} is divided among ranks (DTensor): quantize the model first, then call parallelize_module or fully_shard."
        )
    if hasattr(type(parameter), "__tensor_flatten__"):
        raise WeightError(
            f"{name} is a {type(parameter).__name__}, another library's tensor: start from the original weights, convert it with "
            "intscale_compile.convert_from_torchao, or leave this layer out with filter_fn."
        )
    if leaf not in module._parameters and leaf not in module._buffers:
        raise WeightError(
            f"{name} is no parameter of {kind} but computed or set by other code: make it a parameter, or leave this layer out "
            "with filter_fn."
        )
    check_weight(parameter.detach(), name)


def check_weight(weight: Tensor, name: str) -> None:
    """Raise ``WeightError`` unless ``weight`` can be quantized."""
    if not weight.dtype.is_floating_point or weight.dtype.itemsize < 2:
        raise WeightError(f"{name} is {weight.dtype}; only floating point weights of 16 bits or more can be quantized.")
    if weight.layout != torch.strided:
        raise WeightError(
            f"{name} has layout {weight.layout}: call to_dense() on it, or leave this layer out with filter_fn."
        )
    if weight.dim() not in (2, 3) or 0 in weight.shape:
        raise WeightError(f"{name} has shape {tuple(weight.shape)}; a non-empty [N, K] or [E, N, K] weight is needed.")
    if weight.device.type == "meta":
        raise WeightError(f"{name} is on the meta device and has no data: load the checkpoint (or to_empty) first.")
    if not _is_finite(weight):
        raise WeightError(
            f"{name} has NaN or Inf entries: repair the checkpoint, or leave this layer out with filter_fn."
        )


def _is_finite(weight: Tensor) -> bool:
    # The least and the greatest entry are NaN where any entry is; nothing of the size of the weight is allocated for them.
    # float64 is quantized in float32, where 1e300 is Inf.
    return bool(torch.isfinite(torch.stack(torch.aminmax(weight)).float()).all())
