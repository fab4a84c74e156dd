// Kernels on float32 activations and states: what is not a product with weights. Formulas: kernels/reference.py.
// Rows lie a stride apart, given in floats; results and states are contiguous. [begin, end) is one thread's share.
#pragma once
#include <cstdint>

namespace moepack {

// q, k [tokens, key_heads, key_width], v [tokens, value_heads, value_width], a token's heads side by side; decay, beta
// [tokens, value_heads]; state [value_heads, key_width, value_width]; out as v. Value head h reads key head
// h / (value_heads / key_heads).
struct Delta {
    float* out;
    const float *q, *k, *v, *decay, *beta;
    float* state;
    int64_t tokens, key_heads, value_heads, key_width, value_width;
    int64_t q_stride, k_stride, v_stride;
};

// q, out [tokens, heads, width], contiguous; keys, values [kv_heads, context, width], float32 or bf16, their heads a
// stride apart, which is counted in elements.
struct Attention {
    float* out;
    const float* q;
    const void *keys, *values;
    bool is_bf16;  // keys and values
    int64_t tokens, heads, kv_heads, context, width;
    int64_t key_head_stride, value_head_stride;

    int64_t group() const { return heads / kv_heads; }  // query heads that share a kv head
};

// Keys are taken in tiles of a fixed size, each softmax'd by itself and then folded in, in the order of the context:
// so a query's result depends neither on the other queries of the call nor on the threads.
constexpr int64_t KEY_TILE = 256;

// Queries of one kv head that go through the context together: count of them from token `first`.
struct QueryBlock {
    int64_t kv_head, first, count;
};

struct FloatKernels {
    // rows of x [rows, width]: x / rms(x) * (1 + weight)
    void (*rms_norm)(float* out, const float* x, int64_t x_stride, const float* weight, int64_t width, float eps,
                     int64_t begin, int64_t end);
    // rows: x / rms(x) * weight * silu(gate)
    void (*gated_rms_norm)(float* out, const float* x, int64_t x_stride, const float* gate, int64_t gate_stride,
                           const float* weight, int64_t width, float eps, int64_t begin, int64_t end);
    // rows: x * sigmoid(gate)
    void (*gated)(float* out, const float* x, int64_t x_stride, const float* gate, int64_t gate_stride, int64_t width,
                  int64_t begin, int64_t end);
    // rows: silu(gate) * up
    void (*silu_mul)(float* out, const float* gate, int64_t gate_stride, const float* up, int64_t up_stride,
                     int64_t width, int64_t begin, int64_t end);
    // heads of a, b [tokens, heads]: -exp(a_log) softplus(a + dt_bias) and sigmoid(b)
    void (*decay_and_strength)(float* decay, float* strength, const float* a, const float* b, const float* a_log,
                               const float* dt_bias, int64_t tokens, int64_t heads, int64_t begin, int64_t end);
    // channels of x [tokens, channels] with weight [channels, taps] and state [taps - 1, channels]
    void (*causal_conv)(float* out, const float* x, int64_t x_stride, const float* weight, float* state, int64_t tokens,
                        int64_t channels, int64_t taps, int64_t begin, int64_t end);
    // tokens of x [tokens, heads, width], turned by angles [tokens, 2, half]: cosines, then sines
    void (*rope)(float* out, const float* x, const float* angles, int64_t heads, int64_t width, int64_t half,
                 int64_t begin, int64_t end);
    // tokens of logits [tokens, experts]: the `chosen` best and their weights
    void (*choose_experts)(int64_t* ids, float* weights, const float* logits, int64_t logits_stride, int64_t experts,
                           int64_t chosen, int64_t begin, int64_t end);

    // key heads of the gated delta rule, all tokens
    void (*gated_delta)(const Delta& delta, float* scratch, int64_t begin, int64_t end);
    int64_t (*gated_delta_scratch)(const Delta& delta);  // in floats

    // a block of queries over the whole context that they see
    void (*attend)(const Attention& attention, const QueryBlock& block, float* scratch);
    // the same in two steps: one tile of keys into its partial result, then all partial results into out
    void (*attend_tile)(const Attention& attention, const QueryBlock& block, int64_t tile, float* partial, float* scratch);
    void (*attend_fold)(const Attention& attention, const QueryBlock& block, float* partials, int64_t tiles);
    int64_t (*attend_scratch)(const Attention& attention, int64_t count);  // in floats
    int64_t (*attend_partial)(const Attention& attention, int64_t count);  // floats of one partial result
};

}  // namespace moepack
