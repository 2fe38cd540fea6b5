"""AWQ checkpoints in the GEMM layout of AutoAWQ (algorithm: arXiv 2306.00978).

For a linear layer with ``K`` input and ``N`` output features in ``G`` groups:

    qweight  int32 [K, N / 8]   codes packed along N, offset binary (0 to 15); bits 4 i hold column ORDER[i] of the eight
    qzeros   int32 [G, N / 8]   zero points, packed in the same order
    scales   fp16  [G, N]
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError
from .layers import (
    ORIGINAL,
    QuantizedLayer,
    check_group_size,
    check_part,
    groups_of,
    nibbles,
    require,
    require_symmetric,
)

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


class AwqFormat:
    """Reader of AWQ layers.

    Args:
        config: ``quantization_config`` of the checkpoint.

    Raises:
        ConfigError: bits other than 4, another layout than GEMM, or a group size that we cannot make.
    """

    required: tuple[str, ...] = ("qweight", "scales")
    optional: tuple[str, ...] = ("qzeros",)

    def __init__(self, config: Mapping[str, Any]):
        bits = config.get("bits", config.get("w_bit", 4))
        if bits != 4:
            raise ConfigError(f"AWQ with bits={bits!r} cannot be imported, 4 bits can: {ORIGINAL}")
        version = str(config.get("version", config.get("format", "gemm"))).lower()
        if version != "gemm" or config.get("backend", "autoawq") == "llm-awq":
            raise ConfigError(
                f"AWQ version={version!r} is packed for one kernel: save it with AutoAWQ's version='gemm'."
            )
        self._zero_point = bool(config.get("zero_point", True))
        self._group_size = check_group_size("AWQ", config.get("group_size", config.get("q_group_size", 128)))

    def read(self, name: str, parts: Mapping[str, Tensor]) -> QuantizedLayer:
        """Unpack one layer.

        Raises:
            CheckpointError: a tensor is missing, shapes or dtypes do not fit each other, or there are zero points other than
                8 where ``zero_point`` is false.
        """
        qweight, scales = parts["qweight"], parts["scales"]
        require(qweight.dim() == 2, name, f"qweight has {qweight.dim()} dimensions, not 2")
        require("qzeros" in parts or not self._zero_point, name, "qzeros is missing where zero_point is true")
        in_features, words = qweight.shape
        groups = groups_of(in_features, self._group_size)
        check_part(name, "qweight", qweight, torch.int32, (in_features, words))
        check_part(name, "scales", scales, None, (groups, words * 8))
        zero_point = None
        if "qzeros" in parts:
            check_part(name, "qzeros", parts["qzeros"], torch.int32, (groups, words))
            zero_point = _columns(parts["qzeros"])
            if not self._zero_point:
                require_symmetric(name, "qzeros", zero_point, "zero_point=false")
        return QuantizedLayer("awq", _columns(qweight), scales.float().t().contiguous(), zero_point, self._group_size)


def _columns(packed: Tensor) -> Tensor:
    """Signed codes int8 ``[N, R]`` of words ``[R, N / 8]``."""
    place = torch.tensor(ORDER, device=packed.device).argsort()
    ordered = nibbles(packed).unflatten(-1, (-1, 8))[..., place].flatten(-2)
    return (ordered.to(torch.int8) - 8).t().contiguous()
