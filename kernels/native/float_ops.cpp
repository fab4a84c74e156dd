// The operations on float32 activations and states: shapes and threads. One exported function per operation.
#include <algorithm>

#include "float_ops.h"
#include "kernels.h"
#include "pool.h"
#include "scratch.h"

using namespace moepack;

namespace {

constexpr int64_t SPLIT_FLOATS = 8192;  // less is done sooner by one thread than another is woken
constexpr int64_t QUERY_ROWS = 128;     // rows of a block of queries: scores, packed queries and results stay in L2
constexpr int64_t MOST_PARTIAL_FLOATS = 1 << 22;  // of attention, kept between calls: 16 MiB

float* thread_scratch(int64_t floats) {
    static thread_local Scratch scratch;
    return scratch.get<float>(floats);
}

// Rows that make a share worth a thread.
int64_t row_grain(int64_t width) { return width < SPLIT_FLOATS ? SPLIT_FLOATS / std::max(width, int64_t(1)) : 1; }

}  // namespace

// x [rows, width], weight [width]
API void moepack_rms_norm(float* out, const float* x, int64_t x_stride, const float* weight, int64_t rows, int64_t width,
                          float eps) {
    Pool::get().split(rows, row_grain(width), [&](int64_t begin, int64_t end) {
        kernels().floats.rms_norm(out, x, x_stride, weight, width, eps, begin, end);
    });
}

// x, gate [rows, width], weight [width]
API void moepack_gated_rms_norm(float* out, const float* x, int64_t x_stride, const float* gate, int64_t gate_stride,
                                const float* weight, int64_t rows, int64_t width, float eps) {
    Pool::get().split(rows, row_grain(width), [&](int64_t begin, int64_t end) {
        kernels().floats.gated_rms_norm(out, x, x_stride, gate, gate_stride, weight, width, eps, begin, end);
    });
}

// x, gate [rows, width]
API void moepack_gated(float* out, const float* x, int64_t x_stride, const float* gate, int64_t gate_stride, int64_t rows,
                       int64_t width) {
    Pool::get().split(rows, row_grain(width), [&](int64_t begin, int64_t end) {
        kernels().floats.gated(out, x, x_stride, gate, gate_stride, width, begin, end);
    });
}

// gate, up [rows, width]
API void moepack_silu_mul(float* out, const float* gate, int64_t gate_stride, const float* up, int64_t up_stride, int64_t rows,
                          int64_t width) {
    Pool::get().split(rows, row_grain(width), [&](int64_t begin, int64_t end) {
        kernels().floats.silu_mul(out, gate, gate_stride, up, up_stride, width, begin, end);
    });
}

// a, b [tokens, heads]
API void moepack_decay_and_strength(float* decay, float* strength, const float* a, const float* b, const float* a_log,
                                    const float* dt_bias, int64_t tokens, int64_t heads) {
    Pool::get().split(heads, row_grain(16 * tokens), [&](int64_t begin, int64_t end) {
        kernels().floats.decay_and_strength(decay, strength, a, b, a_log, dt_bias, tokens, heads, begin, end);
    });
}

// x [tokens, channels], weight [channels, taps], state [taps - 1, channels]
API void moepack_causal_conv(float* out, const float* x, int64_t x_stride, const float* weight, float* state, int64_t tokens,
                             int64_t channels, int64_t taps) {
    Pool::get().split(channels, 256, [&](int64_t begin, int64_t end) {
        kernels().floats.causal_conv(out, x, x_stride, weight, state, tokens, channels, taps, begin, end);
    });
}

// x [tokens, heads, width], angles [tokens, 2, half]
API void moepack_rope(float* out, const float* x, const float* angles, int64_t tokens, int64_t heads, int64_t width,
                      int64_t half) {
    Pool::get().split(tokens, row_grain(heads * width), [&](int64_t begin, int64_t end) {
        kernels().floats.rope(out, x, angles, heads, width, half, begin, end);
    });
}

// logits [tokens, experts]; ids, weights [tokens, chosen]
API void moepack_choose_experts(int64_t* ids, float* weights, const float* logits, int64_t logits_stride, int64_t tokens,
                                int64_t experts, int64_t chosen) {
    Pool::get().split(tokens, row_grain(experts), [&](int64_t begin, int64_t end) {
        kernels().floats.choose_experts(ids, weights, logits, logits_stride, experts, chosen, begin, end);
    });
}

// Shapes: struct Delta.
API void moepack_gated_delta(float* out, const float* q, int64_t q_stride, const float* k, int64_t k_stride, const float* v,
                             int64_t v_stride, const float* decay, const float* beta, float* state, int64_t tokens,
                             int64_t key_heads, int64_t value_heads, int64_t key_width, int64_t value_width) {
    const Delta delta = {out, q, k, v, decay, beta, state, tokens, key_heads, value_heads, key_width, value_width,
                         q_stride, k_stride, v_stride};
    const FloatKernels& floats = kernels().floats;
    Pool::get().split(key_heads, 1, [&](int64_t begin, int64_t end) {
        floats.gated_delta(delta, thread_scratch(floats.gated_delta_scratch(delta)), begin, end);
    });
}

// Blocks of queries are the tasks, the costliest first. A few queries over a long context, as in decoding, would leave
// threads without work: there every tile of keys is a task, and the results are folded in the same order as otherwise,
// as long as the partial results are not more than the memory plan has room for.
// Shapes: struct Attention.
API void moepack_attention(float* out, const float* q, const void* keys, int64_t key_head_stride, const void* values,
                           int64_t value_head_stride, int is_bf16, int64_t tokens, int64_t heads, int64_t kv_heads,
                           int64_t context, int64_t width) {
    const Attention a = {out, q, keys, values, is_bf16 != 0, tokens, heads, kv_heads, context, width, key_head_stride,
                         value_head_stride};
    const FloatKernels& floats = kernels().floats;
    const int64_t step = a.group() < QUERY_ROWS ? QUERY_ROWS / a.group() : 1, blocks = (a.tokens + step - 1) / step;
    const int64_t tiles = (a.context + KEY_TILE - 1) / KEY_TILE;
    const int64_t partial = floats.attend_partial(a, a.tokens);
    if (blocks > 1 || tiles == 1 || Pool::get().size() == 1 || a.kv_heads * tiles * partial > MOST_PARTIAL_FLOATS) {
        Pool::get().each(blocks * a.kv_heads, [&](int64_t task) {
            const int64_t first = (blocks - 1 - task / a.kv_heads) * step;
            const int64_t count = a.tokens - first < step ? a.tokens - first : step;
            floats.attend(a, {task % a.kv_heads, first, count}, thread_scratch(floats.attend_scratch(a, count)));
        });
        return;
    }
    static thread_local Scratch memory;
    float* partials = memory.get<float>(a.kv_heads * tiles * partial);
    Pool::get().each(a.kv_heads * tiles, [&](int64_t task) {
        floats.attend_tile(a, {task / tiles, 0, a.tokens}, task % tiles, partials + task * partial,
                           thread_scratch(floats.attend_scratch(a, a.tokens)));
    });
    Pool::get().each(a.kv_heads, [&](int64_t kv_head) {
        floats.attend_fold(a, {kv_head, 0, a.tokens}, partials + kv_head * tiles * partial, tiles);
    });
}
