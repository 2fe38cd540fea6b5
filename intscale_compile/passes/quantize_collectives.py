"""Quantize collectives: sums and gathers of activations travel as low-bit messages (Flash Communication, arXiv 2412.04964).

    wait_tensor(_c10d_functional.all_reduce(x, "sum", group))       =>  intscale.quantized_all_reduce(x, wire, group)
    wait_tensor(_c10d_functional.reduce_scatter_tensor(x, "sum", ranks, group))  =>  intscale.quantized_reduce_scatter(...)
    wait_tensor(_c10d_functional.all_gather_into_tensor(x, ranks, group))        =>  intscale.quantized_all_gather(...)
    with "auto": wait_tensor(_c10d_functional.all_reduce(x, "sum", group))       =>  intscale.planned_all_reduce(x, plan, group)

A pass over Inductor's post-grad graph, where the collectives of DTensor, functional ones and raw in-place ones all have this
form; off unless the option ``intscale.communication`` asks for it. Coalesced collectives become one op for each tensor, all
or none of them. Where the size of a message is symbolic, the op that is emitted decides at each call (``by_size``).

An all-gather is quantized only where a matrix product reads its result and it does not gather an input of the graph: what is
left out are logits and results of the model, indices, and sharded weights, whose error would not pass through a quantized
product anyway. Graphs of gradients stay as they are.
"""

from __future__ import annotations

import hashlib
import logging
import operator
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import torch
import torch.distributed as dist
from torch import Tensor, fx
from torch._inductor.custom_graph_pass import CustomGraphPass

from ..communication import by_size, link_cost, ops
from ..communication.choice import Allowed, Plan, plan
from ..communication.link_table import LOSSLESS, PLAIN, Link, Times, link_of, times_of
from ..communication.message import WireFormat
from ..communication.planned import PLANNED_ALL_REDUCE
from ..communication.symmetric import LOSSLESS_DTYPES
from ..kernels.abi import KERNEL_ABI
from ..reasons import Reason, log_once
from .base import module_path
from .collective_flow import gathers_input, is_backward, reaches_product
from .collective_report import CollectiveReport

NAME = "quantize_collectives"
C10D = torch.ops._c10d_functional
WAIT = C10D.wait_tensor.default
# From torch 2.15 on, coalesced collectives are waited for together: wait_tensors([a, b]) and its items.
WAIT_ALL = C10D.wait_tensors.default if hasattr(C10D, "wait_tensors") else None
KINDS: dict[Any, str] = {
    C10D.all_reduce.default: "all_reduce",
    C10D.all_reduce_coalesced.default: "all_reduce",
    C10D.reduce_scatter_tensor.default: "reduce_scatter",
    C10D.reduce_scatter_tensor_coalesced.default: "reduce_scatter",
    C10D.all_gather_into_tensor.default: "all_gather",
    C10D.all_gather_into_tensor_coalesced.default: "all_gather",
}
QUANTIZED = {"all_reduce": ops.ALL_REDUCE_OP, "reduce_scatter": ops.REDUCE_SCATTER_OP, "all_gather": ops.ALL_GATHER_OP}
BY_SIZE = {
    "all_reduce": by_size.ALL_REDUCE_BY_SIZE,
    "reduce_scatter": by_size.REDUCE_SCATTER_BY_SIZE,
    "all_gather": by_size.ALL_GATHER_BY_SIZE,
}
REPORT = "intscale_collective"  # meta of a new node: the name of its report
KEPT = ("val", "tensor_meta", "stack_trace", "nn_module_stack", "source_fn_stack")  # meta of a replaced node


@dataclass(frozen=True)
class Member:
    """One tensor of a collective: its node, the results that a coalesced collective hands out, and those waited for."""

    x: fx.Node
    handles: tuple[fx.Node, ...]
    waits: tuple[fx.Node, ...]
    is_waited: bool  # and nothing else reads the result


class QuantizeCollectives(CustomGraphPass):
    """The pass, for one compilation.

    Args:
        wire: the wire format, or what else ``communication.choice.Allowed`` parses.
        min_bytes: threshold for all collectives; None: that of each link (``link_cost``).
        disabled: whether it only reports.
        graphs: whether the compilation is for CUDA graphs.

    Attributes:
        name: of the pass.
        reports: what became of each collective, filled when the pass runs.
        ran: whether it ran; it does not where Inductor finds the graph in its cache.
        seconds: how long it took.

    Raises:
        ConfigError: the table of a link is malformed.
    """

    name = NAME

    def __init__(self, wire: str, min_bytes: Optional[int] = None, disabled: bool = False, graphs: bool = True):
        self.allowed, self.min_bytes, self.disabled, self.graphs = Allowed.parse(wire), min_bytes, disabled, graphs
        self.form = WireFormat.parse(self.allowed.wire) if self.allowed.wire else None
        self.wire = str(self.allowed)
        self.links = _links()
        self.reports: list[CollectiveReport] = []
        self.ran, self.seconds = False, 0.0

    def uuid(self) -> str:
        """Everything that the result depends on: our sources, the options, sizes of the groups and tables of their links."""
        known = (
            KERNEL_ABI,
            self.wire,
            self.min_bytes,
            self.disabled,
            self.graphs,
            sorted(self.links.items()),
        )
        return "intscale.quantize_collectives." + hashlib.sha256(repr(known).encode()).hexdigest()

    def __call__(self, graph: fx.Graph) -> None:
        """Replace what can be replaced and report on all of it."""
        start = time.perf_counter()
        self.ran = True
        found = [node for node in graph.nodes if node.target in KINDS]
        backward = bool(found) and is_backward(graph)
        reports = [report for node in found for report in self._collective(graph, node, backward)]
        self.reports += reports
        self.seconds += time.perf_counter() - start
        _log(reports)

    @property
    def count(self) -> int:
        """How many collectives are quantized."""
        return sum(report.quantized for report in self.reports)

    @staticmethod
    def calls_in(files: Sequence[str]) -> int:
        """How many quantized collectives the code calls that Inductor generated."""
        names = [str(op) for op in (*QUANTIZED.values(), *BY_SIZE.values(), PLANNED_ALL_REDUCE)]
        texts = [Path(file).read_text(encoding="utf-8") for file in files]
        return sum(text.count(f"torch.ops.{name}(") for text in texts for name in names)

    def _collective(self, graph: fx.Graph, node: fx.Node, backward: bool) -> list[CollectiveReport]:
        members = list(_members(node))
        reports = [self._decide(node, member, backward) for member in members]
        refused = next((report for report in reports if not report.quantized), None)
        if refused is not None:
            reports = [
                r if not r.quantized else _with(r, reason=refused.reason, explanation=refused.explanation)
                for r in reports
            ]
            return reports
        if _split_waits(graph, members):
            members = list(_members(node))
        for member, report in zip(members, reports):
            self._replace(graph, node, member, report)
        graph.erase_node(node)
        return reports

    def _decide(self, node: fx.Node, member: Member, backward: bool) -> CollectiveReport:
        kind, x = KINDS[node.target], member.x.meta["val"]
        group = _arguments(node)["group_name"]
        ranks, link, times = self._group(group, x.device.type)
        numel = x.numel() * ((ranks or 1) if kind == "all_gather" else 1)
        nbytes = numel * x.element_size()
        report = CollectiveReport(
            _name(node), kind, str(group), ranks, _shape(x, kind, ranks), str(x.dtype).removeprefix("torch."),
            nbytes if isinstance(nbytes, int) else None, self.allowed.wire or self.wire,
            link="" if link is None else str(link),
        )  # fmt: skip
        reason = self._refusal(node, member, x, ranks, backward)
        if reason is None and link is not None and self.allowed.lossless and kind == "all_reduce":
            report = self._with_plan(report, x, link, times)
            reason = Reason.COLLECTIVE_PLAIN if report.wire == PLAIN else None
        elif reason is None and link is not None:
            report = self._with_threshold(report, link, times)
            least, size = int(report.threshold or 0), report.nbytes
            if least == link_cost.NEVER or (size is not None and size < least):
                reason = Reason.COLLECTIVE_BELOW_THRESHOLD
        return report if reason is None else _with(report, reason=reason.name, explanation=reason.value)

    def _group(self, name: Any, device: str) -> tuple[Optional[int], Optional[Link], Times]:
        known = self.links.get(name, {}) if isinstance(name, str) else {}
        if device not in known:
            return None, None, {}
        link, times = known[device]
        return link.ranks, link, times

    def _refusal(
        self, node: fx.Node, member: Member, x: Tensor, ranks: Optional[int], backward: bool
    ) -> Optional[Reason]:
        """Why a collective stays plain whatever its size."""
        gathers = KINDS[node.target] == "all_gather"
        scatters = KINDS[node.target] == "reduce_scatter"
        planned = self.allowed.lossless and not gathers and not scatters
        elements = x.numel() // (ranks or 1) if scatters else x.numel()  # of the message that the op would quantize
        checks = (
            (self.disabled, Reason.PASS_DISABLED),
            (ranks is None, Reason.COLLECTIVE_GROUP),
            (backward, Reason.COLLECTIVE_BACKWARD),
            (not member.is_waited, Reason.COLLECTIVE_FORM),
            (_arguments(node).get("reduce_op", "sum") != "sum", Reason.COLLECTIVE_REDUCE_OP),
            (x.dtype not in ops.FLOAT_DTYPES, Reason.COLLECTIVE_DTYPE),
            (ranks == 1, Reason.COLLECTIVE_ONE_RANK),
            (self.form is None and not planned, Reason.COLLECTIVE_NO_LOSSLESS_FORM),
            (gathers and gathers_input(member.x), Reason.COLLECTIVE_GATHERS_INPUT),
            (gathers and not reaches_product(member.waits), Reason.COLLECTIVE_NOT_MULTIPLIED),
            (
                self.form is not None and not planned and isinstance(elements, int) and elements < self.form.group_size,
                Reason.COLLECTIVE_TOO_SMALL,
            ),
        )
        return next((reason for refused, reason in checks if refused), None)

    def _with_plan(self, report: CollectiveReport, x: Tensor, link: Link, times: Times) -> CollectiveReport:
        """The form of an all-reduce, or all forms that its size will choose from."""
        allowed = Allowed(x.dtype in LOSSLESS_DTYPES and x.device.type != "cpu", self.allowed.wire)
        found = plan(link, times, allowed, self.graphs, self.min_bytes)
        if report.nbytes is None:
            form = found.forms[0] if len(found.forms) == 1 else self.wire
            return _with(report, wire=form, plan=str(found), threshold=0, threshold_source=found.source)
        form = found.form(report.nbytes)
        if form not in (PLAIN, *LOSSLESS) and x.numel() < WireFormat.parse(form).group_size:
            form = PLAIN
        least = max(n for n, _ in found.steps if n <= report.nbytes)
        gain = None if form == PLAIN else link_cost.predicted_gain(link, times, report.kind, form, report.nbytes)
        return _with(
            report, wire=form, plan=str(Plan(((0, form),))), threshold=least, threshold_source=found.source, predicted_gain=gain,
        )  # fmt: skip

    def _with_threshold(self, report: CollectiveReport, link: Link, times: Times) -> CollectiveReport:
        if self.min_bytes is not None:
            least = link_cost.Threshold(self.min_bytes, "option")
        else:
            least = link_cost.threshold(link, times, report.kind, report.wire, self.graphs)
        gain = None
        if report.nbytes:
            gain = link_cost.predicted_gain(link, times, report.kind, report.wire, report.nbytes)
        return _with(report, threshold=least.nbytes, threshold_source=least.source, predicted_gain=gain)

    def _replace(self, graph: fx.Graph, node: fx.Node, member: Member, report: CollectiveReport) -> None:
        ranks: tuple = () if report.kind == "all_reduce" else (report.ranks,)
        chosen: list[Any]
        if report.plan:
            target, chosen = PLANNED_ALL_REDUCE, [report.plan]
        elif report.nbytes is None:
            target, chosen = BY_SIZE[report.kind], [report.wire, report.threshold]
        else:
            target, chosen = QUANTIZED[report.kind], [report.wire]
        with graph.inserting_before(node):
            new = graph.call_function(target, (member.x, *chosen, *ranks, report.group))
        kept = member.waits[0].meta
        new.meta.update({key: kept[key] for key in KEPT if key in kept} | {REPORT: report.name})
        for wait in member.waits:
            wait.replace_all_uses_with(new)
            graph.erase_node(wait)
        for again in [user for user in new.users if user.target is WAIT]:  # functional collectives may wait twice
            again.replace_all_uses_with(new)
            graph.erase_node(again)
        for handle in member.handles:
            graph.erase_node(handle)


def _links() -> dict[str, dict[str, tuple[Link, Times]]]:
    """Link and measured times of every process group of this process, by name and type of device."""
    if not dist.is_available() or not dist.is_initialized():
        return {}
    devices = [torch.device("cpu")]
    if torch.cuda.is_available():
        devices.append(torch.device("cuda", torch.cuda.current_device()))
    known: dict[str, dict[str, tuple[Link, Times]]] = {}
    for group, name in dist.distributed_c10d._world.pg_names.items():
        links = {device.type: link_of(group, device) for device in devices}
        known[name] = {device: (link, times_of(link)) for device, link in links.items()}
    return known


def _members(node: fx.Node) -> Iterator[Member]:
    source = node.args[0]
    if isinstance(source, fx.Node):
        yield _member(source, (node,), ())
        return
    for i, x in enumerate(source):  # type: ignore[arg-type, union-attr]
        handles = tuple(u for u in node.users if u.target is operator.getitem and u.args[1] == i)
        yield _member(x, handles, handles)  # type: ignore[arg-type]


def _member(x: fx.Node, results: Sequence[fx.Node], handles: tuple[fx.Node, ...]) -> Member:
    waits: list[fx.Node] = []
    is_waited = True
    for result in results:
        for user in result.users:
            if user.target is WAIT:
                waits.append(user)
            elif WAIT_ALL is not None and user.target is WAIT_ALL:
                items = [item for item in user.users if item.target is operator.getitem]
                waits += [item for item in items if user.args[0][item.args[1]] is result]  # type: ignore[index]
                is_waited = is_waited and len(items) == len(user.users)
            else:
                is_waited = False
    return Member(x, handles, tuple(waits), is_waited and bool(waits))


def _split_waits(graph: fx.Graph, members: Sequence[Member]) -> bool:
    """Wait for each tensor alone where ``members`` are waited for together; returns whether there was such a wait."""
    waits = [wait for member in members for wait in member.waits]
    together = dict.fromkeys(wait.args[0] for wait in waits if wait.target is operator.getitem)
    for node in together:
        for item in list(node.users):  # type: ignore[union-attr]
            with graph.inserting_before(item):
                alone = graph.call_function(WAIT, (node.args[0][item.args[1]],))  # type: ignore[index, union-attr, arg-type]
            alone.meta.update(item.meta)
            item.replace_all_uses_with(alone)
            graph.erase_node(item)
        graph.erase_node(node)  # type: ignore[arg-type]
    return bool(together)


def _arguments(node: fx.Node) -> dict[str, Any]:
    """Arguments of a node by the names of its schema."""
    names = (argument.name for argument in node.target._schema.arguments)  # type: ignore[union-attr]
    return {**dict(zip(names, node.args)), **node.kwargs}


def _shape(x: Tensor, kind: str, ranks: Optional[int]) -> str:
    sizes = list(x.shape)
    if kind == "all_gather" and ranks is not None:
        sizes = [sizes[0] * ranks, *sizes[1:]] if sizes else [ranks]
    return str(sizes)


def _name(node: fx.Node) -> str:
    module = module_path(node)
    return f"{module}.{node.name}" if module else node.name


def _with(report: CollectiveReport, **changes: Any) -> CollectiveReport:
    return CollectiveReport(**{**vars(report), **changes})


def _log(reports: Sequence[CollectiveReport]) -> None:
    for report in reports:
        if not report.quantized:
            log_once(logging.INFO, f"{report.kind} of {report.dtype}: {report.reason}: {report.explanation}")


def chained(ours: CustomGraphPass, users: Any) -> Any:
    """A value for Inductor's ``post_grad_custom_pre_pass`` that runs the user's passes, if there are any, and then ours."""
    if not users:
        return ours
    if isinstance(users, (list, tuple)):  # torch 2.13
        return (*users, ours)
    return Chain(users, ours)


class Chain(CustomGraphPass):
    """A pass of the user and ours after it, for a torch that takes one pass. Graphs are cached if both can be."""

    def __init__(self, first: Any, second: CustomGraphPass):
        self.first, self.second = first, second

    def uuid(self) -> Optional[Any]:
        """Those of both; None, so that nothing is cached, where the first has none."""
        first = self.first.uuid() if isinstance(self.first, CustomGraphPass) else None
        return None if first is None else (first, self.second.uuid())

    def __call__(self, graph: fx.Graph) -> None:
        """Run both."""
        self.first(graph)
        self.second(graph)
