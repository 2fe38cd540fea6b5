"""Why a weight was left alone: one enumeration, used by ``quantize_``, the passes and ``explain``."""

from __future__ import annotations

import enum
import functools
import logging

__all__ = ["Reason"]

OUTPUT_NAMES = ("lm_head", "lm_head.decoder")  # last parts of the name of an output embedding
SMALLEST_FEATURES = 16  # below, padding to a tile costs more than four bits save
log = logging.getLogger("intscale_compile")


class Reason(enum.Enum):
    """Reasons for leaving a candidate in its original precision; the value says it to a reader, with the mend."""

    OUTPUT_EMBEDDING = (
        "output embedding (lm_head): left in high precision; IntScaleConfig(output_embedding='w8a8') quantizes it to 8 bits, and "
        "so does naming it in filter_fn or FqnToConfig"
    )
    TIED_EMBEDDING = (
        "weight shared with an input embedding: left in high precision; IntScaleConfig(output_embedding='w8a8') gives an output "
        "embedding a weight of its own in 8 bits"
    )
    ROUTER = "router of a mixture of experts: left in high precision"
    EXPERTS = (
        "stack of expert weights in a form that no pass knows: of transformers' experts implementations, use grouped_mm, "
        "batched_mm or intscale (model.set_experts_implementation)"
    )
    ALREADY_QUANTIZED = "already quantized by intscale"
    REQUIRES_GRAD = (
        "weight requires grad in grad mode: wrap the call in torch.no_grad() or call model.requires_grad_(False)"
    )
    NOT_CONSTANT = "weight is computed in the graph, not a parameter or buffer"
    UNKNOWN_VIEW = (
        "weight reaches the product through a view that is neither the weight nor its transpose: write x @ weight.t(), or "
        "keep the weight in the shape in which it is used"
    )
    FOREIGN_SUBCLASS = "weight is another library's tensor subclass"
    SHARDED_FORM = (
        "sharded weight (DTensor) in a form that the pass local_shards does not know, on a mesh of several dimensions, or with "
        "gradients: it runs quantized through its tensor subclass, without the fusions"
    )
    SHARDED_PLAIN = "sharded weight (DTensor) that is not quantized: call quantize_ before the model is sharded"
    FAKE_WEIGHT = "weight has no data at compile time (fake tensor)"
    RAW_PARAMETER = (
        "parameter or buffer of no linear layer, which quantize_ does not choose either: left in high precision; set the "
        "option intscale.quantize_plain to include it"
    )
    NON_FINITE = "weight has NaN or Inf entries: repair the checkpoint"
    WEIGHT_DTYPE = "weight dtype is not float32, bfloat16 or float16"
    ACTIVATION_DTYPE = "activation dtype is not float32, bfloat16 or float16"
    DEVICE = "no kernel for this device, or the weight is moved between devices inside the graph"
    LEFT_OPERAND = "weight is the left operand of the product: write x @ weight.t()"
    WEIGHT_RANK = "weight is not a matrix"
    DIFFERENTIATED = (
        "inside of torch.func.grad, vjp, jvp or vmap in the compiled function: a plain weight stays as it is, a quantized "
        "one runs through its tensor subclass; compile the model alone to have it rewritten"
    )
    SCALED_ADDMM = "addmm with beta or alpha other than 1"
    BIAS_SHAPE = "the added tensor is not a bias vector of length N"
    TOO_SMALL = "fewer than 16 input or output features: nothing to gain"
    OVERFLOW_PROOF = "the int32 accumulator cannot be proved free of overflow with this configuration"
    NOT_SELECTED = "left out when the model was quantized; set the option intscale.quantize_plain to include it"
    EXCLUDED = "excluded by the option intscale.skip"
    PASS_DISABLED = (
        "the pass that rewrites it is turned off by the option intscale.disable_passes: a plain weight stays in high "
        "precision, a quantized one runs through its tensor subclass"
    )
    CONVOLUTION = "convolution: only matrix products are quantized"
    RECURRENT = "weight of a recurrent layer (nn.LSTM, nn.GRU, nn.RNN), which is one operator: left in high precision"
    EMBEDDING = "input embedding: its rows are looked up, not multiplied"
    NOT_MULTIPLIED = "parameter that is added, scaled or compared, and in no product"
    ONE_OPERATOR = (
        "inside nn.MultiheadAttention or nn.TransformerEncoderLayer, which are one operator in the graph; "
        "torch.backends.mha.set_fastpath_enabled(False) sets at least the two linears of an encoder layer free"
    )
    NOT_REACHED = (
        "in no compiled graph: not called with these inputs, or called outside of the graphs (graph break, skipped "
        "function)"
    )
    STRIDES = (
        "the strides of its result are not those of a new tensor and may be looked at (as_strided, an operator of another "
        "library, a result of the graph): put .contiguous() behind the product"
    )
    SUBGRAPH = "inside a higher-order operator (checkpoint, cond, nested_compile_region), which passes do not enter"
    UNKNOWN_FORM = "a product with this weight in a form that no pass knows"
    # Of collectives, where the option intscale.communication asks for quantized ones.
    COLLECTIVE_REDUCE_OP = "collective with a reduction other than sum: it stays plain"
    COLLECTIVE_DTYPE = "collective of a tensor that is not float32, bfloat16 or float16: it stays plain"
    COLLECTIVE_ONE_RANK = "collective over a group of one rank: there is nothing to send"
    COLLECTIVE_TOO_SMALL = (
        "collective of a message with fewer elements than one group of the wire format: it stays plain"
    )
    COLLECTIVE_BELOW_THRESHOLD = (
        "collective of fewer bytes than the threshold of its link, below which quantizing does not pay: it stays plain; set "
        "intscale.communication_min_bytes, or measure the link with intscale_compile.communication.tune_link"
    )
    COLLECTIVE_PLAIN = (
        "all_reduce whose plain form is the fastest that may be taken at its size, or the only one: the lossless kernels take "
        "bf16 and fp16 on GPUs of one host"
    )
    COLLECTIVE_NO_LOSSLESS_FORM = (
        "reduce_scatter or all_gather: only an all-reduce has other lossless forms, it stays plain"
    )
    COLLECTIVE_GATHERS_INPUT = (
        "all_gather of an input of the graph, which may be a sharded weight: only activations are quantized"
    )
    COLLECTIVE_NOT_MULTIPLIED = (
        "all_gather whose result goes into no matrix product of the graph (logits): it stays exact"
    )
    COLLECTIVE_BACKWARD = "collective in a backward graph: gradients are not quantized"
    COLLECTIVE_GROUP = "collective over a process group that is not known when the graph is compiled: it stays plain"
    COLLECTIVE_FORM = "collective in a form that the pass does not know: its result is used before it is waited for"


@functools.lru_cache(maxsize=4096)
def log_once(level: int, message: str) -> None:
    """Log ``message`` the first time that it is said in this process."""
    log.log(level, message)
