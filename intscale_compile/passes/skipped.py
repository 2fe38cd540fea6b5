"""Which weights the option ``intscale.skip`` leaves alone, and a word where a pattern cannot mean what it says.

Dynamo names a weight from the module whose ``forward`` it traces. Behind a graph break inside a layer, or where layers are
compiled one by one, that is the layer and not the model, and one graph serves all layers that are alike: a pattern with
the number of a layer can then not be followed.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from functools import cached_property

from torch import Tensor

from ..integrations.torch import outermost_module
from ..reasons import log_once


class Skipped:
    """Weights left alone by name.

    Args:
        patterns: of the option; each has to match a whole name.
    """

    def __init__(self, patterns: Sequence[str]):
        self.patterns = patterns

    def __call__(self, name: str, tensor: Tensor) -> bool:
        """Whether a pattern matches ``name``, which Dynamo gave; says so where one matches the name in the model instead."""
        if any(re.fullmatch(pattern, name) for pattern in self.patterns):
            return True
        if not self.patterns or self._whole_names.get(id(tensor), name) == name:
            return False
        # One graph serves every layer that is alike, not only the one of this tensor.
        alike = [whole for whole in self._whole_names.values() if whole.endswith(f".{name}")]
        missed = ((pattern, whole) for pattern in self.patterns for whole in alike if re.fullmatch(pattern, whole))
        for pattern, whole in missed:
            log_once(
                logging.WARNING,
                f"option intscale.skip: {pattern!r} matches {whole!r}, but this graph was traced from inside of the model and "
                f"has only {name!r}, for all layers alike: the weight is not skipped. Write a pattern for that name, leave the "
                "weight out of quantize_, or remove the graph break (TORCH_LOGS=graph_breaks shows it).",
            )
            break
        return False

    @cached_property
    def _whole_names(self) -> dict[int, str]:
        """Names by identity of the parameters of the outermost module whose call is under way."""
        outermost = outermost_module()
        found = outermost.named_parameters() if outermost is not None else ()
        return {id(tensor): name.replace("_orig_mod.", "") for name, tensor in found}
