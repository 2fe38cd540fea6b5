"""intscale: W4A8 large language models in PyTorch with integer group scales, as a ``torch.compile`` backend.

quantize_(model, IntScaleConfig())                      # torchao's own quantize_
model = torch.compile(model, backend="intscale")
print(intscale_compile.explain(model, *inputs))
"""

from .versions import __version__ as __version__
from .versions import check_versions

check_versions()

from . import quantization  # noqa: F401  (registration)
from .calibration import CalibrationReport, Recipe, calibrate, recipe
from .compile.times import CompileTime, compile_times
from .config import IntScaleConfig
from .debug import Compilation, bisect, compare, last_compilation, trace_node
from .errors import (
    CalibrationError,
    CheckpointError,
    CommunicationError,
    CompileError,
    ConfigError,
    InputError,
    IntScaleError,
    OverflowProofError,
    ShardingError,
    UnsupportedOpError,
    VersionError,
    WeightError,
)
from .explanation import Explanation, explain
from .importing import ImportReport, export_compressed_tensors, import_quantized, import_tensors
from .integrations.transformers import register_experts_implementation
from .parallel import dtensor_ops  # noqa: F401  (registration)
from .saving.checkpoint import load_safetensors, make_savable, rebuild_tensor, register, save_safetensors  # noqa: F401
from .saving.shard_reading import register_sharded_loading
from .tensors import expert_operators, operators  # noqa: F401  (registration)
from .tensors.intscale_tensor import IntScaleTensor
from .tensors.selection import linears_and_experts
from .tuning import tune

__all__ = [
    "CalibrationError",
    "CalibrationReport",
    "CheckpointError",
    "CommunicationError",
    "Compilation",
    "CompileError",
    "CompileTime",
    "ConfigError",
    "Explanation",
    "ImportReport",
    "InputError",
    "IntScaleConfig",
    "IntScaleError",
    "IntScaleTensor",
    "OverflowProofError",
    "Recipe",
    "ShardingError",
    "UnsupportedOpError",
    "VersionError",
    "WeightError",
    "bisect",
    "calibrate",
    "compare",
    "compile_times",
    "explain",
    "export_compressed_tensors",
    "import_quantized",
    "import_tensors",
    "last_compilation",
    "linears_and_experts",
    "load_safetensors",
    "make_savable",
    "recipe",
    "save_safetensors",
    "trace_node",
    "tune",
]

register()
register_experts_implementation()
register_sharded_loading()
