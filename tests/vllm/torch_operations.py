"""vLLM's operations that round otherwise than transformers', replaced for the tests by those that transformers calls.

Attention is torch's scaled_dot_product_attention, request by request; routers take the softmax before they choose, and both sides
have their products in fp64.
"""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor
from torch.nn import functional as F
from vllm.model_executor.layers.fused_moe.router import cpu_router
from vllm.v1.attention import selector
from vllm.v1.attention.backends import cpu_attn, registry


class TorchAttentionImpl(cpu_attn.CPUAttentionBackendImpl):
    """Causal attention of decoders without windows, soft caps or sinks, over a cache in rows of tokens."""

    def do_kv_cache_update(self, layer, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor) -> None:
        """Put keys and values ``[T, heads, D]`` in their slots of ``[blocks, heads, block size, 2 D]``."""
        size = kv_cache.shape[2]
        place = slot_mapping // size, slice(None), slot_mapping % size
        kv_cache[place] = torch.cat([key, value], dim=-1)[: len(slot_mapping)]

    def forward(self, layer, query, key, value, kv_cache, attn_metadata, output, **scales) -> Tensor:
        """Write the result for ``query`` ``[T, heads, D]`` to ``output`` ``[T, heads * D]``."""
        if attn_metadata is None:  # warming up
            return output
        starts, lengths = attn_metadata.query_start_loc.tolist(), attn_metadata.seq_lens.tolist()
        for number, length in enumerate(lengths):
            rows = slice(starts[number], starts[number + 1])
            blocks = attn_metadata.block_table[number, : -(-length // kv_cache.shape[2])]
            stored = kv_cache[blocks].transpose(0, 1).flatten(1, 2)[None, :, :length]  # [1, heads, length, 2 D]
            keys, values = (half.contiguous() for half in stored.chunk(2, dim=-1))
            queries = query[rows].transpose(0, 1)[None]
            tokens = queries.shape[2]
            assert tokens in (1, length), "a part of a prompt: raise max_num_batched_tokens"
            found = F.scaled_dot_product_attention(
                queries, keys, values, scale=self.scale, is_causal=tokens > 1, enable_gqa=self.num_queries_per_kv > 1
            )
            output[rows] = found[0].transpose(0, 1).reshape(output[rows].shape)
        return output


class TorchAttentionBackend(cpu_attn.CPUAttentionBackend):
    """vLLM's attention for a CPU with the arithmetic of :class:`TorchAttentionImpl`."""

    @staticmethod
    def get_impl_cls():
        return TorchAttentionImpl


@contextlib.contextmanager
def torch_attention():
    """Engines made meanwhile have it."""
    kind = registry.AttentionBackendEnum.CPU_ATTN
    registry.register_backend(kind, f"{__name__}.TorchAttentionBackend")
    selector._cached_get_attn_backend.cache_clear()
    try:
        yield
    finally:
        kind.clear_override()
        selector._cached_get_attn_backend.cache_clear()


def softmax_topk(logits: Tensor, k: int, renormalize: bool) -> tuple[Tensor, Tensor]:
    """Weights and ids ``[T, k]`` of the ``k`` likeliest experts: softmax first, as transformers; vLLM chooses first."""
    weights, ids = logits.float().softmax(-1).topk(k, dim=-1)
    return weights / weights.sum(-1, keepdim=True) if renormalize else weights, ids.to(torch.int32)


@contextlib.contextmanager
def torch_routing():
    """Experts are chosen with it meanwhile."""
    original = cpu_router._softmax_topk
    cpu_router._softmax_topk = softmax_topk
    try:
        yield
    finally:
        cpu_router._softmax_topk = original


def exact_router_products(llm, model) -> None:
    """Compute what routers multiply in fp64 and round it once, in an engine and in transformers' model, from now on.

    vLLM's product is oneDNN's, torch's MKL's, which has one sum for a single row and another for several: their last bits are
    equal on some processors only, and experts are weighted by them.
    """
    weights = []
    for name, module in model.named_modules():
        if name.endswith("mlp.gate"):
            module.double().register_forward_pre_hook(lambda module, args: (args[0].double(),))
            weights.append(module.weight)

    def hook(served):
        gates = [module for name, module in served.named_modules() if name.endswith("block_sparse_moe.gate")]
        assert len(gates) == len(weights)
        for gate, weight in zip(gates, weights):
            gate.register_forward_hook(
                lambda module, args, output, w=weight: (F.linear(args[0].double(), w).float(), output[1])
            )

    llm.apply_model(hook)
