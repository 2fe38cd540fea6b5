"""Integer-only models on a GPU: the bits of the CPU, in every way to compute them."""

import copy
from pathlib import Path

import pytest
import torch
from torchao.quantization import quantize_

from intscale_compile import IntScaleConfig, integer_only
from intscale_compile.kernels.integer import arithmetic, attention
from intscale_compile.kernels.integer.rows import QUANTIZE_OP
from tests.integer.test_integer_models import GOLDEN, in_chunks, load
from tests.integer.test_integer_ops import EDGES, numbers
from tests.support.benchmarks import load as load_benchmark
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.gpu
transformers = pytest.importorskip("transformers")
RANKS = Path(__file__).parents[1] / "integer" / "_ranks_main.py"
bench = load_benchmark(("perplexity",)).perplexity


def test_functions_of_integers():
    a = torch.tensor([*EDGES, *numbers(-(2**61), 2**61)])
    b, one = torch.tensor([1, 2, 3, 127, 2**31 - 1]).unsqueeze(1), a.abs().clamp(1, 2**61)

    def run(a, b, one):
        found = [arithmetic.rdiv(a, b), arithmetic.rsh_by(a, b & 63), arithmetic.shift(a >> 40, b & 15)]
        found += [
            arithmetic.ilog2(one),
            arithmetic.isqrt(one),
            arithmetic.exp2neg(one >> 12),
            arithmetic.sigmoid(a >> 22),
        ]
        return [*found, *arithmetic.quantize_rows(a.unsqueeze(0) >> 8, 16)]

    expected = run(a, b, one)
    on_gpu = [x.cuda() for x in (a, b, one)]
    for found in (run(*on_gpu), torch.compile(run, backend="intscale")(*on_gpu)):
        assert all(torch.equal(x.cpu(), y) for x, y in zip(found, expected))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(
    "tokens, keys, features", [(1, 300, 64), (1, 5000, 128), (3, 40, 80), (77, 77, 128), (130, 130, 32)]
)
def test_attention(tokens, keys, features, fused, monkeypatch):
    from intscale_compile.kernels.integer import triton_attention

    monkeypatch.setattr(triton_attention, "FUSED", fused)
    draw = lambda *shape: torch.randint(-(2**19), 2**19, shape).to(torch.int32)  # noqa: E731
    operands = [*QUANTIZE_OP(draw(2, 8, tokens, features))]
    for _ in range(2):
        operands += QUANTIZE_OP(draw(2, 2, keys, features))
    mask = torch.rand(2, 1, tokens, keys) < 0.7
    for seen, causal in ((None, tokens == keys), (mask, False)):
        arguments = (*operands, seen, causal, 23000, 18)
        on_gpu = [x.cuda() if isinstance(x, torch.Tensor) else x for x in arguments]
        assert torch.equal(attention.ATTENTION_OP(*on_gpu).cpu(), attention.ATTENTION_OP(*arguments))


@pytest.fixture(scope="module")
def short(models_dir):
    return load(models_dir / "tiny-llama", layers=2)


@pytest.fixture(scope="module")
def ids(models_dir):
    tokenizer = transformers.AutoTokenizer.from_pretrained(models_dir / "tiny-llama")
    texts = bench.held_out_sequences(tokenizer, models_dir / "heldout_stdlib_modules.txt", 24, 512)
    return texts[:8, :24].contiguous()


@pytest.fixture(scope="module")
def expected(short, ids):
    with torch.no_grad():
        return integer_only.run_eagerly(short)(ids, use_cache=False).logits


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_bits_of_the_cpu(short, ids, expected, compiled):
    model, ids = copy.deepcopy(short).cuda(), ids.cuda()
    run = integer_only.run_eagerly(model)
    if compiled:
        run = torch.compile(model, backend="intscale", options=integer_only.OPTIONS, fullgraph=True)
    with torch.no_grad():
        for batch in (8, 1, 2):
            logits = run(ids[:batch], use_cache=False).logits.cpu()
            assert torch.equal(logits, expected[:batch]), f"batch of {batch}"
        assert integer_only.hash_logits(logits[0, -1, :12]) == GOLDEN
        assert torch.equal(run(ids[:2, :9], use_cache=False).logits.cpu(), expected[:2, :9])
        found, _ = in_chunks(run, ids[:2], (7, 9, 1, 1, 1, 5))
    assert torch.equal(found.cpu(), expected[:2])


def test_bits_of_a_linear_of_every_schedule():
    """4-bit scales fold, 8-bit ones do not; rows and features that are not whole tiles."""
    for config in ({}, {"scale_bits": 8}, {"group_size": 32}, {"weight_bits": 8, "group_size": -1}):
        model = torch.nn.Sequential(torch.nn.Embedding(40, 200), torch.nn.Linear(200, 72)).eval().requires_grad_(False)
        quantize_(model, IntScaleConfig(**config))
        ids = torch.arange(40)[None]
        with torch.no_grad():
            expected = integer_only.run_eagerly(model)(ids)
            on_gpu = copy.deepcopy(model).cuda()
            torch._dynamo.reset()
            found = torch.compile(on_gpu, backend="intscale", options=integer_only.OPTIONS)(ids.cuda())
        assert torch.equal(found.cpu(), expected), config
        torch._dynamo.reset()


def test_proof(short, ids):
    proof = integer_only.prove(copy.deepcopy(short).cuda(), ids.cuda(), use_cache=False)
    assert proof.holds and proof.kernels > 5, str(proof)


@pytest.mark.two_gpus
def test_two_ranks_have_the_bits_of_one(tmp_path):
    """Over NCCL; what one rank computes on a CPU is expected."""
    for seen in run_ranks(RANKS, 2, tmp_path, "cuda", "compiled", fork=False):
        assert {name: value for name, value in seen.items() if value is False} == {} and len(seen) == 7
