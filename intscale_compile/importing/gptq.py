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
from typing import Any, Optional

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
    order_of_groups,
    require,
    require_symmetric,
)

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
        if config.get("is_marlin_format"):
            layout = "marlin"  # as AutoGPTQ says it
        if layout not in ZERO_OFFSETS:
            raise ConfigError(
                f"GPTQ checkpoint_format={layout!r} is packed for one kernel: save it as 'gptq' or 'gptq_v2' with GPTQModel."
            )
        self._layout = layout
        self._config = config
        self._of_layer("quantization_config")  # errors before anything is read

    def _of_layer(self, name: str) -> tuple[int, Optional[bool]]:
        """Group size of a layer and whether it is symmetric, if that is said.

        GPTQModel's ``dynamic`` may give a layer settings of its own.
        """
        chosen = {"bits": self._config.get("bits"), "group_size": self._config.get("group_size", -1)}
        chosen["sym"] = self._config.get("sym")
        for pattern, changes in (self._config.get("dynamic") or {}).items():
            if not pattern.startswith("-:") and re.match(pattern.removeprefix("+:"), name):
                chosen.update(changes)
                break
        if chosen["bits"] != 4:
            raise ConfigError(f"{name}: GPTQ with bits={chosen['bits']!r} cannot be imported, 4 bits can: {ORIGINAL}")
        if chosen["sym"] not in (True, False, None):
            raise ConfigError(f"{name}: GPTQ with sym={chosen['sym']!r}: it is true or false.")
        return check_group_size(name, chosen["group_size"]), chosen["sym"]

    def read(self, name: str, parts: Mapping[str, Tensor]) -> QuantizedLayer:
        """Unpack one layer.

        Raises:
            CheckpointError: shapes or dtypes do not fit each other; groups of other sizes; zero points other than 8 where
                ``sym`` is true.
            ConfigError: bits other than 4; a group size that we cannot make.
        """
        group_size, symmetric = self._of_layer(name)
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
        zero_point, note = self._zero_points(name, nibbles(qzeros)[:, :out_features], symmetric)
        scale = scales.float().t().contiguous()
        return QuantizedLayer("gptq", codes, scale, zero_point, group_size, input_order=order, note=note)

    def _zero_points(self, name: str, stored: Tensor, symmetric: Optional[bool]) -> tuple[Tensor, str]:
        """Zero points int8 ``[N, G]`` of stored ones uint8 ``[G, N]``, and what to say of them.

        The formats differ in an offset, and some tools write one and name the other. Where a checkpoint says that it is
        symmetric, all zero points are 8, which settles the offset; without ``sym``, 9 for all groups cannot be meant either.
        """
        offset, note = ZERO_OFFSETS[self._layout], ""
        others = {v: layout for layout, v in ZERO_OFFSETS.items() if v != offset}
        for other, layout in others.items():
            if symmetric is not False and bool((stored == 8 - other).all()):
                offset = other
                note = f"zero points are stored as {layout!r} stores them, not as {self._layout!r}; read as 8 for all groups"
        zeros = (stored + offset) & 15  # the offset of 1 wraps: a zero point of 0 was stored as 15
        zero_point = (zeros.to(torch.int8) - 8).t().contiguous()
        if symmetric:
            require_symmetric(name, "qzeros", zero_point, "sym=true")
        return zero_point, note
