"""What we use of peft beyond its public API: how its layers put a merged weight back into a quantized layer.

peft dequantizes a weight of torchao's, adds the adapter and quantizes the sum anew, with a configuration that it finds only on
models that transformers loaded. Nothing here imports peft: the methods are exchanged when something imports it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .after_import import after_import
from .registry import PrivateName, note_version

_LOSSY = (
    "merge_and_unload quantizes merged weights with their default scales, and not at all in models quantized in this process: "
    "use intscale_compile.lora.merge"
)
MERGE = PrivateName(
    "peft.tuners.lora.torchao:TorchaoLoraLinear.merge",
    "merging an adapter into a quantized weight",
    _LOSSY,
    parameters=("self", "safe_merge", "adapter_names"),
    own=True,
)
UNMERGE = PrivateName(
    "peft.tuners.lora.torchao:TorchaoLoraLinear.unmerge",
    "giving back the weight that was there before an adapter was merged",
    _LOSSY,
    parameters=("self",),
    own=True,
)
CREATE = PrivateName(
    "peft.tuners.lora.torchao:TorchaoLoraLinear.__init__",
    "layers whose quantized weight can be merged without a configuration",
    "peft warns that merging raises an error, which it does not",
    own=True,
)
SET_WEIGHT = PrivateName(
    "peft.utils.quantization_utils:TorchaoBackend.set_base_weight",
    "merging adapters of other kinds than LoRA into a quantized weight",
    "they are merged with the default scales of the format",
    parameters=("self", "peft_layer", "weight_data"),
    own=True,
)
HOOKED = (MERGE, UNMERGE, CREATE, SET_WEIGHT)


def hook_merging(wrappers: dict[str, Callable[[Callable], Callable]]) -> None:
    """Put wrappers around methods of peft: now where it is imported, else when it will be.

    Args:
        wrappers: by the name of the method, of those of :data:`HOOKED`; each takes the method and gives another that takes
            the same arguments.
    """

    def wrap_all(module: Any) -> None:
        note_version("peft")
        for name in HOOKED:
            if name.target.partition(":")[0] == module.__name__:
                name.wrap(wrappers[name.attribute])

    for module in dict.fromkeys(name.target.partition(":")[0] for name in HOOKED):
        after_import(module, wrap_all)
