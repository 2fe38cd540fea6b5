"""The named tuples of our ops' arguments: schemas, implementations that take them, nodes and gradients read by name."""

import pytest
import torch
from torch import fx

from intscale_compile import ops  # noqa: F401 (registers the ops)
from intscale_compile.kernels import arguments
from intscale_compile.kernels.arguments import (
    GatedArguments,
    GroupedArguments,
    LinearAddArguments,
    LinearArguments,
    arguments_of,
    converted,
    gradients,
)

OPERANDS = "Tensor xq, Tensor token_scale, Tensor qdata, Tensor scale, Tensor row_scale, Tensor? bias"
FORM = "int out_features, int group_size, int scale_bits, str packing, ScalarType dtype, int abi"
OPTIONS = "bool overlap=False, Tensor? zero_point=None"
SCHEMAS = {
    "w4a8_accumulate": "Tensor xq, Tensor qdata, Tensor scale, int out_features, int group_size, int scale_bits, "
    "str packing, int abi, Tensor? zero_point=None",
    "w4a8_linear": f"{OPERANDS}, {FORM}, Tensor? ste_input=None, {OPTIONS}",
    "w4a8_linear_add": f"{OPERANDS}, Tensor residual, {FORM}, {OPTIONS}",
    "w4a8_gated_linear": f"{OPERANDS}, str activation, {FORM}, {OPTIONS}",
    "w4a8_grouped_linear": f"{OPERANDS}, Tensor offsets, {FORM}, Tensor? row_index=None, Tensor? out_index=None, "
    "Tensor? ste_input=None, Tensor? zero_point=None",
    "w4a8_grouped_input_grad": "Tensor grad, Tensor qdata, Tensor scale, Tensor row_scale, Tensor offsets, int rows, "
    "int out_features, int in_features, int group_size, str packing, Tensor? row_index=None, Tensor? out_index=None, "
    "Tensor? zero_point=None",
    "dequantize_per_token": "Tensor xq, Tensor token_scale, ScalarType dtype",
    "dequantize_weight": "Tensor qdata, Tensor scale, Tensor row_scale, int out_features, int in_features, "
    "int group_size, str packing, ScalarType dtype, Tensor? zero_point=None",
}


@pytest.mark.parametrize("name", SCHEMAS)
def test_the_ops_have_the_schemas_that_saved_graphs_call(name):
    assert str(getattr(torch.ops.intscale, name).default._schema) == f"intscale::{name}({SCHEMAS[name]}) -> Tensor"


def test_every_tuple_belongs_to_an_op():
    kinds = [kind for name, kind in vars(arguments).items() if name.endswith("Arguments") and hasattr(kind, "_fields")]
    assert len(kinds) == len(SCHEMAS)
    assert {arguments.schema(kind) for kind in kinds} == {f"({text}) -> Tensor" for text in SCHEMAS.values()}


def test_arguments_of_a_node_are_read_by_name_also_where_given_by_keyword():
    graph = fx.Graph()
    x, weight, zero = (graph.placeholder(name) for name in ("x", "weight", "zero"))
    given = (x, x, weight, weight, weight, None, 64, 128, 4, "plain", torch.float32, 1)
    node = graph.call_function(torch.ops.intscale.w4a8_linear.default, given, {"zero_point": zero})
    found = arguments_of(LinearArguments, node)
    assert found.qdata is weight and found.zero_point is zero and found.out_features == 64 and not found.overlap
    gated = converted(GatedArguments, found, activation="silu")
    assert gated == (*given[:6], "silu", *given[6:], False, zero)
    assert converted(LinearAddArguments, found, residual=x) == (*given[:6], x, *given[6:], False, zero)


def test_gradients_stand_in_the_place_of_their_argument():
    names = [argument.name for argument in torch.ops.intscale.w4a8_grouped_linear.default._schema.arguments]
    found = dict(zip(names, gradients(GroupedArguments, bias="b", ste_input="x"), strict=True))
    assert {name: value for name, value in found.items() if value is not None} == {"bias": "b", "ste_input": "x"}
