"""Machine code of decode attention for GPUs that are not here: tensor cores, no spills; and its schema on a CPU."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget

from intscale_compile.errors import InputError
from intscale_compile.kernels.decode_attention import OP, unsupported
from intscale_compile.kernels.triton_attention import MOST_PARTS, decode_attention_kernel, launch_options
from intscale_compile.ops import KERNEL_ABI
from tests.support.sass import assemble

POINTERS = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "out_ptr"), "*bf16")
POINTERS |= dict.fromkeys(("partial_ptr", "stats_ptr"), "*fp32") | {"counter_ptr": "*i32", "log2_scale": "fp32"}
INTEGERS = (
    "L", "parts", "key_heads", "q_batch", "q_head", "k_batch", "k_head", "k_stride", "v_batch", "v_head", "v_stride",
    "mask_batch", "mask_head", "mask_stride",
)  # fmt: skip
MASK_TYPES = {"none": "*bf16", "bool": "*i1", "heads": "*i1", "float": "*bf16"}
TENSOR_CORE = ("HMMA", "HGMMA")


def compile_kernel(target: GPUTarget, mask: str, heads: int = 4, features: int = 128, steps: int = 1, overlap=False):
    """As ``decode_attention_cuda`` launches it."""
    signature = POINTERS | dict.fromkeys(INTEGERS, "i32") | {"mask_ptr": MASK_TYPES[mask]}
    constants = dict(HEADS=heads, ROWS=16, D=features, BLOCK_D=max(16, 1 << (features - 1).bit_length()), BLOCK_L=64)
    constants |= dict(STEPS=steps, MASK=mask, SPLIT=True, OVERLAP=overlap, SUM_ROWS=heads, MOST=MOST_PARTS)
    aligned = [name for name in signature if name not in ("L", "parts", "key_heads", "log2_scale", "mask_ptr")]
    aligned = [name for name in aligned if not name.startswith("mask_")]
    capability = divmod(target.arch, 10) if target.backend == "cuda" else None
    options = {**launch_options(mask, constants["BLOCK_D"], capability), **({"launch_pdl": True} if overlap else {})}
    return assemble(decode_attention_kernel, signature, constants, target, aligned=aligned, **options)


# Features, heads, steps: the largest, and 80, which are worked on as 128.
SIZES = {90: ((80, 4, 1), (128, 8, 4)), 80: ((128, 8, 1),)}
OTHER_SIZES = {90: ((64, 1, 1),), 80: ((80, 4, 4),)}


NVIDIA = [(80, "float"), *((90, mask) for mask in MASK_TYPES if mask != "none")]  # with a mask is more code
NVIDIA += [pytest.param(80, mask, marks=pytest.mark.slow) for mask in MASK_TYPES if mask != "float"]
NVIDIA += [pytest.param(90, "none", marks=pytest.mark.slow)]
NVIDIA += [pytest.param(a, f"{m}, other sizes", marks=pytest.mark.slow) for a in (80, 90) for m in ("float", "none")]


def sizes_of(arch: int, mask: str) -> tuple[tuple[int, int, int], ...]:
    kind, _, others = mask.partition(", ")
    if kind == "float":
        return OTHER_SIZES[arch] if others else SIZES[arch]
    return (*OTHER_SIZES[arch], *SIZES[arch][:-1]) if others else SIZES[arch][-1:]


def compile_sizes(arch: int, mask: str) -> list:
    target, kind = GPUTarget("cuda", arch, 32), mask.partition(",")[0]
    return [compile_kernel(target, kind, h, f, s, overlap=arch == 90) for f, h, s in sizes_of(arch, mask)]


@pytest.mark.assembles(kernel=compile_sizes)
@pytest.mark.parametrize("arch, mask", NVIDIA)
def test_nvidia(arch, mask, code):
    for (features, heads, steps), one in zip(sizes_of(arch, mask), code, strict=True):
        assert any(one.count(opcode) for opcode in TENSOR_CORE), one.opcodes()
        # 80 features are worked on as 128, with two masks: four registers do not fit, outside of the loop.
        least = 16 if features == 80 else 0
        assert one.spill_bytes <= least, (features, heads, steps)
        assert ("griddepcontrol.wait" in one.asm["ptx"]) is (arch == 90)
        assert one.shared <= 99 << 10, "what consumer GPUs have"


@pytest.mark.parametrize(
    "mask", ["float", *(pytest.param(m, marks=pytest.mark.slow) for m in ("none", "bool", "heads"))]
)
def test_amd(mask):
    compiled = compile_kernel(GPUTarget("hip", "gfx942", 64), mask)
    assert "v_mfma_f32" in compiled.asm["amdgcn"] and len(compiled.asm["hsaco"]) > 0


def operands(dtype=torch.bfloat16, heads=8, key_heads=2, keys=20):
    q = torch.randn(2, 1, heads, 64, dtype=dtype).transpose(1, 2)
    return q, *(torch.randn(2, key_heads, keys, 64, dtype=dtype) for _ in range(2))


@pytest.mark.parametrize("mask, dtype", [("none", torch.bfloat16), ("bool", torch.float16), ("float", torch.bfloat16)])
def test_opcheck(mask, dtype):
    visible = torch.rand(2, 1, 1, 20) > 0.3
    given = {"none": None, "bool": visible, "float": torch.randn(2, 8, 1, 20, dtype=dtype)}[mask]
    for overlap in (False, True):
        torch.library.opcheck(OP, (*operands(dtype), given, 0.2, KERNEL_ABI, overlap))


def test_on_a_cpu_it_is_attention():
    q, k, v = operands()
    mask = torch.rand(2, 1, 1, 20) > 0.3
    y = OP(q, k, v, mask, 0.2, KERNEL_ABI)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, scale=0.2, enable_gqa=True)
    assert torch.equal(y, expected) and y.stride() == (512, 64, 64, 1)


BAD = {
    "two queries": lambda q, k, v: (q.expand(-1, -1, 2, -1), k, v, None),
    "fp32": lambda q, k, v: (q.float(), k.float(), v.float(), None),
    "two dtypes": lambda q, k, v: (q, k.half(), v, None),
    "other heads": lambda q, k, v: (q[:, :7], k, v, None),
    "other batch": lambda q, k, v: (q[:1], k, v, None),
    "other values": lambda q, k, v: (q, k, v[:, :, :-1], None),
    "three dimensions": lambda q, k, v: (q[0], k[0], v[0], None),
    "two-dimensional mask": lambda q, k, v: (q, k, v, torch.ones(1, 20, dtype=torch.bool)),
    "integer mask": lambda q, k, v: (q, k, v, torch.ones(1, 1, 1, 20, dtype=torch.int32)),
}


@pytest.mark.parametrize("case", BAD)
def test_other_operands_are_refused(case):
    bad = BAD[case](*operands())
    assert unsupported(*bad)
    with pytest.raises(InputError, match="decode_attention"):
        OP(*bad, 0.2, KERNEL_ABI)
