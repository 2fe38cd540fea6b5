"""One rank of the tests on several GPUs: runs the checks named on the command line and saves what they return."""

from __future__ import annotations

import datetime
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.distributed as dist

from intscale_compile.communication import all_gather, all_reduce, reduce_scatter, symmetric, transport
from intscale_compile.communication.message import WireFormat
from intscale_compile.communication.reference import simulate_all_reduce, simulate_lossless_all_reduce
from tests.communication.inputs import contributions, same_bits

FORMS = [(wire, torch.bfloat16) for wire in ("int8", "int6", "int5", "int4", "int4-spikes")]
FORMS += [("int8", torch.float32), ("int4", torch.float32), ("int5", torch.float16)]


def exact(forms: str = "9", most: str = "20000001") -> dict[str, str]:
    """Fused kernel and process group against the one-process reference, bit for bit: where they differ."""
    wrong = {}
    rank, ranks = dist.get_rank(), dist.get_world_size()
    sizes = [n for n in (128, 1000, 4096 * ranks, 300_001, 5_000_000) if n <= int(most)]
    for wire, dtype in FORMS[: int(forms)]:
        several_rounds = [20_000_001] if wire in ("int8", "int4") and int(most) >= 20_000_001 else []
        for elements in sizes + several_rounds:
            inputs = [x.cuda() for x in contributions(elements, ranks, dtype, special=elements == 300_001)]
            wanted = simulate_all_reduce([x.cpu() for x in inputs], WireFormat.parse(wire))
            fused = symmetric.all_reduce(inputs[rank], WireFormat.parse(wire), dist.group.WORLD)
            case = f"{wire} {dtype} {elements}"
            if fused is None or not same_bits(fused.cpu(), wanted):
                wrong[f"fused {case}"] = "not used" if fused is None else "differs"
            if not same_bits(through_group(inputs[rank], wire).cpu(), wanted):
                wrong[f"group {case}"] = "differs"
    return wrong


def through_group(x: torch.Tensor, wire: str) -> torch.Tensor:
    """The all-reduce as it is without symmetric memory."""
    return transport.all_reduce(x, WireFormat.parse(wire), dist.group.WORLD)


def queued() -> list[str]:
    """Collectives of changing sizes and forms one behind the other, none of them waited for: which of them are wrong."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    symmetric.all_reduce(
        torch.zeros(1 << 21, dtype=torch.bfloat16, device="cuda"), WireFormat.parse("int8"), dist.group.WORLD
    )
    cases = [(wire, elements) for wire in ("int8", "int4", "int6") for elements in (1 << 14, 1 << 21, 3 << 16, 1 << 19)]
    inputs = {n: [x.cuda() for x in contributions(n, ranks, torch.bfloat16)] for _, n in cases}
    wanted = {(w, n): simulate_all_reduce([x.cpu() for x in inputs[n]], WireFormat.parse(w)) for w, n in cases}
    order = torch.randint(len(cases), (600,), generator=torch.Generator().manual_seed(0)).tolist()
    dist.barrier()
    torch.cuda.synchronize()
    found = []
    for place, i in enumerate(order):
        if place % 7 == rank:  # now one rank is late, now the other
            torch.cuda._sleep(100_000)
        wire, n = cases[i]
        found.append(symmetric.all_reduce(inputs[n][rank], WireFormat.parse(wire), dist.group.WORLD))
    return [
        f"{i}: {cases[c]}" for i, (c, out) in enumerate(zip(order, found)) if not same_bits(out.cpu(), wanted[cases[c]])
    ]


def captured() -> bool:
    """A captured graph replays the collective on new data."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    x = torch.empty(3 * 65536 + 40, dtype=torch.bfloat16, device="cuda").normal_()
    all_reduce(x, "int4"), through_group(x, "int4")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        first = all_reduce(x, "int4")
        second = all_reduce(first, "int8")
        third = through_group(x, "int4")
    good = True
    for seed in range(20):
        inputs = []
        for other in range(ranks):
            torch.cuda.manual_seed(100 * seed + other)
            inputs.append(torch.empty_like(x).normal_())
        x.copy_(inputs[rank])
        graph.replay()
        wanted = simulate_all_reduce(inputs, WireFormat.parse("int4"))
        again = simulate_all_reduce([wanted] * ranks, WireFormat.parse("int8"))
        good &= same_bits(first.cpu(), wanted.cpu()) and same_bits(second.cpu(), again.cpu())
        good &= same_bits(third.cpu(), wanted.cpu())
    return good


def lossless() -> dict[str, str]:
    """One-shot and two-shot against the reference, bit for bit: alone, queued with changing sizes, and in a graph on new data."""
    rank, ranks, group, wrong = dist.get_rank(), dist.get_world_size(), dist.group.WORLD, {}
    ways = {"one_shot": symmetric.one_shot, "two_shot": symmetric.two_shot}
    sizes = (2, 130, 1024, 12_290, 65_536, 300_002, 2_000_000)
    cases = [(dtype, n) for dtype in (torch.bfloat16, torch.float16) for n in sizes]
    inputs = {
        case: [x.cuda() for x in contributions(case[1], ranks, case[0], special=case[1] == 300_002)] for case in cases
    }
    wanted = {case: simulate_lossless_all_reduce([x.cpu() for x in given]) for case, given in inputs.items()}
    for case in cases:
        for name, way in ways.items():
            if not same_bits(way(inputs[case][rank], group).cpu(), wanted[case]):
                wrong[f"{name} {case}"] = "differs"
    order = torch.randint(len(cases) * 2, (500,), generator=torch.Generator().manual_seed(1)).tolist()
    dist.barrier()
    found = []
    for place, i in enumerate(order):
        if place % 7 == rank:  # now one rank is late, now the other
            torch.cuda._sleep(100_000)
        found.append(list(ways.values())[i % 2](inputs[cases[i // 2]][rank], group))
    for place, (i, out) in enumerate(zip(order, found)):
        if not same_bits(out.cpu(), wanted[cases[i // 2]]):
            wrong[f"queued {place} {i % 2} {cases[i // 2]}"] = "differs"
    x = torch.empty(12_290, dtype=torch.bfloat16, device="cuda")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outs = [symmetric.one_shot(x, group), symmetric.two_shot(x, group), symmetric.one_shot(x, group)]
    for seed in range(50):
        given = contributions(x.numel() + 2 * seed, ranks, torch.bfloat16)
        x.copy_(given[rank][: x.numel()])
        graph.replay()
        expected = simulate_lossless_all_reduce([one[: x.numel()] for one in given])
        if not all(same_bits(out.cpu(), expected) for out in outs):
            wrong[f"graph {seed}"] = "differs"
    return wrong


def others() -> dict[str, float]:
    """Relative errors of reduce-scatter and all-gather."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    inputs = [x.cuda().view(ranks * 8, -1) for x in contributions(ranks * 8 * 777, ranks, torch.bfloat16)]
    total = sum(x.double() for x in inputs)
    part, whole = reduce_scatter(inputs[rank], "int8"), all_gather(inputs[rank], "int8")
    wanted = {"reduce_scatter": (part, total.chunk(ranks)[rank]), "all_gather": (whole, torch.cat(inputs).double())}
    return {name: ((found - expected).norm() / expected.norm()).item() for name, (found, expected) in wanted.items()}


def compiled(wire: str = "int8") -> dict[str, object]:
    """A model with an all-reduce through the backend, in CUDA graphs."""
    import torch.distributed._functional_collectives as functional

    import intscale_compile  # noqa: F401

    torch.manual_seed(0)
    layer = torch.nn.Linear(1024, 1024, bias=False, device="cuda", dtype=torch.bfloat16).requires_grad_(False)

    def model(x):
        return functional.all_reduce(layer(x), "sum", dist.group.WORLD) * 2

    x = torch.randn(512, 1024, device="cuda", dtype=torch.bfloat16)
    options = {"intscale.communication": wire, "intscale.communication_min_bytes": 0, "triton.cudagraphs": True}
    plain = torch.compile(model, backend="intscale", options={"triton.cudagraphs": False}, fullgraph=True)(x)
    run = torch.compile(model, backend="intscale", options=options, fullgraph=True)
    for _ in range(4):
        found = run(x).clone()
    error = ((found - plain).float().norm() / plain.float().norm()).item()
    shared = [torch.empty_like(found) for _ in range(dist.get_world_size())]
    dist.all_gather(shared, found)
    forms = [one.decision for one in intscale_compile.debug.last_compilation()[-1].collectives or ()]
    return {"error": error, "forms": forms, "same": all(torch.equal(shared[0], other) for other in shared)}


def main() -> None:
    """``rank ranks folder check arguments...``"""
    rank, ranks, folder, name, *arguments = sys.argv[1:]
    store, result = f"{folder}/store", f"{folder}/result{rank}.pt"
    torch.cuda.set_device(int(rank))
    os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
    dist.init_process_group(
        "nccl", init_method=f"file://{store}", rank=int(rank), world_size=int(ranks), device_id=torch.device("cuda", int(rank)),
        timeout=datetime.timedelta(seconds=60),
    )  # fmt: skip
    start = time.monotonic()
    torch.save(globals()[name](*arguments), result)
    print(f"{name}: {time.monotonic() - start:.1f} s")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
