"""What every peer of the GEMM benchmark does: prepare a weight once, multiply, be checked."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

SAMPLE_ROWS = 64  # tokens and
SAMPLE_COLUMNS = 512  # output features that a check looks at: the first and the last half of them


class Unavailable(Exception):
    """A peer cannot be measured, here or at one point; the text says why."""


class WrongResult(Exception):
    """A peer's output is not the product of its own operands."""


def ends(size: int, sample: int, device: torch.device | str = "cpu") -> Tensor:
    """Indices of the first and the last ``sample / 2`` of ``size`` rows, all of them where there are not more."""
    index = torch.arange(size, device=device)
    return index if size <= sample else torch.cat([index[: sample // 2], index[size - sample // 2 :]])


def fp8_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """``x`` as float8_e4m3fn with one fp32 scale for each row, ``[..., 1]``."""
    wide = x.float()
    scale = wide.abs().amax(-1, keepdim=True).clamp(min=1e-12) / 448
    return (wide / scale).to(torch.float8_e4m3fn), scale


def int4_groups(weight: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """Plain rounding to int4: codes plus 8 as uint8 ``[N, K]``, and fp32 scales ``[N, K / group_size]``."""
    groups = weight.to(torch.float32, copy=True).unflatten(-1, (-1, group_size))
    scale = (groups.abs().amax(-1, keepdim=True).clamp(min=1e-12) / 7.5).to(weight.dtype).float()
    codes = groups.div_(scale).round_().add_(8).clamp_(0, 15).to(torch.uint8)
    return codes.flatten(-2), scale.squeeze(-1)


class Activations:
    """One activation ``[M, K]`` in the forms that the peers take."""

    def __init__(self, tokens: int, in_features: int, device: torch.device | str = "cuda"):
        self.bf16 = torch.randn(tokens, in_features, device=device, dtype=torch.bfloat16)

    @cached_property
    def int8(self) -> tuple[Tensor, Tensor]:
        """int8 and fp32 token scales ``[M, 1]``."""
        return torch.ops.intscale.quantize_per_token(self.bf16)

    @cached_property
    def fp8(self) -> tuple[Tensor, Tensor]:
        """float8_e4m3fn and fp32 token scales ``[M, 1]``."""
        return fp8_rows(self.bf16)


class Peer:
    """One implementation of ``x @ weight.t()`` for one weight.

    ``tensors`` holds what the kernel reads of the weight (None for an absent part), ``reference`` the dequantized rows
    ``columns`` of it. ``activation`` says which form of the activation the kernel takes.
    """

    name = ""
    title = ""
    four_bit = False
    ours = False
    activation = "bf16"
    tolerance = 0.02  # relative Frobenius error against the float64 product of the operands as the peer has them
    min_tokens: int = 1
    max_tokens: int | None = None
    tensors: tuple[Tensor | None, ...]
    reference: Tensor

    def __init__(self, weight: Tensor, options):
        self.out_features, self.in_features = weight.shape
        self.options = options
        self.columns = ends(self.out_features, SAMPLE_COLUMNS, weight.device)
        self.prepare(weight)
        self.copies = [self.tensors]

    @classmethod
    def require(cls) -> None:
        """Raise, as an import does, where this peer cannot run at all."""

    def prepare(self, weight: Tensor) -> None:
        """Set ``tensors`` and ``reference``."""
        raise NotImplementedError

    def run(self, x: Activations, tensors: tuple[Tensor | None, ...]) -> Tensor:
        """Output ``[M, N]``."""
        raise NotImplementedError

    def refuse(self, tokens: int) -> str | None:
        """Why this peer is not measured at this many tokens."""
        if tokens < self.min_tokens:
            return f"needs M >= {self.min_tokens}"
        if self.max_tokens is not None and tokens > self.max_tokens:
            return f"not measured above M = {self.max_tokens}"
        return None

    @property
    def weight_bytes(self) -> int:
        """Bytes of one copy of the weight and its scales."""
        return sum(t.nbytes for t in self.tensors if t is not None)

    def replicate(self, count: int) -> None:
        """Keep ``count`` copies of the weight to rotate over."""
        self.copies = [self.tensors]
        self.copies += [tuple(None if t is None else t.clone() for t in self.tensors) for _ in range(count - 1)]

    def moved_bytes(self, x: Activations, out: Tensor) -> int:
        """Bytes that one call has to read or write at least once."""
        form = getattr(x, self.activation)
        return self.weight_bytes + out.nbytes + sum(t.nbytes for t in (form if isinstance(form, tuple) else (form,)))

    def sampled_activation(self, x: Activations, rows: Tensor) -> Tensor:
        """Some rows of the activation as the kernel sees it, float64."""
        form = getattr(x, self.activation)
        if isinstance(form, tuple):
            return form[0][rows].double() * form[1][rows].double()
        return form[rows].double()

    def check(self, x: Activations) -> tuple[float, Tensor]:
        """Relative error of a sample of the output, and the output; raises ``WrongResult``."""
        tokens = x.bf16.shape[0]
        poison = torch.full((tokens, self.out_features), float("nan"), device=x.bf16.device, dtype=torch.bfloat16)
        del poison  # the allocator hands its memory to the output next: what a kernel leaves unwritten is NaN
        out = self.run(x, self.tensors)
        if out.shape != (tokens, self.out_features):
            raise WrongResult(f"shape {tuple(out.shape)}")
        rows = ends(tokens, SAMPLE_ROWS, out.device)
        return self.compare(x, rows, out[rows][:, self.columns]), out

    def compare(self, x: Activations, rows: Tensor, sample: Tensor) -> float:
        """Relative error of the sampled output; raises ``WrongResult`` above ``tolerance``."""
        expected = self.sampled_activation(x, rows) @ self.reference.double().t()
        error = ((sample.double() - expected).norm() / expected.norm()).item()
        if not error <= self.tolerance:
            raise WrongResult(f"relative error {error:.3g}, at most {self.tolerance:g} allowed")
        return error
