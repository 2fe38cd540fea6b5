"""``explain``: what the compiler did to every linear layer of a model, and why.

``collect`` runs the model and gathers; ``report`` is what it returns; ``text``, ``html`` and ``difference`` show it.
"""

from __future__ import annotations

from typing import Any, Optional

from torch import nn

from ..compile.options import parse_options
from ..integrations.torch import compiled_with
from .collect import explanation, run
from .difference import Difference, diff
from .records import GemmReport, GraphPart, LayerReport
from .report import Explanation
from .roofline import gpu_named

__all__ = ["Difference", "Explanation", "GemmReport", "GraphPart", "LayerReport"]


def explain(
    model: nn.Module,
    *inputs: Any,
    mode: Optional[str] = None,
    options: Optional[dict] = None,
    dynamic: Optional[bool] = None,
    measure: bool = False,
    gpu: Optional[str] = None,
    **kwargs: Any,
) -> Explanation:
    """Say what ``torch.compile(model, backend="intscale")`` does with ``model`` for these inputs.

    Runs the model once on the inputs (without Inductor, without gradients) and reports every linear product.
    Weights that it quantizes are kept for a compilation that follows. ``explain.diff(a, b)`` compares two results.

    Args:
        model: a module, compiled or not.
        inputs, kwargs: what the model is called with.
        mode, options, dynamic: as for ``torch.compile``. Where none is given and the module was compiled with our backend,
            those that it was compiled with.
        measure: also time every GEMM on the device of the model, with random activations.
        gpu: name of the GPU whose roofline predicts times (``roofline.GPUS``). The default is the one that the model is on;
            on a CPU an H100 is assumed, and the result says so.

    Raises:
        ConfigError: an option or the GPU is unknown.
    """
    known = compiled_with(model)
    if mode is None and options is None:
        mode, options = known.mode, known.options
    dynamic = known.dynamic if dynamic is None else dynamic
    settings, patches = parse_options(mode, options)
    rates = None if gpu is None else gpu_named(gpu)
    cuda_graphs = bool(patches.get("triton.cudagraphs"))
    module = getattr(model, "_orig_mod", model)
    graphs, left = run(module, inputs, kwargs, settings, cuda_graphs, dynamic)
    return explanation(module, graphs, left, cuda_graphs, rates, measure, _said(mode, options, dynamic))


def _said(mode: Optional[str], options: Optional[dict], dynamic: Optional[bool]) -> dict[str, Any]:
    given = {"mode": mode, "dynamic": dynamic, **(options or {})}
    return {
        key: value if isinstance(value, (bool, int, str)) else str(value)
        for key, value in given.items()
        if value is not None
    }


explain.diff = diff  # type: ignore[attr-defined]
