"""Roofline of a W4A8 product: the time that its bytes and its int8 operations need at least on a known GPU.

    predicted = max(bytes moved / memory bandwidth, 2 * M * N * K / int8 operations per second)

(Williams, Waterman, Patterson: Roofline, CACM 2009). For the GPU that this project has measured, both rates are those that
were reached there, so the prediction is a time to expect; for the others they are the vendor's peaks, so it is a bound.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Optional

from ..errors import ConfigError

MEASURED = "benchmarks/results/2026-11-22-h100-gemm.md"


@dataclass(frozen=True)
class Gpu:
    """Rates of one GPU.

    Attributes:
        name: as it is shown, and as ``explain(gpu=...)`` takes it.
        pattern: whole words of ``torch.cuda.get_device_name()``; the first entry of the table that fits is taken.
        bandwidth: of its memory, in bytes per second.
        int8: dense int8 operations per second of its tensor cores; a multiplication and an addition are two.
        source: where the rates come from.
    """

    name: str
    pattern: str
    bandwidth: float
    int8: float
    source: str

    @property
    def measured(self) -> bool:
        """Whether the rates are those that were reached, not the vendor's peaks."""
        return self.source.startswith("benchmarks/")


# 2437 GB/s: a large copy, read and written. 1179 TOPS: our kernel at 28672 x 4096 and 4096 tokens, 816 us. The data sheet says
# 3350 GB/s and 1979 TOPS.
GPUS = (
    Gpu("H100", "H100 80GB HBM3", 2437e9, 1179e12, MEASURED),
    Gpu("H100 NVL", "H100 NVL", 3938e9, 1671e12, "NVIDIA H100 data sheet"),
    Gpu("H100 PCIe", "H100 PCIe", 2000e9, 1513e12, "NVIDIA H100 data sheet"),
    Gpu("H200", "H200", 4800e9, 1979e12, "NVIDIA H200 data sheet"),
    Gpu("B200", "B200", 8000e9, 4500e12, "NVIDIA HGX B200 data sheet"),
    Gpu("A100 80GB", "A100-SXM4-80GB", 2039e9, 624e12, "NVIDIA A100 data sheet"),
    Gpu("A100 80GB PCIe", "A100 80GB PCIe", 1935e9, 624e12, "NVIDIA A100 data sheet"),
    Gpu("A100 40GB", "A100", 1555e9, 624e12, "NVIDIA A100 data sheet"),
    Gpu("A10", "A10", 600e9, 250e12, "NVIDIA A10 data sheet"),
    Gpu("L40S", "L40S", 864e9, 733e12, "NVIDIA L40S data sheet"),
    Gpu("L4", "L4", 300e9, 242e12, "NVIDIA L4 data sheet"),
    Gpu("RTX 4090", "RTX 4090", 1008e9, 660.6e12, "NVIDIA Ada architecture white paper"),
    Gpu("RTX 3090", "RTX 3090", 936e9, 284e12, "NVIDIA Ampere GA102 white paper"),
    Gpu("MI300X", "MI300X", 5300e9, 2614.9e12, "AMD Instinct MI300X data sheet"),
)
ASSUMED = GPUS[0]


def gpu_named(name: str) -> Gpu:
    """The entry of the table with this name.

    Raises:
        ConfigError: there is none.
    """
    for gpu in GPUS:
        if gpu.name.lower() == name.lower():
            return gpu
    raise ConfigError(f"gpu={name!r} is not known: use one of {[gpu.name for gpu in GPUS]}.")


def gpu_of_device(device_name: str) -> Optional[Gpu]:
    """The entry for a device as CUDA names it, or None."""
    return next((gpu for gpu in GPUS if re.search(rf"\b{gpu.pattern}\b", device_name)), None)


def predict_us(gpu: Gpu, moved_bytes: float, operations: float) -> tuple[float, str]:
    """Microseconds that a product needs, and what limits it: ``"memory"`` or ``"int8"``."""
    memory, arithmetic = moved_bytes / gpu.bandwidth * 1e6, operations / gpu.int8 * 1e6
    return max(memory, arithmetic), "memory" if memory >= arithmetic else "int8"
