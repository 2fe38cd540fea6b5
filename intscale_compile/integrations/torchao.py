"""What we use of torchao beyond its public API."""

from __future__ import annotations

from torchao.quantization import quant_api

is_linear = quant_api._is_linear
