"""``prepare_for_generation``: one line after which transformers' ``generate`` runs compiled, prompt and decoding steps.

intscale_compile.prepare_for_generation(model)
model.generate(**inputs, max_new_tokens=200)
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Optional, Union

import torch

from .backend import intscale
from .compile.compile_progress import watch
from .compile.options import parse_options
from .errors import ConfigError
from .integrations.transformers_generate import PromptState, foreign_forward, has_windows, prepare_model, restore_model
from .integrations.transformers_layers import decoder_layers
from .tensors.intscale_tensor import IntScaleTensor

log = logging.getLogger("intscale_compile")
PROMPTS = ("auto", "layers", "compiled", "eager")


@dataclass(frozen=True)
class GenerationSetup:
    """What :func:`prepare_for_generation` set; ``print`` it.

    Attributes:
        device: where the model is.
        quantized: weights that are quantized, of all linears.
        linears: number of linears.
        decoding: how a decoding step runs.
        prompt: how a prompt runs.
        cache: which cache decoding uses.
        notes: what is worth knowing beside that.
    """

    device: str
    quantized: int
    linears: int
    decoding: str
    prompt: str
    cache: str
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [
            f"generate on {self.device}, {self.quantized} of {self.linears} linears quantized",
            f"  prompt:   {self.prompt}",
            f"  decoding: {self.decoding}",
            f"  cache:    {self.cache}",
        ]
        return "\n".join([*lines, *(f"  note:     {note}" for note in self.notes)])


def prepare_for_generation(
    model: Any,
    *,
    prompt: str = "auto",
    mode: Optional[str] = None,
    backend: Union[str, Callable] = "intscale",
    keep_cache: bool = True,
    max_cache_len: Optional[int] = None,
    communication: Optional[str] = None,
) -> GenerationSetup:
    """Set a model of transformers up for ``generate``, which compiles at its first call.

    The model's ``generation_config`` gets a static cache and a ``compile_config`` with this backend; arguments of
    ``generate`` still win. Sampling, beam search and padded batches run compiled; assisted decoding cannot use a static
    cache and runs eagerly, and so does a model that fails with one in transformers (XLM, ProphetNet). Called again, it
    replaces what it set before. Call it after ``quantize_``; a model that is not quantized is quantized at compile time, as
    ``backend="intscale"`` always does, and its prompts must be compiled for that.

    Args:
        model: a causal or an encoder-decoder model of transformers.
        prompt: ``"compiled"``: one graph of the whole model for every length of prompt, compiled at the first call;
            ``"layers"``: one graph that the decoder layers of a quantized model share, which compiles many times faster, but
            costs the host more at every prompt; ``"eager"``: no compilation; ``"auto"``: compiled on a GPU, where the host's
            time counts most, by layer elsewhere. Prompts of encoder-decoder models and of those with sliding windows, those
            with anything but tokens, padded ones, and those behind others in a cache run eagerly.
        mode: of ``torch.compile``, for decoding steps; by default ``"reduce-overhead"`` on a GPU, where launches cost more
            than kernels, and ``"default"`` elsewhere and for models with sliding windows, whose steps differ in a number.
        backend: of ``torch.compile``.
        keep_cache: reuse the static cache of the last call where it has the same form and nobody holds it. It costs its
            memory between calls; without it CUDA graphs may be recorded again at each call.
        max_cache_len: least length of the static cache, so that longer prompts or answers do not compile again.
        communication: the option ``intscale.communication``, for a model that is divided among ranks: ``"auto"``, ``"int8"``, ...
            Every rank gives the same, and calls ``generate`` with the same prompts.

    Returns:
        What was set.

    Raises:
        ConfigError: a value that is not supported, or a model without ``generate``.
    """
    if communication is not None:
        backend = _with_communication(backend, communication)
    _check(model, prompt)
    if not _static_cache_works(model):
        return _left_eager(model)
    on_gpu = model.device.type == "cuda"
    windows = has_windows(model)
    mode = mode or ("reduce-overhead" if on_gpu and not windows else "default")
    _set_steps(model.generation_config, _compile_config(backend, mode, windows), max_cache_len)
    compiled_prompt = prompt != "eager" and not model.config.is_encoder_decoder and not foreign_forward(model)
    compile_forward = _compile_of_prompts(backend) if compiled_prompt else None
    by_layer = prompt == "layers" or (prompt == "auto" and not on_gpu)
    by_layer &= compiled_prompt and _quantized(model) > 0 and bool(decoder_layers(model))
    watch()
    prepare_model(model, PromptState(compile_forward, keep_cache and not model.config.is_encoder_decoder, by_layer))
    how = f"torch.compile, one graph for all {'layers and ' if by_layer else ''}lengths" if compiled_prompt else "eager"
    setup = _describe(model, mode, how, keep_cache, max_cache_len, windows)
    log.info("%s", setup)
    return setup


def _compile_config(backend: Union[str, Callable], mode: str, windows: bool) -> Any:
    """How transformers compiles decoding steps."""
    from transformers import CompileConfig  # optional dependency

    # A window's count is a number in the graph: constant, each step would be compiled anew until Dynamo gives up.
    return CompileConfig(backend=backend, mode=mode, dynamic=None if windows else False, fullgraph=False)


def _check(model: Any, prompt: str) -> None:
    if prompt not in PROMPTS:
        raise ConfigError(f"prompt={prompt!r} is not supported: use one of {PROMPTS}.")
    if not hasattr(model, "generation_config") or not hasattr(model, "generate"):
        raise ConfigError(f"{type(model).__name__} has no generate(): pass a model of transformers.")


def _static_cache_works(model: Any) -> bool:
    """Whether a model decodes with a static cache; tried on three tokens where its class does not promise it."""
    if getattr(model, "_can_compile_fullgraph", False):
        return True
    restore_model(model)  # of an earlier call: nothing is compiled for a trial
    ids = torch.ones((1, 3), dtype=torch.long, device=model.device)

    def works(**cache: Any) -> bool:
        try:
            model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, do_sample=False,
                disable_compile=True, **cache,
            )  # fmt: skip
        except Exception:  # whatever a cache of another form leads to
            return False
        return True

    return works(cache_implementation="static") or not works(cache_implementation=None)


def _left_eager(model: Any) -> GenerationSetup:
    """Leave a model as transformers has it, and say so."""
    undo_prepare_for_generation(model)
    setup = _describe(model, "", "eager", False, None, False)
    why = f"{type(model).__name__} fails in transformers with a static cache, which compiled steps need"
    notes = tuple(note for note in setup.notes if "the first call compiles" not in note)
    setup = dataclasses.replace(setup, decoding=f"eager: {why}", cache="transformers' own", notes=notes)
    log.warning("%s", setup)
    return setup


def _compile_of_prompts(backend: Union[str, Callable]) -> Callable:
    """``torch.compile`` for a whole prompt, which attends to itself only."""
    ours = backend == "intscale" or getattr(backend, "takes_intscale_options", False)
    return functools.partial(torch.compile, backend=backend, options={"intscale.whole_prompt": True} if ours else None)


def _set_steps(config: Any, steps: Any, max_cache_len: Optional[int]) -> None:
    """Let decoding steps run compiled on a static cache."""
    config.cache_implementation = "static"
    if max_cache_len is not None:
        config.max_cache_len = max_cache_len
    config.compile_config = steps
    # Without it transformers compiles on accelerators only, and says so in a line that is easily missed.
    config.compile_config._compile_all_devices = True


def _with_communication(backend: Union[str, Callable], communication: str) -> Callable:
    """Our backend with the option; ``ConfigError`` for another backend or value."""
    if backend != "intscale":
        raise ConfigError(
            f"communication={communication!r} is an option of the backend 'intscale', not of {backend!r}."
        )
    added = {"intscale.communication": communication}
    parse_options(None, added)

    def intscale_with_communication(gm: Any, inputs: Any, *, options: Optional[dict] = None, **others: Any) -> Callable:
        return intscale(gm, inputs, options={**added, **(options or {})}, **others)

    intscale_with_communication.takes_intscale_options = True  # type: ignore[attr-defined]
    intscale_with_communication.reset = intscale.reset  # type: ignore[attr-defined]
    return intscale_with_communication


def undo_prepare_for_generation(model: Any) -> None:
    """Give a model back the ``forward`` of its class, and a generation config that compiles nothing."""
    restore_model(model)
    model.generation_config.cache_implementation = model.generation_config.compile_config = None


def _quantized(model: Any) -> int:
    """Number of linears whose weight is quantized."""
    return sum(isinstance(m.weight, IntScaleTensor) for m in model.modules() if isinstance(m, torch.nn.Linear))


def _describe(
    model: Any, mode: str, prompt: str, keep_cache: bool, max_cache_len: Optional[int], windows: bool
) -> GenerationSetup:
    linears = sum(isinstance(m, torch.nn.Linear) for m in model.modules())
    quantized = _quantized(model)
    notes = []
    if not quantized:
        notes.append("no weight is quantized yet: quantize_(model, IntScaleConfig()) saves memory as well")
    if foreign_forward(model):
        notes.append(
            "its forward was exchanged by another library, which cannot be compiled for prompts: they run eagerly"
        )
    if windows:
        notes.append("its sliding windows count tokens in Python: prompts run eagerly, and steps without CUDA graphs")
    notes.append("the first call compiles; later processes find most of it in the caches of Inductor and Triton")
    length = f"at least {max_cache_len} tokens" if max_cache_len else "as long as the longest call"
    return GenerationSetup(
        device=str(model.device),
        quantized=quantized,
        linears=linears,
        decoding=f"torch.compile, mode={mode!r}, once for each batch size and length of the cache",
        prompt=prompt,
        cache=f"static, {length}{', kept between calls' if keep_cache else ''}",
        notes=tuple(notes),
    )
