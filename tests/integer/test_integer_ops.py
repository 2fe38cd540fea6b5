"""Each op of integer-only models against Python's integers, bit for bit, eager and inside of Inductor's kernels."""

import math

import pytest
import torch

from intscale_compile.kernels.integer import arithmetic, attention, cpu_attention, linear, pointwise, rows, scalar
from intscale_compile.ops import KERNEL_ABI, register_inductor
from tests.support import integers as oracle

pytestmark = pytest.mark.generated

I64 = torch.int64
EDGES = [
    0,
    1,
    -1,
    2,
    -2,
    3,
    126,
    127,
    128,
    255,
    2**15 - 1,
    2**15,
    65535,
    65536,
    2**31 - 1,
    -(2**31),
    2**30 + 1,
    -(2**30) - 1,
]


def numbers(low, high, count=200):
    """Numbers of every magnitude in ``[low, high]``, and the ends."""
    generator = torch.Generator().manual_seed(7)
    bits = max(abs(low), abs(high)).bit_length()
    values = [low, high]
    for i in range(count):
        size = torch.randint(0, 2 ** min(1 + i % bits, 62), (), generator=generator).item()
        values += [v for v in (size, -size) if low <= v <= high]
    return values


def q16(*shape, bits=20, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(-(2**bits), 2**bits, shape, dtype=I64, generator=generator)
    return x.to(torch.int32)


def dyadic(*shape, low=16, high=30, seed=3):
    generator = torch.Generator().manual_seed(seed)
    m = torch.randint(2**14, 2**15, shape, generator=generator)
    return arithmetic.pack_dyadic(m, torch.randint(low, high, shape, generator=generator))


def unary():
    yield arithmetic.ilog2, numbers(1, 2**62 - 1), lambda a: a.bit_length() - 1
    yield (
        arithmetic.isqrt,
        [*numbers(1, 2**62 - 1), *(n * n + d for n in (3, 2**15, 2**26 - 1) for d in (-1, 0, 1))],
        math.isqrt,
    )
    yield arithmetic.exp2neg, numbers(0, 2**50), oracle.exp2neg
    yield arithmetic.sigmoid, numbers(-(2**40), 2**40), oracle.sigmoid
    yield arithmetic.exponent, numbers(-(2**31), 2**31 - 1), oracle.exponent
    yield arithmetic.mantissa, numbers(-(2**31), 2**31 - 1), oracle.mantissa


@pytest.mark.parametrize("op, values, expected", [*unary()], ids=lambda v: getattr(v, "__name__", None))
def test_functions_of_one_integer(op, values, expected):
    assert op(torch.tensor(values)).tolist() == [expected(v) for v in values]


def binary():
    numerators = [*EDGES, *numbers(-(2**61), 2**61)]
    yield arithmetic.rdiv, numerators, [1, 2, 3, 127, 2**31 - 1, 2**40 + 1], oracle.rdiv
    yield arithmetic.rsh_by, numerators, [-3, 0, 1, 2, 15, 16, 31, 61, 62, 70], oracle.rsh_by
    yield arithmetic.shift, [*EDGES, *numbers(-(2**36), 2**36)], [-70, -3, -1, 0, 1, 25], oracle.shift


@pytest.mark.parametrize("op, left, right, expected", [*binary()], ids=lambda v: getattr(v, "__name__", None))
def test_functions_of_two_integers(op, left, right, expected):
    found = op(torch.tensor(left).unsqueeze(1), torch.tensor(right))
    assert found.tolist() == [[expected(a, b) for b in right] for a in left]


def test_division_of_rows_by_multiplication():
    """Exact at every quotient up to 2**15, at both sides of every rounding, for small and large divisors."""
    divisors = [1, 2, 3, 5, 127, 2**15, 2**29 + 1, 2**30 - 1, 2**30, 2**31 + 7, 2**40 - 1, 2**45]
    quotients = [0, 1, 2, 126, 127, 128, 8191, 2**14, 2**15 - 2]
    for b in divisors:
        halves = [q * b + b // 2 + d for q in quotients for d in (-1, 0, 1)]
        a = [v for v in [*halves, *(q * b for q in quotients)] if v >= 0]
        a = torch.tensor([*a, *(-v for v in a)])
        found = arithmetic.divide_rows(a, torch.tensor([b]))
        assert found.tolist() == [oracle.rdiv(v, b) for v in a.tolist()], b


def test_long_division_of_rows():
    """Quotients up to 2**28, at both sides of every rounding."""
    for b in (1, 2, 3, 127, 2**15, 2**26 - 1, 2**30 + 1):
        quotients = torch.tensor([0, 1, 2, 2**14 - 1, 2**14, 2**15, 99_999, 2**20 + 1, 2**28 - 1])
        a = (quotients.unsqueeze(1) * b + torch.tensor([0, b // 2 - 1, b // 2, b // 2 + 1, b - 1])).flatten().clamp(0)
        a = torch.cat([a, -a])
        expected = [oracle.rdiv(v, b) for v in a.tolist()]
        assert arithmetic.long_quotient(a, torch.tensor([b])).tolist() == expected, b


def test_division_of_the_sigmoid():
    """For every divisor that there is, at both sides of the quotient."""
    d = torch.arange(2**16, 2**17 + 1)
    for q in (0, 1, 2, 5000, 2**13, 2**14 - 1, 2**14):
        for n in (q * d, q * d + 1, q * d + d - 1):
            assert torch.equal(scalar._divided_near_one(scalar.OnTensors, n, d), torch.full_like(d, q))


def test_functions_inside_of_kernels():
    """One compiled kernel with every function gives what they give alone."""
    register_inductor()
    a, b, z = torch.tensor(numbers(-(2**61), 2**61)), torch.tensor(3), torch.tensor(numbers(0, 2**50))

    def every(a, b, z):
        one = a.abs().clamp(1, 2**61)
        yield from (arithmetic.rdiv(a, b), arithmetic.rsh_by(a, b), arithmetic.shift(a >> 40, a & 15))
        yield from (arithmetic.ilog2(one), arithmetic.isqrt(one), arithmetic.exp2neg(z), arithmetic.sigmoid(a >> 22))
        yield from (arithmetic.mantissa(a >> 30), arithmetic.exponent(a >> 30))
        yield from arithmetic.quantize_rows(a >> 8, 16)
        yield arithmetic.divide_rows(a >> 40, torch.full_like(b, 2**8 + 1))
        yield arithmetic.long_quotient(a >> 30, torch.full_like(b, 2**8 + 1))
        yield arithmetic.row_rdiv(a, b)

    run = lambda *args: tuple(every(*args))  # noqa: E731
    for found, expected in zip(torch.compile(run)(a, b, z), run(a, b, z)):
        assert torch.equal(found, expected)


def extreme_rows(features):
    """Ordinary rows, a row of zeros, one of the ends of int32, one with one huge channel, and codes at and beside ties."""
    x = q16(8, features)
    x[1], x[2] = 0, torch.tensor([2**31 - 1, -(2**31)]).repeat(features)[:features]
    x[3, 5] = 2**30
    x[4] = torch.arange(features) - 3
    odd = 2 * torch.arange(features) % 200 - 99
    x[6], x[7] = odd, (odd << 22) - odd.sign()  # 127 x / amax: halves, and less than halves by what 24 bits cannot say
    x[6:, 0] = torch.tensor([254, 254 << 22])
    return x


@pytest.mark.parametrize("features", [8, 100])
def test_quantize(features):
    x = extreme_rows(features)
    codes, scale = rows.QUANTIZE_OP(x)
    for i, row in enumerate(x.tolist()):
        expected, m, k = oracle.quantize(row, 16)
        assert codes[i].tolist() == expected
        assert (oracle.mantissa(scale[i].item()), oracle.exponent(scale[i].item())) == (m, k)
    assert codes.amax() == 127 and codes.amin() == -127
    exact = x.double().abs().amax(1, keepdim=True).clamp(min=1) / 127 / 2**16
    value = torch.ldexp(arithmetic.mantissa(scale).double(), -arithmetic.exponent(scale))
    assert ((value / exact - 1).abs() < 2**-15).all()


@pytest.mark.parametrize("center, with_beta", [(False, False), (True, True)], ids=["rms", "layer"])
@pytest.mark.parametrize("features", [64, 1500])
def test_norm(center, with_beta, features):
    h = extreme_rows(features)
    weight = torch.randn(features)
    gamma = arithmetic.dyadic_of(weight, 14, common=True)
    beta = torch.randint(-(2**28), 2**28, (features,)) if with_beta else None
    eps = round(1e-5 * 2 ** (48 if center else 32))
    found = rows.NORM_OP(h, gamma, beta, eps, center)
    codes, scale = rows.NORM_QUANTIZE_OP(h, gamma, beta, eps, center)
    for i, row in enumerate(h.tolist()):
        y, fraction = oracle.norm(row, gamma.tolist(), beta.tolist() if with_beta else None, eps, center)
        assert found[i].tolist() == [oracle.saturate(oracle.rsh_by(a, fraction - 16)) for a in y]
        expected, m, k = oracle.quantize(y, fraction)
        assert codes[i].tolist() == expected
        assert scale[i].item() == (k << 18) + m
    wide = h[:1].double() / 2**16
    if not center:
        exact = wide * (wide.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight
        assert ((found[:1] / 2**16 - exact).abs() < 2e-3).all()


@pytest.mark.parametrize("kind", ["silu", "gelu"])
def test_activations(kind):
    g, u = extreme_rows(40), q16(8, 40, bits=18, seed=1)
    assert pointwise.ACTIVATION_OP(g, kind).flatten().tolist() == [
        oracle.saturate(oracle.activated(a, kind)) for a in g.flatten().tolist()
    ]
    codes, scale = rows.GATE_QUANTIZE_OP(g, u, kind)
    alone, alone_scale = rows.ACTIVATION_QUANTIZE_OP(g, kind)
    for i in range(len(g)):
        product = [oracle.rsh(oracle.activated(a, kind) * b, 12) for a, b in zip(g[i].tolist(), u[i].tolist())]
        for got, got_scale, row, f in ((codes, scale, product, 20), (alone, alone_scale, None, 16)):
            row = row or [oracle.activated(a, kind) for a in g[i].tolist()]
            expected, m, k = oracle.quantize(row, f)
            assert got[i].tolist() == expected and got_scale[i].item() == (k << 18) + m
    x = torch.linspace(-6, 6, 1001)
    exact = getattr(torch.nn.functional, kind)(x.double())
    found = pointwise.ACTIVATION_OP((x * 2**16).round().to(torch.int32), kind).double() / 2**16
    assert (found - exact).abs().max() < (4e-3 if kind == "silu" else 1e-3 * 6)


def test_rotation_is_the_hadamard_transform():
    x = q16(3, 64)
    for size in (16, 32):
        codes, scale = rows.QUANTIZE_OP(x, size)
        value = codes.double() * torch.ldexp(arithmetic.mantissa(scale).double(), -arithmetic.exponent(scale))
        exact = torch.ops.intscale.hadamard(x.double().float() / 2**16, size).double()
        assert ((value - exact).abs() < exact.abs().amax(-1, keepdim=True) / 200).all()


def test_linear():
    generator = torch.Generator().manual_seed(5)
    xq = torch.randint(-127, 128, (3, 128), generator=generator).to(torch.int8)
    weight = torch.randint(-127, 128, (6, 128), generator=generator).to(torch.int8)
    xq[0], weight[0] = 127, 127
    token, row, bias = dyadic(3, 1), dyadic(6), q16(6)
    ones = torch.ones(6, 1, dtype=torch.uint8)
    for b in (bias, None):
        y = linear.LINEAR_OP(xq, token, weight, ones, row, b, 6, -1, 8, "plain", KERNEL_ABI)
        assert y.tolist() == [
            oracle.linear(c, t, weight.tolist(), row.tolist(), b.tolist() if b is not None else None)
            for c, (t,) in zip(xq.tolist(), token.tolist())
        ]


def test_rope_and_addition_and_embedding():
    x, table = q16(1, 2, 5, 16, bits=31), pointwise.rope_table(1e4 ** -torch.linspace(0, 1, 8), 32, 1.0)
    positions = torch.tensor([[0, 1, 7, 30, 31]])
    y = pointwise.ROPE_OP(x, positions, table)
    for h in range(2):
        for t, position in enumerate(positions[0].tolist()):
            assert y[0, h, t].tolist() == oracle.rope(x[0, h, t].tolist(), table[position].tolist())
    a = torch.tensor([2**31 - 1, -(2**31), 5], dtype=torch.int32)
    assert pointwise.ADD_OP(a, a).tolist() == [2**31 - 1, -(2**31), 10]
    codes, scale = torch.randint(-127, 128, (9, 4)).to(torch.int8), dyadic(9)
    expected = [
        [oracle.rsh_by(c * oracle.mantissa(d), oracle.exponent(d) - 16) for c in row]
        for row, d in zip(codes.tolist(), scale.tolist())
    ]
    assert pointwise.EMBEDDING_OP(torch.arange(9), codes, scale).tolist() == expected


@pytest.mark.parametrize("causal, masked", [(False, False), (True, False), (False, True)])
def test_attention(causal, masked):
    (batch, heads, shared, tokens, keys, features) = (2, 4, 2, 5, 5, 8)
    q, k, v = (rows.QUANTIZE_OP(q16(batch, n, keys, features, bits=18, seed=n)) for n in (heads, shared, shared + 1))
    v = (v[0][:, :shared].contiguous(), v[1][:, :shared].contiguous())
    mask = torch.rand(batch, 1, tokens, keys) < 0.6 if masked else None
    if masked:
        mask[0, 0, 2] = False  # sees nothing
    c_m, c_k = arithmetic.dyadic_number(math.log2(math.e) / math.sqrt(features))
    y = attention.ATTENTION_OP(*q, *k, *v, mask, causal, c_m, c_k)
    for b in range(batch):
        for h in range(heads):
            g = h // (heads // shared)
            for t in range(tokens):
                seen = [(not causal or j <= t) and (mask is None or mask[b, 0, t, j].item()) for j in range(keys)]
                parts = [p for x in (k, v) for p in (x[0][b, g].tolist(), x[1][b, g].flatten().tolist())]
                expected = oracle.attention(q[0][b, h, t].tolist(), q[1][b, h, t].item(), *parts, seen, c_m, c_k)
                assert y[b, h, t].tolist() == expected
    if masked:
        assert (y[0, :, 2] == 0).all()


@pytest.mark.parametrize(
    "batch, heads, shared, tokens, keys, features, masked, causal, bits",
    [
        (1, 6, 2, 37, 37, 64, False, True, 18), (2, 6, 2, 13, 77, 33, True, False, 20), (1, 1, 1, 1, 300, 128, True, False, 16),
        (3, 2, 1, 70, 70, 16, True, True, 19), (1, 2, 2, 9, 40, 16, False, False, 31),
    ],
)  # fmt: skip
def test_attention_of_the_cpu_is_the_aten_form(batch, heads, shared, tokens, keys, features, masked, causal, bits):
    """Blocks and vectors that are not whole, heads that share keys, rows that see nothing, strides, threads."""
    assert cpu_attention.library() is not None
    q = rows.QUANTIZE_OP(q16(batch, tokens, heads, features, bits=bits).transpose(1, 2))
    k = rows.QUANTIZE_OP(q16(batch, shared, keys, features, bits=bits, seed=1))
    v = rows.QUANTIZE_OP(q16(batch, keys, shared, features, bits=bits, seed=2).transpose(1, 2))
    mask = torch.rand(batch, 1, tokens, keys) < 0.3 if masked else None
    if masked:
        mask[0, 0, 0] = False
    arguments = (*q, *k, *v, mask, causal, *arithmetic.dyadic_number(math.log2(math.e) / 8))
    expected, threads = attention.attention_aten(*arguments), torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(cpu_attention, "FEW_PRODUCTS", 0)
                assert torch.equal(attention.ATTENTION_OP(*arguments), expected)
    finally:
        torch.set_num_threads(threads)


def test_attention_without_a_compiler(monkeypatch):
    parts = [part for seed in range(3) for part in rows.QUANTIZE_OP(q16(1, 2, 5, 8, seed=seed))]
    arguments = (*parts, None, True, 20000, 16)
    expected = attention.ATTENTION_OP(*arguments)
    monkeypatch.setattr(cpu_attention, "library", lambda: None)
    assert torch.equal(attention.ATTENTION_OP(*arguments), expected)


def test_dyadic_numbers():
    values = torch.tensor([1.0, 0.999999, 3e-5, 127.0, 2.0**-20, 1 / 3])
    d = arithmetic.dyadic_of(values)
    assert ((arithmetic.mantissa(d) >= 2**14) & (arithmetic.mantissa(d) < 2**15)).all()
    back = torch.ldexp(arithmetic.mantissa(d).double(), -arithmetic.exponent(d))
    assert ((back / values.double() - 1).abs() <= 2**-15).all()
    assert arithmetic.dyadic_number(0.5) == (2**14, 15)
    common = arithmetic.dyadic_of(torch.tensor([-4.0, 0.0, 0.001]), 14, common=True)
    assert len(set(arithmetic.exponent(common).tolist())) == 1 and arithmetic.mantissa(common).tolist() == [
        -(2**13),
        0,
        2,
    ]


SAMPLES = [
    (rows.QUANTIZE_OP, lambda: (q16(2, 3, 32), 16)),
    (rows.NORM_QUANTIZE_OP, lambda: (q16(2, 32), dyadic(32), None, 7, False)),
    (rows.NORM_OP, lambda: (q16(2, 32), dyadic(32), torch.ones(32, dtype=I64), 7, True)),
    (rows.GATE_QUANTIZE_OP, lambda: (q16(2, 32), q16(2, 32), "silu")),
    (rows.ACTIVATION_QUANTIZE_OP, lambda: (q16(2, 32), "gelu")),
    (pointwise.ADD_OP, lambda: (q16(2, 3), q16(2, 3))),
    (pointwise.TO_FLOAT_OP, lambda: (q16(2, 3), torch.bfloat16)),
    (attention.ATTENTION_OP, lambda: (*rows.QUANTIZE_OP(q16(1, 4, 3, 8)), *rows.QUANTIZE_OP(q16(1, 2, 5, 8)),
                                      *rows.QUANTIZE_OP(q16(1, 2, 5, 8)), None, True, 20000, 16)),
    (arithmetic.rdiv, lambda: (torch.ones(3, 1, dtype=I64), torch.ones(4, dtype=I64))),
]  # fmt: skip


@pytest.mark.parametrize("op, arguments", SAMPLES, ids=lambda v: getattr(v, "_name", None))
def test_opcheck(op, arguments):
    torch.library.opcheck(op, arguments(), test_utils=("test_schema", "test_faketensor", "test_autograd_registration"))
