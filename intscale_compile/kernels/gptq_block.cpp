// Rounding the columns of a block of GPTQ one after the other, on a CPU: the operations and their order are those of
// calibration/gptq.py, so the bits are too where PyTorch's BLAS rounds a product and a sum at once, as here. A strip of rows
// stays in L1 for all columns, where PyTorch's operators write it to memory once for each.

#include <cstdint>

namespace {

constexpr int STRIP = 64;  // rows at a time

inline float limited(float x, float low, float high) { return x < low ? low : (x > high ? high : x); }

}  // namespace

// target, reference, steps: row n, column c at [n * stride + c], each with a stride of its own; rows [columns, row_stride].
// codes, errors: [columns, n]. At most 128 columns.
extern "C" void intscale_gptq_block(const float* target, int64_t target_stride, const float* reference, int64_t reference_stride,
                                    const float* steps, int64_t steps_stride, const float* rows, int64_t row_stride, int64_t n,
                                    int columns, float low, float high, int8_t* codes, float* errors) {
    alignas(64) float rest[128][STRIP];
    alignas(64) float error[STRIP];
    for (int64_t start = 0; start < n; start += STRIP) {
        const int count = (int)(n - start < STRIP ? n - start : STRIP);
        for (int r = 0; r < count; ++r)
            for (int c = 0; c < columns; ++c) rest[c][r] = target[(start + r) * target_stride + c];
        for (int r = count; r < STRIP; ++r)
            for (int c = 0; c < columns; ++c) rest[c][r] = 0;
        for (int j = 0; j < columns; ++j) {
            for (int r = 0; r < STRIP; ++r) error[r] = 0;
            for (int r = 0; r < count; ++r) {
                const float step = steps[(start + r) * steps_stride + j];
                const float code = limited(__builtin_rintf(rest[j][r] / step), low, high);
                codes[j * n + start + r] = (int8_t)code;
                error[r] = reference[(start + r) * reference_stride + j] - code * step;
            }
            for (int r = 0; r < count; ++r) errors[j * n + start + r] = error[r];
            for (int i = j + 1; i < columns; ++i) {
                const float factor = rows[j * row_stride + i];
                for (int r = 0; r < STRIP; ++r) rest[i][r] = __builtin_fmaf(factor, error[r], rest[i][r]);
            }
        }
    }
}
