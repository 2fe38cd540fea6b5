// The exhaustive search of integer group scales on a CPU: every candidate row scale, every integer for every group, codes
// rounded anew each time. One pass over a group that stays in registers and L1, where PyTorch's operators make five over
// memory for each candidate.
//
// Float sums depend on their order. A decision that another order might turn is therefore not taken here: the caller takes it
// with PyTorch's operators, among the candidates that this search says for the row. All other rows get what these would give.

#include <cstdint>

namespace {

constexpr float TINY_DIFFERENCE = 8e-6f;  // relative; two orders of summing 256 squares differ by less than 1e-6
constexpr float INFINITE = 3.4e38f;
constexpr int MOST_CANDIDATES = 64;

inline float limited(float x, float low, float high) { return x < low ? low : (x > high ? high : x); }

template <int SIZE, bool WEIGHTED>
float squared_error(const float* x, const float* weights, float step, float inverse, int size) {
    float total = 0;
    const int count = SIZE ? SIZE : size;
    for (int i = 0; i < count; ++i) {
        const float code = limited(__builtin_rintf(x[i] * inverse), -8.0f, 7.0f);
        const float rest = x[i] - code * step;
        total += WEIGHTED ? rest * rest * weights[i] : rest * rest;
    }
    return total;
}

struct Found {
    float error;
    int scale;
    bool close;
};

// The best integer for one group and one row step: the smallest of equal ones.
template <int SIZE, bool WEIGHTED>
Found best_scale(const float* x, const float* weights, float absmax, double row_step, int largest, int size) {
    Found best{INFINITE, 1, false};
    if (absmax == 0) return {0, 1, false};
    for (int scale = 1; scale <= largest; ++scale) {
        const double step = row_step * scale;
        // One entry alone costs more than a whole candidate that is known: only larger steps can be better.
        const float cut = absmax - 8.01f * (float)step;
        if (!WEIGHTED && cut > 0 && cut * cut > 1.01f * best.error) continue;
        const float error = squared_error<SIZE, WEIGHTED>(x, weights, (float)step, (float)(1.0 / step), size);
        const float gap = best.error - error, margin = TINY_DIFFERENCE * error;
        if (gap > margin) {
            best = {error, scale, false};
        } else if (gap >= -margin) {
            best.close = true;
            if (gap > 0) best.error = error, best.scale = scale;
        }
        if (absmax < 0.49f * (float)step) break;  // every code is 0 from here on, and the error the same
    }
    return best;
}

template <int SIZE, bool WEIGHTED>
void search(const float* x, const float* weights, int64_t rows, int groups, int size, int largest, const double* steps,
            int candidates, int32_t* chosen, uint8_t* scales, int64_t* unsure) {
    for (int64_t row = 0; row < rows; ++row, x += (int64_t)groups * size, scales += groups) {
        float absmax[4096];
        for (int g = 0; g < groups; ++g) {
            float most = 0;
            for (int i = 0; i < size; ++i) {
                const float magnitude = __builtin_fabsf(x[(int64_t)g * size + i]);
                most = magnitude > most ? magnitude : most;
            }
            absmax[g] = most;
        }
        float least = INFINITE, totals[MOST_CANDIDATES];
        bool close = false;
        chosen[row] = 0;
        for (int c = 0; c < candidates; ++c) {
            uint8_t picked[4096];
            float total = 0;
            bool doubtful = false;
            for (int g = 0; g < groups; ++g) {
                const Found found = best_scale<SIZE, WEIGHTED>(x + (int64_t)g * size, weights ? weights + (int64_t)g * size : nullptr,
                                                               absmax[g], steps[c], largest, size);
                total += found.error;
                picked[g] = (uint8_t)found.scale;
                doubtful |= found.close;
            }
            totals[c] = total;
            if (total < least) {
                least = total;
                close = doubtful;
                chosen[row] = c;
                for (int g = 0; g < groups; ++g) scales[g] = picked[g];
            }
        }
        uint64_t best = 0;
        for (int c = 0; c < candidates; ++c)
            if (c == chosen[row] || (least > 0 && totals[c] - least <= TINY_DIFFERENCE * totals[c])) best |= uint64_t(1) << c;
        unsure[row] = close || (best & (best - 1)) ? (int64_t)best : 0;
    }
}

template <bool WEIGHTED>
void search_of_size(const float* x, const float* weights, int64_t rows, int groups, int size, int largest, const double* steps,
                    int candidates, int32_t* chosen, uint8_t* scales, int64_t* unsure) {
    switch (size) {
        case 32: return search<32, WEIGHTED>(x, weights, rows, groups, size, largest, steps, candidates, chosen, scales, unsure);
        case 64: return search<64, WEIGHTED>(x, weights, rows, groups, size, largest, steps, candidates, chosen, scales, unsure);
        case 128: return search<128, WEIGHTED>(x, weights, rows, groups, size, largest, steps, candidates, chosen, scales, unsure);
        case 256: return search<256, WEIGHTED>(x, weights, rows, groups, size, largest, steps, candidates, chosen, scales, unsure);
        default: return search<0, WEIGHTED>(x, weights, rows, groups, size, largest, steps, candidates, chosen, scales, unsure);
    }
}

}  // namespace

// x [rows, groups, size]; weights [groups, size] or null; steps [candidates]; chosen [rows]; scales [rows, groups];
// unsure [rows]: 0, or a bit for each candidate that may be the best. At most 4096 groups and 64 candidates.
extern "C" void intscale_scale_search(const float* x, const float* weights, int64_t rows, int groups, int size, int largest,
                                      const double* steps, int candidates, int32_t* chosen, uint8_t* scales, int64_t* unsure) {
    if (weights)
        search_of_size<true>(x, weights, rows, groups, size, largest, steps, candidates, chosen, scales, unsure);
    else
        search_of_size<false>(x, weights, rows, groups, size, largest, steps, candidates, chosen, scales, unsure);
}
