// The fit of a group: the scale and bias, in bf16, and the integers with the least squared error. Formula: native_fit.py.
//
// The same input gives the same bytes on every machine: sums run in sixteen lanes and a fixed tree whatever the
// instruction set, and this file is compiled without fused multiply-add (setup.py). The compiler clones the entry for
// wider registers where it can; isa.cpp has no part in it.
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
constexpr float SHARES[] = {1.0f, 0.93f, 0.86f, 0.79f, 0.72f, 0.65f, 0.57f, 0.48f};
constexpr int TURNS = 4;

struct Pair {
    float scale, bias;
};


INLINE uint16_t to_bf16(float value) {  // nearest, ties to even; finite
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

// V vectors of weights of a group, with the importance of each where it matters.
template <int V, bool WEIGHTED> struct Group {
    f32x16 x[V], importance[V];
    float top, total, total_x;  // largest integer; sums of importance and of importance * x

    inline __attribute__((always_inline)) f32x16 weigh(int v, f32x16 value) const { return WEIGHTED ? value * importance[v] : value; }

    inline __attribute__((always_inline)) void read(const float* weights, const float* columns, float largest_integer) {
        f32x16 sum_x = {}, sum_w = {};
        for (int v = 0; v < V; ++v) {
            x[v] = load(weights + v * LANES);
            if (WEIGHTED) importance[v] = load(columns + v * LANES);
            sum_x += weigh(v, x[v]);
            if (WEIGHTED) sum_w += importance[v];
        }
        top = largest_integer;
        total_x = sum(sum_x);
        total = WEIGHTED ? sum(sum_w) : float(V * LANES);
    }

    // The integer of each weight, as a float. Adding and taking off 1.5 * 2^23 rounds, ties to even.
    inline __attribute__((always_inline)) f32x16 round(int v, Pair p, float inverse) const {
        const f32x16 step = (x[v] - p.bias) * inverse;
        return max(splat(0.0f), min(splat(top), step)) + 12582912.0f - 12582912.0f;
    }

    // The least-squares scale and bias for the integers that `p` gives, or p where they do not decide a line.
    inline __attribute__((always_inline)) Pair improve(Pair p, bool keep_scale) const {
        const float inverse = 1.0f / p.scale;
        f32x16 sum_q = {}, sum_qq = {}, sum_qx = {};
        for (int v = 0; v < V; ++v) {
            const f32x16 q = round(v, p, inverse), wq = weigh(v, q);
            sum_q += wq;
            sum_qq += wq * q;
            sum_qx += wq * x[v];
        }
        const float q = sum(sum_q), spread = total * sum(sum_qq) - q * q;
        const float scale = (total * sum(sum_qx) - q * total_x) / spread;
        if (!keep_scale && spread > 0.0f && scale > 0.0f) p.scale = scale;
        p.bias = (total_x - p.scale * q) / total;
        return p;
    }

    inline __attribute__((always_inline)) float error(Pair p) const {
        const float inverse = 1.0f / p.scale;
        f32x16 squares = {};
        for (int v = 0; v < V; ++v) {
            const f32x16 off = round(v, p, inverse) * p.scale + p.bias - x[v];
            squares += weigh(v, off * off);
        }
        return sum(squares);
    }

    // A pair as it will be stored: the scale rounded, the bias fitted to the rounded scale and rounded.
    inline __attribute__((always_inline)) Pair stored(Pair p) const {
        p.scale = bf16_value(to_bf16(p.scale));
        if (!(p.scale > 0.0f)) return p;
        p.bias = bf16_value(to_bf16(improve(p, true).bias));
        return p;
    }

    inline __attribute__((always_inline)) Pair fit() const {
        f32x16 lows = x[0], highs = x[0];
        for (int v = 1; v < V; ++v) lows = min(lows, x[v]), highs = max(highs, x[v]);
        const float low = -largest(-lows), high = largest(highs);
        Pair best = {bf16_value(to_bf16((high - low) / top)), bf16_value(to_bf16(low))};  // min/max: never worse
        if (!(best.scale > 0.0f)) return best;  // all weights are equal
        float least = error(best);
        for (const float share : SHARES) {
            const float middle = 0.5f * low + 0.5f * high, half = 0.5f * share * (high - low);
            Pair p = {2.0f * half / top, middle - half};
            if (!(p.scale > 0.0f)) continue;
            for (int turn = 0; turn < TURNS; ++turn) p = improve(p, false);
            p = stored(p);
            if (!(p.scale > 0.0f)) continue;
            const float found = error(p);
            if (found < least) least = found, best = p;
        }
        return best;
    }
};

template <int V, bool WEIGHTED>
INLINE void fit_rows(const float* weights, const float* importance, int64_t rows, int64_t columns, float top,
                     uint16_t* scales, uint16_t* biases, uint8_t* integers, Loss* loss) {
    constexpr int64_t SIZE = V * LANES;
    for (int64_t row = 0; row < rows; ++row) {
        for (int64_t first = 0; first < columns; first += SIZE) {
            Group<V, WEIGHTED> group;
            group.read(weights + row * columns + first, WEIGHTED ? importance + first : nullptr, top);
            const Pair p = group.fit();
            *scales++ = to_bf16(p.scale);
            *biases++ = to_bf16(p.bias);
            uint8_t* to = integers + row * columns + first;
            const float inverse = p.scale > 0.0f ? 1.0f / p.scale : 0.0f;
            for (int v = 0; v < V; ++v) {
                typedef uint8_t u8x16 __attribute__((vector_size(16)));
                const u8x16 bytes = __builtin_convertvector(__builtin_convertvector(group.round(v, p, inverse), i32x16), u8x16);
                memcpy(to + v * LANES, &bytes, sizeof bytes);
                const f32x16 off = group.round(v, p, inverse) * p.scale + p.bias - group.x[v];
                loss->squared_error += sum(off * off);
                loss->squared_weight += sum(group.x[v] * group.x[v]);
                const double far = largest(abs(off));
                loss->largest = far > loss->largest ? far : loss->largest;
            }
        }
    }
}

template <int V>
INLINE void fit_rows_either(const float* weights, const float* importance, int64_t rows, int64_t columns, float top,
                            uint16_t* scales, uint16_t* biases, uint8_t* integers, Loss* loss) {
    if (importance) fit_rows<V, true>(weights, importance, rows, columns, top, scales, biases, integers, loss);
    else fit_rows<V, false>(weights, nullptr, rows, columns, top, scales, biases, integers, loss);
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
    if (group_size == 32) moepack::fit_rows_either<2>(weights, importance, rows, columns, top, scales, biases, integers, loss);
    if (group_size == 64) moepack::fit_rows_either<4>(weights, importance, rows, columns, top, scales, biases, integers, loss);
    if (group_size == 128) moepack::fit_rows_either<8>(weights, importance, rows, columns, top, scales, biases, integers, loss);
}
