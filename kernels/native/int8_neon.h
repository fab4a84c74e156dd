// int8 primitives of NEON with the dot-product extension: four i8 x i8 products to each of four lanes.

// 32 packed integers -> 32 bytes.
template <int BITS> INLINE void unpack32(const uint8_t* packed, uint8_t* values) {
    if (BITS == 8) {
        memcpy(values, packed, 32);
    } else if (BITS == 4) {
        const uint8x16_t bytes = vld1q_u8(packed);
        const uint8x16x2_t parts = {{vandq_u8(bytes, vdupq_n_u8(15)), vshrq_n_u8(bytes, 4)}};
        vst2q_u8(values, parts);  // stores them in turn: low, high, low, high
    } else if (BITS == 2) {
        const uint8x8_t bytes = vld1_u8(packed), mask = vdup_n_u8(3);
        const uint8x8x4_t parts = {{vand_u8(bytes, mask), vand_u8(vshr_n_u8(bytes, 2), mask), vand_u8(vshr_n_u8(bytes, 4), mask), vshr_n_u8(bytes, 6)}};
        vst4_u8(values, parts);
    } else {
        for (int unit = 0; unit < 4; ++unit) {
            uint32_t word = 0;
            memcpy(&word, packed + unit * BITS, BITS);
            for (int i = 0; i < 8; ++i) values[unit * 8 + i] = uint8_t(word >> (i * BITS) & 7);
        }
    }
}

using Lanes = int32x4_t;
using FloatLanes = float32x4_t;
INLINE Lanes zero_lanes() { return vdupq_n_s32(0); }
INLINE FloatLanes zero_floats() { return vdupq_n_f32(0.0f); }

template <int BITS> INLINE Lanes dot32(const uint8_t* values, const int8_t* q, Lanes lanes) {
    for (int half = 0; half < 32; half += 16) {
        const int8x16_t x = vld1q_s8(q + half);
        uint8x16_t v = vld1q_u8(values + half);
        if (BITS == 8) {  // 0..255 does not fit i8: v = (v - 128) + 64 + 64
            v = veorq_u8(v, vdupq_n_u8(128));
            lanes = vdotq_s32(lanes, vdupq_n_s8(64), x);
            lanes = vdotq_s32(lanes, vdupq_n_s8(64), x);
        }
        lanes = vdotq_s32(lanes, vreinterpretq_s8_u8(v), x);
    }
    return lanes;
}

INLINE FloatLanes add_scaled(FloatLanes sums, Lanes lanes, float scale) { return vfmaq_n_f32(sums, vcvtq_f32_s32(lanes), scale); }
INLINE float sum_floats(FloatLanes sums) { return vaddvq_f32(sums); }

#include "int8_rows.inl"
