"""Other spellings of ``F.linear(x, weight)``: which operand is the weight, and whether it is kept as ``[N, K]``.

``inner(x, weight)``, ``tensordot(x, weight, ([-1], [1]))`` and ``einsum("...k,nk->...n", x, weight)`` reduce the last dimension
of an activation over one of a matrix, and put the matrix's other dimension in its place. The passes and the tensor subclass
ask here, so that eager and compiled calls agree.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Optional

# Products that are no linear layer, whichever operand a weight is; names without "linalg_".
OTHER_FORMS = {
    "addmm_", "baddbmm", "baddbmm_", "addbmm", "addbmm_", "bilinear", "multi_dot", "chain_matmul", "kron", "dot", "vdot",
    "vecdot", "outer", "ger", "addr", "addr_", "sspaddmm", "scaled_dot_product_attention", "grouped_mm", "_grouped_mm", "cross",
    "matrix_power", "matrix_exp",
}  # fmt: skip


def einsum_linear(equation: Any, weight_at: int) -> Optional[bool]:
    """Whether the operand ``weight_at`` (0 or 1) of an einsum is a weight kept as ``[N, K]``; None where it is no linear layer.

    False means ``[K, N]``. The activation must have its features last, and the result its outputs.
    """
    if not isinstance(equation, str):
        return None
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    operands = inputs.split(",")
    if len(operands) != 2:
        return None
    weight, x = operands[weight_at], operands[1 - weight_at]
    if not arrow:
        once = sorted(label for label in set(x + weight) - {"."} if (x + weight).count(label) == 1)
        output = ("..." if "..." in x + weight else "") + "".join(once)
    labels = x.replace("...", "")
    if len(weight) != 2 or weight[0] == weight[1] or "." in weight or len(set(labels)) != len(labels):
        return None
    for place in (0, 1):
        n, k = weight[place], weight[1 - place]
        if x.endswith(k) and n not in x and output == x[:-1] + n:
            return weight == n + k
    return None


def tensordot_linear(dims: Any, x_rank: Optional[int]) -> Optional[bool]:
    """Whether ``tensordot(x, weight, dims)`` multiplies by a weight kept as ``[N, K]``; None where it is no linear layer.

    Args:
        dims: as ``torch.tensordot`` takes it: a number, or the dimensions of both operands.
        x_rank: dimensions of the activation; None: not known, so that only the dimension -1 is known to be the last.
    """
    if dims == 1 and isinstance(dims, int):
        return False
    if not isinstance(dims, Sequence) or len(dims) != 2:
        return None
    pairs = [list(part) if isinstance(part, (list, tuple)) else [part] for part in dims]
    if any(len(part) != 1 or not isinstance(part[0], int) for part in pairs):
        return None
    (of_x,), (of_weight,) = pairs
    is_last = of_x == -1 if x_rank is None else of_x % x_rank == x_rank - 1
    return bool(of_weight % 2) if is_last else None
