"""While the tests of passes run: whatever a pass puts in the place of a value has its strides, or no reader looks at them."""

import pytest
from torch import Tensor, fx

from intscale_compile.passes.base import example
from intscale_compile.passes.layout import READS_LAYOUT, same_layout
from tests.support.layouts import memory


@pytest.fixture(autouse=True)
def replaced_values_keep_their_strides(monkeypatch):
    replace = fx.Node.replace_all_uses_with

    def checked(self, other, *args, **kwargs):
        old, new = example(self), example(other)
        if isinstance(old, Tensor) and isinstance(new, Tensor) and not same_layout(old, new):
            assert_nobody_looks(self, new)
        return replace(self, other, *args, **kwargs)

    monkeypatch.setattr(fx.Node, "replace_all_uses_with", checked)


def assert_nobody_looks(node: fx.Node, value: Tensor) -> None:
    for reader in node.users:
        name = reader.target if isinstance(reader.target, str) else getattr(reader.target, "__name__", "")
        assert reader.op != "output" and name not in READS_LAYOUT, f"{reader.format_node()} reads the strides of {node}"
        if not memory(example(reader)).isdisjoint(memory(value)):
            assert_nobody_looks(reader, example(reader))
