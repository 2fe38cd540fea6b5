"""GPTQ checkpoints in the layout of AutoGPTQ and GPTQModel (algorithm: arXiv 2210.17323).

For a linear layer with ``K`` input and ``N`` output features in ``G`` groups:

    qweight  int32 [K / 8, N]   code k + i of column n in bits 4 i of word [k / 8, n], offset binary (0 to 15)
    qzeros   int32 [G, N / 8]   zero points, packed along N; format "gptq" stores them minus one, "gptq_v2" as they are
    scales   fp16  [G, N]
    g_idx    int32 [K]          group of every input feature

With activation order (``desc_act``) and no static groups, the features of a group are scattered over the row. Columns are then
sorted by group, and the weight gets an ``input_order``: no code changes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError
from .layers import QuantizedLayer, check_group_size, check_part, groups_of, nibbles, order_of_groups, require

ZERO_OFFSETS = {"gptq": 1, "gptq_v2": 0}  # added to stored zero points


class GptqFormat:
    """Reader of GPTQ layers.

    Args:
        config: ``quantization_config`` of the checkpoint.

    Raises:
        ConfigError: bits other than 4, or a layout of another kernel.
    """

    required: tuple[str, ...] = ("qweight", "qzeros", "scales")
    optional: tuple[str, ...] = ("g_idx",)

    def __init__(self, config: Mapping[str, Any]):
        layout = config.get("checkpoint_format") or config.get("format") or "gptq"
        if layout not in ZERO_OFFSETS:
            raise ConfigError(
                f"GPTQ checkpoint_format={layout!r} is packed for one kernel: save it as 'gptq' or 'gptq_v2' with GPTQModel."
            )
        self._zero_offset = ZERO_OFFSETS[layout]
        self._config = config
        self._of_layer("quantization_config")  # errors before anything is read

    def _of_layer(self, name: str) -> int:
        """Group size of a layer; GPTQModel's ``dynamic`` may give it settings of its own."""
        chosen = {"bits": self._config.get("bits"), "group_size": self._config.get("group_size", -1)}
        for pattern, changes in (self._config.get("dynamic") or {}).items():
            if not pattern.startswith("-:") and re.match(pattern.removeprefix("+:"), name):
                chosen.update(changes)
                break
        if chosen["bits"] != 4:
            raise ConfigError(f"{name}: GPTQ with bits={chosen['bits']!r} cannot be imported: 4 bits can.")
        return check_group_size(name, chosen["group_size"])

    def read(self, name: str, parts: Mapping[str, Tensor]) -> QuantizedLayer:
        """Unpack one layer.

        Raises:
            CheckpointError: shapes or dtypes do not fit each other; groups of other sizes.
            ConfigError: bits other than 4; a group size that we cannot make.
        """
        group_size = self._of_layer(name)
        qweight, scales, qzeros = parts["qweight"], parts["scales"], parts["qzeros"]
        require(qweight.dim() == 2, name, f"qweight has {qweight.dim()} dimensions, not 2")
        in_features, out_features = qweight.shape[0] * 8, qweight.shape[1]
        groups = groups_of(in_features, group_size)
        check_part(name, "qweight", qweight, torch.int32, (in_features // 8, out_features))
        check_part(name, "scales", scales, None, (groups, out_features))
        check_part(name, "qzeros", qzeros, torch.int32, (groups, -(-out_features // 8)))
        order = None
        if "g_idx" in parts:
            check_part(name, "g_idx", parts["g_idx"], torch.int32, (in_features,))
            order = order_of_groups(name, "g_idx", parts["g_idx"], group_size)
        codes = nibbles(qweight.t()).to(torch.int8) - 8
        codes = codes if order is None else codes[:, order]
        # The offset of 1 wraps: a zero point of 0 was stored as 15.
        zeros = (nibbles(qzeros)[:, :out_features] + self._zero_offset) & 15
        zero_point = (zeros.to(torch.int8) - 8).t().contiguous()
        scale = scales.float().t().contiguous()
        return QuantizedLayer("gptq", codes, scale, zero_point, group_size, input_order=order)
