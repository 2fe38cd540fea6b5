"""What a node calls where it is a linear layer or a product of matrices: functions of torch and operators of aten."""

from __future__ import annotations

import operator

import torch

_ATEN = {
    name: {(packet := getattr(torch.ops.aten, name)), packet.default}
    for name in ("linear", "matmul", "linalg_matmul", "mm", "addmm")
}
LINEAR = {torch.nn.functional.linear, torch._C._nn.linear} | _ATEN["linear"]
MATMUL = {torch.matmul, torch.mm, operator.matmul, operator.imatmul, torch.linalg.matmul}
MATMUL |= _ATEN["matmul"] | _ATEN["linalg_matmul"] | _ATEN["mm"]
ADDMM = {torch.addmm} | _ATEN["addmm"]
MATMUL_METHODS = {"matmul", "mm", "__matmul__", "__rmatmul__"}
