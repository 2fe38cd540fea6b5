"""Rotation of a model's activations so that no channel stands out: QuaRot (arXiv 2404.00456), folded into the weights.

The residual stream ``h`` becomes ``h Q`` with an orthogonal ``Q``. A norm without a weight commutes with that, so its
weight is folded into what reads it first; then

    embeddings  E Q        weights that read the stream  W Q        weights that write to it  Q^T W

Between value and output projections of attention each head is rotated by a Hadamard matrix, and before the other writing
projections (``down_proj``) the activation itself is: online, by ``hadamard_transform``, with the inverse in the columns of
the weight. A LayerNorm subtracts the mean, which commutes only with a ``Q`` that keeps the vector of ones: for models with
LayerNorm ``Q`` is one of those, so no module is exchanged (SliceGPT, arXiv 2401.15024, exchanges them for RMSNorm).
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any, Optional

import torch
from torch import Tensor, nn

from ..errors import CalibrationError
from ..kernels.hadamard import hadamard_transform
from ..tensors.input_rotation import start_rotating
from ..tensors.untied import note_untied
from .groups import Norm, difference, norm_offset, scaling_groups
from .layers import (
    Inputs,
    LinearWeight,
    blocks,
    example_batch,
    float_copy,
    may_be_norm,
    record_inputs,
    run_block,
    stacks,
    trace,
    weights_of,
    without_cache,
)

log = logging.getLogger("intscale_compile")

SAME = 1e-4  # relative difference of outputs in fp32 before and after
SMALLEST_BLOCK = 16  # of an online Hadamard; below it spreads an outlier over too few channels to be worth its time


class NotRotatableError(CalibrationError):
    """A model of a kind that cannot be rotated; it computes what it did."""


@dataclass
class _Plan:
    """What to do in one block, by the names of its norms and weights."""

    readers: list[tuple[Norm, list[str]]] = field(default_factory=list)
    writers: list[str] = field(default_factory=list)
    heads: list[tuple[str, Tensor, str, int]] = field(default_factory=list)  # value, its rows, output, size
    online: dict[str, int] = field(default_factory=dict)


def rotate(model: nn.Module, batch: Optional[Any] = None, *, seed: int = 0, online: bool = True) -> dict[str, int]:
    """Rotate a decoder in place, its function kept; every step is checked on a copy before the model is touched.

    A tied output embedding gets a weight of its own (the norm before it is folded in), and the configuration says so.

    Args:
        model: a transformers model with an output embedding, norms before its linear layers and floating point weights:
            Llama, Mistral, Qwen, Mixtral, Gemma, GPT-2, OPT, Phi and the like.
        batch: token ids or keyword arguments for the checks; None: a few ids.
        seed: of the random signs (and of the random factor where the hidden size is no power of two).
        online: whether activations that only an online transform reaches (before ``down_proj``) are rotated as well;
            stacks of experts never are.

    Returns:
        Size of the online Hadamard transform by name of the linear layer. A forward pre-hook rotates the input of such
        a layer until it is quantized: ``quantize_`` and ``calibrate`` set ``rotation`` of its ``IntScaleTensor`` and take
        the hook off. Hooks
        are not saved: save the quantized model, or rotate with ``online=False``.

    Raises:
        NotRotatableError: the model is not of a kind that can be rotated; the message names what was met.
        CalibrationError: its logits changed.
    """
    with torch.no_grad():
        try:
            batch = example_batch(model) if batch is None else batch
            head = _output_embedding(model)
            recorded = record_inputs(model, batch)
            before = _logits(model, batch)
            norm, x = _final_norm(model, head, batch)
            hidden = x.shape[-1]
            q = residual_rotation(hidden, seed, keep_ones=subtracts_mean(norm.module, x)).to(x.device)
            plans = {name: _checked_plan(name, block, recorded[name], q, online) for name, block in blocks(model)}
            _untie(model, head)
            _rotate_embeddings(model, batch, recorded, q)
        except CalibrationError as error:
            raise NotRotatableError(str(error)) from error
        sizes: dict[str, int] = {}
        for name, block in blocks(model):
            _apply(plans[name], block, q)
            sizes |= {f"{name}.{weight}": size for weight, size in plans[name].online.items()}
        _read(norm, [LinearWeight("lm_head", head, "weight")], q)
        if not difference(_logits(model, batch), before) < tolerance_of(model):
            raise CalibrationError("the rotated model's logits differ from the original's: load the model anew.")
    return sizes


def residual_rotation(size: int, seed: int, keep_ones: bool = False) -> Tensor:
    """A random orthogonal matrix fp64 ``[size, size]`` whose entries are all small.

    ``diag(random signs) (R x H)``: a Hadamard matrix of the largest power of two that divides ``size``, and a random
    orthogonal ``R`` for the other factor. With ``keep_ones`` a random orthogonal matrix that keeps the vector of ones.
    """
    generator = torch.Generator().manual_seed(seed)
    if keep_ones:
        basis = torch.randn(size, size, dtype=torch.float64, generator=generator)
        basis[:, 0] = 1
        basis = torch.linalg.qr(basis)[0]
        inner = random_orthogonal(size - 1, generator)
        return basis @ torch.block_diag(torch.ones(1, 1, dtype=torch.float64), inner) @ basis.T
    power = size & -size
    signs = torch.randint(0, 2, (size, 1), generator=generator).double() * 2 - 1
    return signs * torch.kron(random_orthogonal(size // power, generator), hadamard_matrix(power))


def random_orthogonal(size: int, generator: torch.Generator) -> Tensor:
    """A uniformly random orthogonal matrix, fp64 ``[size, size]``."""
    q, r = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=generator))
    return (q * r.diagonal().sign()).contiguous()


def hadamard_matrix(size: int) -> Tensor:
    """Orthonormal Hadamard matrix in Sylvester order, fp64; ``size`` is a power of two."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix / size**0.5


def subtracts_mean(norm: nn.Module, x: Tensor) -> bool:
    """Whether a norm is blind to a constant added to all channels (LayerNorm), found by adding one."""
    return difference(norm(x + x.abs().max()), norm(x)) < 1e-2


def _checked_plan(name: str, block: nn.Module, inputs: Inputs, q: Tensor, online: bool) -> _Plan:
    """What to do in a block; done to a copy, whose output must be the block's, rotated."""
    copied, wide = float_copy(block, inputs)
    hidden = len(q)
    before = run_block(copied, wide)
    plan, steps = _Plan(), trace(copied, wide)
    for stage in steps:
        names = [weight.name for weight in stage.weights]
        if stage.norm is None:
            plan.writers += [weight.name for weight in stage.weights if weight.weight.shape[-2] == hidden]
        elif stage.norm[1].weight.numel() == hidden:  # type: ignore[union-attr, operator]
            offset = norm_offset(stage.norm[1], stage.norm[2])
            if offset is None:
                raise CalibrationError(f"{name}.{stage.norm[0]} multiplies by neither weight nor 1 + weight.")
            plan.readers.append((Norm(stage.norm[0], stage.norm[1], offset), names))
    plan.heads = _rotated_heads(copied, wide, before, set(plan.writers))
    if online:
        plan.online = _online_sizes(weights_of(copied), plan)
    _apply(plan, copied, q)
    after = run_block(copied, _rotated_inputs(wide, q, name))
    if not difference(after, before @ q.to(before.dtype)) < SAME:
        read = {norm.name for norm, _ in plan.readers}
        others = [n for n, m in copied.named_modules() if may_be_norm(m) and n not in read]
        met = f"; norms that no linear layer reads directly: {', '.join(others)}" if others else ""
        raise CalibrationError(
            f"{name} ({type(block).__name__}) cannot be rotated: its output does not follow a rotation of its input{met}. "
            "Use rotation='none'; fptq and awq smooth such models."
        )
    return plan


def _online_sizes(weights: dict[str, LinearWeight], plan: _Plan) -> dict[str, int]:
    done = {output for _, _, output, _ in plan.heads}
    sizes = {}
    for name in plan.writers:
        channels = weights[name].weight.shape[-1]
        size = channels & -channels
        if name in done or weights[name].weight.dim() == 3:
            continue
        if size < SMALLEST_BLOCK:
            log.info("%s is not rotated online: %d input features have no block of %d", name, channels, SMALLEST_BLOCK)
            continue
        sizes[name] = size
    return sizes


def _rotated_heads(
    block: nn.Module, inputs: Inputs, before: Tensor, writers: set[str]
) -> list[tuple[str, Tensor, str, int]]:
    """Pairs of weights between which blocks of channels may be mixed, with the largest size that keeps the function.

    Attention mixes tokens, not the channels of a head, so values may be rotated head by head and the output projection
    back; whether two weights are such a pair is tried out. The blocks found are rotated in ``block`` already undone.
    """
    weights = weights_of(block)
    found = []
    for group in scaling_groups(block, inputs):
        output = group.consumers[0]
        if isinstance(group.previous, Norm) or len(group.consumers) > 1 or output.name not in writers:
            continue
        if output.weight.dim() == 3:
            continue
        rows = torch.arange(group.channels) if group.rows is None else group.rows
        size = group.channels & -group.channels
        while size >= SMALLEST_BLOCK:
            pair = (group.previous.name, rows, output.name, size)
            if _is_blocked(rows, size):
                _rotate_heads(weights, pair)
                same = difference(run_block(block, inputs), before) < SAME
                _rotate_heads(weights, pair)  # its own inverse
                if same:
                    found.append(pair)
                    break
            size //= 2
    return found


def _is_blocked(rows: Tensor, size: int) -> bool:
    """Whether channels come from rows block by block, and two blocks share all of their rows or none."""
    parts = rows.view(-1, size)
    starts = parts[:, 0].unique()
    return torch.equal(parts, parts[:, :1] + torch.arange(size)) and bool((starts.diff() >= size).all())


def _rotate_heads(weights: dict[str, LinearWeight], pair: tuple[str, Tensor, str, int]) -> None:
    value, rows, output, size = weights[pair[0]], pair[1], weights[pair[2]], pair[3]
    chosen = rows.view(-1, size)[:, 0].unique().unsqueeze(-1).add(torch.arange(size)).flatten().to(value.weight.device)
    matrix = value.weight
    matrix[chosen] = _transformed(matrix[chosen].mT, size).mT
    if value.bias is not None:
        value.bias[chosen] = _transformed(value.bias[chosen], size)
    output.weight.copy_(_transformed(output.weight, size))


def _transformed(x: Tensor, size: int) -> Tensor:
    """Block Hadamard transform in fp32, in the dtype of ``x``."""
    return hadamard_transform(x.float().contiguous(), size).to(x.dtype)


def _apply(plan: _Plan, block: nn.Module, q: Tensor) -> None:
    """Rotate a block as planned, in place."""
    weights, modules = weights_of(block), dict(block.named_modules())
    for pair in plan.heads:
        _rotate_heads(weights, pair)
    for norm, names in plan.readers:
        _read(Norm(norm.name, modules[norm.name], norm.offset), [weights[name] for name in names], q)
    for name in plan.writers:
        weight, bias = weights[name].weight, weights[name].bias
        weight.copy_((q.T.to(weight.device) @ weight.double()).to(weight.dtype))
        if bias is not None:
            bias.copy_((bias.double() @ q.to(bias.device)).to(bias.dtype))
    for name, size in plan.online.items():
        weight, module = weights[name].weight, weights[name].module
        weight.copy_(_transformed(weight, size))
        start_rotating(module, size)


def _read(norm: Norm, consumers: list[LinearWeight], q: Tensor) -> None:
    """Fold a norm into the weights that read it and rotate their columns.

    The bias of a LayerNorm goes into the biases of the consumers; where one has none, it stays in the norm, rotated.
    """
    module: Any = norm.module
    gain = (module.weight.detach().double() + norm.offset).to(q.device)
    bias = getattr(module, "bias", None)
    if isinstance(bias, Tensor) and bool(bias.any()):
        shift = bias.detach().double()
        if all(weight.bias is not None for weight in consumers):
            for weight in consumers:
                weight.bias.add_((weight.weight.double() @ shift).to(weight.bias.dtype))  # type: ignore[union-attr]
            bias.detach().zero_()
        else:
            if bool(((gain == 0) & (shift != 0)).any()):
                raise CalibrationError(
                    f"{norm.name} has channels of weight 0 with a bias: nothing can absorb the bias."
                )
            bias.detach().copy_(torch.where(shift != 0, shift / gain, shift) @ q)
    for weight in consumers:
        weight.weight.copy_(((weight.weight.double() * gain) @ q).to(weight.weight.dtype))
    module.weight.detach().fill_(1 - norm.offset)


def _output_embedding(model: nn.Module) -> nn.Module:
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # type: ignore[operator]
    if not isinstance(head, nn.Linear):
        raise CalibrationError(
            f"{type(model).__name__} has no linear output embedding: only language models are rotated."
        )
    if len(stacks(model)) > 1:
        raise CalibrationError(f"{type(model).__name__} has several stacks of layers: only decoders are rotated.")
    return head


def _logits(model: nn.Module, batch: Any) -> Tensor:
    with without_cache(model):
        return (model(**batch) if isinstance(batch, dict) else model(batch)).logits


def _final_norm(model: nn.Module, head: nn.Module, batch: Any) -> tuple[Norm, Tensor]:
    """The norm whose output the output embedding reads, and its input."""
    made: dict[int, tuple[str, nn.Module, Tensor]] = {}
    read: list[Tensor] = []
    kept: list[Tensor] = []

    def left(name: str):
        def hook(module, args, result):
            made[result.data_ptr()] = (name, module, args[0])
            kept.append(result)

        return hook

    handles = [m.register_forward_hook(left(name)) for name, m in model.named_modules() if may_be_norm(m)]
    handles.append(head.register_forward_pre_hook(lambda module, args: read.append(args[0])))
    try:
        _logits(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    found = made.get(read[0].data_ptr()) if read else None
    offset = norm_offset(found[1], found[2]) if found else None
    if found is None or offset is None:
        raise CalibrationError(f"no norm comes right before the output embedding of {type(model).__name__}.")
    return Norm(found[0], found[1], offset), found[2]


def _untie(model: nn.Module, head: Any) -> None:
    shared = any(isinstance(m, nn.Embedding) and m.weight is head.weight for m in model.modules())
    if not shared:
        return
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=head.weight.requires_grad)
    note_untied(model, [head])
    log.info("the output embedding is no longer tied to the input embedding: the norm before it is folded into it")


def _rotate_embeddings(model: nn.Module, batch: Any, recorded: dict[str, Inputs], q: Tensor) -> None:
    """Rotate every embedding that feeds the first block; put them back where the block's input does not follow."""
    name, block = blocks(model)[0]
    inside = {id(m) for m in block.modules()}
    tables: list[Any] = [
        m for m in model.modules() if isinstance(m, nn.Embedding) and id(m) not in inside and m.embedding_dim == len(q)
    ]
    kept = [table.weight.detach().clone() for table in tables]
    for table in tables:
        table.weight.detach().copy_((table.weight.double() @ q).to(table.weight.dtype))
    after = _stream(record_inputs(model, batch, [name])[name], name)
    if not difference(after, _stream(recorded[name], name).double() @ q) < tolerance_of(model):
        for table, weight in zip(tables, kept):
            table.weight.detach().copy_(weight)
        raise CalibrationError(
            f"what {name} reads is not a sum of embeddings of size {len(q)} (a projection, a norm or an image comes before): "
            "this model cannot be rotated."
        )


def _stream(inputs: Inputs, name: str) -> Tensor:
    if inputs[0] and isinstance(inputs[0][0], Tensor):
        return inputs[0][0]
    if isinstance(hidden := inputs[1].get("hidden_states"), Tensor):
        return hidden
    raise CalibrationError(f"{name} is not called with hidden states first: this model cannot be rotated.")


def _rotated_inputs(inputs: Inputs, q: Tensor, name: str) -> Inputs:
    hidden = _stream(inputs, name)
    turned = (hidden.double() @ q).to(hidden.dtype)
    return ((turned, *inputs[0][1:]), inputs[1]) if inputs[0] else (inputs[0], {**inputs[1], "hidden_states": turned})


def tolerance_of(model: nn.Module) -> float:
    """Rounding of the weights themselves decides below fp32."""
    return SAME if next(model.parameters()).dtype in (torch.float32, torch.float64) else 0.1
