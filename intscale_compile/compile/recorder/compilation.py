"""``last_compilation``: every graph that the backend compiled in this process, with the graph after each pass."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import torch

from ...errors import CompileError
from ...passes.base import GraphRewrite
from ...passes.collective_report import CollectiveReport
from ...passes.settings import Settings
from . import python_code
from .stages import InputRecord, Product, RecordedStage, StageRecorder, changed, differences

KEPT = 32  # graphs; one of a model with 32 layers is 4 MB of names and arguments
FINAL = "final"  # what Inductor gets: after dead nodes and replaced weights are gone


@dataclass(frozen=True)
class Stage:
    """The graph after one pass; ``"dynamo"`` is what came in, ``"final"`` what Inductor gets.

    Attributes:
        name: of the pass.
        count: how many places it changed (for ``match``: how many products can be quantized).
        changed: whether the graph is another than that of the stage before.
    """

    name: str
    count: int
    changed: bool
    _graph: int
    _recorded: RecordedStage
    _before: Optional[RecordedStage]
    _inputs: Mapping[str, InputRecord]

    @property
    def code(self) -> str:
        """A Python module that runs: ``forward``, ``example_inputs``, and a call."""
        at = {"dynamo": "as Dynamo traced it", FINAL: "as Inductor gets it"}.get(
            self.name, f"after the pass {self.name}"
        )
        title = f"Graph {self._graph} of this process, {at} (torch {torch.__version__})."
        return python_code.module_text(title, self._recorded.steps, self._inputs)

    @property
    def graph(self) -> torch.fx.Graph:
        """The graph itself, without metadata."""
        return python_code.rebuild(self._recorded.steps)

    @property
    def steps(self) -> tuple:
        """The nodes, as names and arguments."""
        return self._recorded.steps

    @property
    def products(self) -> Mapping[str, tuple[int, ...]]:
        """Nodes that compute products with weights, and which entries of ``Compilation.products`` each computes."""
        return self._recorded.products

    @property
    def new_names(self) -> set[str]:
        """Nodes that this pass wrote, or whose arguments it changed."""
        if self._before is None:
            return set()
        return {step.name for sign, step in differences(self._before, self._recorded) if sign == "+"}

    def meaning(self, name: str) -> str:
        """What an input takes: ``"argument of the model: x"``, the name of a weight, or a part of packed ones."""
        return self._inputs[name].meaning if name in self._inputs else ""

    def diff(self) -> str:
        """Lines that this pass removed (``-``) and wrote (``+``)."""
        if self._before is None:
            return ""
        found = list(differences(self._before, self._recorded))
        texts = {sign: python_code.statements([s for mark, s in found if mark == sign]) for sign in "-+"}
        return "\n".join(f"{sign} {texts[sign].get(step.name, step.name)}" for sign, step in found)

    def save(self, path: str | os.PathLike) -> None:
        """Write ``code`` into a file."""
        Path(path).write_text(self.code)

    def __str__(self) -> str:
        note = "" if self.changed or self.name == "dynamo" else ", graph unchanged"
        return f"{self.name}: {self.count} places, {len(self._recorded.steps)} nodes{note}"

    __repr__ = __str__


@dataclass(frozen=True)
class KernelSource:
    """A file of code that Inductor generated: the calls of a graph with the kernels, or one kernel."""

    path: str

    @property
    def code(self) -> str:
        """What is in the file.

        Raises:
            CompileError: it is gone: Inductor's cache was cleared.
        """
        try:
            return Path(self.path).read_text()
        except OSError as error:
            raise CompileError(f"{self.path} cannot be read any more ({error}): compile the model again.") from error


@dataclass(frozen=True)
class Compilation:
    """One graph that the backend ``"intscale"`` compiled. Holds names, no weights.

    Attributes:
        number: of the graph in this process, from 1, as in ``compile_times``.
        mode: of ``torch.compile``.
        options: the settings of intscale.
        inductor_options: what Inductor got.
        pass_counts, pass_seconds: by pass.
        products: the products with weights and what became of them.
        stages: the graph before the passes, after each, and as Inductor got it.
        collectives: what became of each collective, where quantized communication was asked for; None where Inductor had the
            graph in its cache, so that nothing is known.
        kernels: what Inductor generated; empty where it had the graph in memory already.
    """

    number: int
    mode: Optional[str]
    options: Settings
    inductor_options: Mapping[str, Any]
    pass_counts: Mapping[str, int]
    pass_seconds: Mapping[str, float]
    products: tuple[Product, ...]
    stages: tuple[Stage, ...]
    kernels: tuple[KernelSource, ...]
    collectives: Optional[tuple[CollectiveReport, ...]] = ()

    def stage(self, name: str) -> Stage:
        """The stage of that name.

        Raises:
            CompileError: there is none.
        """
        for stage in self.stages:
            if stage.name == name:
                return stage
        raise CompileError(f"graph {self.number} has no stage {name!r}: use one of {[s.name for s in self.stages]}.")

    def __str__(self) -> str:
        done = sum(p.reason is None for p in self.products)
        head = f"graph {self.number}: {done} of {len(self.products)} products with weights quantized"
        return "\n".join([head, *(f"  {stage}" for stage in self.stages), *self.collective_lines()])

    def collective_lines(self) -> list[str]:
        """A line for each collective, or one that says why nothing is known."""
        if self.collectives is None:
            count = self.pass_counts.get("quantize_collectives")
            known = "" if count is None else f"{count} quantized; "
            return [f"  collectives: {known}Inductor had the graph in its cache, explain(...) lists them"]
        return [f"  collective {one}" for one in self.collectives]

    __repr__ = __str__


_compilations: deque[Compilation] = deque(maxlen=KEPT)
_numbers = itertools.count(1)


def last_compilation() -> list[Compilation]:
    """One entry for every graph that the backend compiled in this process, in order; the last 32 are kept."""
    return list(_compilations)


@contextlib.contextmanager
def generated_files() -> Iterator[Callable[[], list[str]]]:
    """Gives a function that lists the files of the Python modules that Inductor loaded since."""
    # Slow to import.
    from torch._inductor.codecache import PyCodeCache

    loaded = len(PyCodeCache.modules)
    yield lambda: list(dict.fromkeys(str(module.__file__) for module in PyCodeCache.modules[loaded:]))


def remember(
    recorder: StageRecorder, rewrite: GraphRewrite, mode: Optional[str], patches: Mapping[str, Any], files: list[str]
) -> Compilation:
    """Keep what was recorded of one graph."""
    recorder.finish(rewrite)
    number = next(_numbers)
    stages = []
    for before, recorded in zip([None, *recorder.stages], recorder.stages):
        moved = before is not None and changed(before, recorded)
        stages.append(Stage(recorded.name, recorded.count, moved, number, recorded, before, recorder.inputs))
    compilation = Compilation(
        number, mode, rewrite.settings, dict(patches), dict(rewrite.counts), dict(rewrite.seconds),
        recorder.products, tuple(stages), tuple(map(KernelSource, files)), rewrite.collectives,
    )  # fmt: skip
    _compilations.append(compilation)
    return compilation
