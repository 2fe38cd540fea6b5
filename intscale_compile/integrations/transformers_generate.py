"""What we exchange in a model of transformers so that ``generate`` runs compiled from the first token on.

All of it is in the ``__dict__`` of one model: ``forward``, which compiles prompts, and ``_prepare_cache_for_generation``, which
keeps the static cache from one call to the next. Both are bound methods, which a deep copy of the model binds to the copy.
"""

from __future__ import annotations

import functools
import gc
import inspect
import logging
import sys
import types
from collections.abc import Callable
from typing import Any, Optional

import torch
from torch import Tensor

from ..progress import WORK
from ..reasons import log_once
from .transformers_layers import CACHE_NAMES, compiled_layers, decoder_layers, folding_output, mark_dynamic

STATE = "_intscale_generation"
# A prompt with anything else, such as pixels, runs as it always did.
PROMPT_ARGUMENTS = {
    "input_ids", "attention_mask", "position_ids", "cache_position", "use_cache", "logits_to_keep", "return_dict",
    "output_attentions", "output_hidden_states", *CACHE_NAMES,
}  # fmt: skip


class PromptState:
    """What one model keeps between calls.

    Attributes:
        compile: makes a compiled function of ``forward(self, ...)``; None: prompts run eagerly.
        keep_cache: whether the static cache is kept.
        by_layer: whether decoder layers are compiled, not the whole model.
        prompts: number of prompts that ran compiled.
    """

    def __init__(
        self, compile_forward: Optional[Callable[[Callable], Callable]], keep_cache: bool, by_layer: bool = False
    ):
        self.compile = compile_forward
        self.keep_cache = keep_cache
        self.by_layer = by_layer
        self.prompts = 0
        self._compiled: dict[Callable, Callable] = {}
        self._layers: Optional[dict[Any, int]] = None
        self._cache: Any = None
        self._cache_form: Any = None
        self._collected = False

    def __deepcopy__(self, memo: dict) -> PromptState:
        """A copied model compiles anew and has a cache of its own."""
        return PromptState(self.compile, self.keep_cache, self.by_layer)

    def __reduce__(self) -> tuple:
        """Nothing of it can be stored: the model is prepared again where it is loaded."""
        return PromptState, (None, False)

    def compiled(self, forward: Callable) -> Callable:
        """``forward`` of a class, compiled once."""
        if forward not in self._compiled:
            assert self.compile is not None
            self._compiled[forward] = self.compile(forward)
        return self._compiled[forward]

    def run(self, model: Any, forward: Callable, kwargs: dict[str, Any]) -> Any:
        """A whole prompt, compiled."""
        self.prompts += 1
        tokens = kwargs["input_ids"].shape[1]
        token = WORK.set(f"prompt of {tokens} tokens")
        try:
            return self._run(model, forward, kwargs, tokens)
        finally:
            WORK.reset(token)

    def _run(self, model: Any, forward: Callable, kwargs: dict[str, Any], tokens: int) -> Any:
        if self.by_layer and self._layers is None:
            self._layers = decoder_layers(model)
        layers = self._layers if self.by_layer else None
        if not layers:
            names = ("input_ids", "position_ids", "cache_position", "attention_mask")
            mark_dynamic([kwargs.get(name) for name in names], tokens)
            return self.compiled(forward)(model, **kwargs)
        with compiled_layers(layers, tokens, self.compiled) as ran, folding_output(model):
            result = forward(model, **kwargs)
        if len(ran) < len(layers):
            self.by_layer = False
            log_once(
                logging.WARNING,
                f"{type(model).__name__}: {len(layers) - len(ran)} of {len(layers)} layers get no cache by name, so they "
                "cannot be compiled one by one: prompts are compiled as a whole from the next one on",
            )
        return result

    def kept(self, made: Any, form: Any) -> Any:
        """The cache of the last call where it has this form and nobody holds it any more, empty; else ``made``, kept.

        CUDA graphs hold addresses: with another cache every graph is recorded again.
        """
        if self._cache is not None and self._cache_form == form:
            if self._is_held() and not self._collected:
                self._collected = True
                gc.collect()  # compiling leaves it in circles of references; once for each cache
            if not self._is_held():
                self._cache.reset()
                return self._cache
        self._cache, self._cache_form, self._collected = made, form, False
        return made

    def _is_held(self) -> bool:
        return sys.getrefcount(self._cache) > 2  # ours, and the argument of getrefcount


def prepare_model(model: Any, state: PromptState) -> None:
    """Exchange the two methods, or only what they keep where they were exchanged before."""
    model.__dict__[STATE] = state
    if not foreign_forward(model):
        model.forward = types.MethodType(_forward_of(model), model)
    model._prepare_cache_for_generation = types.MethodType(_prepare_cache, model)


def foreign_forward(model: Any) -> bool:
    """Whether somebody else exchanged the model's ``forward``, such as accelerate; it is then left alone."""
    forward = model.__dict__.get("forward")
    return forward is not None and not hasattr(getattr(forward, "__func__", None), STATE)


def restore_model(model: Any) -> None:
    """Undo :func:`prepare_model`."""
    names = [STATE, "_prepare_cache_for_generation"] + ["forward"] * (not foreign_forward(model))
    for name in names:
        model.__dict__.pop(name, None)


def _forward_of(model: Any) -> Callable:
    """The method ``forward`` of a prepared model; its signature is that of the model's class, which transformers reads."""
    original = type(model).forward

    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return original(self, *args, **kwargs)
        state = self.__dict__.get(STATE)
        if state is None or state.compile is None or args or not _is_prompt(self, kwargs):
            return original(self, *args, **kwargs)
        return state.run(self, original, kwargs)

    setattr(forward, STATE, True)
    return forward


def cache_of(kwargs: dict[str, Any]) -> Any:
    """The cache among the arguments of ``forward``, or None."""
    return next((kwargs[name] for name in CACHE_NAMES if kwargs.get(name) is not None), None)


def _is_prompt(model: Any, kwargs: dict[str, Any]) -> bool:
    """Whether these are the arguments of a whole prompt: several tokens, none of them padding, and an empty static cache.

    transformers leaves the mask out where it hides just the future. The cache is then initialized.
    """
    ids, cache = kwargs.get("input_ids"), cache_of(kwargs)
    if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.shape[1] < 2 or torch.is_grad_enabled():
        return False
    if any(value is not None and name not in PROMPT_ARGUMENTS for name, value in kwargs.items()):
        return False
    if kwargs.get("output_attentions") or kwargs.get("output_hidden_states"):
        return False
    if not getattr(model.config, "is_causal", True) or not _is_static(cache) or not _is_empty(cache):
        return False
    reason = _obstacle(model, kwargs.get("attention_mask"), cache, ids.shape[0])
    if reason:
        log_once(
            logging.WARNING, f"{type(model).__name__}: {reason}, so that prompt runs eagerly; decoding is compiled"
        )
    return reason is None


def has_windows(model: Any) -> bool:
    """Whether the static cache of a model has layers with a window, which count their tokens in Python."""
    # Slow to import.
    from transformers import StaticCache

    try:
        layers = StaticCache(config=model.config.get_text_config(decoder=True), max_cache_len=2).layers
    except (AttributeError, TypeError, ValueError):  # generate says what is wrong
        return False
    return any(getattr(layer, "is_sliding", False) for layer in layers)


def _obstacle(model: Any, mask: Any, cache: Any, batch: int) -> Optional[str]:
    """Why the prompt of a static cache is not compiled although it is a whole one."""
    # Slow to import.
    from transformers.cache_utils import StaticLayer

    # A model whose layers differ in what they see takes a mask for each kind.
    masks = mask.values() if isinstance(mask, dict) else (mask,)
    others = [layer for layer in cache.layers if type(layer) is not StaticLayer]
    if others:
        windows = [layer for layer in others if getattr(layer, "is_sliding", False)]
        what = (
            "some layers see a part of the prompt only"
            if windows
            else "some layers keep something else than keys and values"
        )
        return f"{what} ({type((windows or others)[0]).__name__} in its cache)"
    if any(one is not None for one in masks):
        return "a prompt is padded, or its tokens do not see all that is before them"
    if not _initialized(model, cache, batch):
        return "the form of its cache is not known before it is used"
    return None


def _is_empty(cache: Any) -> bool:
    """Whether nothing is in the cache; waits for a GPU where it was used before."""
    counts = (
        getattr(layer, "cumulative_length", None) for layer in cache.layers if getattr(layer, "is_initialized", False)
    )
    return not int(next((count for count in counts if count is not None), 0))  # others hold states without a length


def _is_static(cache: Any) -> bool:
    # Slow to import.
    from transformers import StaticCache

    return type(cache) is StaticCache


def _initialized(model: Any, cache: Any, batch: int) -> bool:
    """Whether every layer of the cache has memory: in a compiled prompt it would be memory of the graph, and be copied.

    Layers get it here where the model says which form it has.
    """
    if all(layer.is_initialized for layer in cache.layers):
        return True
    config = model.config.get_text_config(decoder=True)
    if getattr(config, "multi_query", False) or getattr(config, "new_decoder_architecture", False):
        return False  # names of Falcon and GPT-BigCode, whose heads transformers does not read
    form = getattr(model, "_get_static_cache_init_shape", lambda: None)()
    if form is None or not all(getattr(layer, "supports_early_init", True) for layer in cache.layers):
        return False
    heads, head_dim = form
    cache.early_initialization(
        batch_size=batch, num_heads=heads, head_dim=head_dim, dtype=model.dtype, device=model.device
    )
    return True


def _prepare_cache(
    self: Any, generation_config: Any, model_kwargs: dict, generation_mode: Any, *args: Any, **kwargs: Any
):
    """``_prepare_cache_for_generation``: assisted decoding gets a cache that it can cut, others the one of the last call."""
    # Slow to import.
    from transformers.generation.utils import GenerationMode

    original = type(self)._prepare_cache_for_generation
    if any(model_kwargs.get(name) is not None for name in CACHE_NAMES):  # the user's own, for this call
        generation_config.cache_implementation = None  # transformers refuses both
        return original(self, generation_config, model_kwargs, generation_mode, *args, **kwargs)
    if generation_mode == GenerationMode.ASSISTED_GENERATION:
        generation_config.cache_implementation, generation_config.disable_compile = None, True
    result = original(self, generation_config, model_kwargs, generation_mode, *args, **kwargs)
    state = self.__dict__.get(STATE)
    for name in CACHE_NAMES:
        cache = model_kwargs.get(name)
        if state is not None and state.keep_cache and cache is not None and _is_static(cache):
            bound = inspect.signature(original).bind(
                self, generation_config, model_kwargs, generation_mode, *args, **kwargs
            )
            sequences = max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1)
            layers = tuple((type(layer).__name__, getattr(layer, "max_cache_len", None)) for layer in cache.layers)
            form = sequences * bound.arguments["batch_size"], layers, self.dtype, self.device
            del cache
            model_kwargs[name] = state.kept(model_kwargs.pop(name), form)
    return result
