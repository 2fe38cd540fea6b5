"""For each reason of refusal a model that shows it."""

import torch
import torch.utils.checkpoint
from torch import nn
from torch.nn import functional as F

from intscale_compile.reasons import Reason


class Holder(nn.Module):
    """``function(x, *weights)``; the weights are parameters w0, w1 and so on."""

    def __init__(self, function, *weights):
        super().__init__()
        self.function, self.count = function, len(weights)
        for i, weight in enumerate(weights):
            setattr(self, f"w{i}", nn.Parameter(weight, requires_grad=False))

    def forward(self, x):
        return self.function(x, *[getattr(self, f"w{i}") for i in range(self.count)])


def linear(*shape, **kwargs):
    return Holder(lambda x, w: F.linear(x, w), torch.randn(*shape, **kwargs))


class Head(nn.Module):
    def __init__(self, tied):
        super().__init__()
        self.embed = nn.Embedding(100, 64)
        self.lm_head = nn.Linear(64, 100, bias=False)
        if tied:
            self.lm_head.weight = self.embed.weight

    def forward(self, x):
        return self.lm_head(self.embed(x.long().abs() % 100))


class Mixture(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(64, 32)
        self.experts = nn.ModuleList(nn.Linear(64, 64) for _ in range(2))

    def forward(self, x):
        return self.gate(x), [expert(x) for expert in self.experts]


class Experts(nn.Module):
    def __init__(self, product):
        super().__init__()
        self.product, self.weight = product, nn.Parameter(torch.randn(4, 32, 64), requires_grad=False)

    def forward(self, x):
        return self.product(self.weight, x.t().expand(4, -1, -1))


class WithGradients(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(64, 64)

    def forward(self, x):
        with torch.enable_grad():
            return self.layer(x)


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(64, 32)

    def forward(self, x):
        return torch.utils.checkpoint.checkpoint(self.layer, x, use_reentrant=False)


class Foreign(torch.Tensor):
    """A tensor subclass of somebody else."""


def foreign():
    model = linear(32, 64)
    model.w0 = nn.Parameter(torch.randn(32, 64).as_subclass(Foreign), requires_grad=False)
    return model


class Unused(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.unused = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x):
        return self.used(x)


class Raw(nn.Module):
    """A parameter that is multiplied beside a linear layer."""

    def __init__(self):
        super().__init__()
        self.layer, self.proj = nn.Linear(64, 64), nn.Parameter(torch.randn(64, 32))

    def forward(self, x):
        return self.layer(x) @ self.proj


# A model, or a model and options, or a model, options and input.
MODELS = {
    Reason.OUTPUT_EMBEDDING: lambda: Head(False),
    Reason.TIED_EMBEDDING: lambda: Head(True),
    Reason.ROUTER: lambda: nn.Sequential(Mixture()),
    Reason.EXPERTS: lambda: nn.Sequential(Experts(torch.bmm)),
    Reason.REQUIRES_GRAD: WithGradients,
    Reason.NOT_CONSTANT: lambda: Holder(lambda x, w: F.linear(x, w * 2), torch.randn(32, 64)),
    Reason.UNKNOWN_VIEW: lambda: Holder(lambda x, w: x @ w.view(64, 32), torch.randn(32, 64)),
    Reason.FOREIGN_SUBCLASS: foreign,
    Reason.RAW_PARAMETER: Raw,
    Reason.NON_FINITE: lambda: Holder(lambda x, w: F.linear(x, w), torch.full((32, 64), float("inf"))),
    Reason.WEIGHT_DTYPE: lambda: Holder(lambda x, w: F.linear(x, w.float()), torch.randn(32, 64, dtype=torch.float64)),
    Reason.ACTIVATION_DTYPE: lambda: Holder(
        lambda x, w: F.linear(x.double(), w), torch.randn(32, 64, dtype=torch.float64)
    ),
    Reason.DEVICE: lambda: (nn.Linear(64, 64, device="meta"), {}, torch.randn(4, 64, device="meta")),
    Reason.LEFT_OPERAND: lambda: Holder(lambda x, w: w @ x.t(), torch.randn(32, 64)),
    Reason.WEIGHT_RANK: lambda: Holder(lambda x, w: x @ w, torch.randn(64)),
    Reason.DIFFERENTIATED: lambda: Holder(
        lambda x, w: torch.func.grad(lambda v: F.linear(v, w).sum())(x), torch.randn(32, 64)
    ),
    Reason.SCALED_ADDMM: lambda: Holder(
        lambda x, w, b: torch.addmm(b, x, w, alpha=2), torch.randn(64, 32), torch.randn(32)
    ),
    Reason.BIAS_SHAPE: lambda: Holder(lambda x, w, b: torch.addmm(b, x, w), torch.randn(64, 32), torch.randn(1, 32)),
    Reason.TOO_SMALL: lambda: linear(8, 64),
    Reason.OVERFLOW_PROOF: lambda: (
        Holder(lambda x, w: F.linear(x, w), torch.ones(32, 64) * 1e4),
        {"intscale.amplifier": 1 << 20},
    ),
    Reason.NOT_SELECTED: lambda: (linear(32, 64), {"intscale.quantize_plain": False}),
    Reason.EXCLUDED: lambda: (linear(32, 64), {"intscale.skip": "w0"}),
    Reason.PASS_DISABLED: lambda: (linear(32, 64), {"intscale.disable_passes": ["insert_qdq"]}),
    Reason.CONVOLUTION: lambda: (nn.Conv1d(64, 64, 1), {}, torch.randn(1, 64, 8)),
    Reason.ONE_OPERATOR: lambda: (
        nn.TransformerEncoderLayer(64, 4, 128, batch_first=True).eval().requires_grad_(False),
        {},
        torch.randn(2, 5, 64),
    ),
    Reason.RECURRENT: lambda: nn.LSTM(64, 64),
    Reason.EMBEDDING: lambda: Head(False),
    Reason.NOT_MULTIPLIED: lambda: Holder(lambda x, w: x + w, torch.randn(4, 64)),
    Reason.NOT_REACHED: Unused,
    Reason.SUBGRAPH: Checkpointed,
    Reason.UNKNOWN_FORM: lambda: Holder(lambda x, w: torch.einsum("mk,nk->nm", x, w), torch.randn(32, 64)),
}
