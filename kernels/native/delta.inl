// The gated delta rule, as in reference.py. Tokens go in chunks of 64 from the call's first; a chunk of one is a step.
//
// A chunk computes with small dense products. With S the state before it, P = K S, and G the decay since its start,
// the updates U of its tokens solve one unit lower triangular system, directly for their own values:
//
//     (I + tril(beta * K K^T * between, -1)) U = beta * (V - G P)
//     O = G (Q S) + tril(Q K^T * between) U;   S = G_end S + K^T (U * decay from the token to the end)

constexpr int64_t CHUNK = 64;

// One thread's room. Widths of values are padded to 16 columns.
struct DeltaScratch {
    float *queries, *keys;            // normalized: [CHUNK, Dk] and, transposed, [Dk, CHUNK]
    float *key_products;              // K K^T [CHUNK, CHUNK], lower triangle
    float *query_products;            // Q K^T
    float *system, *mixing;           // the system's matrix, negated, and the weights of updates in the output
    float *updates, *result;          // [CHUNK, Dv]
    float *state;                     // [Dk, Dv], if Dv is no multiple of 16
    int64_t floats;

    DeltaScratch(const Delta& d, float* buffer) {
        Pieces pieces(buffer);
        const int64_t value_width = round_up(d.value_width, LANES);
        queries = pieces.take(CHUNK * d.key_width);
        keys = pieces.take(d.key_width * CHUNK);
        key_products = pieces.take(CHUNK * CHUNK);
        query_products = pieces.take(CHUNK * CHUNK);
        system = pieces.take(CHUNK * CHUNK);
        mixing = pieces.take(CHUNK * CHUNK);
        updates = pieces.take(CHUNK * value_width);
        result = pieces.take(CHUNK * value_width);
        state = pieces.take(d.key_width * value_width);
        floats = pieces.taken();
    }
};

static int64_t gated_delta_scratch(const Delta& d) { return DeltaScratch(d, nullptr).floats; }

// x / |x| * scale
INLINE void normalize(float* out, const float* x, int64_t width, float scale) {
    const float factor = scale / std::sqrt(sum_of_squares(x, width) + 1e-6f);
    for_columns(out, width, [&](const auto& read) INLINE_LAMBDA { return read(x) * factor; });
}

INLINE float dot(const float* a, const float* b, int64_t width) {
    f32x16 sums = {};
    int64_t i = 0;
    for (; i + LANES <= width; i += LANES) sums += load(a + i) * load(b + i);
    if (i < width) sums += load_first(a + i, width - i) * load_first(b + i, width - i);
    return sum(sums);
}

// One token and some columns of one head's state, which is read from memory once: the output needs only what the old
// state gives for q and k. The second pass finds these columns in the cache.
template <int64_t REGISTERS>
INLINE void step_columns(float* state, int64_t stride, const float* q, const float* k, const float* v, float* out,
                         int64_t key_width, float kept, float beta, float q_dot_k) {
    f32r recalled[REGISTERS] = {}, read[REGISTERS] = {}, update[REGISTERS];
    for (int64_t i = 0; i < key_width; ++i)
        for (int64_t c = 0; c < REGISTERS; ++c) {
            const f32r value = load_register(state + i * stride + c * REGISTER);
            recalled[c] += value * k[i];
            read[c] += value * q[i];
        }
    for (int64_t c = 0; c < REGISTERS; ++c) {
        update[c] = (load_register(v + c * REGISTER) - recalled[c] * kept) * beta;
        store_register(out + c * REGISTER, read[c] * kept + update[c] * q_dot_k);
    }
    for (int64_t i = 0; i < key_width; ++i)
        for (int64_t c = 0; c < REGISTERS; ++c) {
            float* at = state + i * stride + c * REGISTER;
            store_register(at, load_register(at) * kept + update[c] * k[i]);
        }
}

constexpr int64_t STEP_REGISTERS = REGISTER == 8 ? 4 : 8;  // two sums in each, within the registers there are
constexpr int64_t STEP_COLUMNS = STEP_REGISTERS * REGISTER;

// One head's state [Dk, Dv], its rows padded to 16 columns.
struct DeltaHead {
    int64_t index;
    float* state;
    int64_t stride;
};

static void delta_step(const Delta& d, const DeltaHead& head, int64_t token, const DeltaScratch& s) {
    const int64_t at = token * d.value_heads + head.index;
    const float *q = s.queries, *k = s.keys;
    const float kept = exp(splat(d.decay[at]))[0], beta = d.beta[at], q_dot_k = dot(q, k, d.key_width);
    memcpy(s.updates, d.v + token * d.v_stride + head.index * d.value_width, size_t(d.value_width) * sizeof(float));
    int64_t column = 0;
    for (; column + STEP_COLUMNS <= head.stride; column += STEP_COLUMNS)
        step_columns<STEP_REGISTERS>(head.state + column, head.stride, q, k, s.updates + column, s.result + column,
                                     d.key_width, kept, beta, q_dot_k);
    for (; column < head.stride; column += LANES)
        step_columns<LANES / REGISTER>(head.state + column, head.stride, q, k, s.updates + column, s.result + column,
                                       d.key_width, kept, beta, q_dot_k);
    memcpy(d.out + at * d.value_width, s.result, size_t(d.value_width) * sizeof(float));
}

// Normalized queries and keys of `count` tokens from `first`, and their products: shared by the value heads.
static void prepare_keys(const Delta& d, int64_t key_head, int64_t first, int64_t count, const DeltaScratch& s) {
    const float query_scale = 1.0f / std::sqrt(float(d.key_width));
    const float *q = d.q + first * d.q_stride + key_head * d.key_width, *k = d.k + first * d.k_stride + key_head * d.key_width;
    if (count == 1) {
        normalize(s.queries, q, d.key_width, query_scale);
        normalize(s.keys, k, d.key_width, 1.0f);
        return;
    }
    memset(s.keys, 0, size_t(d.key_width * CHUNK) * sizeof(float));
    for (int64_t t = 0; t < count; ++t) {
        float* row = s.queries + t * d.key_width;
        normalize(row, k + t * d.k_stride, d.key_width, 1.0f);
        for (int64_t i = 0; i < d.key_width; ++i) s.keys[i * CHUNK + t] = row[i];
        normalize(row, q + t * d.q_stride, d.key_width, query_scale);
    }
    for (int64_t t = 0; t < count; t += LANES) {  // columns beyond the diagonal's block are not needed
        const int64_t rows = smaller(LANES, count - t);
        multiply<Sum::START>(s.key_products + t * CHUNK, CHUNK, {s.keys + t, 1, CHUNK}, s.keys, CHUNK, rows, t + LANES,
                             d.key_width);
        multiply<Sum::START>(s.query_products + t * CHUNK, CHUNK, {s.queries + t * d.key_width, d.key_width, 1}, s.keys,
                             CHUNK, rows, t + LANES, d.key_width);
    }
}

// The chunk's two triangular matrices: products times the decay between the two tokens. Zero above the diagonal as far
// as a block of 16 reaches. `total` is the logarithm of the decay since the chunk's start.
static void weigh_products(const DeltaScratch& s, const double* total, const float* beta, int64_t count) {
    for (int64_t t = 0; t < count; ++t) {
        float *system = s.system + t * CHUNK, *mixing = s.mixing + t * CHUNK;
        for (int64_t from = 0; from <= t; from += LANES) {
            alignas(64) float between[LANES];
            for (int64_t lane = 0; lane < LANES; ++lane) between[lane] = float(total[t] - total[from + lane]);
            const f32x16 factor = exp(load(between));
            store(system + from, load(s.key_products + t * CHUNK + from) * factor * -beta[t]);
            store(mixing + from, load(s.query_products + t * CHUNK + from) * factor);
        }
        for (int64_t later = t + 1; later < round_up(t + 1, LANES); ++later) mixing[later] = 0.0f;
    }
}

// Forward substitution in place: rows of a block of 8 after all rows before it, then among themselves.
static void solve_updates(const DeltaScratch& s, int64_t stride, int64_t count) {
    constexpr int64_t BLOCK = 8;
    for (int64_t first = 0; first < count; first += BLOCK) {
        const int64_t rows = smaller(BLOCK, count - first);
        float* block = s.updates + first * stride;
        multiply<Sum::CONTINUE>(block, stride, {s.system + first * CHUNK, CHUNK, 1}, s.updates, stride, rows, stride, first);
        for (int64_t row = 1; row < rows; ++row)
            multiply<Sum::CONTINUE>(block + row * stride, stride, {s.system + (first + row) * CHUNK + first, CHUNK, 1}, block,
                                    stride, 1, stride, row);
    }
}

INLINE void scale_row(float* row, int64_t width, float factor) {
    for (int64_t i = 0; i < width; i += LANES) store(row + i, load(row + i) * factor);
}

static void delta_chunk(const Delta& d, const DeltaHead& head, int64_t first, int64_t count, const DeltaScratch& s) {
    const int64_t width = head.stride;
    double total[CHUNK];
    alignas(64) float beta[CHUNK], from_start[CHUNK], to_end[CHUNK];
    for (int64_t t = 0; t < CHUNK; ++t) {
        const int64_t at = (first + smaller(t, count - 1)) * d.value_heads + head.index;
        total[t] = t == 0 ? d.decay[at] : t < count ? total[t - 1] + d.decay[at] : total[t - 1];
        beta[t] = d.beta[at];
        from_start[t] = float(total[t]);
    }
    for (int64_t t = 0; t < CHUNK; ++t) to_end[t] = float(total[CHUNK - 1] - total[t]);
    for (int64_t t = 0; t < CHUNK; t += LANES) {
        store(from_start + t, exp(load(from_start + t)));
        store(to_end + t, exp(load(to_end + t)));
    }
    weigh_products(s, total, beta, count);

    multiply<Sum::START>(s.updates, width, {s.keys, 1, CHUNK}, head.state, width, count, width, d.key_width);
    for (int64_t t = 0; t < count; ++t) {
        const float* v = d.v + (first + t) * d.v_stride + head.index * d.value_width;
        float* row = s.updates + t * width;
        for_columns(row, d.value_width,
                    [&](const auto& read) INLINE_LAMBDA { return (read(v) - read(row) * from_start[t]) * beta[t]; });
    }
    solve_updates(s, width, count);

    multiply<Sum::START>(s.result, width, {s.queries, d.key_width, 1}, head.state, width, count, width, d.key_width);
    for (int64_t t = 0; t < count; ++t) scale_row(s.result + t * width, width, from_start[t]);
    for (int64_t t = 0; t < count; t += LANES) {
        const int64_t rows = smaller(LANES, count - t);
        multiply<Sum::CONTINUE>(s.result + t * width, width, {s.mixing + t * CHUNK, CHUNK, 1}, s.updates, width, rows, width,
                                t + rows);
    }
    for (int64_t t = 0; t < count; ++t)
        memcpy(d.out + ((first + t) * d.value_heads + head.index) * d.value_width, s.result + t * width,
               size_t(d.value_width) * sizeof(float));

    for (int64_t t = 0; t < count; ++t) scale_row(s.updates + t * width, width, to_end[t]);
    for (int64_t i = 0; i < d.key_width; ++i) scale_row(head.state + i * width, width, from_start[count - 1]);
    multiply<Sum::CONTINUE>(head.state, width, {s.keys, CHUNK, 1}, s.updates, width, d.key_width, width, count);
}

static void gated_delta(const Delta& d, float* scratch, int64_t begin, int64_t end) {
    const DeltaScratch s(d, scratch);
    const int64_t shared = d.value_heads / d.key_heads, stride = round_up(d.value_width, LANES);
    const bool padded = stride != d.value_width;
    memset(s.updates, 0, size_t(CHUNK * stride) * sizeof(float));
    for (int64_t key_head = begin; key_head < end; ++key_head)
        for (int64_t first = 0; first < d.tokens; first += CHUNK) {
            const int64_t count = smaller(CHUNK, d.tokens - first);
            prepare_keys(d, key_head, first, count, s);
            for (int64_t index = key_head * shared; index < (key_head + 1) * shared; ++index) {
                float* state = d.state + index * d.key_width * d.value_width;
                if (padded) copy_padded(s.state, stride, state, d.value_width, d.key_width, d.value_width);
                const DeltaHead head = {index, padded ? s.state : state, stride};
                if (count == 1) delta_step(d, head, first, s);
                else delta_chunk(d, head, first, count, s);
                if (padded) copy_padded(state, d.value_width, s.state, stride, d.key_width, d.value_width);
            }
        }
}
