"""Stacks of packed weights for kernel tests, with ragged routings and the exact accumulator."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

import torch
from torch import Tensor

from intscale_compile.kernels.triton_grouped import GroupedForm
from tests.support.weights import Problem, make_problem

# Rows of each expert, and rows that belong to none at the end.
ROUTINGS = {
    "ragged": ((3, 0, 17, 1, 0, 33), 0),
    "small": ((2, 0, 5), 1),
    "last-empty": ((5, 5, 0, 0), 3),
    "one-has-all": ((0, 0, 40, 0), 0),
    "one-each": ((1, 1, 1, 1, 1), 0),
    "no-expert": ((0, 0, 0), 6),
    "single": ((2,), 1),
}


@dataclass(frozen=True)
class GroupedProblem:
    """A stack of weights, activations and a routing."""

    xq: Tensor  # int8 [tokens, K]
    token_scale: Tensor  # fp32 [tokens, 1]
    qdata: Tensor
    scale: Tensor
    row_scale: Tensor  # fp32 [E, N, 1]
    bias: Tensor  # fp32 [E, N]
    offsets: Tensor  # int32 [E]
    row_index: Optional[Tensor]
    out_index: Optional[Tensor]
    form: GroupedForm
    accumulator: Tensor  # int64 [rows, N], in the order of the output
    expected: Tensor  # fp32 [rows, N], without bias
    zero_point: Optional[Tensor] = None

    @property
    def indices(self) -> tuple[Optional[Tensor], Optional[Tensor]]:
        """``row_index`` and ``out_index``."""
        return self.row_index, self.out_index

    def to(self, device: str) -> GroupedProblem:
        """The same problem on another device; the reference stays where it is."""
        kept = ("form", "accumulator", "expected")
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return GroupedProblem(
            **{n: v if n in kept or v is None else v.to(device) for n, v in fields.items()}
        )  # fmt: skip


def make_grouped(
    counts: tuple[int, ...], tail: int, n: int, k: int, group_size: int = 128, gather: bool = False, scatter: bool = False,
    **options,
) -> GroupedProblem:  # fmt: skip
    """A problem with ``counts[e]`` rows for expert ``e`` and ``tail`` rows for none; ``options`` of ``make_problem``."""
    rows = sum(counts) + tail
    generator = torch.Generator().manual_seed(rows)
    tokens = max(1, rows // 2) if gather else rows
    parts = [make_problem(tokens, n, k, group_size, seed=e, **options) for e in range(len(counts))]
    first: Problem = parts[0]
    row_index = torch.randint(0, tokens, (rows,), generator=generator, dtype=torch.int32) if gather else None
    out_index = torch.randperm(rows, generator=generator).to(torch.int32) if scatter else None
    token_of = torch.arange(rows) if row_index is None else row_index.long()
    accumulator = torch.zeros(rows, n, dtype=torch.int64)
    expected = torch.zeros(rows, n)
    offsets = torch.tensor(counts).cumsum(0)
    for e, part in enumerate(parts):
        own = slice(int(offsets[e]) - counts[e], int(offsets[e]))
        # Every part drew other activations: those of the first expert serve all.
        weight = _dense_codes(part)
        accumulator[own] = first.xq[token_of[own]].long() @ weight[:, :k].t()
        scales = first.token_scale[token_of[own]] * 1.0
        expected[own] = accumulator[own].float() * scales * part.row_scale.view(-1)
    if out_index is not None:
        accumulator = torch.empty_like(accumulator).index_copy_(0, out_index.long(), accumulator)
        expected = torch.empty_like(expected).index_copy_(0, out_index.long(), expected)
    return GroupedProblem(
        first.xq, first.token_scale, *(torch.stack([getattr(p, f) for p in parts]) for f in ("qdata", "scale")),
        torch.stack([p.row_scale for p in parts]), torch.stack([p.bias for p in parts]), offsets.to(torch.int32),
        row_index, out_index, GroupedForm(*first.weight_args), accumulator, expected,
        None if first.zero_point is None else torch.stack([p.zero_point for p in parts]),
    )  # fmt: skip


def _dense_codes(problem: Problem) -> Tensor:
    """``(code - zero point) * group scale`` of a packed weight, int64 ``[N, Kp]``."""
    from intscale_compile import format as fmt
    from intscale_compile.kernels.dequantize import unpack_weight

    n, group_size, _, packing = problem.weight_args
    codes, scale = unpack_weight(problem.qdata, problem.scale, n, group_size, packing, problem.zero_point)
    return codes.long() * fmt.expand_group_scale(scale, codes.shape[-1]).long()
