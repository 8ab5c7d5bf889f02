// The elementwise work around an operator, each in one pass over memory. kernels.py holds the same in PyTorch and says
// what each means; both give the same numbers bit for bit: every product, sum and rounding is written out, and the
// compiler is told not to contract.
//
// Tensors are float32, (clips, channels, pixels), dense in one of two layouts: `channels_last` != 0 holds the channels
// of a pixel side by side, else the pixels of a channel. A block of pixels stays in the cache from the magnitude to the
// codes.

#include <math.h>
#include <stdint.h>
#include <string.h>

enum { BLOCK = 64, NARROW = 16 };

static inline float quantized(float scaled, float low, float high) {
    float code = rintf(scaled);
    code = code < low ? low : code;
    return code > high ? high : code;
}

// Magnitudes are compared as the integers of their bits, which are ordered alike; NaN is the largest.
static inline int32_t magnitude_bits(float residual) {
    int32_t bits;
    memcpy(&bits, &residual, sizeof bits);
    return bits & 0x7fffffff;
}

static void largest_magnitudes(const float *restrict x, const float *restrict reference, int64_t channels, int64_t count,
                               int64_t pixel, int64_t channel, float *restrict found) {
    int32_t largest[BLOCK] = {0};
    if (channel == 1 && channels < NARROW) {  // too few to fill a vector: all of the block in one loop
        int32_t bits[BLOCK * NARROW];
        for (int64_t i = 0; i < count * channels; i++) bits[i] = magnitude_bits(x[i] - reference[i]);
        for (int64_t c = 0; c < channels; c++)
            for (int64_t p = 0; p < count; p++) {
                int32_t own = bits[p * channels + c];
                largest[p] = own > largest[p] ? own : largest[p];
            }
    } else if (channel == 1) {
        for (int64_t p = 0; p < count; p++) {
            const float *xs = x + p * pixel, *rs = reference + p * pixel;
            int32_t most = 0;
            for (int64_t c = 0; c < channels; c++) {
                int32_t bits = magnitude_bits(xs[c] - rs[c]);
                most = bits > most ? bits : most;
            }
            largest[p] = most;
        }
    } else {
        for (int64_t c = 0; c < channels; c++) {
            const float *xs = x + c * channel, *rs = reference + c * channel;
            for (int64_t p = 0; p < count; p++) {
                int32_t bits = magnitude_bits(xs[p] - rs[p]);
                largest[p] = bits > largest[p] ? bits : largest[p];
            }
        }
    }
    memcpy(found, largest, (size_t)count * sizeof(float));
}

static inline float coded(float x, float *restrict reference, float inverse, float limit, float unit, int moves,
                          float step) {
    float code = quantized((x - *reference) * inverse, -limit, limit) * unit;
    if (moves) *reference = fmaf(code, step, *reference);
    return code;
}

static void encode_block(const float *restrict x, float *restrict reference, float *restrict codes, int64_t channels,
                         int64_t count, int64_t pixel, int64_t channel, const float *inverse, const float *limit,
                         const float *unit, int moves, float step) {
    if (channel == 1 && channels < NARROW) {
        float i[BLOCK * NARROW], l[BLOCK * NARROW], u[BLOCK * NARROW];
        for (int64_t p = 0; p < count; p++)
            for (int64_t c = 0; c < channels; c++) {
                i[p * channels + c] = inverse[p];
                l[p * channels + c] = limit[p];
                u[p * channels + c] = unit[p];
            }
        for (int64_t k = 0; k < count * channels; k++) codes[k] = coded(x[k], reference + k, i[k], l[k], u[k], moves, step);
    } else if (channel == 1) {
        for (int64_t p = 0; p < count; p++) {
            const float *xs = x + p * pixel;
            float *rs = reference + p * pixel, *cs = codes + p * pixel;
            const float i = inverse[p], l = limit[p], u = unit[p];
            if (l == 0.0f) {
                memset(cs, 0, (size_t)channels * sizeof(float));
            } else if (moves) {
                for (int64_t c = 0; c < channels; c++) cs[c] = coded(xs[c], rs + c, i, l, u, 1, step);
            } else {
                for (int64_t c = 0; c < channels; c++) cs[c] = coded(xs[c], rs + c, i, l, u, 0, step);
            }
        }
    } else {
        for (int64_t c = 0; c < channels; c++) {
            const float *xs = x + c * channel;
            float *rs = reference + c * channel, *cs = codes + c * channel;
            for (int64_t p = 0; p < count; p++) cs[p] = coded(xs[p], rs + p, inverse[p], limit[p], unit[p], moves, step);
        }
    }
}

// Codes of residuals, with the reference moved by them where `moves`. `steps` holds 1 / step, largest code, units and
// cost of `entries`, one after the other. A pixel's entry is index[p]; or, where `kappas` > 0,
// index[p] * (kappas + 1) + #{j : magnitude > tau[p] * sigma * kappa[j]}.
void resq_encode(int64_t clips, int64_t channels, int64_t pixels, int64_t channels_last, int64_t threads,
                 const float *x, float *reference, float *codes, float *cost, const int64_t *index, const float *tau,
                 float sigma, const float *kappa, int64_t kappas, const float *steps, int64_t entries, int moves,
                 float step) {
    const int64_t pixel = channels_last ? channels : 1, channel = channels_last ? 1 : pixels;
    const int64_t blocks = (pixels + BLOCK - 1) / BLOCK;
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t b = 0; b < clips * blocks; b++) {
        const int64_t clip = b / blocks, first = b % blocks * BLOCK;
        const int64_t count = pixels - first < BLOCK ? pixels - first : BLOCK, at = clip * pixels + first;
        const int64_t start = clip * pixels * channels + first * pixel;
        float inverse[BLOCK], limit[BLOCK], unit[BLOCK], magnitude[BLOCK];
        if (kappas > 0)
            largest_magnitudes(x + start, reference + start, channels, count, pixel, channel, magnitude);
        for (int64_t p = 0; p < count; p++) {
            int64_t entry = index[at + p];
            if (kappas > 0) {
                const float bound = tau[at + p] * sigma;
                entry *= kappas + 1;
                for (int64_t j = 0; j < kappas; j++) entry += magnitude[p] > bound * kappa[j];
            }
            inverse[p] = steps[entry];
            limit[p] = steps[entries + entry];
            unit[p] = steps[2 * entries + entry];
            cost[at + p] = steps[3 * entries + entry];
        }
        encode_block(x + start, reference + start, codes + start, channels, count, pixel, channel, inverse, limit, unit,
                     moves, step);
    }
}

// Codes and values of `count` numbers.
void resq_encode_keyframe(int64_t count, int64_t threads, const float *restrict x, float *restrict codes,
                          float *restrict values, float step, float low, float high) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t i = 0; i < count; i++) {
        codes[i] = quantized(x[i] / step, low, high);
        values[i] = codes[i] * step;
    }
}
