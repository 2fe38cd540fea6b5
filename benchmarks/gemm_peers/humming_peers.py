"""humming-kernels 0.1.19 (Ant Group and vLLM), CUDA compiled at run time by NVRTC, tiles chosen by its own heuristics.

A layer is prepared as its README says, and called through ``humming_forward`` with activations quantized before. Of the
tiles that humming would compile for all M, only those that the measured M select are compiled (about 7 of 13, 2 s each on one
core, in parallel); for a given M the kernel is the same.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor
from typing_extensions import override

from .base import Peer, Unavailable

GROUP_SIZE = 128


class Humming(Peer):
    """A ``HummingLayer``; subclasses say which weight and activation types it has."""

    four_bit = True
    activation = "int8"
    weight_config: dict[str, object] = {}
    integer_scale = False

    @classmethod
    @override
    def require(cls) -> None:
        import humming.layer  # noqa: F401

    @classmethod
    def layer_config(cls, out_features: int, in_features: int):
        """What humming makes of this weight and activation type before it has seen data."""
        from humming.schema import BaseInputSchema, BaseWeightSchema
        from humming.transform import prepare_layer_config

        weight = BaseWeightSchema.from_config({"quant_method": "humming", **cls.weight_config})
        activation = BaseInputSchema.from_config({"quant_method": "humming", **cls.input_config()})
        return prepare_layer_config(
            out_features, in_features, weight, activation, torch_dtype=torch.bfloat16, device=torch.device("cuda", 0)
        )

    @classmethod
    def input_config(cls) -> dict[str, str]:
        """Activation type in humming's words."""
        return {"dtype": "int8" if cls.activation == "int8" else "bfloat16"}

    @override
    def prepare(self, weight: Tensor) -> None:
        from humming.layer import HummingLayer

        layer = HummingLayer(
            shape_n=self.out_features,
            shape_k=self.in_features,
            weight_config=dict(self.weight_config),
            input_config=self.input_config(),
            torch_dtype=torch.bfloat16,
        ).cuda()
        quantized = layer.weight_schema.quant_tensor(weight, layer.weight_schema, torch.bfloat16)
        sample = {name: t[self.columns] for name, t in quantized.items()}
        self.reference = layer.weight_schema.dequant_tensors(sample)
        layer.load_from_tensors(quantized)
        layer.transform()
        self.config = layer.humming_config
        if bool(self.config.use_int_weight_scale) != self.integer_scale:
            raise Unavailable(f"humming chose use_int_weight_scale={self.config.use_int_weight_scale}")
        self.tuning = tuning_for(self.config, self.options.tokens)
        second = getattr(layer, "weight_scale_2", None)
        parts = (layer.weight, layer.weight_scale, second, layer.locks)
        self.tensors = tuple(None if t is None else t.detach() for t in parts)

    @override
    def run(self, x, tensors):
        from humming.forward import humming_forward

        inputs, input_scale = x.int8 if self.activation == "int8" else (x.bf16, None)
        weight, weight_scale, weight_scale_2, locks = tensors
        return humming_forward(
            self.config,
            inputs=inputs,
            weight=weight,
            weight_scale=weight_scale,
            weight_scale_2=weight_scale_2,
            input_scale=input_scale,
            locks=locks,
            tuning_config=self.tuning,
        )


class HummingGroup(Humming):
    """Float group scales."""

    name, title = "humming_g128", "humming W4A8 g128, float scales"
    weight_config = {"dtype": "int4", "group_size": GROUP_SIZE}


class HummingInt(Humming):
    """Integer group scales: humming takes them where the scale group is one row high."""

    name, title = "humming_iws", "humming W4A8 g128, integer scales"
    weight_config = {"dtype": "int4", "group_size": GROUP_SIZE, "group_size_n": 1}
    integer_scale = True


class HummingChannel(Humming):
    """One scale per row."""

    name, title = "humming_ch", "humming W4A8 per channel"
    weight_config = {"dtype": "int4"}


class HummingW4A16(Humming):
    """bf16 activations."""

    name, title = "humming_w4a16", "humming W4A16 g128"
    weight_config = {"dtype": "int4", "group_size": GROUP_SIZE}
    activation = "bf16"


PEERS = (HummingGroup, HummingInt, HummingChannel, HummingW4A16)


def tuning_for(config, tokens: Sequence[int]) -> str:
    """humming's heuristic tiles for the intervals of M that hold one of ``tokens``, as its ``tuning_config``.

    The interval of M = 1 is always kept: its launcher looks it up first.
    """
    from humming.tune import get_heuristics_config

    intervals = get_heuristics_config(config, device=torch.device("cuda", 0))
    return json.dumps([i for i in intervals if any(i[0] < m <= i[1] for m in (1, *tokens))])


def compile_ahead(
    peers: Sequence[type[Peer]], shapes: Sequence[tuple[int, int]], tokens: Sequence[int], threads: int | None
) -> list[str]:
    """Compile the kernels of all shapes at once; returns what failed. humming runs one compiler per core.

    A guess made without data, so a failure here is none of the measurement: ``prepare`` compiles what is missing.
    """
    if threads is not None:
        os.environ["HUMMING_MAX_PARALLEL_BUILD_WORKERS"] = str(threads)
    failures = []

    def build(peer: type[Humming], n: int, k: int) -> None:
        try:
            from humming.kernel.humming import HummingKernel

            config = peer.layer_config(n, k)
            HummingKernel.prepare_kernels(config.to_str(), None, tuning_for(config, tokens), 0)
        except Exception as error:  # foreign code
            failures.append(f"{peer.name} {n}x{k}: {type(error).__name__}: {error}")

    jobs = [(p, n, k) for p in peers if issubclass(p, Humming) for n, k in shapes]
    with ThreadPoolExecutor(max_workers=4) as pool:
        for done in [pool.submit(build, *job) for job in jobs]:
            done.result()
    return failures
