"""What Dynamo does for each node of a graph and no test reads, left out: 6 % of a capture of a transformers model."""

from __future__ import annotations

import torch._dynamo.symbolic_convert as tracing
import torch._dynamo.utils


def quicker_dynamo() -> None:
    """Leave out names of functions in Dynamo's logs, and a pattern compiled for each frame of a node's stack."""
    # To name them it splits every source file that it traces into tokens, whether or not somebody logs.
    tracing.get_funcname = lambda *_: None
    # Every compilation writes all settings of Dynamo and of Inductor as JSON into its own statistics.
    for name in ("_get_dynamo_config_for_logging", "_scrubbed_inductor_config_for_logging"):
        setattr(torch._dynamo.utils, name, lambda: None)
    tracing.InstructionTranslatorBase.is_co_filename_from_nn_modules = _is_of_torch_modules  # type: ignore[method-assign]


def _is_of_torch_modules(self: tracing.InstructionTranslatorBase) -> bool:
    """As torch finds it, without a regular expression."""
    return "torch/nn/modules" in self.f_code.co_filename
