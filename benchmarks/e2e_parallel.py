"""Time to first token, or of a decoded token, of a model that is sharded over several ranks, with different collectives.

    python benchmarks/e2e_parallel.py                                        # Llama-3-8B shapes, 4 layers, 2 GPUs over NVLink
    python benchmarks/e2e_parallel.py --link host --prompts 2048 8192 --json OUT.json
    python benchmarks/e2e_parallel.py --ranks 4 --bf16 --decode 1 16 64 --context 2048 --wires auto int8
    sudo python benchmarks/slow_link.py -- benchmarks/e2e_parallel.py --model narrow --layers 2 \\
        --group-size 64 --batch 32 --prompts 128 --wires int8 int4

Random weights; transformers' own model code and tensor-parallel plan, sharded by ``intscale_compile.tensor_parallel``. All
peers but "bf16" are one W4A8 model compiled with different ``intscale.communication``. A time begins when all ranks are ready
and ends when the slowest has read its first token; peers take turns, medians. With ``--decode`` the time is that of one token for
each sequence, steps queued behind each other, of the slowest rank. Starts its ranks itself unless it is one.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from e2e_parts.models import ATTENTION, CONFIGS, build
from e2e_parts.sharded_decode import ROUNDS, decoding, seconds_of_a_step
from ranks import LINKS, agreed, check_ranks_and_wires, is_rank, join, largest, launch, link_name
from reporting import table as markdown
from timing import environment, release

import intscale_compile
from intscale_compile import tensor_parallel

BF16, W4A8 = "bf16", "w4a8"
WIRES = ("int8", "int6", "int4")
SECONDS = {"cuda": 1.0, "cpu": 20.0}  # of each peer at each prompt length
LEAST, MOST = 5, 30


@dataclass
class Run:
    """What was measured: milliseconds and the difference of the logits to those with bf16 collectives.

    ``prompt`` of a point is the number of tokens of a prompt, or of sequences that are decoded.
    """

    environment: dict[str, Any]
    title: str
    points: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    decode: bool = False

    def point(self, prompt: int, peer: str) -> dict[str, Any] | None:
        """One peer at one prompt length."""
        return next((p for p in self.points if p["prompt"] == prompt and p["peer"] == peer), None)

    def table(self) -> str:
        """Markdown: a row for each prompt length."""
        peers = list(dict.fromkeys(p["peer"] for p in self.points))
        first = "sequences" if self.decode else "tokens of each prompt"
        header, rows = [first, *(peer.replace(W4A8, "W4A8", 1) for peer in peers)], []
        for prompt in dict.fromkeys(p["prompt"] for p in self.points):
            rows.append([str(prompt), *(self._cell(prompt, peer) for peer in peers)])
        legend = (
            f"Milliseconds {'of a decoded token' if self.decode else 'to the first token'} (times W4A8 with bf16 collectives), "
            "norm of the difference of the logits to that model's, over their norm."
        )
        return "\n".join([self.title, "", markdown(header, rows), "", legend, *(f"- {note}" for note in self.notes)])

    def _cell(self, prompt: int, peer: str) -> str:
        point, base = self.point(prompt, peer), self.point(prompt, W4A8)
        if point is None or base is None:
            return "-"
        if peer == W4A8:
            return f"{point['ms']:.2f}"
        return f"{point['ms']:.2f} (**{base['ms'] / point['ms']:.2f}x**), {point['difference']:.2%}"


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(prog="e2e_parallel", description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--backend", choices=("nccl", "gloo"), default="nccl" if on_gpu else "gloo")
    parser.add_argument("--link", choices=sorted(LINKS), default="nvlink", help="that NCCL is held to")
    parser.add_argument("--model", choices=sorted(CONFIGS), default="llama-3-8b")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--batch", type=int, default=1, help="prompts at once")
    parser.add_argument("--prompts", type=int, nargs="+", default=[2048, 8192], metavar="TOKENS")
    parser.add_argument(
        "--decode", type=int, nargs="+", metavar="BATCH", help="decode so many sequences at once, in place of --prompts"
    )
    parser.add_argument("--context", type=int, default=2048, metavar="TOKENS", help="in the cache of --decode")
    parser.add_argument("--wires", nargs="+", default=list(WIRES), metavar="FORMAT", help="as int8, auto or auto+int8")
    parser.add_argument("--group-size", type=int, default=128, help="of the weights")
    parser.add_argument("--bf16", action="store_true", help="measure the model that is not quantized, too")
    parser.add_argument("--min-bytes", type=int, default=0, help="intscale.communication_min_bytes; -1: the link's own")
    parser.add_argument("--no-cuda-graphs", action="store_true")
    parser.add_argument("--seconds", type=float, default=540.0, help="after which the ranks are killed")
    parser.add_argument("--json", type=Path, help="write everything measured to this file")
    args = parser.parse_args(argv)
    check_ranks_and_wires(parser, args, auto=True)
    return args


def sharded(args: argparse.Namespace, device: torch.device, quantized: bool) -> torch.nn.Module:
    """The model of this rank."""
    from torchao.quantization import quantize_

    def quantize(module: torch.nn.Module) -> None:
        config = intscale_compile.IntScaleConfig(args.group_size)
        quantize_(module, config, filter_fn=intscale_compile.linears_and_experts)

    model = build(args.model, args.layers, ATTENTION, str(device), quantize if quantized else None)
    return tensor_parallel.parallelize(model)


def options(args: argparse.Namespace, peer: str, device: torch.device, graphs: bool) -> dict[str, Any]:
    """Of ``torch.compile``."""
    found: dict[str, Any] = {"triton.cudagraphs": graphs} if device.type == "cuda" else {}
    if peer.startswith(W4A8 + " "):
        found["intscale.communication"] = peer.removeprefix(W4A8 + " ")
        if args.min_bytes >= 0 and not found["intscale.communication"].startswith("auto"):
            found["intscale.communication_min_bytes"] = args.min_bytes
    return found


class Bench:
    """The models of this rank, and times of them."""

    def __init__(self, args: argparse.Namespace, device: torch.device):
        self.args, self.device = args, device
        self.models = {W4A8: sharded(args, device, True)}
        if args.bf16:
            self.models[BF16] = sharded(args, device, False)
        self.peers = [*([BF16] if args.bf16 else []), W4A8, *(f"{W4A8} {wire}" for wire in args.wires)]
        self.graphs = device.type == "cuda" and not args.no_cuda_graphs
        self.notes: list[str] = []

    def steps(self, forward: Callable[[str], Callable[[], torch.Tensor]]) -> dict[str, Callable[[], torch.Tensor]]:
        """For each peer a function that gives the logits of the last tokens; compiled and warm, all in CUDA graphs or none."""
        found = {}
        for peer in self.peers:
            found[peer] = forward(peer)
            problem = ""
            try:
                for _ in range(3):
                    found[peer]()
            except Exception as error:
                if not self.graphs:
                    raise
                problem = f"{type(error).__name__}: {error}".splitlines()[0]
            if not agreed(not problem, self.device):
                self.notes.append(f"without CUDA graphs, since {peer} did not run in them: {problem or 'another rank'}")
                self.graphs = False
                torch._dynamo.reset()
                return self.steps(forward)
        return found

    def _compiled(self, peer: str) -> Callable:
        model = self.models[BF16 if peer == BF16 else W4A8]
        backend = "inductor" if peer == BF16 else "intscale"
        chosen = options(self.args, peer, self.device, self.graphs)
        return torch.compile(model, backend=backend, options=chosen, dynamic=False)

    def measure_decoding(self, batch: int) -> list[dict[str, Any]]:
        """All peers at one number of sequences; the same on every rank."""
        kinds = {kind: decoding(model, batch, self.args.context, self.device) for kind, model in self.models.items()}

        def forward(peer: str) -> Callable[[], torch.Tensor]:
            compiled, (step, _) = self._compiled(peer), kinds[BF16 if peer == BF16 else W4A8]
            return lambda: step(compiled)

        steps = self.steps(forward)
        rewinds = {peer: kinds[BF16 if peer == BF16 else W4A8][1] for peer in steps}
        logits = {}
        for peer, run in steps.items():
            rewinds[peer]()
            logits[peer] = run().float().clone()
        times: dict[str, list[float]] = {peer: [] for peer in steps}
        for _ in range(ROUNDS):
            for peer, run in steps.items():
                times[peer].append(seconds_of_a_step(run, rewinds[peer], self.device))
        return self._points(batch, times, logits)

    def measure(self, prompt: int) -> list[dict[str, Any]]:
        """All peers at one prompt length; the same on every rank."""
        generator = torch.Generator().manual_seed(prompt)
        vocabulary = CONFIGS[self.args.model]["vocab_size"]
        prompts = torch.randint(0, vocabulary, (self.args.batch, prompt), generator=generator).to(self.device)

        def forward(peer: str) -> Callable[[], torch.Tensor]:
            compiled = self._compiled(peer)
            return lambda: compiled(prompts, use_cache=False, logits_to_keep=1).logits

        steps = self.steps(forward)
        logits = {peer: run().float().clone() for peer, run in steps.items()}
        times: dict[str, list[float]] = {peer: [] for peer in steps}
        once = {peer: largest(self.first_token(run), self.device) for peer, run in steps.items()}
        turns = {peer: max(LEAST, min(MOST, int(SECONDS[self.device.type] / s))) for peer, s in once.items()}
        for turn in range(max(turns.values())):
            for peer, run in steps.items():
                if turn < turns[peer]:
                    times[peer].append(self.first_token(run))
        return self._points(prompt, times, logits)

    def _points(
        self, prompt: int, times: dict[str, list[float]], logits: dict[str, torch.Tensor]
    ) -> list[dict[str, Any]]:
        points = []
        for peer, seconds in times.items():
            difference = float((logits[peer] - logits[W4A8]).norm() / logits[W4A8].norm())
            if peer not in (BF16, W4A8) and "auto" not in peer and not difference:
                self.notes.append(f"{peer}, prompts of {prompt}: no collective was quantized")
            every: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(every, seconds)
            slowest = max(every, key=statistics.median)
            ms = statistics.median(slowest) * 1e3
            points.append(dict(prompt=prompt, peer=peer, ms=ms, difference=difference, samples_s=slowest))
        torch._dynamo.reset()
        return points

    def first_token(self, run: Callable[[], torch.Tensor]) -> float:
        """Seconds from when all ranks are ready until this one has its first tokens."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        dist.barrier()
        start = time.perf_counter()
        run()[:, -1].argmax(-1).tolist()
        return time.perf_counter() - start


def rank_main(args: argparse.Namespace) -> int:
    """What one rank does."""
    device = join(args.backend, args.link)
    first = dist.get_rank() == 0
    torch._dynamo.config.recompile_limit = 64
    try:
        with torch.no_grad():
            bench = Bench(args, device)
            facts, link = environment(), link_name(args.backend, args.link)
            what = f"{args.context} tokens in the cache" if args.decode else f"{args.batch} prompts at once"
            title = (
                f"{args.model}, {args.layers} layers, {what}, {dist.get_world_size()} ranks, "
                f"{args.backend}, {link}, {facts['device']}; torch {torch.__version__}, {str(facts['date'])[:10]}"
            )
            run = Run(facts, title, notes=bench.notes, decode=bool(args.decode))
            for size in args.decode or args.prompts:
                run.points += bench.measure_decoding(size) if args.decode else bench.measure(size)
                release()
                if first and args.json:
                    args.json.write_text(json.dumps(dataclasses.asdict(run), indent=1) + "\n", encoding="utf-8")
        if first:
            print(run.table())
        return 0
    finally:
        dist.destroy_process_group()


def main(argv: list[str] | None = None) -> int:
    """Start the ranks, or be one."""
    args = parse(argv)
    if args.backend == "nccl" and torch.cuda.device_count() < args.ranks:
        raise SystemExit(
            f"e2e_parallel: {args.ranks} ranks need as many GPUs; --backend gloo --model tiny runs on CPUs"
        )
    return rank_main(args) if is_rank() else launch(args.ranks, args.seconds)


if __name__ == "__main__":
    sys.exit(main())
