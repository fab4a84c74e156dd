// Products with weights, for the instruction set around this include. From int8_*.h come unpack32<BITS>, dot_row_walk
// and dot_tile; what is here is the same text for all.

// Sixteen consecutive values as floats, whatever their storage.
INLINE f32x16 load_f16(const uint16_t* from) {
    u16x16 half;
    memcpy(&half, from, sizeof half);
    const u32x16 wide = __builtin_convertvector(half, u32x16);
    // Exponent and mantissa move up; one multiplication by 2^112 sets the bias right, subnormals included.
    f32x16 magnitude = (f32x16)((wide & 0x7fff) << 13) * 0x1p112f;
    const u32x16 special = (u32x16)((wide & 0x7c00) == 0x7c00) & 0x7f800000u;  // infinity and NaN
    return (f32x16)((u32x16)magnitude | special | (wide & 0x8000) << 16);
}

template <int BITS> static void widen_quantized(const Matrix& m, int64_t row, float* out) {
    alignas(64) uint8_t values[32];
    const uint8_t* packed = m.data + row * m.row_bytes();
    const int64_t groups = m.groups();
    for (int64_t i = 0; i < m.columns; i += 32) {
        const int64_t group = row * groups + i / m.group_size;
        const f32x16 scale = splat(bf16_value(m.scales[group])), bias = splat(bf16_value(m.biases[group]));
        unpack32<BITS>(packed + i * BITS / 8, values);
        for (int64_t part = 0; part < 32; part += LANES) {
            typedef uint8_t u8x16 __attribute__((vector_size(16)));
            u8x16 bytes;
            memcpy(&bytes, values + part, sizeof bytes);
            // Two roundings, as the format defines it: a fused multiply-add would round once.
            f32x16 product = __builtin_convertvector(bytes, f32x16) * scale;
            asm("" : "+m"(product));
            store(out + i + part, product + bias);
        }
    }
}

static void widen_row(const Matrix& m, int64_t row, float* out) {
    const int64_t columns = m.columns;
    if (m.storage == QUANTIZED) {
        switch (m.bits) {
            case 2: return widen_quantized<2>(m, row, out);
            case 3: return widen_quantized<3>(m, row, out);
            case 4: return widen_quantized<4>(m, row, out);
            default: return widen_quantized<8>(m, row, out);
        }
    }
    if (m.storage == F32) {
        memcpy(out, (const float*)m.data + row * columns, size_t(columns) * sizeof(float));
        return;
    }
    const uint16_t* from = (const uint16_t*)m.data + row * columns;
    const bool bf16 = m.storage == BF16;
    int64_t i = 0;
    for (; i + LANES <= columns; i += LANES) store(out + i, bf16 ? load_bf16(from + i) : load_f16(from + i));
    if (i < columns) {
        uint16_t tail[LANES] = {};
        memcpy(tail, from + i, size_t(columns - i) * sizeof *tail);
        store_first(out + i, bf16 ? load_bf16(tail) : load_f16(tail), columns - i);
    }
}

// ROWS x TOKENS sums at once. Each is accumulated alone and in the same order, so it does not depend on its company.
template <int ROWS, int TOKENS>
INLINE void float_block(const float* rows, int64_t row_stride, const float* const* x, int64_t columns, float* const* out, int64_t first) {
    f32x16 sums[ROWS][TOKENS] = {};
    int64_t i = 0;
    for (; i + LANES <= columns; i += LANES)
        for (int r = 0; r < ROWS; ++r)
            for (int t = 0; t < TOKENS; ++t) sums[r][t] += load(rows + r * row_stride + i) * load(x[t] + i);
    if (i < columns)
        for (int r = 0; r < ROWS; ++r)
            for (int t = 0; t < TOKENS; ++t)
                sums[r][t] += load_first(rows + r * row_stride + i, columns - i) * load_first(x[t] + i, columns - i);
    for (int r = 0; r < ROWS; ++r)
        for (int t = 0; t < TOKENS; ++t) out[t][first + r] = sum(sums[r][t]);
}

template <int ROWS>
static void float_panel(const float* rows, int64_t row_stride, int64_t columns, const float* x, const int64_t* index, int64_t tokens, float* out,
                        int64_t out_stride, int64_t first) {
    const auto from = [&](int64_t t) { return x + (index ? index[t] : t) * columns; };
    int64_t t = 0;
    for (; t + 4 <= tokens; t += 4) {
        const float* inputs[] = {from(t), from(t + 1), from(t + 2), from(t + 3)};
        float* outputs[] = {out + t * out_stride, out + (t + 1) * out_stride, out + (t + 2) * out_stride, out + (t + 3) * out_stride};
        float_block<ROWS, 4>(rows, row_stride, inputs, columns, outputs, first);
    }
    for (; t < tokens; ++t) {
        const float* inputs[] = {from(t)};
        float* outputs[] = {out + t * out_stride};
        float_block<ROWS, 1>(rows, row_stride, inputs, columns, outputs, first);
    }
}

// One token and bf16 weights: widened in registers. Two rows, for one sum would wait for itself; a row's is in the order
// of float_block's, so that a token in a short company gets the same bits.
template <int ROWS> INLINE void bf16_rows(const uint16_t* weights, const float* x, int64_t columns, float* out) {
    f32x16 sums[ROWS] = {};
    int64_t i = 0;
    for (; i + LANES <= columns; i += LANES)
        for (int r = 0; r < ROWS; ++r) {
            __builtin_prefetch(weights + r * columns + i + 2048);
            sums[r] += load_bf16(weights + r * columns + i) * load(x + i);
        }
    for (int r = 0; r < ROWS; ++r) {
        if (i < columns) {
            uint16_t tail[LANES] = {};
            memcpy(tail, weights + r * columns + i, size_t(columns - i) * sizeof *tail);
            sums[r] += load_bf16(tail) * load_first(x + i, columns - i);
        }
        out[r] = sum(sums[r]);
    }
}

static void bf16_row_walk(const Matrix& m, const float* x, float* out, int64_t begin, int64_t end) {
    const uint16_t* weights = (const uint16_t*)m.data;
    int64_t row = begin;
    for (; row + 2 <= end; row += 2) bf16_rows<2>(weights + row * m.columns, x, m.columns, out + row);
    if (row < end) bf16_rows<1>(weights + row * m.columns, x, m.columns, out + row);
}

static void float_rows(const Matrix& m, const float* x, const int64_t* index, int64_t tokens, float* out, int64_t out_stride, int64_t begin,
                       int64_t end) {
    if (tokens == 1 && m.storage == BF16) return bf16_row_walk(m, x + (index ? index[0] : 0) * m.columns, out, begin, end);
    static thread_local Scratch scratch;
    const int64_t row_stride = (m.columns + LANES - 1) / LANES * LANES;
    float* rows = scratch.get<float>(4 * row_stride);
    int64_t row = begin;
    for (; row + 4 <= end; row += 4) {
        for (int64_t r = 0; r < 4; ++r) widen_row(m, row + r, rows + r * row_stride);
        float_panel<4>(rows, row_stride, m.columns, x, index, tokens, out, out_stride, row);
    }
    for (; row < end; ++row) {
        widen_row(m, row, rows);
        float_panel<1>(rows, row_stride, m.columns, x, index, tokens, out, out_stride, row);
    }
}

// One token's values in their own order.
static void quantize_row(Activations& a, const float* x, int64_t token) {
    typedef int8_t i8x16 __attribute__((vector_size(16)));
    int8_t* q = a.q + token * a.row_stride;
    const int64_t base = token * a.group_stride;
    const float middle = float((1 << a.bits) - 1) * 0.5f;
    for (int64_t group = 0; group < a.groups; ++group) {
        const float* from = x + group * a.group_size;
        f32x16 total = {}, peak = {};
        for (int64_t i = 0; i < a.group_size; i += LANES) {
            total += load(from + i);
            peak = max(peak, abs(load(from + i)));
        }
        const float most = largest(peak), scale = most / 127.0f;
        // Below this the reciprocal overflows; so small a group counts as zeros, its sum is kept all the same.
        const float inverse = most > 1e-35f ? 127.0f / most : 0.0f;
        u32x16 counted = {};  // unsigned: of a NaN these are any numbers, and their sum may wrap
        for (int64_t i = 0; i < a.group_size; i += LANES) {
            const f32x16 rounded = load(from + i) * inverse + 12582912.0f;  // 1.5 * 2^23: the low bits are the integer
            const u32x16 value = (u32x16)rounded - 0x4b400000u;
            counted += value;
            const i8x16 bytes = __builtin_convertvector((i32x16)value, i8x16);
            memcpy(q + group * a.group_size + i, &bytes, sizeof bytes);
        }
        uint32_t count = 0;
        for (int lane = 0; lane < LANES; ++lane) count += counted[lane];
        const float all = sum(total);
        a.scale[base + group] = scale;
        a.sum[base + group] = all;
        a.residual[base + group] = middle * (all - scale * float(int32_t(count)));
    }
    for (int64_t group = a.groups; group < a.group_stride; ++group)
        a.scale[base + group] = a.sum[base + group] = a.residual[base + group] = 0.0f;
    memset(q + a.columns, 0, size_t(a.row_stride - a.columns));
}

static void quantize(Activations& a, const float* x, const int64_t* index, int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end; ++token) {
        quantize_row(a, x + (index ? index[token] : token) * a.columns, token);
        if (a.one_token) order_for_row_walk(a);
        else order_for_tile(a, token);
    }
}

static void add_weighted(float* out, const float* y, const int64_t* index, const float* weights, int64_t tokens, int64_t width, int64_t begin,
                         int64_t end) {
    for (int64_t t = 0; t < tokens; ++t) {
        float* to = out + index[t] * width;
        const float* from = y + t * width;
        int64_t i = begin;
        for (; i + LANES <= end; i += LANES) store(to + i, load(to + i) + load(from + i) * weights[t]);
        for (; i < end; ++i) to[i] = std::fma(from[i], weights[t], to[i]);
    }
}

static int64_t read_stream(const uint8_t* from, int64_t size_bytes) {
    u32x16 sums[4] = {};
    for (int64_t i = 0; i + 256 <= size_bytes; i += 256)
        for (int part = 0; part < 4; ++part) {
            u32x16 value;
            memcpy(&value, from + i + part * 64, sizeof value);
            sums[part] += value;
            __builtin_prefetch(from + i + part * 64 + 8192);
        }
    const u32x16 total = sums[0] + sums[1] + sums[2] + sums[3];
    int64_t result = 0;
    for (int lane = 0; lane < LANES; ++lane) result += total[lane];
    return result;
}

static constexpr MatrixKernels MATRIX_KERNELS = {quantize, dot_row_walk, dot_tile, float_rows, widen_row, add_weighted, read_stream};
