"""intscale: W4A8 large language models in PyTorch with integer group scales, as a ``torch.compile`` backend.

quantize_(model, IntScaleConfig())                      # torchao's own quantize_
model = torch.compile(model, backend="intscale")
print(intscale_compile.explain(model, *inputs))
"""

from .versions import check_versions

check_versions()

from . import distributed_ops, expert_ops, quantize, tensor_ops  # noqa: E402, F401  (registration)
from .calibration import CalibrationReport, Recipe, calibrate, recipe  # noqa: E402
from .checkpoint import load_safetensors, make_savable, rebuild_tensor, register, save_safetensors  # noqa: E402, F401
from .checkpoint_shards import register_sharded_loading  # noqa: E402
from .compile_times import CompileTime, compile_times  # noqa: E402
from .config import IntScaleConfig  # noqa: E402
from .debug import Compilation, bisect, compare, last_compilation, trace_node  # noqa: E402
from .errors import (  # noqa: E402
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
from .experts import register_experts_implementation  # noqa: E402
from .explain import Explanation, explain  # noqa: E402
from .importing import ImportReport, export_compressed_tensors, import_quantized, import_tensors  # noqa: E402
from .quantize import linears_and_experts  # noqa: E402
from .tensor import IntScaleTensor  # noqa: E402
from .tune import tune  # noqa: E402

__version__ = "0.1.0"
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
