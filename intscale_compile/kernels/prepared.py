"""Launches that are prepared once and started many times: the lean path of eager calls on a GPU.

The first call with operands of some form (shapes, strides, dtypes, alignment, numbers) runs the ordinary launchers under
:func:`~.launching.recorded`: nothing starts, but kernels, grids and arguments are recorded. What Triton compiles for them and
every parameter but the addresses is kept, under a key that holds all of the form. A later call allocates the results, looks
up the addresses of its operands and starts the kernels. No address is ever kept, so that nothing can be stale: a weight may be
written in place, or have its parts exchanged. A call that does anything beside allocating and launching is not prepared.

Counters of split-K are taken anew at each call, as everywhere. Sequences belong to one device; any thread and any stream may
start them, and a CUDA graph may capture them.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Optional, Union

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ..integrations.torch_state import current_device, raw_stream
from . import c_launcher
from .c_launcher import CannotPrepare, LaunchList
from .kernel_parameters import UNSIGNED_TYPES, Parameters, parameters_of
from .launching import GPU_IMPLEMENTATIONS, Recording, collecting, recorded, recording
from .split_k import take_counters

log = logging.getLogger("intscale_compile")
ALIGNMENT = 256  # of parts of the workspace, as of PyTorch's allocations at least 16
MOST_SEQUENCES = 8192
aten = torch.ops.aten
ALLOCATIONS = (
    aten.empty.memory_format,
    aten.empty_strided.default,
    aten.new_empty.default,
    aten.new_empty_strided.default,
)
_stores: dict[Any, dict[Any, Optional[LaunchSequence]]] = {}
_MISSING: Any = object()
_empty = torch.empty


class Extent(NamedTuple):
    """Memory that a tensor spans: ``start <= address < end``."""

    start: int
    end: int


class AllocationsOnly(TorchDispatchMode):
    """Lets pass what allocates memory or looks at it in another shape; anything else raises :class:`CannotPrepare`."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[Tensor] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """See the class."""
        if func in ALLOCATIONS:
            self.made.append(func(*args, **(kwargs or {})))
            return self.made[-1]
        returns = func._schema.returns
        if len(returns) == 1 and returns[0].alias_info is not None and not returns[0].alias_info.is_write:
            return func(*args, **(kwargs or {}))
        raise CannotPrepare(f"it calls {func}")


class Output(NamedTuple):
    """A result to allocate, contiguous."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(slots=True)
class LaunchSequence:
    """Launches without addresses. Slots: operands, then results, the workspace, the counters.

    Attributes:
        launches: in the launcher's memory.
        index, device: where they run.
        outputs: results.
        single: whether the function returns a tensor and not a tuple.
        workspace: bytes for what lies between the kernels.
        counters: of split-K, 0 where there is none.
    """

    launches: LaunchList
    index: int
    device: torch.device
    outputs: tuple[Output, ...]
    single: bool
    workspace: int
    counters: int

    def __call__(self, addresses: Sequence[int]) -> Union[Tensor, tuple[Tensor, ...]]:
        """Start the launches on the current stream of the device; ``addresses`` of the operands, without those that are None."""
        if current_device() != self.index:  # type: ignore[misc]
            with torch.cuda.device(self.index):
                return self(addresses)
        device, launches = self.device, self.launches
        if self.single:
            outputs: Any = _empty(self.outputs[0].shape, dtype=self.outputs[0].dtype, device=device)
            results: tuple[int, ...] = (outputs.data_ptr(),)
        else:
            outputs = tuple(_empty(shape, dtype=dtype, device=device) for shape, dtype in self.outputs)
            results = tuple(y.data_ptr() for y in outputs)
        space = counters = 0
        if self.workspace:
            between = _empty(self.workspace, dtype=torch.uint8, device=device)
            space = between.data_ptr()
        if self.counters:
            taken = take_counters(device, self.counters)
            counters = taken.data_ptr()
        slots = launches.pack(*addresses, *results, space, counters)
        code = launches.run(launches.handle, self.index, raw_stream(self.index), slots)  # type: ignore[misc]
        if code:
            raise RuntimeError(f"intscale: the CUDA driver refused a launch with error {code}.")
        return outputs


def extent(x: Tensor) -> Extent:
    """The memory of ``x``."""
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride())) + 1 if x.numel() else 0
    return Extent(x.data_ptr(), x.data_ptr() + last * x.element_size())


def _apart(tensors: Sequence[Optional[Tensor]]) -> list[Optional[Tensor]]:
    """The same tensors, or others of their form where they share memory, so that an address tells which one is meant."""
    found: list[Optional[Tensor]] = []
    taken: list[Extent] = []
    for x in tensors:
        if x is not None:
            start, end = extent(x)
            if any(start < other.end and other.start < end for other in taken):
                x = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)
            taken.append(extent(x))
        found.append(x)
    return found


class _Addresses:
    """Which slot an address belongs to, of operands, results, workspace and counters."""

    def __init__(self, operands: Sequence[Optional[Tensor]], results: Sequence[Tensor], made: Sequence[Tensor],
                 counters: Sequence[Tensor]):  # fmt: skip
        self.places: list[tuple[Extent, int, int]] = []  # memory, slot, offset in that slot
        for slot, x in enumerate((*operands, *results)):
            if x is not None:
                self.places.append((extent(x), slot, 0))
        last = len(operands) + len(results)
        for x in counters:
            self.places.append((extent(x), last + 1, 0))
        self.workspace = 0
        known = {x.data_ptr() for x in (*results, *counters)}
        for x in made:
            if x.numel() and x.data_ptr() not in known:
                self.places.append((extent(x), last, self.workspace))
                self.workspace += -(-x.nbytes // ALIGNMENT) * ALIGNMENT

    def find(self, x: Tensor) -> tuple[int, int]:
        """``(slot, bytes to add)``."""
        address = x.data_ptr()
        for (start, end), slot, offset in self.places:
            if start <= address < end:
                return slot, address - start + offset
        raise CannotPrepare(f"a kernel takes a {x.dtype} tensor {tuple(x.shape)} that is no operand")


def _add(launches: LaunchList, compiled: Any, grid: tuple, parameters: Parameters, addresses: _Addresses) -> None:
    warps, _, shared = compiled.packed_metadata[:3]
    overlap = bool(getattr(compiled.metadata, "launch_pdl", False))
    block = bytes(parameters.block)
    launches.add(compiled.function, grid, 32 * warps, shared, overlap, block, parameters.offsets, parameters.sizes)
    for offset, x in parameters.pointers:
        launches.add_pointer(offset, *addresses.find(x))
    for offset, descriptor, meta in parameters.maps:
        slot, add = addresses.find(descriptor.base)
        sizes, strides = list(descriptor.shape), [stride * meta["elem_size"] for stride in descriptor.strides]
        launches.add_map(
            offset, slot, add, descriptor.base.data_ptr(), sizes, strides, list(meta["block_size"]),
            UNSIGNED_TYPES[meta["elem_size"]], meta["swizzle"],
        )  # fmt: skip


def _compiled(kernel: Any, grid: tuple, args: tuple, kwargs: dict[str, Any]) -> Any:
    """What Triton would start, loaded on the current device."""
    compiled = kernel.warmup(*args, grid=grid, **kwargs)
    compiled = compiled.result() if hasattr(compiled, "result") else compiled
    compiled._init_handles()
    return compiled


def prepare(function: Callable, args: Sequence[Any], made_by: Any) -> LaunchSequence:
    """Run ``function(*args)`` without starting a kernel, and make a sequence of what it would start.

    Args:
        function: allocates, launches through :func:`~.launching.launch`, returns what it allocated.
        args: operands and numbers; tensors on one device.
        made_by: :func:`~.c_launcher.library`.

    Raises:
        CannotPrepare: it does something else as well, or a kernel has a form that is not known here.
    """
    positions = [i for i, a in enumerate(args) if isinstance(a, Tensor)]
    operands = _apart([args[i] for i in positions])
    device = args[positions[0]].device
    arguments = list(args)
    for i, x in zip(positions, operands):
        arguments[i] = x
    with torch.no_grad(), recorded() as found, AllocationsOnly() as allocations:
        result = function(*arguments)
    results = [result] if isinstance(result, Tensor) else list(result)
    made = {x.data_ptr(): x for x in allocations.made if x.numel()}
    for y in results:
        if not y.is_contiguous() or (y.numel() and (y.data_ptr() not in made or made[y.data_ptr()].nbytes != y.nbytes)):
            raise CannotPrepare("it returns what it did not allocate")
    if not found.launches:
        raise CannotPrepare("it starts no kernel")
    if len(found.counters) > 1:
        raise CannotPrepare("several launches with counters")
    return _sequence(found, operands, results, allocations.made, device, isinstance(result, Tensor), made_by)


def _sequence(
    found: Recording, operands: Sequence[Optional[Tensor]], results: list[Tensor], made: Sequence[Tensor],
    device: torch.device, single: bool, made_by: Any,
) -> LaunchSequence:  # fmt: skip
    addresses = _Addresses(operands, results, made, found.counters)
    launches = LaunchList(made_by, len(operands) + len(results) + 2)
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        for kernel, grid, args, kwargs in found.launches:
            compiled = _compiled(kernel, grid, args, kwargs)
            parameters = parameters_of(compiled, kernel.arg_names, args, kwargs)
            _add(launches, compiled, grid, parameters, addresses)
    counters = found.counters[0].numel() if found.counters else 0
    outputs = tuple(Output(tuple(y.shape), y.dtype) for y in results)
    return LaunchSequence(launches, device.index or 0, device, outputs, single, addresses.workspace, counters)


def prepare_or_none(function: Callable, args: Sequence[Any]) -> Optional[LaunchSequence]:
    """As :func:`prepare`, with the launcher of this machine; None, and the reason in the log, where it cannot be."""
    made_by = c_launcher.library()
    if made_by is None:
        return None
    try:
        return prepare(function, args, made_by)
    except CannotPrepare as why:
        log.debug("%s is not prepared: %s", function.__name__, why)
    return None


def store(key: Any) -> dict[Any, Optional[LaunchSequence]]:
    """Where sequences are kept under keys of the caller; the same for equal ``key``. :func:`forget_all` empties it."""
    return _stores.setdefault(key, {})


def forget_all() -> None:
    """Prepare anew at the next calls, since tables of tiles have changed, or to bound what is kept."""
    for kept in list(_stores.values()):
        kept.clear()


def prepared(function: Callable) -> Callable:
    """``function``, a launcher of operands on a GPU, started as a prepared sequence where it can be."""

    kept = store(function)

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        if collecting() or recording() is not None:
            return function(*args)
        key: list[Any] = []
        addresses = []
        for a in args:
            if isinstance(a, Tensor):
                address = a.data_ptr()
                key.append((a.shape, a.stride(), a.dtype, a.get_device(), address & 15))
                addresses.append(address)
            else:
                key.append(a)
        form = tuple(key)
        found = kept.get(form, _MISSING)
        if found is _MISSING:
            if len(kept) >= MOST_SEQUENCES:
                kept.clear()
            found = kept[form] = prepare_or_none(function, args)
        return function(*args) if found is None else found(addresses)

    return call


def on_gpu(op: str) -> Callable[[Callable], Callable]:
    """Decorator: the function is the op's implementation on a GPU, prepared where it can be."""

    def register(function: Callable) -> Callable:
        torch.library.impl(op, "CUDA", prepared(function))
        GPU_IMPLEMENTATIONS[op] = function
        return function

    return register
