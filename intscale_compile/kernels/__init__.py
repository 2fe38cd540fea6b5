"""The ops of intscale and their kernels. Importing this package registers the ops with ``torch.library``."""

from . import dequantize, quantize_per_token, w4a8_linear  # noqa: F401  (registration)
from .abi import KERNEL_ABI

__all__ = ["KERNEL_ABI", "register_inductor"]

_registered = False


def register_inductor() -> None:
    """Teach Inductor our decompositions and lowerings. Imports Inductor, so it is called when something compiles, not before."""
    global _registered
    if _registered:
        return
    _registered = True
    from torch._inductor.decomposition import register_decomposition

    from .template import register_lowerings

    register_decomposition([quantize_per_token.OP])(quantize_per_token.quantize_per_token_aten)
    register_decomposition([dequantize.TOKEN_OP])(dequantize.dequantize_per_token_aten)
    register_lowerings()
