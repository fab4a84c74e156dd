// int8 products of AVX-512 VNNI: one dpbusd adds 64 products u8 x i8 into 16 lanes.
//
// One token: lanes run along the row. Integers of a row's 64 bytes are taken apart by shift and mask, plane by plane:
// plane k holds every (8/bits)-th integer, so the token's values are put into that order once, and a whole 64 bytes of
// weights costs one conversion to float. Rows are walked one at a time: two or more at once halve what DRAM delivers.
//
// Several tokens: lanes run across 32 rows. A panel of 32 rows is unpacked and transposed slice by slice, as
// [columns/4][32 rows][4] in the first-level cache, and meets the tokens there six at a time, with sums in registers.

// 32 packed integers -> 32 bytes in the row's order.
template <int BITS> INLINE __m256i unpack32(const uint8_t* packed) {
    if (BITS == 8) return _mm256_loadu_si256((const __m256i*)packed);
    __m256i spread;  // eight integers at the bottom of each 64 bits
    if (BITS == 4) spread = _mm256_cvtepu32_epi64(_mm_loadu_si128((const __m128i*)packed));
    if (BITS == 2) spread = _mm256_cvtepu16_epi64(_mm_loadl_epi64((const __m128i*)packed));
    if (BITS == 3) {
        const __m256i bytes = _mm256_castsi128_si256(_mm_maskz_loadu_epi8(0x0fff, packed));
        const __m256i places = _mm256_setr_epi8(0, 1, 2, 0, 0, 0, 0, 0, 3, 4, 5, 0, 0, 0, 0, 0,  //
                                                6, 7, 8, 0, 0, 0, 0, 0, 9, 10, 11, 0, 0, 0, 0, 0);
        spread = _mm256_permutexvar_epi8(places, bytes);
    }
    const __m256i shifts = _mm256_set1_epi64x(
        int64_t(7 * BITS) << 56 | int64_t(6 * BITS) << 48 | int64_t(5 * BITS) << 40 | int64_t(4 * BITS) << 32 |
        int64_t(3 * BITS) << 24 | int64_t(2 * BITS) << 16 | int64_t(BITS) << 8);
    return _mm256_and_si256(_mm256_multishift_epi64_epi8(shifts, spread), _mm256_set1_epi8((1 << BITS) - 1));
}

template <int BITS> INLINE void unpack32(const uint8_t* packed, uint8_t* values) {
    _mm256_storeu_si256((__m256i*)values, unpack32<BITS>(packed));
}

// ---- One token -----------------------------------------------------------------------------------------------------

constexpr int planes_of(int bits) { return bits == 3 ? 1 : 8 / bits; }  // 3 bits: spread to bytes in the row's order
constexpr int PREFETCH_BYTES = 8192, SCALES_AHEAD_BYTES = 1024;

// Put a token's values into the order of the planes: within each block of 64 * planes, value j * planes + k goes to
// k * 64 + j.
static void order_for_row_walk(Activations& a) {
    const int planes = planes_of(a.bits), block = 64 * planes;
    if (planes == 1) return;
    alignas(64) int8_t values[256];
    for (int64_t first = 0; first < a.columns; first += block) {
        int8_t* q = a.q + first;
        memcpy(values, q, size_t(block));
        for (int k = 0; k < planes; ++k)
            for (int part = 0; part < planes; ++part) {  // 64 / planes values of plane k out of 64 in order
                const __m512i in_order = _mm512_load_si512(values + part * 64);
                if (planes == 2)
                    _mm256_storeu_si256((__m256i*)(q + k * 64 + part * 32), _mm512_cvtepi16_epi8(_mm512_srli_epi16(in_order, unsigned(8 * k))));
                else
                    _mm_storeu_si128((__m128i*)(q + k * 64 + part * 16), _mm512_cvtepi32_epi8(_mm512_srli_epi32(in_order, unsigned(8 * k))));
            }
    }
}

// 24 bytes of 3-bit integers -> 64 bytes in the row's order.
INLINE __m512i spread_three_bits(__m512i packed) {
    alignas(64) static constexpr int8_t PLACES[64] = {
        0,  1,  2,  0, 0, 0, 0, 0, 3,  4,  5,  0, 0, 0, 0, 0, 6,  7,  8,  0, 0, 0, 0, 0, 9,  10, 11, 0, 0, 0, 0, 0,
        12, 13, 14, 0, 0, 0, 0, 0, 15, 16, 17, 0, 0, 0, 0, 0, 18, 19, 20, 0, 0, 0, 0, 0, 21, 22, 23, 0, 0, 0, 0, 0};
    const __m512i spread = _mm512_permutexvar_epi8(_mm512_load_si512(PLACES), packed);
    return _mm512_and_si512(_mm512_multishift_epi64_epi8(_mm512_set1_epi64(0x15120f0c09060300), spread), _mm512_set1_epi8(7));
}

// 64 bytes of packed integers times their activations, as 16 sums of neighbours (3 bits: 24 bytes).
template <int BITS> INLINE __m512i dot_block(__m512i packed, const int8_t* q) {
    __m512i sums = _mm512_setzero_si512();
    if (BITS == 3) return _mm512_dpbusd_epi32(sums, spread_three_bits(packed), _mm512_loadu_si512(q));
    const __m512i mask = _mm512_set1_epi8(char((1 << BITS) - 1));
    for (int k = 0; k < planes_of(BITS); ++k) {
        const __m512i plane = BITS == 8 ? packed : _mm512_and_si512(k ? _mm512_srli_epi16(packed, unsigned(BITS * k)) : packed, mask);
        sums = _mm512_dpbusd_epi32(sums, plane, _mm512_loadu_si512(q + k * 64));
    }
    return sums;
}

INLINE __m512 widen_scales(__m256i bf16) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bf16), 16)); }

// What a row's integers and a token's make, as 16 sums of products.
template <int BITS, int GROUP> INLINE __m512 walk_row(const Matrix& m, const Activations& a, int64_t row) {
    constexpr int BLOCK = 64 * planes_of(BITS), BLOCK_BYTES = BLOCK * BITS / 8, BLOCKS_OF_16_GROUPS = 16 * GROUP / BLOCK;
    constexpr __mmask64 WHOLE = ~__mmask64(0) >> (64 - BLOCK_BYTES);
    const int64_t groups = m.groups();
    // Which of 16 groups the four values of a lane belong to, in block 0.
    const __m512i lane_group = _mm512_srli_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                                                 unsigned(__builtin_ctz(GROUP / (4 * planes_of(BITS)))));
    const uint8_t* packed = m.data + row * m.row_bytes();
    const uint8_t* const row_end = packed + m.row_bytes();
    const uint16_t *scales = m.scales + row * groups, *biases = m.biases + row * groups;
    const int8_t* q = a.q;
    __m512 sums = _mm512_setzero_ps(), offsets = _mm512_setzero_ps(), both;
    const auto add_block = [&](int block, __m512i bytes) {
        const int first_group = BLOCK >= GROUP ? block * (BLOCK / GROUP) : block / (GROUP / BLOCK > 0 ? GROUP / BLOCK : 1);
        const __m512 factors = _mm512_permutexvar_ps(_mm512_add_epi32(lane_group, _mm512_set1_epi32(first_group)), both);
        sums = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot_block<BITS>(bytes, q)), factors, sums);
        packed += BLOCK_BYTES;
        q += BLOCK;
    };
    for (int64_t g = 0; g < groups; g += 16) {
        const __mmask16 mask = groups - g < 16 ? __mmask16((1u << (groups - g)) - 1) : __mmask16(0xffff);
        __builtin_prefetch((const char*)(scales + g) + SCALES_AHEAD_BYTES);
        __builtin_prefetch((const char*)(biases + g) + SCALES_AHEAD_BYTES);
        const __m512 scale = widen_scales(_mm256_maskz_loadu_epi16(mask, scales + g));
        const __m512 bias = widen_scales(_mm256_maskz_loadu_epi16(mask, biases + g));
        offsets = _mm512_fmadd_ps(scale, _mm512_load_ps(a.residual + g), offsets);
        offsets = _mm512_fmadd_ps(bias, _mm512_load_ps(a.sum + g), offsets);
        both = _mm512_mul_ps(scale, _mm512_load_ps(a.scale + g));
        const int64_t left = row_end - packed;
        const int whole = int(smaller(BLOCKS_OF_16_GROUPS, left / BLOCK_BYTES));
        for (int block = 0; block < whole; ++block) {
            __builtin_prefetch(packed + PREFETCH_BYTES);
            add_block(block, BLOCK_BYTES == 64 ? _mm512_loadu_si512(packed) : _mm512_maskz_loadu_epi8(WHOLE, packed));
        }
        if (whole < BLOCKS_OF_16_GROUPS && packed < row_end)
            add_block(whole, _mm512_maskz_loadu_epi8((__mmask64(1) << (row_end - packed)) - 1, packed));
    }
    return _mm512_add_ps(sums, offsets);
}

// The sums of each of 16 values' lanes, in the order of _mm512_reduce_add_ps: halves onto each other, down to one.
INLINE __m512 reduce_16(const __m512 (&rows)[16]) {
    __m512 halves[8], quarters[4], pairs[2];
    for (int i = 0; i < 8; ++i) {
        const __m512 a = rows[2 * i], b = rows[2 * i + 1];
        halves[i] = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
    }
    for (int i = 0; i < 4; ++i) {
        const __m512 a = halves[2 * i], b = halves[2 * i + 1];
        quarters[i] = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
    }
    for (int i = 0; i < 2; ++i) {
        const __m512d a = _mm512_castps_pd(quarters[2 * i]), b = _mm512_castps_pd(quarters[2 * i + 1]);
        pairs[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
    }
    const __m512 sums = _mm512_add_ps(_mm512_shuffle_ps(pairs[0], pairs[1], 0x88), _mm512_shuffle_ps(pairs[0], pairs[1], 0xdd));
    return _mm512_permutexvar_ps(_mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), sums);
}

template <int BITS, int GROUP>
static void walk_rows(const Matrix& m, const Activations& a, float* out, int64_t begin, int64_t end) {
    int64_t row = begin;
    for (; row + 16 <= end; row += 16) {
        __m512 rows[16];
        for (int r = 0; r < 16; ++r) rows[r] = walk_row<BITS, GROUP>(m, a, row + r);
        _mm512_storeu_ps(out + row, reduce_16(rows));
    }
    for (; row < end; ++row) out[row] = _mm512_reduce_add_ps(walk_row<BITS, GROUP>(m, a, row));
}

template <int BITS> static void walk_rows_of(const Matrix& m, const Activations& a, float* out, int64_t begin, int64_t end) {
    switch (m.group_size) {
        case 32: return walk_rows<BITS, 32>(m, a, out, begin, end);
        case 64: return walk_rows<BITS, 64>(m, a, out, begin, end);
        default: return walk_rows<BITS, 128>(m, a, out, begin, end);
    }
}

static void dot_row_walk(const Matrix& m, const Activations& a, float* out, int64_t begin, int64_t end) {
    switch (m.bits) {
        case 2: return walk_rows_of<2>(m, a, out, begin, end);
        case 3: return walk_rows_of<3>(m, a, out, begin, end);
        case 4: return walk_rows_of<4>(m, a, out, begin, end);
        default: return walk_rows_of<8>(m, a, out, begin, end);
    }
}

// ---- Several tokens ------------------------------------------------------------------------------------------------

constexpr int PANEL_ROWS = 32;
constexpr int TILE_TOKENS = 6;  // 12 integer and 12 float sums, 2 of weights, 4 of scales: 30 of 32 registers

// 16 rows of 16 dwords -> 16 columns of 16 dwords.
INLINE void transpose(__m512i (&rows)[16]) {
    __m512i pairs[16];
    for (int i = 0; i < 16; i += 4) {
        const __m512i a = _mm512_unpacklo_epi32(rows[i], rows[i + 1]), b = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
        const __m512i c = _mm512_unpacklo_epi32(rows[i + 2], rows[i + 3]), d = _mm512_unpackhi_epi32(rows[i + 2], rows[i + 3]);
        pairs[i] = _mm512_unpacklo_epi64(a, c);
        pairs[i + 1] = _mm512_unpackhi_epi64(a, c);
        pairs[i + 2] = _mm512_unpacklo_epi64(b, d);
        pairs[i + 3] = _mm512_unpackhi_epi64(b, d);
    }
    for (int i = 0; i < 4; ++i) {  // pairs[4r + i], lane block c: column 4c + i of rows 4r..4r+3
        const __m512i a = _mm512_shuffle_i32x4(pairs[i], pairs[4 + i], 0x44), b = _mm512_shuffle_i32x4(pairs[i], pairs[4 + i], 0xee);
        const __m512i c = _mm512_shuffle_i32x4(pairs[8 + i], pairs[12 + i], 0x44), d = _mm512_shuffle_i32x4(pairs[8 + i], pairs[12 + i], 0xee);
        rows[i] = _mm512_shuffle_i32x4(a, c, 0x88);
        rows[4 + i] = _mm512_shuffle_i32x4(a, c, 0xdd);
        rows[8 + i] = _mm512_shuffle_i32x4(b, d, 0x88);
        rows[12 + i] = _mm512_shuffle_i32x4(b, d, 0xdd);
    }
}

constexpr int64_t SLICE_COLUMNS = 512;  // of a panel, unpacked at a time: 16 KiB, so that every token finds it in the first-level cache

struct Panel {
    uint8_t* values;         // a slice: [SLICE_COLUMNS / 4][32 rows][4]
    float *scales, *biases;  // [groups padded to 16][32 rows]
    float* sums;             // [tokens][32 rows]: a compact copy, as rows of the result may lie powers of two apart
};

// Put a token's values into the order in which unpack_slice leaves the weights: within each unit of 4 * planes columns,
// those of plane 0 first.
static void order_for_tile(Activations& a, int64_t token) {
    const int planes = planes_of(a.bits);
    if (planes == 1) return;
    const __m128i order = planes == 2 ? _mm_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15)
                                      : _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    int8_t* q = a.q + token * a.row_stride;
    for (int64_t i = 0; i < a.columns; i += 64)
        _mm512_storeu_si512(q + i, _mm512_shuffle_epi8(_mm512_loadu_si512(q + i), _mm512_broadcast_i32x4(order)));
}

// bf16 [count rows, groups] -> float [groups padded to 16, 32 rows]
static void transpose_scales(const uint16_t* from, int64_t groups, int64_t count, float* to) {
    for (int64_t half = 0; half < PANEL_ROWS; half += 16)
        for (int64_t g = 0; g < groups; g += 16) {
            const __mmask16 mask = groups - g < 16 ? __mmask16((1u << (groups - g)) - 1) : __mmask16(0xffff);
            __m512i rows[16];
            for (int64_t r = 0; r < 16; ++r)
                rows[r] = half + r < count ? _mm512_castps_si512(widen_scales(_mm256_maskz_loadu_epi16(mask, from + (half + r) * groups + g)))
                                           : _mm512_setzero_si512();
            transpose(rows);
            for (int64_t i = 0; i < 16; ++i) _mm512_store_si512(to + (g + i) * PANEL_ROWS + half, rows[i]);
        }
}

// Columns [column, end) of count rows, transposed while still packed: a dword then holds 4 * planes values of one row,
// and shift and mask give four of them for each plane. 3 bits are spread to bytes first.
template <int BITS> static void unpack_slice(const Matrix& m, int64_t first, int64_t count, int64_t column, int64_t end, uint8_t* values) {
    constexpr int PLANES = planes_of(BITS), UNIT = 64 * PLANES, UNIT_BYTES = UNIT * BITS / 8;
    const int64_t row_bytes = m.row_bytes();
    const __m512i mask = _mm512_set1_epi8(char((1 << BITS) - 1));
    for (; column < end; column += UNIT, values += UNIT * PANEL_ROWS) {
        const int64_t left = (end - column) * BITS / 8;
        const __mmask64 bytes = left < UNIT_BYTES ? (__mmask64(1) << left) - 1 : ~__mmask64(0) >> (64 - UNIT_BYTES);
        for (int64_t half = 0; half < PANEL_ROWS; half += 16) {
            __m512i rows[16];
            for (int64_t r = 0; r < 16; ++r) {
                const uint8_t* packed = m.data + (first + half + r) * row_bytes + column * BITS / 8;
                rows[r] = half + r < count ? _mm512_maskz_loadu_epi8(bytes, packed) : _mm512_setzero_si512();
                __builtin_prefetch(packed + PANEL_ROWS * row_bytes, 0, 2);  // the same place of the next panel
                if (BITS == 3) rows[r] = spread_three_bits(rows[r]);
            }
            transpose(rows);
            for (int64_t i = 0; i < 16; ++i)
                for (int64_t k = 0; k < PLANES; ++k)
                    _mm512_store_si512(values + (i * PLANES + k) * PANEL_ROWS * 4 + half * 4,
                                       PLANES == 1 ? rows[i] : _mm512_and_si512(k ? _mm512_srli_epi32(rows[i], unsigned(BITS * k)) : rows[i], mask));
        }
    }
}

// Groups [group, end) of a panel, whose slice starts with them, times TOKENS tokens; joins the panel's sums.
template <int TOKENS> static void multiply_slice(const Panel& panel, const Activations& a, int64_t first, int64_t group, int64_t end) {
    float* to = panel.sums + first * PANEL_ROWS;
    __m512 sums[2][TOKENS];
    for (int t = 0; t < TOKENS; ++t) {
        sums[0][t] = _mm512_load_ps(to + t * PANEL_ROWS);
        sums[1][t] = _mm512_load_ps(to + t * PANEL_ROWS + 16);
    }
    const int8_t* q = a.q + first * a.row_stride + group * a.group_size;
    const int64_t base = first * a.group_stride, steps = a.group_size / 4;
    const uint8_t* values = panel.values;
    for (; group < end; ++group) {
        __m512i products[2][TOKENS];
#pragma GCC unroll 6
        for (int t = 0; t < TOKENS; ++t) products[0][t] = products[1][t] = _mm512_setzero_si512();
        for (int64_t step = 0; step < steps; ++step) {
            const __m512i w0 = _mm512_load_si512(values), w1 = _mm512_load_si512(values + 64);
            values += PANEL_ROWS * 4;
#pragma GCC unroll 6
            for (int t = 0; t < TOKENS; ++t) {
                int32_t four;
                memcpy(&four, q + t * a.row_stride, 4);
                const __m512i x = _mm512_set1_epi32(four);
                products[0][t] = _mm512_dpbusd_epi32(products[0][t], w0, x);
                products[1][t] = _mm512_dpbusd_epi32(products[1][t], w1, x);
            }
            q += 4;
        }
        const float *scales = panel.scales + group * PANEL_ROWS, *biases = panel.biases + group * PANEL_ROWS;
#pragma GCC unroll 2
        for (int h = 0; h < 2; ++h) {
            const __m512 scale = _mm512_load_ps(scales + h * 16), bias = _mm512_load_ps(biases + h * 16);
#pragma GCC unroll 6
            for (int t = 0; t < TOKENS; ++t) {
                const int64_t place = base + t * a.group_stride + group;
                const __m512 x = _mm512_fmadd_ps(_mm512_cvtepi32_ps(products[h][t]), _mm512_set1_ps(a.scale[place]), _mm512_set1_ps(a.residual[place]));
                sums[h][t] = _mm512_fmadd_ps(x, scale, sums[h][t]);
                sums[h][t] = _mm512_fmadd_ps(_mm512_set1_ps(a.sum[place]), bias, sums[h][t]);
            }
        }
    }
    for (int t = 0; t < TOKENS; ++t) {
        _mm512_store_ps(to + t * PANEL_ROWS, sums[0][t]);
        _mm512_store_ps(to + t * PANEL_ROWS + 16, sums[1][t]);
    }
}

// A slice of a panel times all tokens from t on.
static void multiply_tokens(const Panel& panel, const Activations& a, int64_t t, int64_t group, int64_t end) {
    for (; t + TILE_TOKENS <= a.tokens; t += TILE_TOKENS) multiply_slice<TILE_TOKENS>(panel, a, t, group, end);
    switch (a.tokens - t) {
        case 5: return multiply_slice<5>(panel, a, t, group, end);
        case 4: return multiply_slice<4>(panel, a, t, group, end);
        case 3: return multiply_slice<3>(panel, a, t, group, end);
        case 2: return multiply_slice<2>(panel, a, t, group, end);
        case 1: return multiply_slice<1>(panel, a, t, group, end);
    }
}

// Rows [begin, end), panel by panel and slice by slice; multiply(panel, a, group, end) adds a slice's products.
template <int BITS, class Multiply>
static void dot_panels(const Matrix& m, const Activations& a, float* out, int64_t out_stride, int64_t begin, int64_t end, const Multiply& multiply) {
    static thread_local Scratch values, scales, biases, sums;
    const int64_t groups = (m.groups() + 15) / 16 * 16;
    const Panel panel = {values.get<uint8_t>(SLICE_COLUMNS * PANEL_ROWS), scales.get<float>(groups * PANEL_ROWS), biases.get<float>(groups * PANEL_ROWS),
                         sums.get<float>(a.tokens * PANEL_ROWS)};
    for (int64_t row = begin; row < end; row += PANEL_ROWS) {
        const int64_t count = end - row < PANEL_ROWS ? end - row : PANEL_ROWS;
        transpose_scales(m.scales + row * m.groups(), m.groups(), count, panel.scales);
        transpose_scales(m.biases + row * m.groups(), m.groups(), count, panel.biases);
        memset(panel.sums, 0, size_t(a.tokens * PANEL_ROWS) * sizeof(float));
        for (int64_t column = 0; column < m.columns; column += SLICE_COLUMNS) {
            const int64_t column_end = m.columns - column < SLICE_COLUMNS ? m.columns : column + SLICE_COLUMNS;
            unpack_slice<BITS>(m, row, count, column, column_end, panel.values);
            multiply(panel, a, column / m.group_size, column_end / m.group_size);
        }
        for (int64_t t = 0; t < a.tokens; ++t) memcpy(out + t * out_stride + row, panel.sums + t * PANEL_ROWS, size_t(count) * sizeof(float));
    }
}

template <class Multiply>
static void dot_tile_by(const Matrix& m, const Activations& a, float* out, int64_t out_stride, int64_t begin, int64_t end, const Multiply& multiply) {
    switch (m.bits) {
        case 2: return dot_panels<2>(m, a, out, out_stride, begin, end, multiply);
        case 3: return dot_panels<3>(m, a, out, out_stride, begin, end, multiply);
        case 4: return dot_panels<4>(m, a, out, out_stride, begin, end, multiply);
        default: return dot_panels<8>(m, a, out, out_stride, begin, end, multiply);
    }
}
