"""Dynamo graphs for tests of single passes."""

import torch
from torch import nn

from intscale_compile.compile.binding import copied
from intscale_compile.compile.options import parse_options
from intscale_compile.passes import GraphRewrite


def capture(model, *inputs, dynamic=None, **options) -> GraphRewrite:
    """The Dynamo graph of ``model(*inputs)``, ready for passes."""
    settings, _ = parse_options(None, options)
    rewrites = []

    def backend(gm, example_inputs):
        rewrites.append(GraphRewrite(copied(gm), example_inputs, settings))
        return gm.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, backend=backend, dynamic=dynamic, fullgraph=True)(*inputs)
    torch._dynamo.reset()
    (rewrite,) = rewrites
    rewrite.model = model  # which weights are quantized is decided for the whole model, which has to live
    return rewrite


class Together(nn.Module):
    """Several models in one graph, each with an activation of its own, so that nothing is merged between them."""

    def __init__(self, models):
        super().__init__()
        self.models = nn.ModuleList(models)

    def forward(self, *xs):
        return [model(x) for model, x in zip(self.models, xs)]


def count(rewrite: GraphRewrite, target) -> int:
    """Nodes that call ``target``."""
    return sum(node.target is target for node in rewrite.graph.nodes)


def arguments(rewrite: GraphRewrite) -> list:
    """Arguments of the graph in its present state: the example inputs, and packed tensors where passes added inputs."""
    args, originals = [], iter(rewrite.example_inputs)
    for node in (n for n in rewrite.graph.nodes if n.op == "placeholder"):
        if node in rewrite.packed_inputs:
            recipe, part = rewrite.packed_inputs[node]
            value = recipe.resolve(rewrite.example_inputs)
            args.append(value if part is None else getattr(value, part))
        else:
            args.append(next(originals))
    return args


def run(rewrite: GraphRewrite):
    """The rewritten graph called with its example inputs."""
    rewrite.gm.recompile()
    with torch.no_grad():
        return rewrite.gm(*arguments(rewrite))


def assert_true_metadata(rewrite: GraphRewrite) -> None:
    """Every fake tensor on a node has the shape, dtype and strides that running the graph gives."""
    values = {}

    class Record(torch.fx.Interpreter):
        def run_node(self, node):
            values[node] = super().run_node(node)
            return values[node]

    with torch.no_grad():
        Record(rewrite.gm).run(*arguments(rewrite))
    checked = 0
    for node, value in values.items():
        fake = node.meta.get("example_value")
        if isinstance(value, torch.Tensor) and isinstance(fake, torch.Tensor):
            assert tuple(map(int, fake.shape)) == tuple(value.shape), node.format_node()
            assert fake.dtype == value.dtype, node.format_node()
            assert tuple(map(int, fake.stride())) == value.stride(), node.format_node()
            checked += 1
    assert checked > 0
