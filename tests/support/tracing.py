"""What Dynamo does for each node of a graph and no test reads, left out: a sixth of a capture of a transformers model.

And one set of flags for g++, so that C++ headers are compiled ahead once.
"""

from __future__ import annotations

import torch._dynamo.config
import torch._dynamo.guards
import torch._dynamo.symbolic_convert as tracing
import torch._dynamo.utils
import torch._inductor.codecache
import torch._inductor.config
import torch._inductor.cpu_vec_isa
import torch.utils._config_module


def quicker_dynamo() -> None:
    """Leave out what only logs say, a search for cycles behind each compilation, and patterns for each frame of a stack."""
    # To name them it splits every source file that it traces into tokens, whether or not somebody logs.
    tracing.get_funcname = lambda *_: None
    # Every compilation writes all settings of Dynamo and of Inductor as JSON into its own statistics.
    for name in ("_get_dynamo_config_for_logging", "_scrubbed_inductor_config_for_logging"):
        setattr(torch._dynamo.utils, name, lambda: None)
    tracing.InstructionTranslatorBase.is_co_filename_from_nn_modules = _is_of_torch_modules  # type: ignore[method-assign]
    # The user's stack at each attribute that is set, for a log; where each guard comes from, for the text of a recompilation.
    _set_where_known(torch._dynamo.config, "side_effect_replay_policy", "silent")
    torch._dynamo.guards.get_verbose_code_part = lambda part, _: part
    # A twentieth of a compilation; Python searches when there is reason to.
    _set_where_known(torch._dynamo.config, "run_gc_after_compile", False)
    _quicken_settings()


def _set_where_known(settings, name: str, value) -> None:
    if hasattr(settings, name):
        setattr(settings, name, value)


def _quicken_settings() -> None:
    """Read a setting of torch, which Dynamo does twice for each instruction, without the calls that look for other names."""
    module = torch.utils._config_module
    unset, read = module._UNSET_SENTINEL, module.ConfigModule.__getattr__
    known = next(iter(torch._dynamo.config._config.values()))
    fields = ("hide", "deprecated", "alias", "justknob", "default", "env_value_force", "env_value_default")
    if not all(hasattr(known, name) for name in fields) or not hasattr(known.user_override, "get"):
        return  # torch before 2.13

    def quickly(self, name):
        entry = self._config.get(name)
        if entry is None or entry.hide or entry.deprecated or entry.alias or entry.env_value_force is not unset:
            return read(self, name)
        value = entry.user_override.get()
        if value is not unset:
            return value
        plain = entry.env_value_default is unset and entry.justknob is None
        return entry.default if plain and isinstance(entry.default, (int, float, str, type(None))) else read(self, name)

    module.ConfigModule.__getattr__ = quickly


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
