"""What we use of transformers beyond its public API: its experts interface, and hooks into loading and saving.

Nothing here imports transformers: what is added to a module is added when something imports it.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

from ..tensors.expert_operators import register_fallback
from ..tensors.experts import IMPLEMENTATION, experts_forward
from .after_import import after_import
from .registry import MISSING, PrivateName, note_version

_WHOLE = "load the whole model and call intscale_compile.tensor_parallel.parallelize"
_NOT_BY_SHARD = f'from_pretrained(..., tp_plan="auto") cannot read quantized checkpoints shard by shard: {_WHOLE}'

EXPERTS = PrivateName(
    "transformers.integrations.moe:ALL_EXPERTS_FUNCTIONS.register",
    "the experts implementation intscale",
    'model.set_experts_implementation("intscale") is not offered: use grouped_mm',
)
EXPERTS_OP = PrivateName(
    "transformers.integrations.moe:torch.ops.transformers.grouped_mm_fallback",
    "transformers' own op for a grouped product",
    "its op grouped_mm_fallback does not take quantized experts",
)
LOADING = PrivateName(
    "transformers.modeling_utils:convert_and_load_state_dict_in_model",
    "reading quantized checkpoints shard by shard",
    _NOT_BY_SHARD,
    parameters=("model", "state_dict", "load_config"),
)
SHARDING = PrivateName(
    "transformers.distributed.sharding_utils:DtensorShardOperation.shard_tensor",
    "reading quantized checkpoints shard by shard",
    _NOT_BY_SHARD,
    parameters=("source", "tensor_idx", "device", "dtype"),
    own=True,
)
DESERIALIZING = PrivateName(
    "transformers.integrations.torchao:TorchAoDeserialize.convert",
    "reading quantized checkpoints shard by shard",
    _NOT_BY_SHARD,
    parameters=("input_dict", "model", "full_layer_name"),
    own=True,
)
STATE = PrivateName(
    "transformers.quantizers.quantizer_torchao:TorchAoHfQuantizer.get_state_dict_and_metadata",
    "gathering a divided model that is saved",
    "save_pretrained of a divided quantized model is not supported: use intscale_compile.tensor_parallel.gather_shards",
    parameters=("model",),
    own=True,
)
CONVERSIONS = PrivateName(
    "transformers.quantizers.quantizer_torchao:TorchAoHfQuantizer.get_weight_conversions",
    "loading parts that torchao's own tensors do not have",
    "from_pretrained cannot load weights with an input order: use intscale_compile.load_safetensors",
)
FILE_WRITING = PrivateName(
    "transformers.modeling_utils:safe_save_file",
    "checksums in the files that save_pretrained writes",
    "they have none and cannot be verified: use intscale_compile.save_safetensors",
    parameters=("tensors", "filename", "metadata"),
)
PREPARING = PrivateName(
    "transformers.quantizers.quantizer_torchao:TorchAoHfQuantizer._process_model_before_weight_loading",
    "checking the headers of a quantized checkpoint before it is read",
    "from_pretrained does not check format versions and checksums of headers: use intscale inspect --verify first",
    parameters=("model", "checkpoint_files"),
    own=True,
)
QUANTIZER = PrivateName(
    "transformers.modeling_utils:get_hf_quantizer",
    "an error of ours where the quantization_config of a quantized model is damaged",
    "from_pretrained raises what transformers finds, without a mend",
    parameters=("config", "quantization_config"),
)
CONFIGURATION = PrivateName(
    "transformers.configuration_utils:PreTrainedConfig.get_config_dict",
    "an error of ours where the quantization_config of a folder of ours is damaged",
    "from_pretrained raises what transformers finds, without a mend",
    parameters=("pretrained_model_name_or_path",),
    own=True,
)
LOADED = PrivateName(
    "transformers.quantizers.quantizer_torchao:TorchAoHfQuantizer.postprocess_model",
    "marking a model that was loaded quantized",
    "call a loaded model as a whole, where its quantized weights say that the plain ones were left out",
    parameters=("model",),
)
# Arguments of the hooks are used in these forms.
PrivateName(
    "transformers.core_model_loading:WeightConverter.__init__",
    "loading parts that torchao's own tensors do not have",
    "from_pretrained cannot load weights with an input order: use intscale_compile.load_safetensors",
    parameters=("source_patterns", "target_patterns", "operations"),
)


def _patterns_kept() -> bool:
    from transformers.core_model_loading import WeightRenaming  # optional

    renaming = WeightRenaming("a", "b")
    return [renaming._original_source_patterns, renaming._original_target_patterns] == [["a"], ["b"]]


PrivateName(
    "transformers.core_model_loading:WeightTransform._original_source_patterns, _original_target_patterns",
    "loading parts that torchao's own tensors do not have",
    "from_pretrained cannot load weights with an input order: use intscale_compile.load_safetensors",
    probe=_patterns_kept,
)
RENAMING = PrivateName(
    "transformers.core_model_loading:rename_source_key",
    "reading quantized checkpoints shard by shard",
    parameters=("source_key", "weight_renamings", "weight_converters", "base_model_prefix", "meta_state_dict"),
)
PrivateName("transformers.core_model_loading:WeightRenaming", "reading quantized checkpoints shard by shard")
PrivateName(
    "transformers.models.mixtral.modeling_mixtral:MixtralExperts._apply_gate",
    "gates of experts in the implementation intscale",
)
PrivateName("transformers:PreTrainedModel._from_config", "a model without weights")
HOOKED = (
    LOADING,
    FILE_WRITING,
    SHARDING,
    DESERIALIZING,
    STATE,
    PREPARING,
    CONVERSIONS,
    LOADED,
    QUANTIZER,
    CONFIGURATION,
)
_ENTRANCE = "transformers.modeling_utils"  # every model imports it


def _register(moe: Any) -> None:
    register = EXPERTS.find()
    if register is not None:
        register(IMPLEMENTATION, experts_forward)
    op = EXPERTS_OP.find()
    if op is not None:
        register_fallback(op)


def register_experts_implementation() -> None:
    """Offer ``"intscale"`` to transformers: now where it is imported, else when it will be."""
    after_import("transformers.integrations.moe", _register)


def hook_loading(wrappers: dict[str, Callable[[Callable], Callable]]) -> None:
    """Put wrappers around functions of transformers: now where a module is imported, else when it will be.

    Args:
        wrappers: by the name of the function, one of those of :data:`HOOKED`; each takes the function and gives another that
            takes the same arguments.
    """
    by_module: dict[str, list[PrivateName]] = {}
    for name in HOOKED:
        by_module.setdefault(name.target.partition(":")[0], []).append(name)

    def hook(names: list[PrivateName]) -> Callable[[Any], None]:
        def wrap_all(module: Any) -> None:
            for name in names:
                name.wrap(wrappers[name.attribute])

        return wrap_all

    for module, names in by_module.items():
        after_import(module, hook(names))
    after_import(_ENTRANCE, lambda module: look_at_modules())


def look_at_modules() -> None:
    """Say what is missing of modules that are not there at all: their hooks would never run. Says it of the version too."""
    note_version("transformers")
    for name in (*HOOKED, EXPERTS):
        if not _module_exists(name.target.partition(":")[0]):
            name.say(MISSING)


def _module_exists(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ImportError:  # a package above it is missing
        return False
