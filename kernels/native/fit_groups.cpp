// The fit of a group: the scale and bias, in bf16, and the integers with the least squared error. Formula: native_fit.py.
//
// The starts of the search run side by side, one in each lane of a register, so that most sums need no tree and wait for
// nobody. The same input gives the same bytes on every machine: a lane's sum is in the order of the weights, other sums
// run in sixteen lanes and a fixed tree, and this file is compiled without fused multiply-add (setup.py). The compiler
// clones the entry for wider registers where it can, and with AVX-512 two groups share one; isa.cpp has no part in it.
#include <cmath>
#include <cstdint>
#include <cstring>

#include "kernels.h"

#if defined(__x86_64__) && defined(__linux__)
#define FOR_EVERY_WIDTH __attribute__((target_clones("avx2", "default")))
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
#if defined(__x86_64__)
constexpr int FEW = 8;  // lanes of a register, where there is no AVX-512: comparing wider ones is slow
#else
constexpr int FEW = 4;
#endif
constexpr float SHARES[STARTS] = {1.0f, 0.93f, 0.86f, 0.79f, 0.72f, 0.65f, 0.57f, 0.48f};

struct Pair {
    float scale, bias;
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
    float top, total, total_x, low, high;  // largest integer; sums of importance and of importance * x; extremes
    Pair plain;                            // min/max, as it would be stored

    MEMBER void read(const float* weights, const float* columns, float largest_integer) {
        x = weights, importance = columns, top = largest_integer;
        f32x16 sum_x = {}, sum_w = {}, lows = load(x), highs = lows;
        for (int v = 0; v < SIZE; v += LANES) {
            sum_x += WEIGHTED ? load(x + v) * load(importance + v) : load(x + v);
            if (WEIGHTED) sum_w += load(importance + v);
            lows = min(lows, load(x + v)), highs = max(highs, load(x + v));
        }
        total_x = sum(sum_x);
        total = WEIGHTED ? sum(sum_w) : float(SIZE);
        low = -largest(-lows), high = largest(highs);
        plain = {bf16_value(to_bf16((high - low) / top)), bf16_value(to_bf16(low))};
    }

    MEMBER f32x16 round(int v, Pair p, float inverse) const {
        return max(splat(0.0f), min(splat(top), (load(x + v) - p.bias) * inverse)) + ROUNDER - ROUNDER;
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
};

template <int WIDTH> struct Register;
#define REGISTER(WIDTH)                                               \
    template <> struct Register<WIDTH> {                              \
        typedef float Lanes __attribute__((vector_size(4 * WIDTH)));  \
        typedef uint32_t Bits __attribute__((vector_size(4 * WIDTH))); \
    };
REGISTER(4) REGISTER(8) REGISTER(16)

// The search in registers of WIDTH lanes, one for each start: of a part of the starts, of all, or of those of two groups.
template <int SIZE, bool WEIGHTED, int WIDTH> struct Search {
    static constexpr int GROUPS = WIDTH > STARTS ? WIDTH / STARTS : 1, OWN = WIDTH / GROUPS;
    typedef typename Register<WIDTH>::Lanes Lanes;
    typedef typename Register<WIDTH>::Bits Bits;
    typedef Group<SIZE, WEIGHTED> Groups[GROUPS];

    struct Pairs {
        Lanes scale, bias;
    };

    const Groups& groups;
    Lanes total, total_x, top;
    Lanes pairs[GROUPS == 2 ? SIZE : 1];  // weights of two groups side by side: they are read in every turn

    // A value of each group in that group's lanes.
    template <class Of> static MEMBER Lanes give(Of of) {
        Lanes value = Lanes{} + of(0);
        if (GROUPS == 2) {
            Bits second = {};
            for (int n = OWN; n < WIDTH; ++n) second[n] = 1;
            value = second > 0u ? Lanes{} + of(GROUPS - 1) : value;
        }
        return value;
    }

    MEMBER explicit Search(const Groups& given) : groups(given) {
        total = give([&](int g) { return groups[g].total; });
        total_x = give([&](int g) { return groups[g].total_x; });
        top = Lanes{} + groups[0].top;
        for (int k = 0; GROUPS == 2 && k < SIZE; ++k) pairs[k] = give([&](int g) { return groups[g].x[k]; });
    }

    MEMBER Lanes weight(int k) const { return GROUPS == 2 ? pairs[k] : Lanes{} + groups[0].x[k]; }

    MEMBER Lanes weigh(int k, Lanes value) const {
        return WEIGHTED ? value * give([&](int g) { return groups[g].importance[k]; }) : value;
    }

    MEMBER Lanes round(Lanes x, const Pairs& p, Lanes inverse) const {
        const Lanes step = (x - p.bias) * inverse, none = {}, below = step < top ? step : top;
        return (below > none ? below : none) + ROUNDER - ROUNDER;
    }

    // The least-squares scale and bias for the integers that each of `p` gives, or p where they decide no line.
    MEMBER Pairs improve(Pairs p, bool keep_scale) const {
        const Lanes inverse = 1.0f / p.scale, none = {};
        Lanes q = {}, qq = {}, qx = {};
        for (int k = 0; k < SIZE; ++k) {
            const Lanes x = weight(k), integer = round(x, p, inverse), weighed = weigh(k, integer);
            q += weighed;
            qq += weighed * integer;
            qx += weighed * x;
        }
        const Lanes spread = total * qq - q * q, scale = (total * qx - q * total_x) / spread;
        if (!keep_scale) p.scale = spread > none ? (scale > none ? scale : p.scale) : p.scale;
        p.bias = (total_x - p.scale * q) / total;
        return p;
    }

    MEMBER Lanes errors(const Pairs& p) const {
        const Lanes inverse = 1.0f / p.scale;
        Lanes squares = {};
        for (int k = 0; k < SIZE; ++k) {
            const Lanes x = weight(k), off = round(x, p, inverse) * p.scale + p.bias - x;
            squares += weigh(k, off * off);
        }
        return squares;
    }

    static MEMBER Lanes rounded(Lanes value) {  // to bf16, as to_bf16 does
        const Bits bits = (Bits)value;
        return (Lanes)((bits + 0x7fffu + ((bits >> 16) & 1u)) & 0xffff0000u);
    }

    MEMBER void run(Pair* found) const {
        float least[GROUPS] = {};
        Pair best[GROUPS] = {};  // scale 0: none yet
        const Lanes middle = give([&](int g) { return 0.5f * groups[g].low + 0.5f * groups[g].high; });
        const Lanes range = give([&](int g) { return groups[g].high - groups[g].low; });
        for (int first = 0; first < STARTS; first += OWN) {
            Lanes shares;
            for (int n = 0; n < WIDTH; ++n) shares[n] = 0.5f * SHARES[first + n % OWN];
            const Lanes half = shares * range;
            Pairs p = {2.0f * half / top, middle - half};
            for (int turn = 0; turn < TURNS; ++turn) p = improve(p, false);
            p.scale = rounded(p.scale);  // as it will be stored; the bias is fitted to that
            p.bias = rounded(improve(p, true).bias);
            const Lanes squares = errors(p);
            for (int n = 0; n < WIDTH; ++n) {
                const int g = n / OWN;
                if (p.scale[n] > 0.0f && (best[g].scale == 0.0f || squares[n] < least[g]))
                    least[g] = squares[n], best[g] = {p.scale[n], p.bias[n]};
            }
        }
        for (int g = 0; g < GROUPS; ++g) {
            const Group<SIZE, WEIGHTED>& group = groups[g];  // all weights equal, or never worse than min/max
            const bool is_better = group.plain.scale > 0.0f && best[g].scale > 0.0f && group.error(best[g]) < group.error(group.plain);
            found[g] = is_better ? best[g] : group.plain;
        }
    }
};

template <int SIZE, bool WEIGHTED, int WIDTH>
INLINE void fit_rows(const float* weights, const float* importance, int64_t rows, int64_t columns, float top,
                     uint16_t* scales, uint16_t* biases, uint8_t* integers, Loss* loss) {
    typedef Search<SIZE, WEIGHTED, WIDTH> Own;
    const int64_t groups_of_row = columns / SIZE, count = rows * groups_of_row;
    f32x16 farthest = {};
    for (int64_t first = 0; first < count; first += Own::GROUPS) {
        typename Own::Groups groups;
        Pair found[Own::GROUPS];
        for (int g = 0; g < Own::GROUPS; ++g) {
            const int64_t number = first + g < count ? first + g : first;  // at the end one stands for two
            groups[g].read(weights + number * SIZE, importance + number % groups_of_row * SIZE, top);
        }
        Own(groups).run(found);
        for (int g = 0; g < Own::GROUPS && first + g < count; ++g) {
            const Pair p = found[g];
            scales[first + g] = to_bf16(p.scale);
            biases[first + g] = to_bf16(p.bias);
            uint8_t* to = integers + (first + g) * SIZE;
            const float inverse = p.scale > 0.0f ? 1.0f / p.scale : 0.0f;
            f32x16 squares = {}, sizes = {};
            for (int v = 0; v < SIZE; v += LANES) {
                typedef uint8_t u8x16 __attribute__((vector_size(16)));
                const f32x16 q = groups[g].round(v, p, inverse), x = load(groups[g].x + v), off = q * p.scale + p.bias - x;
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

template <int SIZE, int WIDTH>
INLINE void fit_either(const float* weights, const float* importance, int64_t rows, int64_t columns, float top,
                       uint16_t* scales, uint16_t* biases, uint8_t* integers, Loss* loss) {
    if (importance) fit_rows<SIZE, true, WIDTH>(weights, importance, rows, columns, top, scales, biases, integers, loss);
    else fit_rows<SIZE, false, WIDTH>(weights, weights, rows, columns, top, scales, biases, integers, loss);
}

template <int WIDTH>
INLINE void fit_any(const float* weights, const float* importance, int64_t rows, int64_t columns, int64_t group_size,
                    int64_t bits, uint16_t* scales, uint16_t* biases, uint8_t* integers, Loss* loss) {
    *loss = {};
    const float top = float((1 << bits) - 1);
    if (group_size == 32) fit_either<32, WIDTH>(weights, importance, rows, columns, top, scales, biases, integers, loss);
    if (group_size == 64) fit_either<64, WIDTH>(weights, importance, rows, columns, top, scales, biases, integers, loss);
    if (group_size == 128) fit_either<128, WIDTH>(weights, importance, rows, columns, top, scales, biases, integers, loss);
}

#if defined(__x86_64__) && defined(__linux__)
__attribute__((target("avx512f"))) void fit_in_pairs(
    const float* weights, const float* importance, int64_t rows, int64_t columns, int64_t group_size, int64_t bits,
    uint16_t* scales, uint16_t* biases, uint8_t* integers, Loss* loss) {
    fit_any<16>(weights, importance, rows, columns, group_size, bits, scales, biases, integers, loss);
}
#endif

}  // namespace
}  // namespace moepack

// weights [rows, columns], finite; importance [columns], positive, or null for equal; group_size 32, 64 or 128.
// scales, biases [rows, columns / group_size] as bf16 bits, integers [rows, columns] below 2^bits; *loss is overwritten.
API FOR_EVERY_WIDTH void moepack_fit_groups(const float* weights, const float* importance, int64_t rows,
                                            int64_t columns, int64_t group_size, int64_t bits, uint16_t* scales,
                                            uint16_t* biases, uint8_t* integers, moepack::Loss* loss) {
#if defined(__x86_64__) && defined(__linux__)
    if (__builtin_cpu_supports("avx512f"))
        return moepack::fit_in_pairs(weights, importance, rows, columns, group_size, bits, scales, biases, integers, loss);
#endif
    moepack::fit_any<moepack::FEW>(weights, importance, rows, columns, group_size, bits, scales, biases, integers, loss);
}
