"""What each of the two doors chooses in a model."""

import copy

import torch

from intscale_compile import IntScaleConfig, IntScaleTensor, quantize
from intscale_compile.compile.binding import copied
from intscale_compile.passes import GraphRewrite
from intscale_compile.passes.experts import experts
from intscale_compile.passes.match import match
from intscale_compile.passes.settings import Settings

CONFIG = IntScaleConfig(group_size=32, scale_search="absmax")


def chosen_by_quantize(model):
    twin = copy.deepcopy(model)
    quantize(twin, IntScaleConfig(scale_search="absmax"))
    return {name for name, parameter in twin.named_parameters() if isinstance(parameter, IntScaleTensor)}


def compiler_choices(model, *args, compile_parts=(), **kwargs):
    """Names of the weights of all graphs with the reason that the compiler gives; nothing is compiled further."""
    names = {id(tensor): name for name, tensor in (*model.named_buffers(), *model.named_parameters())}
    found = {}

    def backend(gm, example_inputs):
        rewrite = GraphRewrite(copied(gm), example_inputs, Settings(config=CONFIG))
        match(rewrite), experts(rewrite)
        for candidate in rewrite.candidates:
            if candidate.source is not None:
                found[names[id(candidate.source.tensor(example_inputs))]] = candidate.reason
        return gm.forward

    torch._dynamo.reset()
    for part in compile_parts:
        part.compile(backend=backend)
    called = model if compile_parts else torch.compile(model, backend=backend)
    with torch.no_grad():
        called(*args, **kwargs)
    for part in compile_parts:
        part._compiled_call_impl = None
    torch._dynamo.reset()
    return found


def quantized(choices):
    return {name for name, reason in choices.items() if reason is None}
