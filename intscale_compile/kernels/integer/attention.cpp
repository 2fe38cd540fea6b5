// Attention over int8 codes on a CPU: the integers of kernels/integer/attention.py, to the bit. Scores and probabilities of a
// block of rows stay in the L2 cache, where operators write them to memory as int64, and keys that no row of a block sees are
// passed over.
//
// Products of codes are int16 pairs summed in int32. The product of probabilities (15 bits) and values (int32) is summed in
// double: all its partial sums are integers below 2^53 (checked by the caller), so that every one is exact in any order.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

constexpr int MANTISSA = 18, VALUE = 12, FRACTION = 16;
#if defined(__AVX512F__)
constexpr int BYTES = 64, ROWS = 8;
#elif defined(__AVX2__)
constexpr int BYTES = 32, ROWS = 4;
#else
constexpr int BYTES = 16, ROWS = 4;
#endif
// ROWS: rows of a block, queries of one head, one after the other. KEYS, FEATURES: at a time; padded to whole multiples.
constexpr int LONGS = BYTES / 8, FEATURES = 2 * LONGS;
constexpr int64_t KEYS = BYTES / 2;
typedef double Doubles __attribute__((vector_size(BYTES), aligned(8), may_alias));
typedef int64_t Longs __attribute__((vector_size(BYTES), aligned(8), may_alias));
typedef int32_t Words __attribute__((vector_size(BYTES / 2), aligned(4), may_alias));
typedef int8_t Bytes __attribute__((vector_size(BYTES / 8), aligned(1), may_alias));

#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
using Ints = __m512i;
inline Ints zero() { return _mm512_setzero_si512(); }
inline Ints load(const int32_t* p) { return _mm512_loadu_si512(p); }
inline Ints all(int32_t x) { return _mm512_set1_epi32(x); }
inline Ints add_pairs(Ints sum, Ints a, Ints b) { return _mm512_dpwssd_epi32(sum, a, b); }
inline void store(int32_t* p, Ints x) { _mm512_storeu_si512(p, x); }
#elif defined(__AVX2__)
using Ints = __m256i;
inline Ints zero() { return _mm256_setzero_si256(); }
inline Ints load(const int32_t* p) { return _mm256_loadu_si256((const __m256i*)p); }
inline Ints all(int32_t x) { return _mm256_set1_epi32(x); }
inline Ints add_pairs(Ints sum, Ints a, Ints b) { return _mm256_add_epi32(sum, _mm256_madd_epi16(a, b)); }
inline void store(int32_t* p, Ints x) { _mm256_storeu_si256((__m256i*)p, x); }
#else
struct Ints {
    int32_t of[4];
};
inline Ints zero() { return {{0, 0, 0, 0}}; }
inline Ints load(const int32_t* p) { return {{p[0], p[1], p[2], p[3]}}; }
inline Ints all(int32_t x) { return {{x, x, x, x}}; }
inline Ints add_pairs(Ints sum, Ints a, Ints b) {
    for (int i = 0; i < 4; ++i)
        sum.of[i] += (int16_t)a.of[i] * (int16_t)b.of[i] + (a.of[i] >> 16) * (b.of[i] >> 16);
    return sum;
}
inline void store(int32_t* p, Ints x) { std::memcpy(p, x.of, sizeof x); }
#endif
constexpr int WIDTH = sizeof(Ints) / 4, VECTORS = KEYS / WIDTH;

inline int64_t exponent(int32_t d) { return ((int64_t)d + (1 << (MANTISSA - 1))) >> MANTISSA; }
inline int64_t mantissa(int32_t d) { return d - (exponent(d) << MANTISSA); }
inline int64_t limited(int64_t x, int64_t low, int64_t high) { return x < low ? low : (x > high ? high : x); }
inline int64_t rsh(int64_t a, int64_t k) { return (a + ((int64_t)1 << (k - 1))) >> k; }
inline int64_t rsh_by(int64_t a, int64_t k) { return rsh(a, limited(k, 1, 62)); }
inline int64_t saturated(int64_t a) { return limited(a, INT32_MIN, INT32_MAX); }

// 2^-z with 15 fraction bits; z with 16, at most 2^20: there it is 0.
inline int32_t exp2neg(int32_t z) {
    const int32_t r = (z & 0xFFFF) >> 1;
    const int32_t square = (r * r + (1 << 14)) >> 15;
    const int32_t y = (1 << 15) - ((22020 * r + (1 << 14)) >> 15) + ((5636 * square + (1 << 14)) >> 15);
    return y >> (z >> 16);
}

struct Form {
    int64_t batch, heads, shared, tokens, keys, features, causal, c_m, c_k, threads;
    int64_t q[3], q_scale[3], k[3], k_scale[3], v[3], v_scale[3];  // strides over batch, heads and tokens
    int64_t mask[4];                                               // and over keys
};

struct Operands {
    const int8_t *q, *k, *v;
    const int32_t *q_scale, *k_scale, *v_scale;
    const uint8_t* mask;  // or null
    int32_t* out;         // [batch, heads, tokens, features]
};

inline int32_t pair_of(const int8_t* x, int64_t i, int64_t count) {
    const int32_t low = x[i], high = i + 1 < count ? x[i + 1] : 0;
    return (int32_t)((uint32_t)(uint16_t)(int16_t)low | ((uint32_t)high << 16));
}

// Keys and values of one head, packed, and the scores of one block of rows.
struct Work {
    int64_t keys, pairs, features;
    std::vector<int32_t> packed;              // [pairs, keys]
    std::vector<double> values;               // [keys, features]
    std::vector<int32_t> key_m;               // [keys]
    std::vector<int64_t> key_k, scores;       // [keys], [ROWS, keys]
    std::vector<int32_t> sums, probability;   // [ROWS, keys]
    std::vector<uint8_t> seen;                // [ROWS, keys]

    explicit Work(const Form& f)
        : keys((f.keys + KEYS - 1) / KEYS * KEYS), pairs((f.features + 1) / 2),
          features((f.features + FEATURES - 1) / FEATURES * FEATURES), packed(pairs * keys), values(keys * features),
          key_m(keys), key_k(keys), scores(ROWS * keys), sums(ROWS * keys), probability(ROWS * keys), seen(ROWS * keys) {}

    void pack(const Form& f, const Operands& o, int64_t b, int64_t g) {
        for (int64_t j = 0; j < f.keys; ++j) {
            const int8_t* k = o.k + b * f.k[0] + g * f.k[1] + j * f.k[2];
            const int8_t* v = o.v + b * f.v[0] + g * f.v[1] + j * f.v[2];
            const int32_t kd = o.k_scale[b * f.k_scale[0] + g * f.k_scale[1] + j * f.k_scale[2]];
            const int32_t vd = o.v_scale[b * f.v_scale[0] + g * f.v_scale[1] + j * f.v_scale[2]];
            for (int64_t i = 0; i < pairs; ++i) packed[i * keys + j] = pair_of(k, 2 * i, f.features);
            key_m[j] = (int32_t)mantissa(kd);
            key_k[j] = exponent(kd);
            const int64_t m = mantissa(vd), shift = limited(exponent(vd) - VALUE, 1, 62);
            double* row = &values[j * features];
            for (int64_t i = 0; i < f.features; ++i) row[i] = (double)saturated(rsh(v[i] * m, shift));
        }
    }
};

// Which keys a row sees, and their range; keys behind, up to a multiple of KEYS, are none.
inline void look(const Form& f, const Operands& o, int64_t b, int64_t h, int64_t t, uint8_t* seen, int64_t& first, int64_t& last) {
    const int64_t end = f.causal ? std::min(t + 1, f.keys) : f.keys;
    first = 0, last = end;
    if (o.mask == nullptr) {
        std::memset(seen, 1, end);
    } else {
        const uint8_t* mask = o.mask + b * f.mask[0] + h * f.mask[1] + t * f.mask[2];
        for (int64_t j = 0; j < end; ++j) seen[j] = mask[j * f.mask[3]];
        while (last > 0 && !seen[last - 1]) --last;
        while (first < last && !seen[first]) ++first;
    }
    std::memset(seen + last, 0, (KEYS - last % KEYS) % KEYS);
}

// q . k of a block of rows and the keys of [from, to), both multiples of KEYS.
void products(Work& w, const int32_t* query, int64_t from, int64_t to) {
    for (int64_t j = from; j < to; j += KEYS) {
        Ints sum[ROWS][VECTORS];
        for (int r = 0; r < ROWS; ++r)
            for (int n = 0; n < VECTORS; ++n) sum[r][n] = zero();
        for (int64_t i = 0; i < w.pairs; ++i) {
            const int32_t* k = &w.packed[i * w.keys + j];
            for (int r = 0; r < ROWS; ++r) {
                const Ints q = all(query[i * ROWS + r]);
                for (int n = 0; n < VECTORS; ++n) sum[r][n] = add_pairs(sum[r][n], load(k + n * WIDTH), q);
            }
        }
        for (int r = 0; r < ROWS; ++r)
            for (int n = 0; n < VECTORS; ++n) store(&w.sums[r * w.keys + j + n * WIDTH], sum[r][n]);
    }
}

// Probabilities of the keys [first, last) of one row, with 15 bits.
__attribute__((noinline)) void softmax(const int32_t* __restrict sum, const int32_t* __restrict key_m,
             const int64_t* __restrict key_k, const uint8_t* __restrict seen, int64_t query, int64_t shift,
             int64_t first, int64_t last, int64_t* __restrict score, int32_t* __restrict p) {
    const Longs none = Longs{} + INT64_MIN;
    Longs tops = none;
    for (int64_t j = first / LONGS * LONGS; j < last; j += LONGS) {
        Longs k = *(const Longs*)(key_k + j) + shift;
        k = k < 1 ? Longs{} + 1 : k;
        k = k > 62 ? Longs{} + 62 : k;
        const Longs product = __builtin_convertvector(*(const Words*)(sum + j), Longs) *
                              __builtin_convertvector(*(const Words*)(key_m + j), Longs) * query;
        const Longs s = (product + ((Longs{} + 1) << (k - 1))) >> k;
        *(Longs*)(score + j) = s;
        const Longs shown = __builtin_convertvector(*(const Bytes*)(seen + j), Longs) != 0 ? s : none;
        tops = shown > tops ? shown : tops;
    }
    int64_t top = INT64_MIN;
    for (int i = 0; i < LONGS; ++i) top = std::max<int64_t>(top, tops[i]);
    int64_t total = 0;
    for (int64_t start = first; start < last; start += 4096) {  // 2^12 of at most 2^15 each
        const int64_t end = std::min(start + 4096, last);
        int32_t part = 0;
        for (int64_t j = start; j < end; ++j) {
            // A hidden score may be above the top: its difference is negative, and not used.
            const int64_t z = (int64_t)((uint64_t)top - (uint64_t)score[j]);
            const int32_t e = seen[j] ? exp2neg((int32_t)(z < 0 ? 0 : (z > (1 << 20) ? (1 << 20) : z))) : 0;
            p[j] = e;
            part += e;
        }
        total += part;
    }
    // rdiv(e << 14, total) by the inverse of 2 total, 2^16 <= 2 total < 2^32: the estimate is the quotient or one less.
    const uint64_t d = 2 * (uint64_t)std::max<int64_t>(total, 1), inverse = ((uint64_t)1 << 46) / std::max<uint64_t>(d, 1 << 16);
    for (int64_t j = first; j < last; ++j) {
        const uint64_t n = ((uint64_t)(uint32_t)p[j] << 15) + (d >> 1);
        uint64_t q = ((uint64_t)(uint32_t)n * (uint32_t)inverse) >> 46;
        q += (n - (uint64_t)(uint32_t)q * (uint32_t)d) >= d;
        p[j] = (int32_t)q;
    }
}

// Sums of probabilities times values of the keys [first, last), rounded, to `count` rows of out.
void weigh(const Work& w, int64_t first, int64_t last, int count, int64_t features, int32_t* out) {
    constexpr int LANES = LONGS, PARTS = FEATURES / LANES;
    for (int64_t start = 0; start < w.features; start += FEATURES) {
        Doubles sum[ROWS][PARTS] = {};
        const double* values = &w.values[start];
        const int32_t* p = w.probability.data();
        for (int64_t j = first; j < last; ++j) {
            Doubles value[PARTS];
            for (int n = 0; n < PARTS; ++n) value[n] = *(const Doubles*)(values + j * w.features + n * LANES);
            for (int r = 0; r < ROWS; ++r) {
                const double x = (double)p[r * w.keys + j];
                for (int n = 0; n < PARTS; ++n) sum[r][n] += x * value[n];
            }
        }
        for (int r = 0; r < count; ++r)
            for (int64_t i = start; i < std::min(start + FEATURES, features); ++i) {
                const int64_t y = (int64_t)sum[r][(i - start) / LANES][(i - start) % LANES];
                out[r * features + i] = (int32_t)saturated(rsh(y, 14 + VALUE - FRACTION));
            }
    }
}

void block(const Form& f, const Operands& o, Work& w, int64_t b, int64_t h, int64_t start) {
    const int count = (int)std::min<int64_t>(ROWS, f.tokens - start);
    int64_t first[ROWS], last[ROWS], from = f.keys, to = 0;
    std::vector<int32_t> query(w.pairs * ROWS);
    for (int r = 0; r < count; ++r) {
        look(f, o, b, h, start + r, &w.seen[r * w.keys], first[r], last[r]);
        if (first[r] < last[r]) from = std::min(from, first[r]), to = std::max(to, last[r]);
        const int8_t* q = o.q + b * f.q[0] + h * f.q[1] + (start + r) * f.q[2];
        for (int64_t i = 0; i < w.pairs; ++i) query[i * ROWS + r] = pair_of(q, 2 * i, f.features);
    }
    from = std::min(from, to);
    products(w, query.data(), from / KEYS * KEYS, (to + KEYS - 1) / KEYS * KEYS);
    for (int r = 0; r < ROWS; ++r) {
        int32_t* p = &w.probability[r * w.keys];
        std::fill(p + from, p + to, 0);
        if (r >= count || first[r] >= last[r]) continue;
        const int32_t d = o.q_scale[b * f.q_scale[0] + h * f.q_scale[1] + (start + r) * f.q_scale[2]];
        softmax(&w.sums[r * w.keys], w.key_m.data(), w.key_k.data(), &w.seen[r * w.keys], (mantissa(d) * f.c_m) >> 15,
                exponent(d) + f.c_k - 31, first[r], last[r], &w.scores[r * w.keys], p);
    }
    weigh(w, from, to, count, f.features, o.out + ((b * f.heads + h) * f.tokens + start) * f.features);
}

}  // namespace

// As `Form` and `Operands` say; at most 2^15 keys.
extern "C" void intscale_integer_attention(const int8_t* q, const int32_t* q_scale, const int8_t* k, const int32_t* k_scale,
                                           const int8_t* v, const int32_t* v_scale, const uint8_t* mask, int32_t* out,
                                           const int64_t* numbers) {
    Form f;
    static_assert(sizeof(Form) == 32 * sizeof(int64_t), "the caller counts");
    std::memcpy(&f, numbers, sizeof f);
    const Operands o{q, k, v, q_scale, k_scale, v_scale, mask, out};
    const int64_t group = f.heads / f.shared, blocks = (f.tokens + ROWS - 1) / ROWS * group, pairs = f.batch * f.shared;
    // A unit packs keys and values of one head once; where there are fewer heads than threads, several do.
    const int64_t parts = std::max<int64_t>(1, std::min(blocks, (f.threads + pairs - 1) / pairs));
    std::atomic<int64_t> next{0};
    auto run = [&] {
        Work w(f);
        int64_t packed = -1;
        for (int64_t unit; (unit = next++) < pairs * parts;) {
            const int64_t pair = unit / parts, b = pair / f.shared, g = pair % f.shared;
            if (packed != pair) w.pack(f, o, b, g), packed = pair;
            for (int64_t n = unit % parts; n < blocks; n += parts) block(f, o, w, b, g * group + n % group, n / group * ROWS);
        }
    };
    std::vector<std::thread> others;
    for (int64_t i = 1; i < std::min(f.threads, pairs * parts); ++i) others.emplace_back(run);
    run();
    for (auto& other : others) other.join();
}
