"""``generate`` of transformers on a CPU as a user calls it, several peers taking turns: first token, each further token, start.

    python benchmarks/cpu_generate.py                                   # tiny-llama, as the quickstart has it
    python benchmarks/cpu_generate.py --model FOLDER --points 1x32 1x512

Each peer has a process of its own with empty caches of compiled code, which makes one call (the start), then a second process
with those caches (the second start). The second processes stay, and take turns call by call; figures are medians over calls
and steps. A point is BATCHxPROMPT. fp32 and bf16 are set up as their users do, a static cache and a ``CompileConfig``, with
their prompts eager (as transformers has it) and compiled (``_prompt``: by the same code as ours).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from cpu import default_model
from reporting import number, table


class Peer(NamedTuple):
    """How a model is loaded, quantized and set up.

    Attributes:
        dtype: of what is not quantized.
        quantized: ``"ours"``, ``"ours_w8a8"`` (the output embedding too), ``"int4"``, ``"int8"`` (torchao's) or nothing.
        prompt: ``prompt`` of ``prepare_for_generation``; None: set up without it.
    """

    dtype: torch.dtype
    quantized: str = ""
    prompt: str | None = None


PEERS = {
    "fp32": Peer(torch.float32), "fp32_prompt": Peer(torch.float32, prompt="compiled"),
    "bf16": Peer(torch.bfloat16), "bf16_prompt": Peer(torch.bfloat16, prompt="compiled"),
    "int4": Peer(torch.float32, "int4"), "int8": Peer(torch.float32, "int8"),
    "int4_bf16": Peer(torch.bfloat16, "int4"), "int8_bf16": Peer(torch.bfloat16, "int8"),
    "ours": Peer(torch.float32, "ours", "auto"), "ours_bf16": Peer(torch.bfloat16, "ours", "auto"),
    "ours_w8a8": Peer(torch.float32, "ours_w8a8", "auto"), "ours_bf16_w8a8": Peer(torch.bfloat16, "ours_w8a8", "auto"),
    "ours_eager_prompt": Peer(torch.float32, "ours", "eager"), "ours_compiled": Peer(torch.float32, "ours", "compiled"),
    "ours_layers": Peer(torch.float32, "ours", "layers"), "ours_bf16_layers": Peer(torch.bfloat16, "ours", "layers"),
    "ours_bf16_compiled": Peer(torch.bfloat16, "ours", "compiled"),
}  # fmt: skip
DEFAULT_PEERS = ("fp32", "fp32_prompt", "bf16", "bf16_prompt", "int4", "ours", "ours_bf16")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="cpu_generate", description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=default_model(), help="folder of a causal language model")
    parser.add_argument("--peers", nargs="+", choices=sorted(PEERS), default=list(DEFAULT_PEERS), metavar="PEER")
    parser.add_argument("--points", nargs="+", default=["1x32", "1x256"])
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--caches", type=Path, help="folder of caches that are kept; peers that have some make no first call"
    )
    parser.add_argument("--json", type=Path, help="write everything measured to this file")
    return parser.parse_args(argv)


def prepared_model(peer: Peer, folder: Path) -> Any:
    """The model as the peer's user sets it up."""
    from transformers import AutoModelForCausalLM, CompileConfig

    import intscale_compile

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=peer.dtype).eval().requires_grad_(False)
    quantize(model, peer.quantized)
    model.generation_config.update(do_sample=False, pad_token_id=0, eos_token_id=None)
    backend = "intscale" if peer.quantized.startswith("ours") else "inductor"
    if peer.prompt is not None:
        print(intscale_compile.prepare_for_generation(model, backend=backend, prompt=peer.prompt), file=sys.stderr)
        return model
    config = CompileConfig(backend=backend, mode="default", dynamic=False)
    config._compile_all_devices = True
    model.generation_config.compile_config, model.generation_config.cache_implementation = config, "static"
    return model


def quantize(model: Any, how: str) -> None:
    """Quantize every linear layer; the peers of torchao leave the output embedding too, as ours does by default."""
    from torchao.quantization import (
        Int8DynamicActivationInt8WeightConfig,
        Int8DynamicActivationIntxWeightConfig,
        PerGroup,
        quantize_,
    )

    from intscale_compile import IntScaleConfig

    if how.startswith("ours"):
        quantize_(model, IntScaleConfig(output_embedding="w8a8" if how == "ours_w8a8" else None))
    elif how:
        output = model.get_output_embeddings()
        config = (
            Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int4, weight_granularity=PerGroup(32))
            if how == "int4"
            else Int8DynamicActivationInt8WeightConfig()
        )
        quantize_(model, config, filter_fn=lambda m, name: isinstance(m, torch.nn.Linear) and m is not output)


class Arrivals:
    """A stopping criterion that never stops: it notes when each token is there."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        """Note the time."""
        self.times.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


def call(model: Any, point: str, new_tokens: int) -> dict[str, Any]:
    """One call of ``generate`` on random tokens: seconds to the first token, between tokens, and altogether."""
    batch, tokens = map(int, point.split("x"))
    ids = torch.randint(1, model.config.vocab_size, (batch, tokens))
    arrivals = Arrivals()
    start = time.perf_counter()
    model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, min_new_tokens=new_tokens,
        stopping_criteria=[arrivals],
    )  # fmt: skip
    steps = [b - a for a, b in zip(arrivals.times, arrivals.times[1:])]
    return dict(first=arrivals.times[0] - start, steps=steps, total=time.perf_counter() - start)


def work(pipe: Any, name: str, folder: Path, caches: str, new_tokens: int) -> None:
    """The process of a peer: a call for each point that arrives, until None does."""
    os.environ.update(TORCHINDUCTOR_CACHE_DIR=caches, TRITON_CACHE_DIR=f"{caches}/triton")
    torch.manual_seed(0)
    model = None
    while (point := pipe.recv()) is not None:
        try:
            if model is None:
                model = prepared_model(PEERS[name], folder)
            pipe.send(call(model, point, new_tokens))
        except Exception as error:  # this peer cannot do it, others may
            pipe.send(dict(error=f"{type(error).__name__}: {error}"[:300]))


class Process:
    """A peer's process, at the other end of a pipe."""

    def __init__(self, name: str, args: argparse.Namespace, caches: str):
        context = multiprocessing.get_context("spawn")
        self.pipe, end = context.Pipe()
        self.process = context.Process(target=work, args=(end, name, args.model, caches, args.new_tokens), daemon=False)
        self.process.start()

    def call(self, point: str) -> dict[str, Any]:
        """One call of ``generate``."""
        self.pipe.send(point)
        return self.pipe.recv()

    def end(self) -> None:
        """End the process."""
        self.pipe.send(None)
        self.process.join()


def measure(args: argparse.Namespace, folder: str) -> dict[str, dict[str, Any]]:
    """Everything of every peer, by peer and point."""
    found: dict[str, dict[str, Any]] = {name: {} for name in args.peers}
    processes = {}
    for name in args.peers:
        caches, start = f"{folder}/{name}", {}
        if not Path(caches).is_dir():
            first = Process(name, args, caches)
            start = first.call(args.points[0])
            first.end()
        processes[name] = Process(name, args, caches)
        second = processes[name].call(args.points[0])
        error = start.get("error") or second.get("error")
        found[name] = dict(start_s=start.get("total"), second_start_s=second.get("total"), error=error)
        print(json.dumps({name: found[name]}), file=sys.stderr)
        found[name] |= {point: dict(first=[], steps=[]) for point in args.points}
    able = [name for name in args.peers if found[name]["error"] is None]
    for point in args.points:
        for name in able:
            processes[name].call(point)  # compiles, for another length of the cache
        for _ in range(args.rounds):
            for name in able:
                result = processes[name].call(point)
                found[name][point]["first"].append(result["first"])
                found[name][point]["steps"] += result["steps"]
    for process in processes.values():
        process.end()
    return found


def report(found: dict[str, dict[str, Any]], points: list[str]) -> str:
    """A row for each peer: medians in milliseconds, starts in seconds."""
    header = ["peer"]
    for point in points:
        header += [f"first token, {point}, ms", f"a token, {point}, ms"]
    rows = []
    for name, peer in found.items():
        if peer["error"] is not None:
            rows.append([name, peer["error"]])
            continue
        cells = [1e3 * statistics.median(peer[point][what]) for point in points for what in ("first", "steps")]
        starts = (peer["start_s"], peer["second_start_s"])
        rows.append([name, *(f"{cell:.1f}" for cell in cells), *(number(seconds) for seconds in starts)])
    return table([*header, "first call, s", "in the next process, s"], rows)


def main(argv: list[str] | None = None) -> int:
    """Measure, print, write; 1 if a peer failed."""
    args = parse(argv)
    with tempfile.TemporaryDirectory() as folder:
        found = measure(args, folder if args.caches is None else str(args.caches.resolve()))
    facts = dict(
        machine=platform.processor() or platform.machine(), threads=torch.get_num_threads(), torch=torch.__version__
    )
    print(f"{args.model.name}, {facts['machine']}, {facts['threads']} threads, torch {facts['torch']}\n")
    print(report(found, args.points))
    if args.json:
        args.json.write_text(json.dumps(dict(environment=facts, model=args.model.name, results=found), indent=1))
    return int(any(peer["error"] is not None for peer in found.values()))


if __name__ == "__main__":
    sys.exit(main())
