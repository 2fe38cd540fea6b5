"""The commands: options, help and examples. What they do is in ``intscale_compile.commands``, what they print in ``views``."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from . import output, views

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="4-bit weights and 8-bit activations with integer group scales: quantize, look inside, measure.",
    epilog="Exit codes: 0 fine, 1 the answer is no or the work failed, 2 wrong use. INTSCALE_DEBUG=1 shows tracebacks.",
)

Model = Annotated[str, typer.Argument(help="Folder of a transformers model, or its hub name.", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, or auto: a GPU where there is one.")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16, float16, or auto.")]
Config = Annotated[
    Optional[list[str]],
    typer.Option("--config", "-c", metavar="FIELD=VALUE", help="A field of IntScaleConfig; may be given again."),
]
Shapes = Annotated[
    Optional[list[str]], typer.Option("--shape", metavar="NxK", help="Output x input features; may be given again.")
]
Tokens = Annotated[
    Optional[list[int]], typer.Option("--tokens", min=1, help="Rows of the activation; may be given again.")
]


def _examples(*lines: str) -> str:
    return "\n\n".join(["[bold]Examples[/bold]", *(f"  {line}" for line in lines)])


def _dtype(name: str, device: Any, stored: bool = False) -> Any:
    """A torch dtype; ``auto`` is the checkpoint's, and where a model is to run on a CPU float32, which is faster there."""
    # Slow to import: commands that need it not begin at once.
    import torch

    # Slow to import: commands that need it not begin at once.
    from intscale_compile.errors import ConfigError

    names = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name == "auto":
        return torch.float32 if device.type == "cpu" and not stored else None
    if name not in names:
        raise ConfigError(f"--dtype {name!r} is not supported: use {', '.join(names)} or auto.")
    return names[name]


@app.command(
    epilog=_examples(
        "intscale quantize meta-llama/Llama-3.1-8B llama-w4a8",
        "intscale quantize ./model ./out -c group_size=64 -c scale_bits=8",
        "intscale quantize ./model ./out --preset gptq --data corpus.txt --device cuda",
        "intscale quantize TheBloke/Llama-2-7B-GPTQ ./out --export compressed-tensors",
    )
)
def quantize(
    model: Model,
    out: Annotated[Path, typer.Argument(help="New folder for the quantized model.", show_default=False)],
    config: Config = None,
    preset: Annotated[Optional[str], typer.Option(help="Data: rtn, gptq, robust, best, llama3, mixtral, odyssey, fptq")] = None,
    data: Annotated[Optional[list[Path]], typer.Option(help="Text file to calibrate with; may be given again.")] = None,
    sequences: Annotated[int, typer.Option(min=1, help="Sequences of text to calibrate with.")] = 64,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens in each.")] = 512,
    checkpoint_dir: Annotated[Optional[Path], typer.Option(help="Keep finished blocks here, to go on later.")] = None,
    export: Annotated[Optional[str], typer.Option(help="compressed-tensors: write what vLLM reads.")] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    json: Json = False,
) -> None:  # fmt: skip
    """Quantize a model and save it. A GPTQ, AWQ or compressed-tensors checkpoint is taken over with its codes."""
    commands = _library()
    where = commands.loading.usable_device(device)
    summary = commands.quantize_folder(
        model, out, commands.parse_fields(config or ()), preset=preset, data=data or (), sequences=sequences,
        tokens=tokens, checkpoint_dir=checkpoint_dir, device=where, dtype=_dtype(dtype, where, stored=True), export=export,
    )  # fmt: skip
    output.print_json(summary.to_dict()) if json else views.quantized(summary)


@app.command(
    epilog=_examples(
        "intscale inspect llama-w4a8",
        "intscale inspect ./model --html model.html",
        "intscale inspect llama-w4a8 --verify",
        "intscale inspect meta-llama/Llama-3.1-70B --plan -c group_size=64",
    )
)
def inspect(
    model: Model,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of the run that is looked at.")] = 16,
    plan: Annotated[bool, typer.Option("--plan", help="From config.json alone, reading no weights: sizes, no kernels.")] = False,
    config: Config = None,
    unfolded: Annotated[bool, typer.Option("--all", help="Every layer on a line of its own.")] = False,
    html: Annotated[Optional[Path], typer.Option(help="Write the page of explain to this file.")] = None,
    measure: Annotated[bool, typer.Option("--measure", help="Also time every GEMM, for the page and JSON.")] = False,
    verify: Annotated[bool, typer.Option("--verify", help="Only compare all stored data with their checksums.")] = False,
    device: Device = "cpu",
    json: Json = False,
) -> None:  # fmt: skip
    """Say what the compiler does with each layer of a model, and why where it does nothing. Needs no GPU."""
    commands = _library()
    # Slow to import: commands that need it not begin at once.
    from intscale_compile.errors import ConfigError
    from intscale_compile.explanation.blocks import repeated_blocks

    fields = commands.parse_fields(config or ())
    if verify:
        if plan or html is not None or measure or fields:
            raise ConfigError("--verify reads files and runs nothing: leave --plan, --html, --measure and -c out.")
        found = commands.verify_folder(model)
        output.print_json(found.to_dict()) if json else views.verified(found)
        if not found.tensors:
            raise typer.Exit(1)
        return
    if plan:
        if html is not None:
            raise ConfigError("--html shows a run, --plan makes none: leave one of them out.")
        empty = commands.meta_model(model)
        layers = commands.plan(empty, commands.quantizing.make_config(fields))
        if json:
            output.print_json(views.planned_dict(layers))
        else:
            views.planned(layers, () if unfolded else repeated_blocks(empty))
        return
    if html is not None and not html.absolute().parent.is_dir():  # said before the model is loaded and run
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(html))
    where = commands.loading.usable_device(device)
    chosen = commands.quantizing.make_config(fields) if fields else None
    loaded, report = commands.load_model(model, device=where)
    explanation = commands.inspect_model(loaded, tokens, chosen, measure=measure)
    if html is not None:
        explanation.to_html(html)
    if json:
        output.print_json(views.explanation_dict(explanation, report))
    else:
        views.explained(explanation, report, unfolded)
    if not any(layer.quantized for layer in explanation.layers):
        raise typer.Exit(1)


@app.command(
    "eval",
    epilog=_examples(
        "intscale eval llama-w4a8 --text wiki.txt --against meta-llama/Llama-3.1-8B",
        "intscale eval ./out --stdlib --max-perplexity 16",
        "intscale eval ./out --task lambada_openai --limit 200",
    ),
)
def evaluate(
    model: Model,
    text: Annotated[Optional[list[Path]], typer.Option(help="Text file; may be given again.")] = None,
    stdlib: Annotated[bool, typer.Option("--stdlib", help="Text: modules of Python's standard library.")] = False,
    task: Annotated[Optional[list[str]], typer.Option(help="Task of lm-eval; may be given again.")] = None,
    against: Annotated[Optional[str], typer.Option(help="The original model: also compare logits.")] = None,
    sequences: Annotated[int, typer.Option(min=1, help="At most so many sequences of the text.")] = 24,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens in each.")] = 512,
    limit: Annotated[Optional[int], typer.Option(min=1, help="Examples of each task.")] = None,
    max_perplexity: Annotated[Optional[float], typer.Option(help="Exit with 1 where it is higher.")] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    json: Json = False,
) -> None:
    """Perplexity on a text, distance from the original's logits, or tasks of lm-eval."""
    commands = _library()
    # Slow to import: commands that need it not begin at once.
    from intscale_compile.errors import ConfigError

    if (bool(text) + stdlib + bool(task)) != 1:
        raise ConfigError("give one of --text FILE, --stdlib or --task NAME.")
    if task and (against is not None or max_perplexity is not None):
        raise ConfigError("--against and --max-perplexity belong to --text and --stdlib: leave them out with --task.")
    where = commands.loading.usable_device(device)
    kind = _dtype(dtype, where)
    texts = [] if task else commands.stdlib_texts() if stdlib else commands.evaluation.read_texts(text or ())
    tokenizer = commands.load_tokenizer(model)
    ids = None if task else commands.token_sequences(tokenizer, texts, sequences, tokens)
    loaded, _ = commands.load_model(model, dtype=kind, device=where)
    if task:
        with contextlib.redirect_stdout(sys.stderr):
            results = commands.evaluation.evaluate_tasks(loaded, tokenizer, task, limit)
        output.print_json(results) if json else views.tasks(results)
        return
    original = None if against is None else commands.load_model(against, dtype=kind, device=where)[0]
    result = commands.evaluate(loaded, ids, original, progress=True)
    failed = not result.perplexity < (max_perplexity or float("inf"))
    views.evaluated(result, model, against) if not json else output.print_json(result.to_dict())
    if failed:
        raise typer.Exit(1)


@app.command(
    epilog=_examples("intscale bench", "intscale bench --shape 28672x4096 --shape 4096x14336 --tokens 1 --tokens 256")
)
def bench(
    shape: Shapes = None,
    tokens: Tokens = None,
    config: Config = None,
    device: Device = "auto",
    seconds: Annotated[float, typer.Option(min=0.01, help="For each product, on a CPU.")] = 1.0,
    json: Json = False,
) -> None:
    """Time our products against PyTorch's own on this machine: bf16 on a GPU, fp32 on a CPU."""
    commands = _library()
    shapes = [commands.bench.parse_shape(text) for text in shape or ()]
    chosen = commands.quantizing.make_config(commands.parse_fields(config or ()))
    where = commands.loading.usable_device(device)
    all_shapes, all_tokens = commands.bench.products(shapes, tokens or (), where.type == "cuda")
    rows = commands.bench_gemms(all_shapes, all_tokens, chosen, device=str(where), seconds=seconds)
    timings = list(views.with_bar(rows, len(all_shapes) * len(all_tokens), json))
    output.print_json([row.to_dict() for row in timings]) if json else views.timed(timings)


@app.command(
    epilog=_examples(
        "intscale tune",
        "intscale tune ./out",
        "intscale tune --shape 28672x4096 --seconds 300",
        "intscale tune --link --seconds 120",
        "intscale tune --link --device cpu --ranks 2 --wire int8",
    )
)
def tune(
    model: Annotated[Optional[str], typer.Argument(help="Quantized model whose shapes to tune.")] = None,
    shape: Shapes = None,
    tokens: Tokens = None,
    config: Config = None,
    link: Annotated[bool, typer.Option("--link", help="Time collectives instead: from which size on to quantize.")] = False,
    ranks: Annotated[Optional[int], typer.Option(min=1, help="With --link: processes to start; default: one a GPU.")] = None,
    device: Annotated[Optional[str], typer.Option(help="With --link: cuda (NCCL), or cpu (gloo).")] = None,
    wire: Annotated[Optional[list[str]], typer.Option(help="With --link: wire format; may be given again.")] = None,
    size: Annotated[Optional[list[int]], typer.Option("--bytes", help="With --link: size; may be given again.")] = None,
    op: Annotated[Optional[list[str]], typer.Option(help="With --link: collective; may be given again.")] = None,
    path: Annotated[Optional[Path], typer.Option(help="Table to write; default: the one that is read.")] = None,
    seconds: Annotated[Optional[float], typer.Option(min=1, help="Budget for all of it.")] = None,
    json: Json = False,
) -> None:  # fmt: skip
    """Find the fastest tiles of the kernels for this GPU, and keep them. Without arguments: shapes of Llama 3 8B.

    With --link: find from which size on quantized collectives pay between this machine's GPUs. It starts the ranks itself,
    or is one of those that torchrun starts: torchrun --nproc-per-node 8 --nnodes 2 ... -m intscale_cli tune --link
    """
    commands = _library()
    # Slow to import: commands that need it not begin at once.
    from intscale_compile.errors import ConfigError

    if link:
        if model is not None or shape or tokens or config:
            raise ConfigError(
                "--link measures collectives, not products: leave out the model, --shape, --tokens and -c."
            )
        _tune_link(device or "auto", ranks, {"wires": wire, "sizes": size, "ops": op}, path, seconds, json)
        return
    if ranks is not None or device is not None or wire or size or op:
        raise ConfigError("--ranks, --device, --wire, --bytes and --op belong to --link: give that too.")
    # Slow to import: commands that need it not begin at once.
    from intscale_compile.kernels.tile_timing import GpuBench
    from intscale_compile.tuning import TOKENS
    from intscale_compile.tuning import tune as tune_tiles

    if model is not None and (shape or config):
        raise ConfigError("give a model, or shapes with their config: leave one of them out.")
    shapes = [commands.bench.parse_shape(text) for text in shape or ()] or None
    chosen = commands.quantizing.make_config(commands.parse_fields(config or ()))
    GpuBench().close()  # no GPU: said before a model is loaded
    source = shapes if model is None else commands.load_model(model)[0]
    with contextlib.redirect_stdout(sys.stderr if json else sys.stdout):
        entries = tune_tiles(source, tokens or TOKENS, config=chosen, path=path, seconds=seconds)
    if json:
        output.print_json(entries)


def _tune_link(
    device: str, ranks: Optional[int], lists: dict[str, Any], path: Optional[Path], seconds: Optional[float], json: bool
) -> None:
    """``intscale tune --link``, as one of the ranks or as what starts them."""
    # Slow to import: commands that need it not begin at once.
    from intscale_compile.commands import link
    from intscale_compile.errors import ConfigError

    given = {name: values for name, values in lists.items() if values}
    if not link.is_rank():
        kind, count = link.usable_ranks(device, ranks)
        run = link.LinkRun(kind, path=path, seconds=seconds, **given)
        raise typer.Exit(link.launch(run, count, ["--json"] if json else []))
    if ranks is not None:
        raise ConfigError("--ranks: there is a process group, or torchrun has started the ranks already; leave it out.")
    run = link.LinkRun(link.rank_device(device), path=path, seconds=seconds, **given)
    with contextlib.redirect_stdout(sys.stderr if json else sys.stdout):
        found = link.tune_this_rank(run)
    if json and found is not None:
        output.print_json(found)


@app.command(epilog=_examples("intscale doctor", "intscale doctor --names", "intscale doctor --quick --json"))
def doctor(
    quick: Annotated[bool, typer.Option("--quick", help="Compile nothing.")] = False,
    names: Annotated[
        bool, typer.Option("--names", help="List every private name of other packages that is used.")
    ] = False,
    json: Json = False,
) -> None:
    """Look at versions, GPU, caches and a tiny layer; say what will run where, and what to mend. Exits with 1 if broken."""
    # Slow to import: commands that need it not begin at once.
    from .doctor import BROKEN, diagnose

    output.quiet()
    checks = list(views.shown(diagnose(compiled=not quick, names=names or json), json))
    if json:
        output.print_json({"ok": all(c.status != BROKEN for c in checks), "checks": [c.to_dict() for c in checks]})
    if any(check.status == BROKEN for check in checks):
        raise typer.Exit(1)


def _library() -> Any:
    """``intscale_compile.commands``, imported when a command needs it: that takes seconds."""
    output.quiet()
    # Slow to import: commands that need it not begin at once.
    import intscale_compile.commands

    return intscale_compile.commands
