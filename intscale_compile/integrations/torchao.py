"""What we use of torchao beyond its public API."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torchao.core.config import AOBaseConfig
from torchao.utils import TorchAOBaseTensor

from .registry import PrivateName, note_version

_NOT_FILES = "IntScaleTensor cannot be saved to or loaded from safetensors"

IS_LINEAR = PrivateName("torchao.quantization.quant_api:_is_linear", "what quantize_ selects by default")
CONFIG_MODULES = PrivateName(
    "torchao.core.config:ALLOWED_AO_MODULES",
    "finding IntScaleConfig in a checkpoint's config.json",
    "transformers cannot load checkpoints with an IntScaleConfig",
    form=lambda found: hasattr(found, "add"),
)
CLASSES = PrivateName(
    "torchao.prototype.safetensors.safetensors_utils:ALLOWED_CLASSES",
    "building an IntScaleTensor from a safetensors file",
    _NOT_FILES,
    form=lambda found: hasattr(found, "setdefault"),
)
SUBCLASSES = PrivateName(
    "torchao.prototype.safetensors.safetensors_utils:ALLOWED_TENSORS_SUBCLASSES",
    "writing an IntScaleTensor to a safetensors file",
    _NOT_FILES,
    form=lambda found: hasattr(found, "append"),
)
FLATTEN = PrivateName(
    "torchao.prototype.safetensors.safetensors_support:flatten_tensor_state_dict", "writing safetensors files"
)
UNFLATTEN = PrivateName(
    "torchao.prototype.safetensors.safetensors_support:unflatten_tensor_state_dict", "reading safetensors files"
)
HANDLERS = PrivateName(
    "torchao.quantization.transform_module:register_quantize_module_handler", "quantize_ with an IntScaleConfig"
)
OPERATORS = PrivateName("torchao.utils:TorchAOBaseTensor.implements", "operators of the tensor subclass")
FUNCTIONS = PrivateName("torchao.utils:TorchAOBaseTensor.implements_torch_function", "functions of the tensor subclass")
MOVES = PrivateName("torchao.utils:TorchAOBaseTensor._get_to_kwargs", "to(device, dtype) of the tensor subclass")
FILL = PrivateName("torchao.utils:fill_defaults", "arguments of operators", parameters=("args", "n", "defaults_tail"))


class _Plain(TorchAOBaseTensor):
    """A tensor subclass that shows what torchao's base class gives to one."""

    tensor_data_names = ["qdata"]
    tensor_attribute_names: list[str] = []


TABLE = PrivateName(
    "torchao.utils:TorchAOBaseTensor._ATEN_OP_TABLE",
    "refusing operators that have no meaning on packed data",
    probe=lambda: _Plain in getattr(_Plain, "_ATEN_OP_TABLE", {}),
)
FUNCTION_TABLE = PrivateName(
    "torchao.utils:TorchAOBaseTensor._TORCH_FN_TABLE",
    "looking up what torch's functions do with quantized weights while a model is compiled",
    probe=lambda: _Plain in getattr(_Plain, "_TORCH_FN_TABLE", {}),
)
SETSTATE = PrivateName(
    "torchao.utils:TorchAOBaseTensor.__setstate__ of each subclass",
    "checking what is unpickled",
    probe=lambda: "__setstate__" in vars(_Plain),
)

is_linear: Callable[..., bool] = IS_LINEAR.get()


def check_unpickled(cls: type, setstate: Callable[[Any, Any], None]) -> None:
    """Let ``setstate`` unpickle a tensor subclass: torchao's base class installs its own, unchecked one on every subclass, over
    what the class body says."""
    cls.__setstate__ = setstate  # type: ignore[attr-defined]


def register(config: type[AOBaseConfig], tensor: type, rebuild: Callable[..., Any]) -> None:
    """Let torchao's configurations and safetensors files find our classes. Idempotent.

    Args:
        config: a configuration, found by its name in its top package.
        tensor: a tensor subclass.
        rebuild: builds one from its stored parts, given by name.
    """
    note_version("torchao")
    modules, classes, subclasses = CONFIG_MODULES.find(), CLASSES.find(), SUBCLASSES.find()
    if modules is not None:
        modules.add(config.__module__.partition(".")[0])
    if classes is not None:
        classes.setdefault(tensor.__name__, rebuild)
    if subclasses is not None and tensor.__name__ not in subclasses:
        subclasses.append(tensor.__name__)
