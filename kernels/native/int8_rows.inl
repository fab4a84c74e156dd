// int8 products where lanes run along the row: for instruction sets without a kernel of their own layout. A row is
// unpacked once into the first-level cache and meets each token there; one token is no special case.
//
// Before this include: a type Lanes of int32 lanes, unpack32<BITS>, dot32<BITS>(values, q, lanes), and to float and
// back: FloatLanes, zero_floats(), add_scaled(floats, lanes, scale), sum_floats.

template <int BITS> static void dot_rows(const Matrix& m, const Activations& a, float* out, int64_t out_stride, int64_t begin, int64_t end) {
    static thread_local Scratch scratch;
    uint8_t* values = scratch.get<uint8_t>(m.columns);
    const int64_t groups = m.groups(), group_size = m.group_size;
    for (int64_t row = begin; row < end; ++row) {
        const uint8_t* packed = m.data + row * m.row_bytes();
        for (int64_t i = 0; i < m.columns; i += 32) unpack32<BITS>(packed + i * BITS / 8, values + i);
        const uint16_t *scales = m.scales + row * groups, *biases = m.biases + row * groups;
        for (int64_t token = 0; token < a.tokens; ++token) {
            const int8_t* q = a.q + token * a.row_stride;
            const int64_t base = token * a.group_stride;
            FloatLanes products = zero_floats();
            float offsets = 0.0f;
            for (int64_t group = 0; group < groups; ++group) {
                Lanes lanes = zero_lanes();
                const int64_t first = group * group_size;
                for (int64_t i = first; i < first + group_size; i += 32) lanes = dot32<BITS>(values + i, q + i, lanes);
                const float scale = bf16_value(scales[group]);
                products = add_scaled(products, lanes, scale * a.scale[base + group]);
                offsets += scale * a.residual[base + group] + bf16_value(biases[group]) * a.sum[base + group];
            }
            out[token * out_stride + row] = sum_floats(products) + offsets;
        }
    }
}

static void dot_tile(const Matrix& m, const Activations& a, float* out, int64_t out_stride, int64_t begin, int64_t end) {
    switch (m.bits) {
        case 2: return dot_rows<2>(m, a, out, out_stride, begin, end);
        case 3: return dot_rows<3>(m, a, out, out_stride, begin, end);
        case 4: return dot_rows<4>(m, a, out, out_stride, begin, end);
        default: return dot_rows<8>(m, a, out, out_stride, begin, end);
    }
}

static void dot_row_walk(const Matrix& m, const Activations& a, float* out, int64_t begin, int64_t end) {
    dot_tile(m, a, out, m.rows, begin, end);
}

// Values stay in the row's own order.
static void order_for_row_walk(Activations&) {}
static void order_for_tile(Activations&, int64_t) {}
