"""The ``torch.compile`` backend ``"intscale"``: rewrites Dynamo's graph, then hands it to Inductor.

All rewriting happens here, before AOTAutograd, so the rewritten graph is what Inductor's caches are keyed by and no pass
has to run on a cache hit. Found by ``torch.compile`` through the entry point group ``torch_dynamo_backends``.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Optional

from torch import fx

from .compile import options as _options
from .compile.binding import bind, rewrite_graph
from .compile.compile_ahead import compiling_ahead
from .compile.compile_progress import shown
from .compile.inductor_settings import code_generation, inductor_defaults
from .compile.recorder.compilation import FINAL, generated_files, remember
from .compile.recorder.stages import StageRecorder
from .compile.times import compile_times, timed
from .debug import report
from .debug.knobs import debug_patches
from .ops import register_inductor
from .passes import GraphRewrite
from .passes.kept import forget_all
from .passes.quantize_collectives import NAME, QuantizeCollectives, chained

if TYPE_CHECKING:
    from .passes.quantize_collectives import QuantizeCollectives

log = logging.getLogger("intscale_compile")


def intscale(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: Optional[str] = None,
    options: Optional[Mapping[str, Any]] = None,
    name: Optional[str] = None,
    **_: Any,
) -> Callable:
    """Compile a Dynamo graph with W4A8 linears.

    Args:
        gm: Dynamo's graph.
        example_inputs: its inputs; parameters and buffers are the real ones.
        mode: an Inductor mode such as ``"reduce-overhead"``.
        options: ``intscale.*`` keys (see ``options.Settings``), anything else goes to Inductor.

    Returns:
        A callable with the signature of ``gm``.

    Raises:
        ConfigError: an option is unknown or has the wrong type.
    """
    # Slow to import.
    from torch._inductor.compile_fx import compile_fx

    settings, patches = _options.parse_options(mode, options)
    register_inductor()
    recorder = StageRecorder()
    rewrite = rewrite_graph(gm, example_inputs, settings, bool(patches.get("triton.cudagraphs")), recorder)
    patches = {**inductor_defaults(example_inputs, most_tokens(rewrite)), **patches, **debug_patches()}
    collectives = collectives_pass(settings, bool(patches.get("triton.cudagraphs")))
    if collectives is not None:
        patches["post_grad_custom_pre_pass"] = after_users_pass(collectives, patches)

    def compile_graph(graph: fx.GraphModule, inputs: list[Any]) -> Callable:
        recorder(FINAL, rewrite)
        return compile_fx(graph, inputs, config_patches=patches)  # type: ignore[return-value]

    quantized = sum(c.packed is not None for c in rewrite.candidates)
    with (
        compiling_ahead(rewrite, patches) as ahead,
        timed(quantized, rewrite.seconds, ahead),
        shown(rewrite, len(compile_times()) + 1),
        code_generation(),
        generated_files() as files,
    ):
        compiled = bind(rewrite, compile_graph)
    if collectives is not None:
        note_collectives(rewrite, collectives, files())
    report(remember(recorder, rewrite, mode, patches, files()))
    rewrite.release()
    return compiled


intscale.reset = forget_all  # type: ignore[attr-defined]  # called by torch._dynamo.reset()


def collectives_pass(settings: _options.Settings, cuda_graphs: bool) -> Optional[QuantizeCollectives]:
    """The pass over collectives, where the option asks for it.

    Raises:
        ConfigError: the table of a link is malformed.
    """
    wire = settings.communication
    if wire is None:
        return None
    disabled = settings.disable_passes
    return QuantizeCollectives(wire, settings.communication_min_bytes, NAME in disabled, cuda_graphs)


def after_users_pass(ours: QuantizeCollectives, patches: Mapping[str, Any]) -> Any:
    """A value for Inductor's option that runs the user's own post-grad pass, wherever it was set, and then ours."""
    # Slow to import.
    from torch._inductor import config

    return chained(ours, patches.get("post_grad_custom_pre_pass", config.post_grad_custom_pre_pass))


def note_collectives(rewrite: GraphRewrite, collectives: QuantizeCollectives, files: Sequence[str] = ()) -> None:
    """Record what the pass over collectives did; where Inductor had the graph in its cache, what the generated code calls."""
    rewrite.collectives = tuple(collectives.reports) if collectives.ran else None
    if collectives.ran or files:
        rewrite.counts[collectives.name] = collectives.count if collectives.ran else collectives.calls_in(files)
    rewrite.seconds[collectives.name] = collectives.seconds


def most_tokens(rewrite: GraphRewrite) -> Optional[int]:
    """Rows of the largest activation among the linear products; None where one is symbolic or there are none."""
    tokens = [candidate.tokens for candidate in rewrite.candidates]
    return max(map(int, tokens)) if tokens and all(t.isdigit() for t in tokens) else None
