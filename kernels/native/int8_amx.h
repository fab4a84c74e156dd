// int8 products of AMX, for several tokens: one tile product is 16 tokens x 16 rows x 64 values, on the panels of
// int8_avx512.h. The integer sums are exact and meet the scales in the same order as there, so results are the same bits.

constexpr int64_t AMX_TOKENS = 16;
constexpr int64_t FEWEST_TOKENS = 5;  // below, a tile is mostly empty and the vector kernel as fast

// Tiles by number, as the intrinsics of some compilers take nothing else: 0, 1 sums of the panel's low and high rows,
// 2 tokens, 3, 4 weights.

struct alignas(64) TileShapes {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
};

// Tiles for products over depth values: 64, or 32 where groups are that small.
static void shape_tiles(int64_t depth) {
    TileShapes shapes;
    const auto shape = [&](int tile, int64_t rows, int64_t row_bytes) {
        shapes.rows[tile] = uint8_t(rows);
        shapes.row_bytes[tile] = uint16_t(row_bytes);
    };
    shape(0, 16, 64);
    shape(1, 16, 64);
    shape(2, 16, depth);
    shape(3, depth / 4, 64);
    shape(4, depth / 4, 64);
    asm volatile("" ::"m"(shapes));  // GCC 12 takes the next line to read 8 of the 64 bytes, and drops the others
    _tile_loadconfig(&shapes);
}

// Integer sums [16 tokens][16 rows] of a group meet the scales of `tokens` of them and join the float sums.
static void add_group(const int32_t* products, const Activations& a, int64_t place, int64_t tokens, const float* scales, const float* biases,
                      float* sums) {
    const __m512 scale = _mm512_load_ps(scales), bias = _mm512_load_ps(biases);
    for (int64_t t = 0; t < tokens; ++t, place += a.group_stride) {
        const __m512 x = _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_load_si512(products + t * 16)), _mm512_set1_ps(a.scale[place]),
                                         _mm512_set1_ps(a.residual[place]));
        const __m512 sum = _mm512_fmadd_ps(x, scale, _mm512_load_ps(sums + t * PANEL_ROWS));
        _mm512_store_ps(sums + t * PANEL_ROWS, _mm512_fmadd_ps(_mm512_set1_ps(a.sum[place]), bias, sum));
    }
}

// As multiply_slice, for up to 16 tokens. The activations of 16 are read, whatever they are.
static void multiply_tiles(const Panel& panel, const Activations& a, int64_t first, int64_t tokens, int64_t group, int64_t end) {
    alignas(64) int32_t products[2][AMX_TOKENS * 16];
    float* sums = panel.sums + first * PANEL_ROWS;
    const int64_t depth = a.group_size < 64 ? a.group_size : 64;
    const int8_t* q = a.q + first * a.row_stride + group * a.group_size;
    const uint8_t* values = panel.values;
    for (; group < end; ++group) {
        _tile_zero(0);
        _tile_zero(1);
        for (int64_t done = 0; done < a.group_size; done += depth) {
            _tile_loadd(2, q, a.row_stride);
            _tile_loadd(3, values, PANEL_ROWS * 4);
            _tile_loadd(4, values + 64, PANEL_ROWS * 4);
            _tile_dpbsud(0, 2, 3);
            _tile_dpbsud(1, 2, 4);
            q += depth;
            values += depth * PANEL_ROWS;
        }
        _tile_stored(0, products[0], 64);
        _tile_stored(1, products[1], 64);
        const int64_t place = first * a.group_stride + group;
        const float *scales = panel.scales + group * PANEL_ROWS, *biases = panel.biases + group * PANEL_ROWS;
        add_group(products[0], a, place, tokens, scales, biases, sums);
        add_group(products[1], a, place, tokens, scales + 16, biases + 16, sums + 16);
    }
}

static void dot_tile(const Matrix& m, const Activations& a, float* out, int64_t out_stride, int64_t begin, int64_t end) {
    shape_tiles(a.group_size < 64 ? a.group_size : 64);
    dot_tile_by(m, a, out, out_stride, begin, end, [](const Panel& panel, const Activations& a, int64_t group, int64_t end) {
        int64_t t = 0;
        for (; a.tokens - t >= FEWEST_TOKENS; t += AMX_TOKENS)
            multiply_tiles(panel, a, t, a.tokens - t < AMX_TOKENS ? a.tokens - t : AMX_TOKENS, group, end);
        if (t < a.tokens) multiply_tokens(panel, a, t, group, end);
    });
    _tile_release();  // a thread with tiles in use costs more to switch away from
}
