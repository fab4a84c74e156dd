// int8 primitives of AVX2. pmaddubsw adds pairs of u8 x i8 in 16 bits, which up to 4 bits cannot overflow
// (15 * 127 * 2 = 3810, four of them 15240); 8-bit values are widened first.

// 32 packed integers -> 32 bytes.
template <int BITS> INLINE void unpack32(const uint8_t* packed, uint8_t* values) {
    if (BITS == 8) {
        _mm256_storeu_si256((__m256i*)values, _mm256_loadu_si256((const __m256i*)packed));
    } else if (BITS == 4) {
        const __m256i wide = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)packed));  // a byte in every 16 bits
        const __m256i both = _mm256_or_si256(wide, _mm256_slli_epi16(wide, 4));
        _mm256_storeu_si256((__m256i*)values, _mm256_and_si256(both, _mm256_set1_epi8(15)));
    } else if (BITS == 2) {
        const __m256i wide = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)packed));  // a byte in every 32 bits
        const __m256i pairs = _mm256_or_si256(wide, _mm256_slli_epi32(wide, 12));
        const __m256i all = _mm256_or_si256(pairs, _mm256_slli_epi32(pairs, 6));
        _mm256_storeu_si256((__m256i*)values, _mm256_and_si256(all, _mm256_set1_epi8(3)));
    } else {
        for (int unit = 0; unit < 4; ++unit) {
            uint32_t word = 0;
            memcpy(&word, packed + unit * BITS, BITS);
            const uint64_t spread = _pdep_u64(word, 0x0707070707070707u);
            memcpy(values + unit * 8, &spread, 8);
        }
    }
}

using Lanes = __m256i;
using FloatLanes = __m256;
INLINE Lanes zero_lanes() { return _mm256_setzero_si256(); }
INLINE FloatLanes zero_floats() { return _mm256_setzero_ps(); }

template <int BITS> INLINE Lanes dot32(const uint8_t* values, const int8_t* q, Lanes lanes) {
    const __m256i v = _mm256_loadu_si256((const __m256i*)values), x = _mm256_loadu_si256((const __m256i*)q);
    if (BITS < 8)
        return _mm256_add_epi32(lanes, _mm256_madd_epi16(_mm256_maddubs_epi16(v, x), _mm256_set1_epi16(1)));
    const __m256i low = _mm256_madd_epi16(_mm256_cvtepu8_epi16(_mm256_castsi256_si128(v)), _mm256_cvtepi8_epi16(_mm256_castsi256_si128(x)));
    const __m256i high =
        _mm256_madd_epi16(_mm256_cvtepu8_epi16(_mm256_extracti128_si256(v, 1)), _mm256_cvtepi8_epi16(_mm256_extracti128_si256(x, 1)));
    return _mm256_add_epi32(lanes, _mm256_add_epi32(low, high));
}

INLINE FloatLanes add_scaled(FloatLanes sums, Lanes lanes, float scale) {
    return _mm256_fmadd_ps(_mm256_cvtepi32_ps(lanes), _mm256_set1_ps(scale), sums);
}

INLINE float sum_floats(FloatLanes sums) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(sums), _mm256_extractf128_ps(sums, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}

#include "int8_rows.inl"
