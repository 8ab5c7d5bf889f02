// The elementwise work around an operator, each in one pass over memory. plain.py holds the same in PyTorch and says what
// each means; both give the same numbers bit for bit: every product, sum and rounding is written out, and the compiler is
// told not to contract.
//
// Each function takes one struct, `arguments_NAME`, which compiled.py declares from its table of arguments in front of
// this text. compiled.py checks types, devices and layouts.
//
// Tensors are float32, (clips, channels, pixels), dense in one of two layouts: `channels_last` != 0 holds the channels
// of a pixel side by side, else the pixels of a channel. A block of pixels stays in the cache from the magnitude to the
// codes.
//
// Codes are float32, or bytes: the code plus a zero point, `zero`, so that it is not negative. Neither bytes nor codes that are
// not written can hold NaN, so that the functions that encode return 1 where an input has one, else 0.

#include <math.h>
#include <stdint.h>
#include <string.h>

enum { BLOCK = 64, NARROW = 16, LONG = 4096 };

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

static inline __attribute__((always_inline)) void largest_magnitudes(const float *restrict x, const float *restrict reference, int64_t channels, int64_t count,
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

static inline void put(void *restrict codes, int64_t index, float code, int bytes, float zero) {
    if (bytes)
        ((uint8_t *)codes)[index] = (uint8_t)(int32_t)(code + zero);
    else
        ((float *)codes)[index] = code;
}

// Codes of a block of pixels, to where `codes` begins. With `active`, the codes of the pixels that it does not mark are 0 and
// already lie there.
static inline __attribute__((always_inline)) void encode_block(
    const float *restrict x, float *restrict reference, void *restrict codes, int bytes, float zero, int64_t channels,
    int64_t count, int64_t pixel, int64_t channel, const float *inverse, const float *limit, const float *unit, int moves,
    float step, const uint8_t *active) {
    const size_t size = bytes ? sizeof(uint8_t) : sizeof(float);
    if (channel == 1 && channels < NARROW) {
        float i[BLOCK * NARROW], l[BLOCK * NARROW], u[BLOCK * NARROW];
        for (int64_t p = 0; p < count; p++)
            for (int64_t c = 0; c < channels; c++) {
                i[p * channels + c] = inverse[p];
                l[p * channels + c] = limit[p];
                u[p * channels + c] = unit[p];
            }
        for (int64_t k = 0; k < count * channels; k++)
            put(codes, k, coded(x[k], reference + k, i[k], l[k], u[k], moves, step), bytes, zero);
    } else if (channel == 1) {
        for (int64_t p = 0; p < count; p++) {
            if (active && !active[p]) continue;
            const float *xs = x + p * pixel;
            float *rs = reference + p * pixel;
            void *cs = (char *)codes + (size_t)(p * pixel) * size;
            const float i = inverse[p], l = limit[p], u = unit[p];
            if (l == 0.0f) {
                memset(cs, bytes ? (int)zero : 0, (size_t)channels * size);
            } else if (moves) {
                for (int64_t c = 0; c < channels; c++) put(cs, c, coded(xs[c], rs + c, i, l, u, 1, step), bytes, zero);
            } else {
                for (int64_t c = 0; c < channels; c++) put(cs, c, coded(xs[c], rs + c, i, l, u, 0, step), bytes, zero);
            }
        }
    } else {
        for (int64_t c = 0; c < channels; c++)
            for (int64_t p = 0; p < count; p++)
                put(codes, c * channel + p,
                    coded(x[c * channel + p], reference + c * channel + p, inverse[p], limit[p], unit[p], moves, step),
                    bytes, zero);
    }
}

// Where a clip's largest magnitudes are kept, and room for three times as many numbers behind them.
static inline float *room_of(const struct arguments_encode *a, int64_t clip) {
    return (float *)a->fit->room + 4 * clip * a->pixels;
}

static inline __attribute__((always_inline)) void clip_magnitudes(const struct arguments_encode *a, int64_t clip,
                                                                  const int64_t channels, const int channels_last) {
    const int64_t pixels = a->pixels, pixel = channels_last ? channels : 1, channel = channels_last ? 1 : pixels;
    const int64_t start = clip * channels * pixels;
    for (int64_t first = 0; first < pixels; first += BLOCK)
        largest_magnitudes(a->x + start + first * pixel, a->reference + start + first * pixel, channels,
                           pixels - first < BLOCK ? pixels - first : BLOCK, pixel, channel,
                           room_of(a, clip) + first);
}

// What a layer of one clip costs where no threshold is below `floor`: costs[0] for all of the coverage, costs[j] more for
// what exceeds the j-th bound. `magnitude`, `tau` and `coverage` are of all pixels that may exceed one.
static double spent_above(float floor, const struct arguments_encode *a, int64_t pixels, const float *restrict magnitude,
                          const float *restrict tau, const int32_t *restrict coverage) {
    const float sigma = a->sigma;
    double spent = a->fit->costs[0];
    for (int64_t j = 0; j < a->kappas; j++) {
        const float kappa = a->kappa[j];
        int64_t count = 0;
        for (int64_t first = 0; first < pixels; first += LONG) {
            const int64_t last = first + LONG < pixels ? first + LONG : pixels;
            int32_t some = 0;  // in 32 bits, as of so few pixels it can be
            for (int64_t p = first; p < last; p++) {
                const float bound = (tau[p] > floor ? tau[p] : floor) * sigma;
                some += magnitude[p] > bound * kappa ? coverage[p] : 0;
            }
            count += some;
        }
        spent += a->fit->costs[j + 1] * (double)count;
    }
    return spent;
}

// No threshold of a clip is below `tau`, and no index below `row`.
struct floor {
    float tau;
    int64_t row;
};

// The smallest floor of thresholds, of the numbers with 8 bits behind the leading one, under which the layer of a clip costs no
// more than its allowance: its least, costs[0], and `share` of what is `left`, with `slack` for rounding. What it costs beyond
// its least is taken from what is left.
static struct floor fitted(const struct arguments_encode *a, int64_t clip) {
    enum { UNIT = 1 << 15, OCTAVE = (1 << 23) / UNIT, INFINITE = 0x7f800000 / UNIT };
    const struct arguments_fit *f = a->fit;
    const int64_t pixels = a->pixels;
    const float *tau = a->tau + clip * pixels;
    float *magnitude = room_of(a, clip);
    if (!a->channels_last)
        clip_magnitudes(a, clip, a->channels, 0);
    else if (a->channels == 3)
        clip_magnitudes(a, clip, 3, 1);
    else if (a->channels == 8)
        clip_magnitudes(a, clip, 8, 1);
    else if (a->channels == 16)
        clip_magnitudes(a, clip, 16, 1);
    else
        clip_magnitudes(a, clip, a->channels, 1);
    const double left = f->left[clip] > 0.0 ? f->left[clip] : 0.0;
    const double allowance = (f->costs[0] + left * f->share) * (1.0 + f->slack);
    double spent = spent_above(0.0f, a, pixels, magnitude, tau, f->coverage);
    int32_t high = 0;
    if (spent > allowance) {
        float *kept = magnitude + pixels, *taus = kept + pixels, lowest = INFINITY;
        int32_t *reads = (int32_t *)(taus + pixels);
        int64_t count = 0;  // of the pixels that exceed their lowest bound: no others do under a floor
        for (int64_t p = 0; p < pixels; p++) {
            kept[count] = magnitude[p];
            taus[count] = tau[p];
            reads[count] = f->coverage[p];
            const float bound = tau[p] * a->sigma;
            const int exceeds = magnitude[p] > bound * a->kappa[0];
            count += exceeds;
            lowest = exceeds && tau[p] < lowest ? tau[p] : lowest;
        }
        // In units of the last place: `low` is too low, as it raises no threshold that matters, `high` is high enough.
        int32_t low = magnitude_bits(lowest) / UNIT, step = OCTAVE;
        high = INFINITE;
        spent = spent_above(INFINITY, a, count, kept, taus, reads);
        while (high - low > 1) {
            const int32_t middle = step && low + step < high ? low + step : (low + high) / 2, bits = middle * UNIT;
            float tried;
            memcpy(&tried, &bits, sizeof tried);
            const double own = spent_above(tried, a, count, kept, taus, reads);
            if (own > allowance) {
                low = middle;
                step *= 2;
            } else {
                high = middle;
                spent = own;
                step = 0;
            }
        }
    }
    f->left[clip] -= spent - f->costs[0];
    struct floor found = {0.0f, f->rows[high]};
    const int32_t bits = high * UNIT;
    memcpy(&found.tau, &bits, sizeof bits);
    return found;
}

// Codes of residuals of one block of pixels, with the reference moved by them where `moves`. `steps` holds 1 / step, largest code, units and
// cost of `entries`, one after the other. A pixel's entry is index[p]; or, where `kappas` > 0,
// index[p] * (kappas + 1) + #{j : magnitude > tau[p] * sigma * kappa[j]}, with tau and index no lower than a floor.
// With `active` it marks the pixels that have a code other than 0, and codes must be 0 before: those of other pixels are
// not written. A pixel has one where its largest magnitude has, since rounding is monotone.
static inline __attribute__((always_inline)) int64_t encode_some(const struct arguments_encode *a, int64_t b,
                                                                const struct floor floor, const int64_t channels,
                                                                const int channels_last) {
    const int64_t pixels = a->pixels, kappas = a->kappas, entries = a->entries;
    const int64_t pixel = channels_last ? channels : 1, channel = channels_last ? 1 : pixels;
    const int64_t blocks = (pixels + BLOCK - 1) / BLOCK, first = b % blocks * BLOCK;
    const int64_t count = pixels - first < BLOCK ? pixels - first : BLOCK;
    const int64_t at = b / blocks * pixels + first, start = b / blocks * pixels * channels + first * pixel;
    const float *x = a->x + start;
    float *reference = a->reference + start;
    uint8_t *active = a->active ? a->active + at : 0;
    int64_t nan = 0;
    float inverse[BLOCK], limit[BLOCK], unit[BLOCK], magnitude[BLOCK];
    int32_t entry[BLOCK];
    if (a->fit)
        memcpy(magnitude, room_of(a, b / blocks) + first, (size_t)count * sizeof(float));
    else
        largest_magnitudes(x, reference, channels, count, pixel, channel, magnitude);
    for (int64_t p = 0; p < count; p++) nan |= magnitude[p] != magnitude[p];
    for (int64_t p = 0; p < count; p++)
        entry[p] = (int32_t)((a->index[at + p] > floor.row ? a->index[at + p] : floor.row) * (kappas + 1));
    for (int64_t j = 0; j < kappas; j++)
        for (int64_t p = 0; p < count; p++) {
            const float bound = (a->tau[at + p] > floor.tau ? a->tau[at + p] : floor.tau) * a->sigma;
            entry[p] += magnitude[p] > bound * a->kappa[j];
        }
    for (int64_t p = 0; p < count; p++) {
        inverse[p] = a->steps[entry[p]];
        limit[p] = a->steps[entries + entry[p]];
        unit[p] = a->steps[2 * entries + entry[p]];
        a->cost[at + p] = a->steps[3 * entries + entry[p]];
    }
    if (active) {
        int any = 0;
        for (int64_t p = 0; p < count; p++) {
            active[p] = rintf(magnitude[p] * inverse[p]) >= 1.0f;
            any |= active[p];
        }
        if (!any) return nan;
    }
    if (a->bytes) {
        encode_block(x, reference, (uint8_t *)a->codes + start, 1, a->zero, channels, count, pixel, channel, inverse,
                     limit, unit, a->moves, a->step, active);
    } else {
        encode_block(x, reference, (float *)a->codes + start, 0, 0.0f, channels, count, pixel, channel, inverse, limit,
                     unit, a->moves, a->step, active);
    }
    return nan;
}

// Few channels as constants, over which loops unroll.
static int64_t encode_any(const struct arguments_encode *a, int64_t b, struct floor floor) {
    return !a->channels_last   ? encode_some(a, b, floor, a->channels, 0)
           : a->channels == 3  ? encode_some(a, b, floor, 3, 1)
           : a->channels == 8  ? encode_some(a, b, floor, 8, 1)
           : a->channels == 16 ? encode_some(a, b, floor, 16, 1)
                               : encode_some(a, b, floor, a->channels, 1);
}

int64_t resq_encode(const struct arguments_encode *a) {
    const int64_t clips = a->clips, threads = a->threads, blocks = (a->pixels + BLOCK - 1) / BLOCK;
    const struct floor none = {0.0f, 0};
    int64_t nan = 0;
    if (!a->fit) {
#pragma omp parallel for num_threads(threads) if (threads > 1) reduction(| : nan)
        for (int64_t b = 0; b < clips * blocks; b++) nan |= encode_any(a, b, none);
        return nan;
    }
#pragma omp parallel for num_threads(threads) if (threads > 1 && clips >= threads) reduction(| : nan)
    for (int64_t clip = 0; clip < clips; clip++) {  // which is still in the cache when it is encoded
        const struct floor floor = fitted(a, clip);
#pragma omp parallel for num_threads(threads) if (clips < threads) reduction(| : nan)
        for (int64_t b = clip * blocks; b < (clip + 1) * blocks; b++) nan |= encode_any(a, b, floor);
    }
    return nan;
}

// Codes and values of a keyframe.
int64_t resq_encode_keyframe(const struct arguments_encode_keyframe *a) {
    const float *restrict x = a->x, step = a->step, low = a->low, high = a->high, zero = a->zero;
    float *restrict values = a->values;
    const int64_t all = a->count, bytes = a->bytes, threads = a->threads, blocks = (all + LONG - 1) / LONG;
    int64_t nan = 0;
#pragma omp parallel for num_threads(threads) if (threads > 1) reduction(| : nan)
    for (int64_t b = 0; b < blocks; b++) {
        const int64_t last = (b + 1) * LONG < all ? (b + 1) * LONG : all;
        if (bytes) {
            uint8_t *restrict codes = a->codes;
            for (int64_t i = b * LONG; i < last; i++) {
                const float code = quantized(x[i] / step, low, high);
                nan |= code != code;
                put(codes, i, code, 1, zero);
                values[i] = code * step;
            }
        } else {
            float *restrict codes = a->codes;
            for (int64_t i = b * LONG; i < last; i++) {
                codes[i] = quantized(x[i] / step, low, high);
                nan |= codes[i] != codes[i];
                values[i] = codes[i] * step;
            }
        }
    }
    return nan;
}

// Active tiles. An output is cut into tiles of side x side, numbered clip by clip and row by row; a tile's window is the
// input that its outputs read, which begins at its place times `step` less `lead` and may reach beyond the input, where
// there are codes of 0: `size` bytes of each pixel, all of the value `zero`. Tensors are channels last.

static inline int64_t at_least(int64_t value, int64_t low) { return value > low ? value : low; }
static inline int64_t at_most(int64_t value, int64_t high) { return value < high ? value : high; }

// The tiles whose window has a pixel that `active` marks, ascending. Returns their number.
int64_t resq_find(const struct arguments_find *a) {
    const int64_t rows = a->rows, columns = a->columns, each = a->down * a->across;
    int64_t found = 0;
    if (each == rows * columns && a->high == 1 && a->wide == 1 && a->step_rows == 1 && a->step_columns == 1) {
        // each pixel is a window
        for (int64_t t = 0; t < a->clips * each; t++)
            if (a->active[t]) a->tiles[found++] = t;
        return found;
    }
    for (int64_t t = 0; t < a->clips * each; t++) {
        const int64_t top = t % each / a->across * a->step_rows - a->lead_rows;
        const int64_t left = t % a->across * a->step_columns - a->lead_columns;
        const int64_t below = at_most(top + a->high, rows), first = at_least(left, 0);
        const int64_t length = at_most(left + a->wide, columns) - first;
        const void *any = 0;
        for (int64_t y = at_least(top, 0); y < below && length > 0 && !any; y++)
            any = memchr(a->active + (t / each * rows + y) * columns + first, 1, (size_t)length);
        if (any) a->tiles[found++] = t;
    }
    return found;
}

// The windows of `count` tiles, one after the other.
int64_t resq_gather(const struct arguments_gather *a) {
    const int64_t rows = a->rows, columns = a->columns, each = a->down * a->across, size = a->size;
    const int64_t high = a->high, wide = a->wide, threads = a->threads;
    const int zero = (int)a->zero;
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t i = 0; i < a->count; i++) {
        const int64_t t = a->tiles[i], left = t % a->across * a->step_columns - a->lead_columns;
        const int64_t first = at_least(left, 0), length = at_least(at_most(left + wide, columns) - first, 0);
        for (int64_t y = 0; y < high; y++) {
            const int64_t row = t % each / a->across * a->step_rows - a->lead_rows + y;
            char *to = (char *)a->windows + (i * high + y) * wide * size;
            const int64_t before = row >= 0 && row < rows && length ? first - left : wide;
            memset(to, zero, (size_t)(before * size));
            if (before == wide) continue;
            memcpy(to + before * size, (const char *)a->codes + ((t / each * rows + row) * columns + first) * size,
                   (size_t)(length * size));
            memset(to + (before + length) * size, zero, (size_t)((wide - before - length) * size));
        }
    }
    return 0;
}

// Sums of `count` tiles, (side, side, channels) each, to their places: y = fma(total, scale, y).
int64_t resq_scatter(const struct arguments_scatter *a) {
    const int64_t rows = a->rows, columns = a->columns, each = a->down * a->across, channels = a->channels;
    const int64_t side = a->side, threads = a->threads;
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t i = 0; i < a->count; i++) {
        const int64_t t = a->tiles[i], top = t % each / a->across * side, left = t % a->across * side;
        for (int64_t y = 0; y < at_most(side, rows - top); y++)
            for (int64_t x = 0; x < at_most(side, columns - left); x++) {
                const float *restrict total = a->totals + ((i * side + y) * side + x) * channels, *scale = a->scale;
                float *restrict out = a->y + ((t / each * rows + top + y) * columns + left + x) * channels;
                for (int64_t c = 0; c < channels; c++) out[c] = fmaf(total[c], scale[c], out[c]);
            }
    }
    return 0;
}

// Codes of active pixels to 0.
int64_t resq_clear(const struct arguments_clear *a) {
    for (int64_t p = 0; p < a->pixels; p++)
        if (a->active[p]) memset((char *)a->codes + p * a->size, (int)a->zero, (size_t)a->size);
    return 0;
}

// The first channel with the highest score of every pixel, of 255 at most; from a NaN on, none is higher.
int64_t resq_highest(const struct arguments_highest *a) {
    const int64_t clips = a->clips, channels = a->channels, pixels = a->pixels, threads = a->threads;
    const int64_t channels_last = a->channels_last;
    const float *restrict scores = a->scores;
    uint8_t *restrict found = a->found;
    const int64_t pixel = channels_last ? channels : 1, channel = channels_last ? 1 : pixels;
    const int64_t blocks = (pixels + BLOCK - 1) / BLOCK;
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t b = 0; b < clips * blocks; b++) {
        const int64_t clip = b / blocks, first = b % blocks * BLOCK;
        const int64_t count = pixels - first < BLOCK ? pixels - first : BLOCK;
        const float *own = scores + clip * channels * pixels + first * pixel;
        float best[BLOCK];
        int32_t place[BLOCK] = {0};
        for (int64_t p = 0; p < count; p++) best[p] = own[p * pixel];
        for (int64_t c = 1; c < channels; c++)
            for (int64_t p = 0; p < count; p++) {
                const float score = own[p * pixel + c * channel];
                place[p] = score > best[p] ? (int32_t)c : place[p];
                best[p] = score > best[p] || score != score ? score : best[p];
            }
        for (int64_t p = 0; p < count; p++) found[clip * pixels + first + p] = (uint8_t)place[p];
    }
    return 0;
}
