// Quantizers, for the instruction set around this include: a group is widened once, stays in the L1 cache, and is
// walked in single registers.

typedef int32_t i32r __attribute__((vector_size(REGISTER * sizeof(int32_t))));
typedef uint32_t u32r __attribute__((vector_size(REGISTER * sizeof(uint32_t))));
typedef uint16_t u16r __attribute__((vector_size(REGISTER * sizeof(uint16_t))));
typedef uint8_t u8r __attribute__((vector_size(REGISTER)));

INLINE uint16_t nearest_bf16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

INLINE bool is_finite_bf16(uint16_t bits) { return (bits & 0x7f80) != 0x7f80; }

INLINE void widen_group(const uint8_t* from, Storage storage, int64_t count, float* out) {
    if (storage == F32) {
        memcpy(out, from, size_t(count) * sizeof(float));
    } else if (storage == F16) {
        for (int64_t i = 0; i < count; i += LANES) store(out + i, load_f16((const uint16_t*)from + i));
    } else {
        for (int64_t i = 0; i < count; i += REGISTER) {
            u16r half;
            memcpy(&half, from + 2 * i, sizeof half);
            store_register(out + i, (f32r)(__builtin_convertvector(half, u32r) << 16));
        }
    }
}

// Fold the lanes of a register into one by halves.
template <class Fold> INLINE float fold_lanes(f32r value, const Fold& fold) {
    float lanes[REGISTER];
    store_register(lanes, value);
    if constexpr (REGISTER >= 16)
        for (int64_t lane = 0; lane < 8; ++lane) lanes[lane] = fold(lanes[lane], lanes[lane + 8]);
    if constexpr (REGISTER >= 8)
        for (int64_t lane = 0; lane < 4; ++lane) lanes[lane] = fold(lanes[lane], lanes[lane + 4]);
    return fold(fold(lanes[0], lanes[2]), fold(lanes[1], lanes[3]));
}

INLINE float lowest(f32r value) {
    return fold_lanes(value, [](float a, float b) { return a < b ? a : b; });
}

INLINE float highest(f32r value) {
    return fold_lanes(value, [](float a, float b) { return a > b ? a : b; });
}

struct GroupRange {
    float low, high;
};

// -0 counts as 0, so that the order in which a group is looked at does not decide the sign of its bias.
INLINE GroupRange find_range(const float* w, int64_t count, i32r& nan) {
    f32r low = load_register(w), high = low;
    nan |= low != low;
    for (int64_t i = REGISTER; i < count; i += REGISTER) {
        const f32r x = load_register(w + i);
        low = x < low ? x : low;
        high = x > high ? x : high;
        nan |= x != x;
    }
    return {lowest(low) + 0.0f, highest(high) + 0.0f};
}

// Eight bytes, each below 2^BITS, into the low BITS bytes: neighbours move together in three steps.
template <int BITS> INLINE uint64_t join_eight(uint64_t v) {
    if (BITS == 8) return v;
    constexpr uint64_t PAIR = (uint64_t(1) << 2 * BITS) - 1, FOUR = (uint64_t(1) << 4 * BITS) - 1;
    v = (v | v >> (8 - BITS)) & PAIR * 0x0001000100010001ull;
    v = (v | v >> (16 - 2 * BITS)) & FOUR * 0x0000000100000001ull;
    return v | v >> (32 - 4 * BITS);  // what lies above BITS bytes is not stored
}

template <int BITS> INLINE void pack_group(const uint8_t* integers, int64_t count, uint8_t* out) {
    for (int64_t i = 0; i < count; i += 8) {
        uint64_t eight;
        memcpy(&eight, integers + i, sizeof eight);
        eight = join_eight<BITS>(eight);
        memcpy(out + i / 8 * BITS, &eight, BITS);  // little-endian, as every machine that this runs on
    }
}

// The errors of a row, a lane of a register each.
struct RowError {
    f32r squared_error = {}, squared_weight = {}, largest = {};
};

INLINE void add_row(const RowError& row, RoundingError& error) {
    for (int64_t lane = 0; lane < REGISTER; ++lane) {
        error.squared_error += row.squared_error[lane];
        error.squared_weight += row.squared_weight[lane];
        error.largest = row.largest[lane] > error.largest ? row.largest[lane] : error.largest;
    }
}

// Integers of a group for a scale and a bias that are bf16 already.
template <int BITS>
INLINE void round_group(const float* w, int64_t count, float scale, float bias, uint8_t* out, RowError& error) {
    constexpr float TOP = float((1 << BITS) - 1), SHIFT = 12582912.0f;  // 1.5 * 2^23: the sum is rounded to an integer
    alignas(64) uint8_t integers[LARGEST_GROUP];
    const f32r zero = {}, top = zero + TOP;
    const bool flat = scale == 0.0f;  // equal weights: every integer means the bias
    for (int64_t i = 0; i < count; i += REGISTER) {
        const f32r x = load_register(w + i);
        f32r step = flat ? zero : (x - bias) / scale;
        step = step < top ? step : top;
        step = step > zero ? step : zero;
        const f32r shifted = step + SHIFT;
        const u8r narrow = __builtin_convertvector((u32r)shifted & 0xffu, u8r);
        memcpy(integers + i, &narrow, sizeof narrow);
        const f32r miss = x - ((shifted - SHIFT) * scale + bias);
        const f32r size = (f32r)((u32r)miss & 0x7fffffffu);
        error.squared_error += miss * miss;
        error.squared_weight += x * x;
        error.largest = size > error.largest ? size : error.largest;
    }
    pack_group<BITS>(integers, count, out);
}

template <int BITS, int SIZE> static int64_t minmax_rows(const QuantizeJob& job) {
    const int64_t groups = job.columns / SIZE, item_bytes = job.storage == F32 ? 4 : 2;
    alignas(64) float w[SIZE];
    for (int64_t row = 0; row < job.rows; ++row) {
        RowError error;
        i32r nan = {};
        bool fits = true;
        for (int64_t group = row * groups; group < (row + 1) * groups; ++group) {
            widen_group(job.values + group * SIZE * item_bytes, job.storage, SIZE, w);
            const GroupRange range = find_range(w, SIZE, nan);
            const uint16_t scale = nearest_bf16((range.high - range.low) / float((1 << BITS) - 1)), bias = nearest_bf16(range.low);
            fits &= is_finite_bf16(scale) && is_finite_bf16(bias);
            job.scales[group] = scale;
            job.biases[group] = bias;
            round_group<BITS>(w, SIZE, bf16_value(scale), bf16_value(bias), job.w_q + group * SIZE * BITS / 8, error);
        }
        for (int64_t lane = 0; lane < REGISTER; ++lane) fits &= nan[lane] == 0;
        if (!fits) return row;
        add_row(error, *job.error);
    }
    return -1;
}

template <int BITS> static int64_t minmax_groups(const QuantizeJob& job) {
    switch (job.group_size) {
        case 32: return minmax_rows<BITS, 32>(job);
        case 64: return minmax_rows<BITS, 64>(job);
        default: return minmax_rows<BITS, 128>(job);
    }
}

static int64_t quantize_minmax(const QuantizeJob& job) {
    switch (job.bits) {
        case 2: return minmax_groups<2>(job);
        case 3: return minmax_groups<3>(job);
        case 4: return minmax_groups<4>(job);
        default: return minmax_groups<8>(job);
    }
}

static constexpr QuantizeKernels QUANTIZE_KERNELS = {quantize_minmax};
