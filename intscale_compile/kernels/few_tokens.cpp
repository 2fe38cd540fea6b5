// The int32 accumulator of a few tokens on a CPU with AVX512-VNNI: each row of the weight is read once, packed as it is stored.
//
//     acc[m, n] = sum_g scale[n, g] * sum_{k in g} q[n, k] * xq[m, k]
//
// A 4-bit code is stored as u = q + 8, unsigned, which is what vpdpbusd takes beside a signed activation:
// sum q * x = sum u * x - 8 * sum x, and the second sum is the same for every row. Exact: nothing here saturates.

#include <cstdint>
#include <cstring>
#include <immintrin.h>
#include <vector>

namespace {

constexpr int LANES = 64;  // activations of one vector

inline __m512i load(const void* p) { return _mm512_loadu_si512(p); }

// Both halves of a block: 64 bytes hold the codes of k = 0 .. 63 in their low nibbles and those of k = 64 .. 127 in the others.
template <int M>
void packed_rows(const int8_t* x, const int32_t* minus, const uint8_t* codes, const int8_t* scale, int32_t* out, int64_t rows,
                 int64_t total_rows, int blocks, int blocks_of_group, int groups) {
    const __m512i nibble = _mm512_set1_epi8(15);
    for (int64_t n = 0; n < rows; ++n) {
        __m512i acc[M];
        for (int m = 0; m < M; ++m) acc[m] = _mm512_setzero_si512();
        const uint8_t* row = codes + n * blocks * LANES;
        for (int b = 0; b < blocks;) {
            const int end = b + blocks_of_group < blocks ? b + blocks_of_group : blocks;
            const __m512i factor = _mm512_set1_epi32((uint8_t)scale[n * groups + b / blocks_of_group]);
            __m512i part[M];
            for (int m = 0; m < M; ++m) part[m] = _mm512_setzero_si512();
            for (; b < end; ++b) {
                const __m512i both = load(row + (int64_t)b * LANES);
                const __m512i low = _mm512_and_si512(both, nibble);
                const __m512i high = _mm512_and_si512(_mm512_srli_epi16(both, 4), nibble);
                for (int m = 0; m < M; ++m) {
                    const int64_t at = ((int64_t)m * blocks + b) * 2 * LANES;
                    const int32_t* rest = minus + ((int64_t)m * blocks + b) * 32;
                    part[m] = _mm512_add_epi32(part[m], _mm512_add_epi32(load(rest), load(rest + 16)));
                    part[m] = _mm512_dpbusd_epi32(part[m], low, load(x + at));
                    part[m] = _mm512_dpbusd_epi32(part[m], high, load(x + at + LANES));
                }
            }
            for (int m = 0; m < M; ++m) acc[m] = _mm512_add_epi32(acc[m], _mm512_mullo_epi32(part[m], factor));
        }
        for (int m = 0; m < M; ++m) out[m * total_rows + n] = _mm512_reduce_add_epi32(acc[m]);
    }
}

// Groups of 32 and 64: blocks of 32 bytes, k = 0 .. 31 in the low nibbles, which are a group of their own where groups have 32.
template <int M, bool APART>
void narrow_rows(const int8_t* x, const int32_t* minus, const uint8_t* codes, const int8_t* scale, int32_t* out, int64_t rows,
                 int64_t total_rows, int blocks) {
    const __m256i nibble = _mm256_set1_epi8(15);
    const int groups = APART ? 2 * blocks : blocks;
    for (int64_t n = 0; n < rows; ++n) {
        __m256i acc[M];
        for (int m = 0; m < M; ++m) acc[m] = _mm256_setzero_si256();
        for (int b = 0; b < blocks; ++b) {
            const __m256i both = _mm256_loadu_si256((const __m256i*)(codes + (n * blocks + b) * 32));
            const __m256i low = _mm256_and_si256(both, nibble);
            const __m256i high = _mm256_and_si256(_mm256_srli_epi16(both, 4), nibble);
            const uint8_t* factors = (const uint8_t*)scale + n * groups + (APART ? 2 * b : b);
            const __m256i first = _mm256_set1_epi32(factors[0]);
            for (int m = 0; m < M; ++m) {
                const int64_t at = (int64_t)m * blocks + b;
                const __m256i* part = (const __m256i*)(x + at * 64);
                const __m256i* rest = (const __m256i*)(minus + at * 16);
                __m256i sum = _mm256_dpbusd_epi32(_mm256_loadu_si256(rest), low, _mm256_loadu_si256(part));
                __m256i other = _mm256_loadu_si256(rest + 1);
                if (APART) {
                    other = _mm256_dpbusd_epi32(other, high, _mm256_loadu_si256(part + 1));
                    const __m256i second = _mm256_set1_epi32(factors[1]);
                    acc[m] = _mm256_add_epi32(acc[m], _mm256_mullo_epi32(other, second));
                } else {
                    sum = _mm256_add_epi32(_mm256_dpbusd_epi32(sum, high, _mm256_loadu_si256(part + 1)), other);
                }
                acc[m] = _mm256_add_epi32(acc[m], _mm256_mullo_epi32(sum, first));
            }
        }
        for (int m = 0; m < M; ++m)
            out[m * total_rows + n] = _mm512_reduce_add_epi32(_mm512_zextsi256_si512(acc[m]));
    }
}

// 8-bit codes: w + 128 is unsigned, and sum w * x = sum (w + 128) * x - 128 * sum x.
template <int M>
void wide_rows(const int8_t* x, const int32_t* sums, const int8_t* codes, const int8_t* scale, int32_t* out, int64_t rows,
               int64_t total_rows, int64_t features) {
    const __m512i flip = _mm512_set1_epi8((char)0x80);
    for (int64_t n = 0; n < rows; ++n) {
        __m512i acc[M];
        for (int m = 0; m < M; ++m) acc[m] = _mm512_setzero_si512();
        for (int64_t k = 0; k < features; k += LANES) {
            const __m512i w = _mm512_xor_si512(load(codes + n * features + k), flip);
            for (int m = 0; m < M; ++m) acc[m] = _mm512_dpbusd_epi32(acc[m], w, load(x + m * features + k));
        }
        const int32_t factor = (uint8_t)scale[n];
        for (int m = 0; m < M; ++m) out[m * total_rows + n] = (_mm512_reduce_add_epi32(acc[m]) - 128 * sums[m]) * factor;
    }
}

template <int M>
void run(const int8_t* x, const int8_t* codes, const int8_t* scale, int32_t* out, int64_t rows, int64_t total_rows,
         int64_t in_features, int64_t padded, int groups, int group_size, int wide) {
    thread_local std::vector<int8_t> activations;
    thread_local std::vector<int32_t> minus;
    activations.assign(M * padded, 0);
    for (int m = 0; m < M; ++m) std::memcpy(activations.data() + m * padded, x + m * in_features, in_features);
    if (wide) {
        minus.assign(M, 0);
        for (int m = 0; m < M; ++m)
            for (int64_t k = 0; k < in_features; ++k) minus[m] += x[m * in_features + k];
        return wide_rows<M>(activations.data(), minus.data(), codes, scale, out, rows, total_rows, padded);
    }
    const int64_t vectors = M * padded / LANES;  // of 64 activations; of a narrow block both halves apart
    minus.assign((size_t)vectors * 16, 0);
    const __m256i eight = _mm256_set1_epi8(8);
    for (int64_t v = 0; v < 2 * vectors; ++v) {
        const __m256i part = _mm256_loadu_si256((const __m256i*)(activations.data() + v * 32));
        const __m256i sum = _mm256_dpbusd_epi32(_mm256_setzero_si256(), eight, part);
        _mm256_storeu_si256((__m256i*)(minus.data() + v * 8), _mm256_sub_epi32(_mm256_setzero_si256(), sum));
    }
    const auto* packed = (const uint8_t*)codes;
    if (group_size == 32 || group_size == 64) {
        const int blocks = (int)(padded / LANES);
        if (group_size == 32)
            return narrow_rows<M, true>(activations.data(), minus.data(), packed, scale, out, rows, total_rows, blocks);
        return narrow_rows<M, false>(activations.data(), minus.data(), packed, scale, out, rows, total_rows, blocks);
    }
    const int blocks = (int)(padded / (2 * LANES));
    packed_rows<M>(activations.data(), minus.data(), packed, scale, out, rows, total_rows, blocks, blocks / groups, groups);
}

}  // namespace

// Rows [first, first + rows) of out [tokens, total_rows]; x [tokens, in_features]; codes and scale begin at the first row.
extern "C" void intscale_few_tokens(const int8_t* x, const int8_t* codes, const int8_t* scale, int32_t* out, int tokens,
                                    int64_t rows, int64_t total_rows, int64_t in_features, int64_t padded, int groups,
                                    int group_size, int wide) {
    switch (tokens) {
        case 1: return run<1>(x, codes, scale, out, rows, total_rows, in_features, padded, groups, group_size, wide);
        case 2: return run<2>(x, codes, scale, out, rows, total_rows, in_features, padded, groups, group_size, wide);
        case 3: return run<3>(x, codes, scale, out, rows, total_rows, in_features, padded, groups, group_size, wide);
        default: return run<4>(x, codes, scale, out, rows, total_rows, in_features, padded, groups, group_size, wide);
    }
}
