"""The ops of intscale. Importing this module registers them with ``torch.library``.

It stands here and not in ``kernels/__init__.py`` because that folder is linked at the top of the repository: with an
``__init__`` it would be a package named ``kernels`` there and hide Hugging Face's, which transformers looks for.
"""

from .integrations.torch import decompositions_anew
from .integrations.torch_names import check_compile
from .kernels import (
    dequantize,
    hadamard,
    quantize_per_token,
    quantize_static,
    w4a8_gated,
    w4a8_grouped,
    w4a8_linear,
    w4a8_residual,
)
from .kernels.abi import KERNEL_ABI
from .kernels.integer import attention, cache_form, linear, pointwise, rows  # noqa: F401  (registration)
from .kernels.integer.define import DECOMPOSITIONS

__all__ = [
    "KERNEL_ABI",
    "dequantize",
    "hadamard",
    "quantize_per_token",
    "quantize_static",
    "register_inductor",
    "w4a8_gated",
    "w4a8_grouped",
    "w4a8_linear",
    "w4a8_residual",
]

_registered = False


def register_inductor() -> None:
    """Teach Inductor our decompositions and lowerings. Imports Inductor, so it is called when something compiles, not before."""
    global _registered
    if _registered:
        return
    _registered = True
    check_compile()
    # Slow to import: Inductor, and what imports it.
    from torch._inductor.decomposition import register_decomposition

    # Imports Triton, which only GPUs need.
    from .kernels.template import register_lowerings

    register_decomposition([quantize_per_token.OP])(quantize_per_token.quantize_per_token_aten)
    register_decomposition([quantize_static.STATIC_OP])(quantize_static.quantize_static_aten)
    register_decomposition([dequantize.TOKEN_OP])(dequantize.dequantize_per_token_aten)
    # Imports Inductor.
    from .kernels.integer.inductor import register_scalar_lowerings

    register_scalar_lowerings()
    for op, aten_form in DECOMPOSITIONS.items():
        register_decomposition([op])(aten_form)
    register_lowerings()
    # Inductor copies its table at first use, which an import may be (torch.distributed.tensor.debug).
    decompositions_anew()
