"""What Dynamo does for each node of a graph and no test reads, left out: 6 % of a capture of a transformers model.

And one set of flags for g++, so that C++ headers are compiled ahead once.
"""

from __future__ import annotations

import torch._dynamo.symbolic_convert as tracing
import torch._dynamo.utils
import torch._inductor.codecache
import torch._inductor.config
import torch._inductor.cpu_vec_isa


def quicker_dynamo() -> None:
    """Leave out names of functions in Dynamo's logs, and a pattern compiled for each frame of a node's stack."""
    # To name them it splits every source file that it traces into tokens, whether or not somebody logs.
    tracing.get_funcname = lambda *_: None
    # Every compilation writes all settings of Dynamo and of Inductor as JSON into its own statistics.
    for name in ("_get_dynamo_config_for_logging", "_scrubbed_inductor_config_for_logging"):
        setattr(torch._dynamo.utils, name, lambda: None)
    tracing.InstructionTranslatorBase.is_co_filename_from_nn_modules = _is_of_torch_modules  # type: ignore[method-assign]


def same_flags() -> None:
    """C++ without vector instructions gets the flags of that with them, and so its headers, which take 10 s to compile ahead."""
    torch._inductor.codecache.pick_vec_isa = _vector_instructions


def _vector_instructions() -> torch._inductor.cpu_vec_isa.VecISA:
    """Those of this processor, whether or not Inductor writes C++ with them."""
    with torch._inductor.config.patch({"cpp.simdlen": None}):
        return torch._inductor.cpu_vec_isa.pick_vec_isa()


def _is_of_torch_modules(self: tracing.InstructionTranslatorBase) -> bool:
    """As torch finds it, without a regular expression."""
    return "torch/nn/modules" in self.f_code.co_filename
