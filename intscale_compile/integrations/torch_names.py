"""Names of torch beyond its public API that files of ours import, with what each is for.

torch has an upper bound (``versions.SUPPORTED``), so a name that is there at import, or when something compiles first, stays
what it was checked to be: files above import these names directly.
"""

from __future__ import annotations

import torch

from .registry import PrivateName, check_names

AT_IMPORT = {
    "torch._C:DisableTorchFunctionSubclass": "operators on the tensor subclass without its torch functions",
    "torch._C:DisableTorchFunction": "calibration's own products",
    "torch._C._nn:linear": "recognizing F.linear in a graph",
    "torch._C._nn:gelu": "recognizing F.gelu in a graph",
    "torch._C._nn:scaled_dot_product_attention": "recognizing attention in a graph",
    "torch._C:_set_grad_enabled": "recognizing grad mode in a graph",
    "torch:_int_mm": "integer products on a CPU and the oracles",
    "torch:_grouped_mm": "products with a stack of experts",
    "torch:_foreach_add_": "changing many tensors at once",
    "torch:_native_multi_head_attention": "recognizing nn.MultiheadAttention's fast path in a graph",
    "torch:_transformer_encoder_layer_fwd": "recognizing nn.TransformerEncoderLayer's fast path in a graph",
    "torch._utils:_set_obj_state": "unpickling the tensor subclass",
    "torch._ops:OpOverload": "recognizing operators in a graph",
    "torch:ops.aten.add.Tensor._schema": "arguments of an operator by name",
    "torch._ops:HigherOrderOperator": "recognizing checkpoint, cond and their like in a graph",
    "torch._subclasses.fake_tensor:FakeTensor": "weights without data",
    "torch._subclasses.fake_tensor:FakeTensorMode": "shapes of kernels that are compiled ahead",
    "torch._subclasses.fake_tensor:unset_fake_temporarily": "masks that are evaluated while a graph is compiled",
    "torch._dispatch.python:enable_python_dispatcher": "example values of what a pass emits",
    "torch._guards:detect_fake_mode": "example values of what a pass emits",
    "torch._logging:trace_structured": "what tlparse shows of a compilation",
    "torch.utils._pytree:tree_map": "nested inputs and outputs",
    "torch.utils._pytree:tree_leaves": "nested inputs and outputs",
    "torch.utils._pytree:arg_tree_leaves": "operands of a node",
    "torch.utils._pytree:tree_flatten": "comparing nested arguments",
    "torch.utils._python_dispatch:return_and_correct_aliasing": "views of the tensor subclass",
    "torch.utils._python_dispatch:TorchDispatchMode": "kernels that are launched without torch's dispatcher",
    "torch._C:_len_torch_dispatch_stack": "whether a dispatch mode is on",
    "torch._C:_is_tracing": "whether torch.jit traces",
    "torch._C:_is_fwd_grad_enabled": "whether tensors may carry tangents",
    "torch.autograd.forward_ad:_current_level": "whether tensors may carry tangents",
    "torch._C._functorch:peek_interpreter_stack": "whether a transform of torch.func is on",
    "torch._C._functorch:get_interpreter_stack": "which transforms of torch.func are on",
    "torch._C._functorch:TransformType.Grad": "which transforms of torch.func are on",
    "torch._C._functorch:TransformType.Jvp": "which transforms of torch.func are on",
    "torch._C._functorch:_grad_increment_nesting": "recognizing transforms of torch.func in a graph",
    "torch._C._functorch:_jvp_increment_nesting": "recognizing transforms of torch.func in a graph",
    "torch.nn.modules.conv:_ConvNd": "weights of convolutions",
    "torch.fx.node:_get_qualified_name": "nodes as text",
    "torch.fx.graph_module:_format_import_block": "graphs as Python files",
    "torch:Tensor._make_wrapper_subclass": "making the tensor subclass",
    "torch:Tensor._version": "noticing that a tensor was written to",
    "torch:Tensor._base": "row slices that share a joined weight's memory",
    "torch:Tensor._is_view": "shards that own their memory",
    "torch:UntypedStorage._cdata": "telling memory apart",
    "torch.fx:Node._args": "noticing that a pass changed a node",
    "torch.fx:Node._kwargs": "noticing that a pass changed a node",
    "torch.fx:Node._erased": "nodes that a pass erased before",
}
AT_COMPILE = {
    "torch._inductor:config": "Inductor's settings",
    "torch._inductor:list_mode_options": "modes of torch.compile",
    "torch._inductor.compile_fx:compile_fx": "compiling the rewritten graph",
    "torch._inductor:ir": "lowerings of our ops",
    "torch._inductor.kernel.mm_common:mm_grid": "grids of our templates",
    "torch._inductor.lowering:empty": "lowerings of our ops",
    "torch._inductor.lowering:fallback_handler": "ops that run as they are",
    "torch._inductor.lowering:make_pointwise": "functions of integers inside of kernels",
    "torch._inductor.virtualized:ops": "functions of integers inside of kernels",
    "torch._inductor.utils:run_and_get_code": "reading the generated kernels of an integer-only model",
    "torch._inductor.lowering:lowerings": "lowerings of our ops",
    "torch._inductor.lowering:register_lowering": "lowerings of our ops",
    "torch._inductor.select_algorithm:TritonTemplate": "templates of our kernels",
    "torch._inductor.utils:triton_type": "dtypes in templates",
    "torch._inductor.virtualized:V": "the graph that is lowered",
    "torch._inductor.decomposition:register_decomposition": "the quantizers as parts that fuse",
    "torch._inductor.custom_graph_pass:CustomGraphPass": "the pass over collectives",
    "torch._inductor.runtime.runtime_utils:cache_dir": "the folder of the compiled CPU codec",
    "torch._inductor.runtime.runtime_utils:triton_cache_dir": "the folder of kernels that are compiled ahead",
    "torch._inductor.runtime.hints:ReductionHint.INNER": "reductions over rows",
    "torch._inductor.choices:InductorChoices": "rows that stay in registers",
    "torch._inductor.virtualized:V.set_choices_handler": "rows that stay in registers",
    "torch._inductor.codecache:PyCodeCache.modules": "the generated files that debug shows",
    "torch._inductor.codecache:PyCodeCache.load": "compiling a generated kernel anew to read it",
    "torch._dynamo:disable": "what Dynamo must not trace",
    "torch._dynamo:export": "the graph of a whole model that is exported",
    "torch._inductor:aoti_compile_and_package": "packages of exported programs",
    "torch._dynamo:reset": "benchmarks and the self check compile anew",
    "torch._dynamo.utils:counters": "counts of what was compiled",
    "torch._dynamo.source:LocalSource": "inputs that keep their address",
    "torch._dynamo.source:Source": "guards on quantized weights",
    "torch._dynamo.source:AttrSource": "guards on quantized weights",
    "torch._dynamo.source:ChainedSource.__dataclass_fields__": "guards on quantized weights",
    "torch._dynamo.source:SubclassAttrListSource": "guards on quantized weights",
    "torch._dynamo.backends.common:aot_autograd": "explain's view of collectives",
    "torch._guards:TracingContext.try_get": "guards on quantized weights",
    "torch._guards:GuardsSet.remove_guards_with_source": "guards on quantized weights",
    "torch._guards:OrderedSet": "guards on quantized weights",
    "torch._C:_storage_Use_Count": "whether anything else holds the memory of weights that are joined",
}
for _names, _when in ((AT_IMPORT, "import"), (AT_COMPILE, "compile")):
    for _target, _purpose in _names.items():
        PrivateName(_target, _purpose, when=_when)
PrivateName(
    "torch.nn:Module._parameters, _forward_pre_hooks, _forward_hooks",
    "finding weights that are computed before each call",
    probe=lambda: {"_parameters", "_forward_pre_hooks", "_forward_hooks"} <= vars(torch.nn.Module()).keys(),
)
PrivateName(
    "torch.nn:Module._buffers",
    "dividing buffers among ranks",
    probe=lambda: isinstance(getattr(torch.nn.Module(), "_buffers", None), dict),
)

# Only builds and platforms that have collectives.
AT_USE = {
    "torch.distributed.distributed_c10d:_world.pg_map": "checking that ranks agree",
    "torch.distributed.distributed_c10d:_world.pg_names": "groups by name",
    "torch.distributed.distributed_c10d:_get_default_timeout": "checking that ranks agree",
    "torch.distributed.distributed_c10d:_get_default_group": "collectives without a group",
    "torch.distributed.distributed_c10d:_resolve_process_group": "groups by name",
    "torch.distributed:ProcessGroup._get_backend": "the timeout of a group",
    "torch.distributed:ProcessGroup._device_types": "the devices of a group",
    "torch._C._distributed_c10d:Backend.Options._timeout": "the timeout of a group",
    "torch.distributed:_functional_collectives": "collectives of a divided model",
    "torch.distributed.tensor:DTensor._local_tensor": "the shard of a rank",
    "torch.cuda:_sleep": "timing kernels behind a busy GPU",
    "torch.distributed._symmetric_memory:rendezvous": "all-reduce over symmetric memory",
    "torch:ops._c10d_functional.all_reduce": "collectives in a graph",
}
if torch.distributed.is_available():
    for _target, _purpose in AT_USE.items():
        PrivateName(_target, _purpose)


def check_import() -> None:
    """Raise ``VersionError`` unless every name is there that files above import directly."""
    check_names("import")


def check_compile() -> None:
    """The same for what is imported when something compiles first; imports Inductor and Dynamo."""
    check_names("compile")
