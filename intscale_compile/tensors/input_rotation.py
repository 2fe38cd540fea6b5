"""Layers whose input is rotated before they are quantized: a hook does it, until the quantized weight does it itself.

A hook that stayed would rotate for whatever weight comes next: one that was dequantized, or merged with an adapter, takes
the input as it is.
"""

from __future__ import annotations

from typing import Optional

from torch import nn

from ..kernels.hadamard import hadamard_transform

ROTATION = "_intscale_rotation"  # attribute of a module that rotates its input: the size of the Hadamard blocks


def rotate_input(module: nn.Module, args: tuple) -> Optional[tuple]:
    """Forward pre-hook of a layer that is not quantized yet; an ``IntScaleTensor`` rotates its activation itself."""
    if getattr(module.weight, "rotation", 0):
        return None
    return (hadamard_transform(args[0], getattr(module, ROTATION)), *args[1:])


def start_rotating(module: nn.Module, size: int) -> None:
    """Let a layer, whose weight was multiplied accordingly, transform its input in blocks of ``size``."""
    setattr(module, ROTATION, size)
    module.register_forward_pre_hook(rotate_input)


def hand_over_rotation(module: nn.Module) -> None:
    """Take hook and mark off a layer whose quantized weight now rotates the input; other layers stay as they are."""
    if getattr(module, ROTATION, 0) and getattr(module.weight, "rotation", 0):
        stop_rotating(module)


def stop_rotating(module: nn.Module) -> None:
    """Take hook and mark off a layer that has them."""
    if getattr(module, ROTATION, 0):
        delattr(module, ROTATION)
        for key in [key for key, hook in module._forward_pre_hooks.items() if hook is rotate_input]:
            del module._forward_pre_hooks[key]
