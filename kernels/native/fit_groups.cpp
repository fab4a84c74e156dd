// The fit of a group: the scale and bias, in bf16, and the integers with the least squared error. Formula: native_fit.py.
//
// The starts of the search run side by side, one in each lane of a register, so that most sums need no tree and wait for
// nobody. The same input gives the same bytes on every machine: a lane's sum is in the order of the weights, other sums
// run in sixteen lanes and a fixed tree, and this file is compiled without fused multiply-add (setup.py). The compiler
// clones the entry for wider registers where it can; isa.cpp has no part in it.
#include <cmath>
#include <cstdint>
#include <cstring>

#include "kernels.h"

#if defined(__x86_64__) && defined(__linux__)
#define FOR_EVERY_WIDTH __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define FOR_EVERY_WIDTH
#endif

namespace moepack {

// What rounding did: sums of squares of the errors and of the weights, the largest error.
struct Loss {
    double squared_error, squared_weight, largest;
};

namespace {

constexpr const char* ISA_NAME = "portable";
#include "vec.h"

// Shares of the group's range that the search starts from; rounding and least squares take turns from each.
constexpr int STARTS = 8, TURNS = 4;
constexpr float SHARES[STARTS] = {1.0f, 0.93f, 0.86f, 0.79f, 0.72f, 0.65f, 0.57f, 0.48f};

// A value for each of some starts: as many as a register of most machines holds, as no sum goes across them.
#if defined(__x86_64__)
constexpr int WIDTH = 8;
#else
constexpr int WIDTH = 4;
#endif
typedef float Starts __attribute__((vector_size(4 * WIDTH)));
typedef uint32_t StartBits __attribute__((vector_size(4 * WIDTH)));

struct Pair {
    float scale, bias;
};

struct Pairs {
    Starts scale, bias;
};

INLINE uint16_t to_bf16(float value) {  // nearest, ties to even; finite
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

#define MEMBER inline __attribute__((always_inline))

// Adding and taking off 1.5 * 2^23 rounds to an integer, ties to even.
constexpr float ROUNDER = 12582912.0f;

// A group of weights, with the importance of each where it matters.
template <int SIZE, bool WEIGHTED> struct Group {
    const float *x, *importance;
    float top, total, total_x;  // largest integer; sums of importance and of importance * x

    MEMBER Group(const float* weights, const float* columns, float largest_integer)
        : x(weights), importance(columns), top(largest_integer) {
        f32x16 sum_x = {}, sum_w = {};
        for (int v = 0; v < SIZE; v += LANES) {
            sum_x += WEIGHTED ? load(x + v) * load(importance + v) : load(x + v);
            if (WEIGHTED) sum_w += load(importance + v);
        }
        total_x = sum(sum_x);
        total = WEIGHTED ? sum(sum_w) : float(SIZE);
    }

    MEMBER f32x16 round(int v, Pair p, float inverse) const {
        return max(splat(0.0f), min(splat(top), (load(x + v) - p.bias) * inverse)) + ROUNDER - ROUNDER;
    }

    MEMBER Starts round(float weight, const Pairs& p, Starts inverse) const {
        const Starts step = (weight - p.bias) * inverse, none = {}, most = none + top;
        const Starts below = step < most ? step : most;
        return (below > none ? below : none) + ROUNDER - ROUNDER;
    }

    // The least-squares scale and bias for the integers that each of `p` gives, or p where they decide no line.
    MEMBER Pairs improve(Pairs p, bool keep_scale) const {
        const Starts inverse = 1.0f / p.scale, none = {};
        Starts q = {}, qq = {}, qx = {};
        for (int k = 0; k < SIZE; ++k) {
            const Starts integer = round(x[k], p, inverse), weighed = WEIGHTED ? integer * importance[k] : integer;
            q += weighed;
            qq += weighed * integer;
            qx += weighed * x[k];
        }
        const Starts spread = total * qq - q * q, scale = (total * qx - q * total_x) / spread;
        if (!keep_scale) p.scale = spread > none ? (scale > none ? scale : p.scale) : p.scale;
        p.bias = (total_x - p.scale * q) / total;
        return p;
    }

    MEMBER Starts errors(const Pairs& p) const {
        const Starts inverse = 1.0f / p.scale;
        Starts squares = {};
        for (int k = 0; k < SIZE; ++k) {
            const Starts off = round(x[k], p, inverse) * p.scale + p.bias - x[k];
            squares += WEIGHTED ? off * off * importance[k] : off * off;
        }
        return squares;
    }

    MEMBER float error(Pair p) const {
        const float inverse = 1.0f / p.scale;
        f32x16 squares = {};
        for (int v = 0; v < SIZE; v += LANES) {
            const f32x16 off = round(v, p, inverse) * p.scale + p.bias - load(x + v);
            squares += WEIGHTED ? off * off * load(importance + v) : off * off;
        }
        return sum(squares);
    }

    static MEMBER Starts rounded(Starts value) {  // to bf16, as to_bf16 does
        const StartBits bits = (StartBits)value;
        return (Starts)((bits + 0x7fffu + ((bits >> 16) & 1u)) & 0xffff0000u);
    }

    MEMBER Pair fit() const {
        f32x16 lows = load(x), highs = lows;
        for (int v = LANES; v < SIZE; v += LANES) lows = min(lows, load(x + v)), highs = max(highs, load(x + v));
        const float low = -largest(-lows), high = largest(highs);
        const Pair plain = {bf16_value(to_bf16((high - low) / top)), bf16_value(to_bf16(low))};
        if (!(plain.scale > 0.0f)) return plain;  // all weights are equal
        const float middle = 0.5f * low + 0.5f * high;
        Pair best = plain;
        float least = 0.0f;
        bool found = false;
        for (int first = 0; first < STARTS; first += WIDTH) {
            Starts half;
            for (int n = 0; n < WIDTH; ++n) half[n] = 0.5f * SHARES[first + n] * (high - low);
            Pairs p = {2.0f * half / top, middle - half};
            for (int turn = 0; turn < TURNS; ++turn) p = improve(p, false);
            p.scale = rounded(p.scale);  // as it will be stored; the bias is fitted to that
            p.bias = rounded(improve(p, true).bias);
            const Starts squares = errors(p);
            for (int n = 0; n < WIDTH; ++n) {
                if (!(p.scale[n] > 0.0f) || (found && !(squares[n] < least))) continue;
                found = true, least = squares[n], best = {p.scale[n], p.bias[n]};
            }
        }
        return found && error(best) < error(plain) ? best : plain;  // never worse than min/max
    }
};

template <int SIZE, bool WEIGHTED>
INLINE void fit_rows(const float* weights, const float* importance, int64_t rows, int64_t columns, float top,
                     uint16_t* scales, uint16_t* biases, uint8_t* integers, Loss* loss) {
    f32x16 farthest = {};
    for (int64_t row = 0; row < rows; ++row) {
        for (int64_t first = 0; first < columns; first += SIZE) {
            const Group<SIZE, WEIGHTED> group(weights + row * columns + first, importance + first, top);
            const Pair p = group.fit();
            *scales++ = to_bf16(p.scale);
            *biases++ = to_bf16(p.bias);
            uint8_t* to = integers + row * columns + first;
            const float inverse = p.scale > 0.0f ? 1.0f / p.scale : 0.0f;
            f32x16 squares = {}, sizes = {};
            for (int v = 0; v < SIZE; v += LANES) {
                typedef uint8_t u8x16 __attribute__((vector_size(16)));
                const f32x16 q = group.round(v, p, inverse), x = load(group.x + v), off = q * p.scale + p.bias - x;
                const u8x16 bytes = __builtin_convertvector(__builtin_convertvector(q, i32x16), u8x16);
                memcpy(to + v, &bytes, sizeof bytes);
                squares += off * off;
                sizes += x * x;
                farthest = max(farthest, abs(off));
            }
            loss->squared_error += sum(squares);
            loss->squared_weight += sum(sizes);
        }
    }
    loss->largest = largest(farthest);
}

template <int SIZE>
INLINE void fit_rows_either(const float* weights, const float* importance, int64_t rows, int64_t columns, float top,
                            uint16_t* scales, uint16_t* biases, uint8_t* integers, Loss* loss) {
    if (importance) fit_rows<SIZE, true>(weights, importance, rows, columns, top, scales, biases, integers, loss);
    else fit_rows<SIZE, false>(weights, weights, rows, columns, top, scales, biases, integers, loss);
}

}  // namespace
}  // namespace moepack

// weights [rows, columns], finite; importance [columns], positive, or null for equal; group_size 32, 64 or 128.
// scales, biases [rows, columns / group_size] as bf16 bits, integers [rows, columns] below 2^bits; *loss is overwritten.
API FOR_EVERY_WIDTH void moepack_fit_groups(const float* weights, const float* importance, int64_t rows,
                                            int64_t columns, int64_t group_size, int64_t bits, uint16_t* scales,
                                            uint16_t* biases, uint8_t* integers, moepack::Loss* loss) {
    *loss = {};
    const float top = float((1 << bits) - 1);
    if (group_size == 32) moepack::fit_rows_either<32>(weights, importance, rows, columns, top, scales, biases, integers, loss);
    if (group_size == 64) moepack::fit_rows_either<64>(weights, importance, rows, columns, top, scales, biases, integers, loss);
    if (group_size == 128) moepack::fit_rows_either<128>(weights, importance, rows, columns, top, scales, biases, integers, loss);
}
