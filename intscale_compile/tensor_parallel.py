"""Tensor parallelism of models that are quantized already: each rank keeps its shard of every weight, packed as it is.

    quantize_(model, IntScaleConfig())
    tensor_parallel.parallelize(model)                       # transformers models: their own plan
    tensor_parallel.parallelize(model, mesh, {"layers.*.up": "colwise", "layers.*.down": "rowwise"})

The weights become plain local tensors and the modules get functional collectives, so a graph is the same as on one device but
for a sum after each row-parallel layer, and every pass applies. PyTorch's ``parallelize_module`` and transformers'
``from_pretrained(..., tp_plan="auto")`` work too; those keep DTensors (see the pass ``local_shards``).

Row-parallel layers quantize their activation shard by shard: each rank has token scales of its own. The result differs from
that of one device by this rounding, not by more, and is as accurate.
"""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Optional, Union

import torch
from torch import Tensor, nn

from .errors import CheckpointError, ConfigError, InputError, ShardingError
from .parallel.sharding import Layout, chunk, owned, shard
from .reasons import log_once
from .saving.checkpoint import PathLike
from .saving.shard_reading import read_shards
from .saving.shard_writing import RECORD, Cut, Divided, gather_shards, load_shards, save_shards
from .tensors.intscale_tensor import IntScaleTensor

__all__ = [
    "STYLES",
    "Style",
    "from_safetensors",
    "gather_shards",
    "load_shards",
    "parallelize",
    "save_shards",
]

ATTENTION_INPUTS = ("q_proj", "k_proj", "v_proj")  # their rows are heads
HEADS_PER_KEY = "num_key_value_groups"  # attribute of transformers' attention: query heads that share a key


@dataclass(frozen=True)
class Style:
    """What a name in a plan means.

    Attributes:
        dim: dimension of the weight that is divided, from the end; None: it is kept whole.
        packed: how many projections lie one after another in the rows.
        output: what follows the module: ``"sum"`` over the ranks, ``"gather"`` of the last dimension, or nothing.
        splits_input: whether the module's input is whole, so that each rank takes its features of it.
    """

    dim: Optional[int] = None
    packed: int = 1
    output: str = ""
    splits_input: bool = False


STYLES: dict[str, Style] = {  # the names are those of transformers' plans
    "colwise": Style(-2),
    "colwise_gather_output": Style(-2, output="gather"),
    "colwise_rep": Style(-2, output="gather"),
    "rowwise": Style(-1, output="sum"),
    "rowwise_split_input": Style(-1, output="sum", splits_input=True),
    "rowwise_rep": Style(-1, output="sum", splits_input=True),
    "packed_colwise": Style(-2, packed=2),
    "moe_tp_experts": Style(output="sum"),
    "replicated_with_grad_allreduce": Style(),
    "replicate": Style(),
    "embedding_rowwise": Style(),  # embeddings are kept whole: they are not quantized, and are read row by row
}


@dataclass(frozen=True)
class Division:
    """One weight of a model and how it is divided; ``copies`` ranks in a row take one and the same shard."""

    module: nn.Module
    leaf: str
    name: str
    style: Style
    copies: int = 1

    @property
    def weight(self) -> Tensor:
        """The weight as it is now."""
        return getattr(self.module, self.leaf)

    def check(self, rank: int, ranks: int) -> None:
        """Raise ``ShardingError`` unless the weight can be divided so."""
        weight, dim = self.weight, self.style.dim
        assert dim is not None
        rank, ranks = rank // self.copies, ranks // self.copies
        if not isinstance(weight, IntScaleTensor):
            chunk(weight.shape[dim], rank, ranks * self.style.packed, self.name)
        elif (dim == -1) != weight.transposed:
            Layout.of(weight, self.name).check_features(*chunk(weight.in_features, rank, ranks, self.name))
        else:
            chunk(weight.out_features, rank, ranks * self.style.packed, self.name)

    def local(self, rank: int, ranks: int) -> Tensor:
        """This rank's shard."""
        dim, packed = self.style.dim, self.style.packed
        assert dim is not None
        rank, ranks = rank // self.copies, ranks // self.copies
        weight = self.weight.detach()
        if isinstance(weight, IntScaleTensor):
            return shard(weight, dim, rank, ranks, packed=packed, name=self.name)
        pieces = [piece.chunk(ranks, dim)[rank] for piece in weight.chunk(packed, dim)]
        return owned(torch.cat(pieces, dim) if packed > 1 else pieces[0])


def parallelize(model: nn.Module, mesh: Any = None, plan: Union[str, Mapping[str, str]] = "auto") -> nn.Module:
    """Divide the weights of a model among the ranks of a group, in place, for inference.

    Every rank calls this with the same whole model; nothing is sent. Either all weights of the plan are divided or, where one
    cannot be, none.

    Args:
        model: quantized or not, or in parts; weights may be on any device.
        mesh: a ``DeviceMesh`` of one dimension, a process group, or None for the default group.
        plan: names of modules or parameters (``*`` stands for one part of a dotted name) and their style, one of
            :data:`STYLES`; ``"auto"`` takes the plan of a transformers model. Embeddings, and output embeddings that share
            their weight, are kept whole.

    Returns:
        The same model.

    Raises:
        ShardingError: a weight cannot be divided among so many ranks, or would be cut within a group.
        ConfigError: the plan names an unknown style, or nothing that the model has.
    """
    group = group_of(mesh)
    rank, ranks = group.rank(), group.size()
    if ranks == 1:
        log_once(logging.INFO, "tensor parallelism over one rank: the model stays as it is.")
        return model
    chosen = [entry for entry in resolve(model, plan) if not _is_tied(model, *entry)]
    divisions = _all_divisions(model, chosen, ranks)
    for division in divisions:
        division.check(rank, ranks)
    for division in divisions:
        _assign(division.module, division.leaf, division.local(rank, ranks))
    _finish(model, chosen, divisions, group)
    return model


def from_safetensors(
    model: nn.Module, path: PathLike, mesh: Any = None, plan: Union[str, Mapping[str, str]] = "auto"
) -> nn.Module:
    """Fill a model from a file of ``save_safetensors`` and divide it: each rank reads the rows and features that it keeps.

    Args:
        model: of the architecture that was saved, not quantized; it may be on the meta device.
        path: the file.
        mesh, plan: as for :func:`parallelize`.

    Returns:
        The same model, quantized as the file is.

    Raises:
        ShardingError, ConfigError: as for :func:`parallelize`.
        CheckpointError: the file is damaged, or does not hold every tensor of the model.
    """
    group = group_of(mesh)
    rank, ranks = group.rank(), group.size()
    chosen = [entry for entry in resolve(model, plan) if not _is_tied(model, *entry)]
    divisions = _all_divisions(model, chosen, ranks)
    wanted = {d.name: (d.style.dim or -1, d.style.packed, d.copies) for d in divisions}
    _fill(model, read_shards(path, wanted, rank, ranks), path)
    if ranks > 1:
        _finish(model, chosen, divisions, group)
    return model


def _fill(model: nn.Module, state: dict[str, Tensor], path: PathLike) -> None:
    """Exchange the parameters and buffers of a model; names that shared a parameter share the new one."""
    own = model.state_dict(keep_vars=True)
    if set(own) != set(state):
        missing, unknown = sorted(set(own) - set(state))[:3], sorted(set(state) - set(own))[:3]
        raise CheckpointError(
            f"{path}: the file lacks {missing} of the model, and the model lacks {unknown} of the file."
        )
    given: dict[int, nn.Parameter] = {}
    for name, value in state.items():
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        if leaf in module._buffers:
            module._buffers[leaf] = value
            continue
        if id(own[name]) not in given:
            trains = own[name].requires_grad and not isinstance(value, IntScaleTensor)
            given[id(own[name])] = nn.Parameter(value, requires_grad=trains)
        setattr(module, leaf, given[id(own[name])])


def group_of(mesh: Any) -> Any:
    """The process group of a mesh of one dimension, of a process group itself, or the default one."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        raise ConfigError("tensor parallelism needs torch.distributed.init_process_group first.")
    if mesh is None:
        return torch.distributed.group.WORLD
    if isinstance(mesh, torch.distributed.ProcessGroup):
        return mesh
    if getattr(mesh, "ndim", None) != 1:
        raise ConfigError(f"mesh={mesh!r}: give a DeviceMesh of one dimension (mesh['tp']) or a process group.")
    return mesh.get_group()


def resolve(model: nn.Module, plan: Union[str, Mapping[str, str]]) -> Iterator[tuple[nn.Module, str, Style]]:
    """Modules and parameters that a plan names: the module, the dotted name, and the style.

    Raises:
        ConfigError: unknown styles or names.
    """
    automatic = plan == "auto"
    named: Any = plan
    if isinstance(plan, str):
        named = getattr(model, "tp_plan", None) or getattr(model, "_tp_plan", None)
        if not automatic or not named:
            raise ConfigError(
                f"plan={plan!r}: {type(model).__name__} has no tensor parallel plan of its own; give a dict."
            )
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters(remove_duplicate=False))
    for pattern, style in named.items():
        if style not in STYLES:
            raise ConfigError(f"plan[{pattern!r}]={style!r} is not supported: use one of {sorted(STYLES)}.")
        matches = re.compile(re.escape(pattern).replace(r"\*", "[^.]+")).fullmatch
        names = [name for name in (*modules, *parameters) if matches(name)]
        if not names and not automatic:
            raise ConfigError(f"plan[{pattern!r}]: the model has no module or parameter of that name.")
        for name in names:
            module = modules[name] if name in modules else modules[name.rpartition(".")[0]]
            yield module, name, STYLES[style]


def _divisions(module: nn.Module, name: str, style: Style) -> Iterator[Division]:
    """The weights that one entry of a plan divides."""
    if style.dim is None:
        return
    leaf = name.rpartition(".")[2]
    if leaf in dict(module.named_parameters(recurse=False)):  # a parameter, such as a stack of experts
        yield Division(module, leaf, name, style)
        return
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() < 2:
        raise ConfigError(f"plan: {name} is a {type(module).__name__} without a weight to divide; name its parameters.")
    yield Division(module, "weight", f"{name}.weight", style)
    bias = getattr(module, "bias", None)
    if isinstance(bias, Tensor) and style.dim == -2:
        yield Division(module, "bias", f"{name}.bias", Style(-1, style.packed))


def _is_tied(model: nn.Module, module: nn.Module, name: str, style: Style) -> bool:
    """Whether a module that would be divided shares its weight with an input embedding: every rank keeps it whole then."""
    weight = getattr(module, "weight", None)
    tied = style.dim is not None and any(isinstance(m, nn.Embedding) and m.weight is weight for m in model.modules())
    if tied:
        log_once(logging.INFO, f"{name}: its weight is also the input embedding, so every rank keeps the whole of it.")
    return tied


def _all_divisions(model: nn.Module, chosen: list[tuple[nn.Module, str, Style]], ranks: int) -> list[Division]:
    """The weights that a plan divides, and how many ranks share each shard."""
    divisions = [division for module, name, style in chosen for division in _divisions(module, name, style)]
    return [dataclasses.replace(division, copies=_copies(model, division, ranks)) for division in divisions]


def _copies(model: nn.Module, division: Division, ranks: int) -> int:
    """How many ranks need the same rows: each rank needs whole heads, and may share those of keys and values.

    Raises:
        ShardingError: the heads cannot be divided so.
    """
    parent, _, leaf = division.name.rpartition(".")[0].rpartition(".")
    attention = model.get_submodule(parent)
    head = getattr(attention, "head_dim", None) if leaf in ATTENTION_INPUTS else None
    rows = division.weight.shape[0]
    if not isinstance(head, int) or head <= 0 or rows // ranks % head == 0:
        return 1
    heads = rows // head
    shared = getattr(attention, HEADS_PER_KEY, None) if leaf != "q_proj" else None
    if isinstance(shared, int) and rows % head == 0 and ranks % heads == 0 and shared % (ranks // heads) == 0:
        return ranks // heads
    raise ShardingError(
        f"{division.name}: {heads} heads cannot be divided evenly among {ranks} ranks: use a number that divides them"
        + (" or, for keys and values, a multiple of it that divides the query heads." if leaf != "q_proj" else ".")
    )


def _assign(module: nn.Module, leaf: str, value: Tensor) -> None:
    setattr(module, leaf, nn.Parameter(value, requires_grad=getattr(module, leaf).requires_grad))
    if isinstance(module, nn.Linear) and leaf == "weight":
        module.out_features, module.in_features = value.shape


def _finish(
    model: nn.Module, chosen: list[tuple[nn.Module, str, Style]], divisions: list[Division], group: Any
) -> None:
    """Install the collectives, and leave biases that are added before a sum on one rank. From now on for inference."""
    model.requires_grad_(False)
    alone = []
    for division in divisions:
        if division.copies > 1 and division.name.endswith("k_proj.weight"):
            attention = model.get_submodule(division.name.removesuffix(".k_proj.weight"))
            setattr(attention, HEADS_PER_KEY, getattr(attention, HEADS_PER_KEY) // division.copies)
    for module, name, style in chosen:
        if name.rpartition(".")[2] in dict(module.named_parameters(recurse=False)):
            continue
        bias = getattr(module, "bias", None)
        if style.output == "sum" and style.dim is not None and isinstance(bias, Tensor):
            alone.append(f"{name}.bias")
            if group.rank():
                _assign(module, "bias", torch.zeros_like(bias))
        if style.splits_input:
            module.register_forward_pre_hook(_split_input(group))
        if style.output:
            module.register_forward_hook(_after(style.output, group))
    cuts = {d.name: Cut(group, d.style.dim or -1, d.style.packed, d.copies) for d in divisions}
    model.__dict__.setdefault(RECORD, []).append(Divided(cuts, tuple(alone)))


def _after(kind: str, group: Any) -> Callable:
    # Slow to import.
    from torch.distributed import _functional_collectives as collectives

    # torch 2.13 renamed it
    gather = getattr(collectives, "all_gather_single", None) or collectives.all_gather_tensor

    def sum_of_ranks(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        _for_inference(output)
        return collectives.wait_tensor(collectives.all_reduce(output, "sum", group))

    def gather_features(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        _for_inference(output)
        # Along a new first dimension: along another one, torch 2.11 calls what Dynamo does not trace.
        parts = collectives.wait_tensor(gather(output.contiguous().unsqueeze(0), 0, group))
        return parts.movedim(0, -2).flatten(-2)

    return sum_of_ranks if kind == "sum" else gather_features


def _for_inference(output: Tensor) -> None:
    if torch.is_grad_enabled() and output.requires_grad:
        raise InputError("a model that parallelize divided is for inference: call it under torch.no_grad().")


def _split_input(group: Any) -> Callable:
    rank, ranks = group.rank(), group.size()

    def local_features(module: nn.Module, args: tuple) -> tuple:
        return (args[0].chunk(ranks, -1)[rank], *args[1:])

    return local_features
