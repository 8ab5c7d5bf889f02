// The elementwise work around an operator, each in one pass over memory, and convolutions of codes. plain.py holds the
// same in PyTorch and says what each means; both give the same numbers bit for bit: every product, sum and rounding is
// written out, and the compiler is told not to contract.
//
// Each function takes one struct, `arguments_NAME`, which compiled.py declares from its table of arguments in front of
// this text. compiled.py checks types, devices and layouts.
//
// Tensors are float32, (clips, channels, pixels), dense in one of two layouts: `channels_last` != 0 holds the channels
// of a pixel side by side, else the pixels of a channel. A block of pixels stays in the cache from the magnitude to the
// codes.
//
// Codes for `resq_convolve` lie in a room instead: in bfloat16, which holds them exactly, channels last, with the
// convolution's padding around them.

#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__AMX_BF16__) && defined(__linux__)
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#define TILES 1
#endif

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

static inline void put(void *restrict codes, int64_t index, float code, int half) {
    if (half) {
        uint32_t bits;
        memcpy(&bits, &code, sizeof bits);
        ((uint16_t *)codes)[index] = (uint16_t)(bits >> 16);
    } else {
        ((float *)codes)[index] = code;
    }
}

// Codes of a block of pixels, to where `codes` begins; with `half` in bfloat16. With `active`, the codes of the pixels that
// it does not mark are 0 and may already lie there.
static inline __attribute__((always_inline)) void encode_block(
    const float *restrict x, float *restrict reference, void *restrict codes, int half, int64_t channels, int64_t count,
    int64_t pixel, int64_t channel, const float *inverse, const float *limit, const float *unit, int moves, float step,
    const uint8_t *active) {
    const size_t size = half ? sizeof(uint16_t) : sizeof(float);
    if (channel == 1 && channels < NARROW) {
        float i[BLOCK * NARROW], l[BLOCK * NARROW], u[BLOCK * NARROW];
        for (int64_t p = 0; p < count; p++)
            for (int64_t c = 0; c < channels; c++) {
                i[p * channels + c] = inverse[p];
                l[p * channels + c] = limit[p];
                u[p * channels + c] = unit[p];
            }
        for (int64_t k = 0; k < count * channels; k++)
            put(codes, k, coded(x[k], reference + k, i[k], l[k], u[k], moves, step), half);
    } else if (channel == 1) {
        for (int64_t p = 0; p < count; p++) {
            if (active && !active[p]) continue;
            const float *xs = x + p * pixel;
            float *rs = reference + p * pixel;
            void *cs = (char *)codes + (size_t)(p * pixel) * size;
            const float i = inverse[p], l = limit[p], u = unit[p];
            if (l == 0.0f) {
                memset(cs, 0, (size_t)channels * size);
            } else if (moves) {
                for (int64_t c = 0; c < channels; c++) put(cs, c, coded(xs[c], rs + c, i, l, u, 1, step), half);
            } else {
                for (int64_t c = 0; c < channels; c++) put(cs, c, coded(xs[c], rs + c, i, l, u, 0, step), half);
            }
        }
    } else {
        for (int64_t c = 0; c < channels; c++) {
            const float *xs = x + c * channel;
            float *rs = reference + c * channel, *cs = (float *)codes + c * channel;
            for (int64_t p = 0; p < count; p++) cs[p] = coded(xs[p], rs + p, inverse[p], limit[p], unit[p], moves, step);
        }
    }
}

// Where the codes of an image's row begin in a room of `margins`: left, right, top, bottom and what lies behind the last
// clip. What surrounds the row is set to 0.
static uint16_t *row_in_room(uint16_t *room, const int64_t *margins, int64_t clips, int64_t channels, int64_t rows,
                             int64_t columns, int64_t clip, int64_t row) {
    const int64_t left = margins[0], right = margins[1], top = margins[2], bottom = margins[3];
    const int64_t width = (left + columns + right) * channels;
    uint16_t *start = room + (clip * (top + rows + bottom) + top + row) * width, *after = start + width;
    memset(start, 0, (size_t)(left * channels) * sizeof *room);
    memset(after - right * channels, 0, (size_t)(right * channels) * sizeof *room);
    if (row == 0) memset(start - top * width, 0, (size_t)(top * width) * sizeof *room);
    if (row == rows - 1) {
        memset(after, 0, (size_t)(bottom * width) * sizeof *room);
        if (clip == clips - 1) memset(after + bottom * width, 0, (size_t)margins[4] * sizeof *room);
    }
    return start + left * channels;
}

// Codes of residuals, with the reference moved by them where `moves`. `steps` holds 1 / step, largest code, units and
// cost of `entries`, one after the other. A pixel's entry is index[p]; or, where `kappas` > 0,
// index[p] * (kappas + 1) + #{j : magnitude > tau[p] * sigma * kappa[j]}. With `margins` the codes lie in a room.
// With `active` it marks the pixels that have a code other than 0, and codes must be 0 before: those of other pixels are
// not written. A pixel has one where its largest magnitude has, since rounding is monotone.
void resq_encode(const struct arguments_encode *a) {
    const int64_t clips = a->clips, channels = a->channels, channels_last = a->channels_last, threads = a->threads;
    const int64_t kappas = a->kappas, entries = a->entries, moves = a->moves;
    const int64_t *margins = a->margins, *index = a->index;
    const float *x = a->x, *tau = a->tau, *kappa = a->kappa, *steps = a->steps, sigma = a->sigma, step = a->step;
    float *reference = a->reference, *cost = a->cost;
    uint8_t *active = a->active;
    void *codes = a->codes;
    int64_t rows = a->rows, columns = a->columns;
    const int64_t all = rows * columns;
    if (!margins) {  // blocks need not end with a row
        columns = all;
        rows = 1;
    }
    const int64_t pixel = channels_last ? channels : 1, channel = channels_last ? 1 : all;
    const int64_t blocks = (columns + BLOCK - 1) / BLOCK;
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t b = 0; b < clips * rows * blocks; b++) {
        const int64_t clip = b / (rows * blocks), row = b / blocks % rows, first = b % blocks * BLOCK;
        const int64_t count = columns - first < BLOCK ? columns - first : BLOCK;
        const int64_t at = clip * all + row * columns + first, start = clip * all * channels + (at - clip * all) * pixel;
        float inverse[BLOCK], limit[BLOCK], unit[BLOCK], magnitude[BLOCK];
        if (kappas > 0 || active)
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
        if (active) {
            int any = 0;
            for (int64_t p = 0; p < count; p++) {
                active[at + p] = !(rintf(magnitude[p] * inverse[p]) < 1.0f);  // so that NaN is active
                any |= active[at + p];
            }
            if (!any) continue;
        }
        if (margins) {
            uint16_t *own = row_in_room(codes, margins, clips, channels, rows, columns, clip, row) + first * channels;
            encode_block(x + start, reference + start, own, 1, channels, count, pixel, channel, inverse, limit, unit,
                         moves, step, 0);
        } else {
            encode_block(x + start, reference + start, (float *)codes + start, 0, channels, count, pixel, channel,
                         inverse, limit, unit, moves, step, active ? active + at : 0);
        }
    }
}

// What a layer of one clip costs where no threshold is below `floor`: costs[0] for all of the coverage, costs[j] more for
// what exceeds the j-th bound.
static double spent_above(float floor, const struct arguments_fit *a, const float *restrict magnitude,
                          const float *restrict tau) {
    const int32_t *restrict coverage = a->coverage;
    const float sigma = a->sigma;
    double spent = a->costs[0];
    for (int64_t j = 0; j < a->kappas; j++) {
        const float kappa = a->kappa[j];
        int64_t count = 0;
        for (int64_t first = 0; first < a->pixels; first += BLOCK) {
            const int64_t last = first + BLOCK < a->pixels ? first + BLOCK : a->pixels;
            int32_t some = 0;
            for (int64_t p = first; p < last; p++) {
                const float bound = (tau[p] > floor ? tau[p] : floor) * sigma;
                some += magnitude[p] > bound * kappa ? coverage[p] : 0;
            }
            count += some;
        }
        spent += a->costs[j + 1] * (double)count;
    }
    return spent;
}

// The smallest floor of thresholds, of the numbers with 8 bits behind the leading one, under which a layer of each clip
// costs no more than its allowance, and what it costs then. `tau`: of (clips, pixels).
void resq_fit(const struct arguments_fit *a) {
    const int64_t pixels = a->pixels, threads = a->threads;
    const int64_t pixel = a->channels_last ? a->channels : 1, channel = a->channels_last ? 1 : pixels;
    enum { UNIT = 1 << 15, INFINITE = 0x7f800000 / UNIT };
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t clip = 0; clip < a->clips; clip++) {
        float *magnitude = a->magnitude + clip * pixels;
        const float *tau = a->tau + clip * pixels;
        const int64_t start = clip * a->channels * pixels;
        for (int64_t first = 0; first < pixels; first += BLOCK)
            largest_magnitudes(a->x + start + first * pixel, a->reference + start + first * pixel, a->channels,
                               pixels - first < BLOCK ? pixels - first : BLOCK, pixel, channel, magnitude + first);
        const double allowance = a->allowance[clip];
        float floor = 0.0f;
        double spent = spent_above(floor, a, magnitude, tau);
        if (spent > allowance) {
            int32_t low = 0, high = INFINITE;  // in units of the last place: too low, and high enough
            floor = INFINITY;
            spent = spent_above(floor, a, magnitude, tau);
            while (high - low > 1) {
                const int32_t middle = (low + high) / 2, bits = middle * UNIT;
                float tried;
                memcpy(&tried, &bits, sizeof tried);
                const double own = spent_above(tried, a, magnitude, tau);
                if (own > allowance) {
                    low = middle;
                } else {
                    high = middle;
                    floor = tried;
                    spent = own;
                }
            }
        }
        a->floor[clip] = floor;
        a->spent[clip] = spent;
    }
}

// Codes and values of a keyframe; with `margins` the codes lie in a room, and x is channels last.
void resq_encode_keyframe(const struct arguments_encode_keyframe *a) {
    const int64_t clips = a->clips, channels = a->channels, rows = a->rows, columns = a->columns, threads = a->threads;
    const int64_t *margins = a->margins;
    const float *restrict x = a->x, step = a->step, low = a->low, high = a->high;
    float *restrict values = a->values;
    void *restrict codes = a->codes;
    const int64_t count = columns * channels;
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t r = 0; r < clips * rows; r++) {
        const float *xs = x + r * count;
        float *vs = values + r * count;
        if (margins) {
            uint16_t *own = row_in_room(codes, margins, clips, channels, rows, columns, r / rows, r % rows);
            for (int64_t i = 0; i < count; i++) {
                const float code = quantized(xs[i] / step, low, high);
                put(own, i, code, 1);
                vs[i] = code * step;
            }
        } else {
            float *own = (float *)codes + r * count;
            for (int64_t i = 0; i < count; i++) {
                own[i] = quantized(xs[i] / step, low, high);
                vs[i] = own[i] * step;
            }
        }
    }
}

// Active tiles. An output is cut into tiles of side x side, numbered clip by clip and row by row; a tile's window is the
// input that its outputs read, which begins at its place times `step` less `lead` and may reach beyond the input, where
// there are zeros. Tensors are channels last.

static inline int64_t at_least(int64_t value, int64_t low) { return value > low ? value : low; }
static inline int64_t at_most(int64_t value, int64_t high) { return value < high ? value : high; }

// The tiles whose window has a pixel that `active` marks, ascending, and their number.
void resq_find(const struct arguments_find *a) {
    const int64_t rows = a->rows, columns = a->columns, each = a->down * a->across;
    int64_t found = 0;
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
    *a->count = found;
}

// The windows of `count` tiles, one after the other.
void resq_gather(const struct arguments_gather *a) {
    const int64_t rows = a->rows, columns = a->columns, each = a->down * a->across, channels = a->channels;
    const int64_t high = a->high, wide = a->wide, threads = a->threads;
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t i = 0; i < a->count; i++) {
        const int64_t t = a->tiles[i], left = t % a->across * a->step_columns - a->lead_columns;
        const int64_t first = at_least(left, 0), length = at_least(at_most(left + wide, columns) - first, 0);
        for (int64_t y = 0; y < high; y++) {
            const int64_t row = t % each / a->across * a->step_rows - a->lead_rows + y;
            float *to = a->windows + (i * high + y) * wide * channels;
            const int64_t before = row >= 0 && row < rows && length ? first - left : wide;
            memset(to, 0, (size_t)(before * channels) * sizeof *to);
            if (before == wide) continue;
            memcpy(to + before * channels, a->codes + ((t / each * rows + row) * columns + first) * channels,
                   (size_t)(length * channels) * sizeof *to);
            memset(to + (before + length) * channels, 0, (size_t)((wide - before - length) * channels) * sizeof *to);
        }
    }
}

// Sums of `count` tiles, (side, side, channels) each, to their places: y = fma(total, scale, y).
void resq_scatter(const struct arguments_scatter *a) {
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
}

// Codes of active pixels to 0.
void resq_clear(const struct arguments_clear *a) {
    for (int64_t p = 0; p < a->pixels; p++)
        if (a->active[p]) memset(a->codes + p * a->channels, 0, (size_t)a->channels * sizeof *a->codes);
}

// The first channel with the highest score of every pixel, of 255 at most; from a NaN on, none is higher.
void resq_highest(const struct arguments_highest *a) {
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
}

// Whether this process may use the processor's matrix tiles, on which `resq_convolve` runs.
int resq_tiles(void) {
#ifdef TILES
    enum { ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18 };
    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
#else
    return 0;
#endif
}

#ifdef TILES
enum { SIDE = 16, DEPTH = 32, PAIR = 2 * SIDE };  // pixels or channels of a tile, and values that it multiplies at once

static void configure_tiles(void) {
    struct __attribute__((packed)) {
        uint8_t palette, start, reserved[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    } all = {.palette = 1};
    for (int i = 0; i < 8; i++) {
        all.bytes[i] = 64;
        all.rows[i] = SIDE;
    }
    _tile_loadconfig(&all);
}

// Products of two tiles of pixels, whose codes begin at `first` and `second`, with two tiles of output channels, or with
// one where `next` is NULL. Each step is a row of the kernel: its taps and their channels lie side by side.
static inline void multiply(const uint16_t *first, const uint16_t *second, int64_t stride, int64_t line, int64_t lines,
                            int64_t steps, const uint16_t *tiles, const uint16_t *next, float sums[2][SIDE][PAIR]) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t k = 0; k < lines; k++)
        for (int64_t s = 0; s < steps; s++) {
            const int64_t tile = (k * steps + s) * SIDE * DEPTH, place = k * line + s * DEPTH;
            _tile_loadd(4, first + place, stride);
            _tile_loadd(5, second + place, stride);
            _tile_loadd(6, tiles + tile, 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(2, 5, 6);
            if (next) {
                _tile_loadd(7, next + tile, 64);
                _tile_dpbf16ps(1, 4, 7);
                _tile_dpbf16ps(3, 5, 7);
            }
        }
    _tile_stored(0, sums[0][0], PAIR * sizeof(float));
    _tile_stored(1, sums[0][0] + SIDE, PAIR * sizeof(float));
    _tile_stored(2, sums[1][0], PAIR * sizeof(float));
    _tile_stored(3, sums[1][0] + SIDE, PAIR * sizeof(float));
}
#endif

// The convolution of codes in a room with integer weights: y = fma(total, scale, base), channels last. `base` has a
// number for each output where `by_pixel`, else for each channel. `tiles` holds the weights by 16 output channels, row of
// the kernel and 32 inputs, as compiled.py lays them out.
void resq_convolve(const struct arguments_convolve *a) {
#ifdef TILES
    const int64_t clips = a->clips, rows = a->rows, columns = a->columns, outputs = a->outputs, threads = a->threads;
    const int64_t room_rows = a->room_rows, room_columns = a->room_columns, channels = a->channels;
    const int64_t lines = a->kernel_rows, steps = (a->kernel_columns * channels + DEPTH - 1) / DEPTH;
    const int64_t down = a->stride_rows, right = a->stride_columns, by_pixel = a->by_pixel;
    const uint16_t *room = a->room, *tiles = a->tiles;
    const float *scale = a->scale, *base = a->base;
    float *y = a->y;
    const int64_t line = room_columns * channels, stride = right * channels * (int64_t)sizeof *room;
    const int64_t across = (columns + SIDE - 1) / SIDE, pairs = (rows * across + 1) / 2;
    const int64_t block = lines * steps * SIDE * DEPTH;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        float sums[2][SIDE][PAIR] __attribute__((aligned(64)));
        configure_tiles();
#pragma omp for
        for (int64_t pair = 0; pair < clips * pairs; pair++) {
            const int64_t clip = pair / pairs, first = pair % pairs * 2;
            const int64_t both = first + 1 < rows * across ? 2 : 1;
            const uint16_t *codes[2];
            for (int64_t t = 0; t < 2; t++) {
                const int64_t tile = first + (t < both ? t : 0), row = tile / across, column = tile % across * SIDE;
                codes[t] = room + (clip * room_rows + row * down) * line + column * right * channels;
            }
            for (int64_t from = 0; from < outputs; from += PAIR) {
                const int64_t some = outputs - from < PAIR ? outputs - from : PAIR;
                const uint16_t *own = tiles + from / SIDE * block;
                multiply(codes[0], codes[1], stride, line, lines, steps, own, some > SIDE ? own + block : 0, sums);
                for (int64_t t = 0; t < both; t++) {
                    const int64_t row = (first + t) / across, column = (first + t) % across * SIDE;
                    const int64_t valid = columns - column < SIDE ? columns - column : SIDE;
                    const int64_t at = ((clip * rows + row) * columns + column) * outputs + from;
                    for (int64_t p = 0; p < valid; p++) {
                        const float *total = sums[t][p], *factor = scale + from;
                        const float *added = by_pixel ? base + at + p * outputs : base + from;
                        float *out = y + at + p * outputs;
#pragma GCC ivdep
                        for (int64_t c = 0; c < some; c++) out[c] = fmaf(total[c], factor[c], added[c]);
                    }
                }
            }
        }
        _tile_release();
    }
#else
    (void)a;
#endif
}
