"""intscale: W4A8 large language models in PyTorch with integer group scales, as a ``torch.compile`` backend.

quantize_(model, IntScaleConfig())                      # torchao's own quantize_
model = torch.compile(model, backend="intscale")
print(intscale_compile.explain(model, *inputs))

Errors are in ``intscale_compile.errors``, results in the module of what returns them; docs/api.md lists every public name.
"""

from .versions import __version__ as __version__
from .versions import check_versions

check_versions()

from .integrations import known_noise

known_noise.hold_back()

from .integrations.torch_names import check_import

check_import()

from . import communication, errors, integer_only, kv_cache, lora, tensor_parallel  # noqa: F401  (public modules)
from .calibration.config import CalibrationConfig
from .calibration.pipeline import calibrate
from .compile.export import compile_package, export_program
from .config import IntScaleConfig
from .debug.bisection import bisect
from .debug.comparison import compare
from .debug.trace import trace_node
from .explanation import explain
from .generation import prepare_for_generation
from .importing.export import save_compressed_tensors
from .importing.model import from_quantized
from .importing.torchao_tensors import convert_from_torchao
from .integrations.transformers import register_experts_implementation
from .learning import learn_codes
from .parallel import dtensor_ops  # noqa: F401  (registration)
from .passes.kept import refresh
from .quantization import quantize
from .saving.checkpoint import load_safetensors, register, save_pretrained, save_safetensors
from .saving.shard_reading import register_sharded_loading
from .saving.verifying import verify_checkpoint
from .tensors import copies, expert_operators, operators, products  # noqa: F401  (registration)
from .tensors.intscale_tensor import IntScaleTensor
from .tensors.selection import linears_and_experts
from .tuning import tune

__all__ = [
    "CalibrationConfig",
    "IntScaleConfig",
    "IntScaleTensor",
    "bisect",
    "calibrate",
    "compare",
    "compile_package",
    "convert_from_torchao",
    "explain",
    "export_program",
    "from_quantized",
    "learn_codes",
    "linears_and_experts",
    "load_safetensors",
    "prepare_for_generation",
    "quantize",
    "refresh",
    "save_compressed_tensors",
    "save_pretrained",
    "save_safetensors",
    "trace_node",
    "tune",
    "verify_checkpoint",
]

register()
register_experts_implementation()
register_sharded_loading()
known_noise.let_through()
