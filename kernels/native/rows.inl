// Operations on rows: norms, gates, the convolution, rope, the choice of experts.

#define INLINE_LAMBDA __attribute__((always_inline))

// out[i] = body(i, read) for every 16 columns of a row, where read(from) loads them: fewer at the end of the row.
template <class Body> INLINE void for_columns(float* out, int64_t width, const Body& body) {
    int64_t i = 0;
    const auto read = [&](const float* from) INLINE_LAMBDA { return load(from + i); };
    for (; i + LANES <= width; i += LANES) store(out + i, body(read));
    if (i == width) return;
    const auto read_rest = [&](const float* from) INLINE_LAMBDA { return load_first(from + i, width - i); };
    store_first(out + i, body(read_rest), width - i);
}

INLINE float sum_of_squares(const float* x, int64_t width) {
    f32x16 squares[2] = {};
    int64_t i = 0;
    for (; i + 2 * LANES <= width; i += 2 * LANES) {
        squares[0] += load(x + i) * load(x + i);
        squares[1] += load(x + i + LANES) * load(x + i + LANES);
    }
    for (; i < width; i += LANES) {
        const f32x16 value = load_first(x + i, width - i < LANES ? width - i : LANES);
        squares[0] += value * value;
    }
    return sum(squares[0] + squares[1]);
}

static void rms_norm(float* out, const float* x, int64_t x_stride, const float* weight, int64_t width, float eps,
                     int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
        const float* from = x + row * x_stride;
        const float factor = 1.0f / std::sqrt(sum_of_squares(from, width) / float(width) + eps);
        for_columns(out + row * width, width, [&](const auto& read) INLINE_LAMBDA {
            return read(from) * factor * (1.0f + read(weight));
        });
    }
}

static void gated_rms_norm(float* out, const float* x, int64_t x_stride, const float* gate, int64_t gate_stride,
                           const float* weight, int64_t width, float eps, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
        const float *from = x + row * x_stride, *gates = gate + row * gate_stride;
        const float factor = 1.0f / std::sqrt(sum_of_squares(from, width) / float(width) + eps);
        for_columns(out + row * width, width, [&](const auto& read) INLINE_LAMBDA {
            return read(from) * factor * read(weight) * silu(read(gates));
        });
    }
}

static void gated(float* out, const float* x, int64_t x_stride, const float* gate, int64_t gate_stride, int64_t width,
                  int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
        const float *from = x + row * x_stride, *gates = gate + row * gate_stride;
        for_columns(out + row * width, width,
                    [&](const auto& read) INLINE_LAMBDA { return read(from) * sigmoid(read(gates)); });
    }
}

static void silu_mul(float* out, const float* gate, int64_t gate_stride, const float* up, int64_t up_stride,
                     int64_t width, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
        const float *gates = gate + row * gate_stride, *from = up + row * up_stride;
        for_columns(out + row * width, width,
                    [&](const auto& read) INLINE_LAMBDA { return silu(read(gates)) * read(from); });
    }
}

// A few numbers per token: the library's own functions, whose small results keep their relative accuracy.
static void decay_and_strength(float* decay, float* strength, const float* a, const float* b, const float* a_log,
                               const float* dt_bias, int64_t tokens, int64_t heads, int64_t begin, int64_t end) {
    for (int64_t head = begin; head < end; ++head) {
        const float rate = -std::exp(a_log[head]);
        for (int64_t i = head; i < tokens * heads; i += heads) {
            const float x = a[i] + dt_bias[head];
            decay[i] = rate * (std::log1p(std::exp(-std::fabs(x))) + (x < 0.0f ? 0.0f : x));  // softplus
            strength[i] = 1.0f / (1.0f + std::exp(-b[i]));
        }
    }
}

constexpr int64_t CONV_CHANNELS = 256;  // at a time: their taps and a row of input stay in L1
constexpr int64_t CONV_TAPS = 8;        // at most

static void conv_channels(float* out, const float* x, int64_t x_stride, const float* weight, float* state,
                          int64_t tokens, int64_t channels, int64_t taps, int64_t first, int64_t count) {
    alignas(64) float by_tap[CONV_TAPS][CONV_CHANNELS];
    for (int64_t c = 0; c < count; ++c)
        for (int64_t tap = 0; tap < taps; ++tap) by_tap[tap][c] = weight[(first + c) * taps + tap];
    const auto input = [&](int64_t token) {  // negative: before x
        return first + (token < 0 ? state + (taps - 1 + token) * channels : x + token * x_stride);
    };
    for (int64_t token = 0; token < tokens; ++token) {
        const float* rows[CONV_TAPS];
        for (int64_t tap = 0; tap < taps; ++tap) rows[tap] = input(token - (taps - 1) + tap);
        int64_t column = 0;  // of by_tap, in step with the columns of the rows
        for_columns(out + token * channels + first, count, [&](const auto& read) INLINE_LAMBDA {
            f32x16 sum = read(rows[0]) * load(by_tap[0] + column);
            for (int64_t tap = 1; tap < taps; ++tap) sum += read(rows[tap]) * load(by_tap[tap] + column);
            column += LANES;
            return silu(sum);
        });
    }
    for (int64_t row = 0; row < taps - 1; ++row)
        memcpy(state + row * channels + first, input(tokens - (taps - 1) + row), size_t(count) * sizeof(float));
}

static void causal_conv(float* out, const float* x, int64_t x_stride, const float* weight, float* state, int64_t tokens,
                        int64_t channels, int64_t taps, int64_t begin, int64_t end) {
    for (int64_t first = begin; first < end; first += CONV_CHANNELS) {
        const int64_t count = end - first < CONV_CHANNELS ? end - first : CONV_CHANNELS;
        conv_channels(out, x, x_stride, weight, state, tokens, channels, taps, first, count);
    }
}

static void rope(float* out, const float* x, const float* angles, int64_t heads, int64_t width, int64_t half,
                 int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end; ++token) {
        const float *cosines = angles + token * 2 * half, *sines = cosines + half;
        for (int64_t head = 0; head < heads; ++head) {
            const float* first = x + (token * heads + head) * width;
            const float* second = first + half;
            float* to = out + (token * heads + head) * width;
            for_columns(to, half, [&](const auto& read) INLINE_LAMBDA {
                return read(first) * read(cosines) - read(second) * read(sines);
            });
            for_columns(to + half, half, [&](const auto& read) INLINE_LAMBDA {
                return read(second) * read(cosines) + read(first) * read(sines);
            });
            memcpy(to + 2 * half, first + 2 * half, size_t(width - 2 * half) * sizeof(float));
        }
    }
}

// A sorted list of the best so far. Ids are met in ascending order and only a larger logit overtakes, so a tie goes to
// the lower id; a NaN never overtakes, so the list is K distinct ids whatever comes.
static void choose_experts(int64_t* ids, float* weights, const float* logits, int64_t logits_stride, int64_t experts,
                           int64_t chosen, int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end; ++token) {
        const float* scores = logits + token * logits_stride;
        int64_t* best = ids + token * chosen;
        float* weight = weights + token * chosen;
        int64_t listed = 0;
        for (int64_t id = 0; id < experts; ++id) {
            if (listed == chosen && !(scores[id] > scores[best[chosen - 1]])) continue;
            int64_t at = listed < chosen ? listed++ : chosen - 1;
            for (; at > 0 && scores[id] > scores[best[at - 1]]; --at) best[at] = best[at - 1];
            best[at] = id;
        }
        float total = 0.0f;  // of the chosen: the sum over all experts cancels
        for (int64_t i = 0; i < chosen; ++i) total += weight[i] = std::exp(scores[best[i]] - scores[best[0]]);
        for (int64_t i = 0; i < chosen; ++i) weight[i] /= total;
    }
}
