// Sixteen floats as one value. The compiler's vector extension lowers it to whatever the instruction set at hand has:
// one register of AVX-512, two of AVX2, four of NEON or SSE. Included once per instruction set, inside its namespace.
// No include guard, no #include of its own: isa_*.cpp includes the standard headers before it switches targets.

constexpr int64_t LANES = 16;
typedef float f32x16 __attribute__((vector_size(64)));
typedef int32_t i32x16 __attribute__((vector_size(64)));
typedef uint32_t u32x16 __attribute__((vector_size(64)));
typedef uint16_t u16x16 __attribute__((vector_size(32)));

INLINE f32x16 splat(float value) { return f32x16{} + value; }

INLINE f32x16 load(const float* from) {
    f32x16 value;
    memcpy(&value, from, sizeof value);
    return value;
}

INLINE void store(float* to, f32x16 value) { memcpy(to, &value, sizeof value); }

// The first count of sixteen floats, zeros behind them; never touches memory past them.
INLINE f32x16 load_first(const float* from, int64_t count) {
    f32x16 value = {};
    memcpy(&value, from, size_t(count) * sizeof(float));
    return value;
}

INLINE void store_first(float* to, f32x16 value, int64_t count) { memcpy(to, &value, size_t(count) * sizeof(float)); }

INLINE float bf16_value(uint16_t bits) {
    const uint32_t wide = uint32_t(bits) << 16;
    float value;
    memcpy(&value, &wide, sizeof value);
    return value;
}

INLINE f32x16 load_bf16(const uint16_t* from) {
    u16x16 half;
    memcpy(&half, from, sizeof half);
    return (f32x16)(__builtin_convertvector(half, u32x16) << 16);
}

INLINE f32x16 max(f32x16 a, f32x16 b) { return a > b ? a : b; }
INLINE f32x16 min(f32x16 a, f32x16 b) { return a < b ? a : b; }
INLINE f32x16 abs(f32x16 a) { return (f32x16)((u32x16)a & 0x7fffffffu); }

// Sum in a fixed tree order, so that it does not depend on the instruction set.
INLINE float sum(f32x16 value) {
    typedef float f32x8 __attribute__((vector_size(32)));
    typedef float f32x4 __attribute__((vector_size(16)));
    f32x8 low, high;
    memcpy(&low, &value, 32);
    memcpy(&high, (const char*)&value + 32, 32);
    low += high;
    f32x4 first, second;
    memcpy(&first, &low, 16);
    memcpy(&second, (const char*)&low + 16, 16);
    first += second;
    return (first[0] + first[2]) + (first[1] + first[3]);
}

INLINE float largest(f32x16 value) {
    float best = value[0];
    for (int lane = 1; lane < LANES; ++lane) best = value[lane] > best ? value[lane] : best;
    return best;
}

// e^x by 2^n * p(r), |r| <= ln(2)/2: relative error below 2e-7 on [-87, 88], clamped outside.
INLINE f32x16 exp(f32x16 x) {
    x = max(splat(-87.0f), min(splat(88.0f), x));  // in this order a NaN stays one
    const f32x16 shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the sum is rounded to an integer
    const f32x16 n = shifted - 12582912.0f;
    f32x16 r = x - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    f32x16 p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 0.5f;
    p = p * r * r + r + 1.0f;
    const i32x16 power = __builtin_convertvector(n, i32x16) + 127;
    return p * (f32x16)(power << 23);
}

INLINE f32x16 sigmoid(f32x16 x) { return 1.0f / (1.0f + exp(-x)); }
INLINE f32x16 silu(f32x16 x) { return x * sigmoid(x); }

// One register of floats, for kernels that count registers: an f32x16 of several registers is kept in memory by GCC.
constexpr bool is_isa(const char* name) { return __builtin_strcmp(ISA_NAME, name) == 0; }
constexpr int64_t REGISTER = is_isa("amx") || is_isa("avx512") ? 16 : is_isa("avx2") ? 8 : 4;
typedef float f32r __attribute__((vector_size(REGISTER * sizeof(float))));

INLINE f32r load_register(const float* from) {
    f32r value;
    memcpy(&value, from, sizeof value);
    return value;
}

INLINE void store_register(float* to, f32r value) { memcpy(to, &value, sizeof value); }

INLINE int64_t round_up(int64_t count, int64_t multiple) { return (count + multiple - 1) / multiple * multiple; }
INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
