// int8 primitives in plain C++.

// 32 packed integers -> 32 bytes.
template <int BITS> INLINE void unpack32(const uint8_t* packed, uint8_t* values) {
    if (BITS == 8) {
        memcpy(values, packed, 32);
        return;
    }
    for (int unit = 0; unit < 4; ++unit) {  // eight integers fill BITS bytes
        uint32_t word = 0;
        memcpy(&word, packed + unit * BITS, BITS < 4 ? BITS : 4);
        for (int i = 0; i < 8; ++i) values[unit * 8 + i] = uint8_t(word >> (i * BITS) & ((1 << BITS) - 1));
    }
}

using Lanes = int32_t;
using FloatLanes = float;
INLINE Lanes zero_lanes() { return 0; }
INLINE FloatLanes zero_floats() { return 0.0f; }

template <int BITS> INLINE Lanes dot32(const uint8_t* values, const int8_t* q, Lanes lanes) {
    for (int i = 0; i < 32; ++i) lanes += int32_t(values[i]) * q[i];
    return lanes;
}

INLINE FloatLanes add_scaled(FloatLanes sums, Lanes lanes, float scale) { return sums + float(lanes) * scale; }
INLINE float sum_floats(FloatLanes sums) { return sums; }

#include "int8_rows.inl"
