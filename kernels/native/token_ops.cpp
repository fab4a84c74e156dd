// One token through what a layer does between two reads of the SSD, in one call: the same operations in the same order
// as the model file's, so the same bits. Reason: streaming weights leaves nothing of the interpreter in the caches, and
// each operation called from there costs 10 us more than its work; a layer has twenty.
#include <cmath>
#include <cstring>

#include "float_ops.h"
#include "kernels.h"
#include "matrix_ops.h"
#include "scratch.h"

using namespace moepack;

namespace {

// Memory for the intermediate results of one token; a result is valid until its name is asked for again.
template <class Owner, int NAME> float* result(int64_t count) {
    static thread_local Scratch memory;
    return memory.get<float>(count);
}

void add_to(float* x, const float* y, int64_t count) {
    for (int64_t i = 0; i < count; ++i) x[i] += y[i];
}

}  // namespace

// The fields are filled in by native_token.py: keep both in the same order.
struct DeltaNetWeights {
    const float* norm;         // [D]
    const Matrix* in_projs[4];  // q k v, gate, decay, strength
    const float* conv;         // [channels, taps]
    const float *a_log, *dt_bias;  // [value_heads]
    const float* gate_norm;    // [value_width]
    const Matrix* out_proj;
    int64_t key_heads, value_heads, key_width, value_width, taps;
    float eps;
};

struct AttentionWeights {
    const float* norm;          // [D]
    const Matrix* in_projs[3];  // q and its gate per head, k, v
    const float *q_norm, *k_norm;  // [width]
    const Matrix* out_proj;
    int64_t heads, kv_heads, width, half;  // half the rotated width
    float eps;
};

struct RouterWeights {
    const float* norm;          // [D]
    const Matrix* matrices[2];  // router, gate of the shared expert
    int64_t experts, chosen;
    float eps;
};

// x [D] += DeltaNet(norm(x)); the states as in causal_conv and gated_delta.
API void moepack_delta_net_token(float* x, const DeltaNetWeights* w, float* conv_state, float* recurrent_state, int exact) {
    using W = DeltaNetWeights;
    const int64_t hidden = w->out_proj->rows, key = w->key_heads * w->key_width, value = w->value_heads * w->value_width;
    const int64_t channels = 2 * key + value, heads = w->value_heads;
    float* normed = result<W, 0>(hidden);
    float* projected = result<W, 1>(channels + value + 2 * heads);
    float* const parts[] = {projected, projected + channels, projected + channels + value, projected + channels + value + heads};
    float *mixed = result<W, 2>(channels), *gates = result<W, 3>(2 * heads), *out = result<W, 4>(value), *gated = result<W, 5>(value);
    moepack_rms_norm(normed, x, hidden, w->norm, 1, hidden, w->eps);
    moepack_linear(parts, normed, 1, w->in_projs, 4, exact);
    moepack_causal_conv(mixed, parts[0], channels, w->conv, conv_state, 1, channels, w->taps);
    moepack_decay_and_strength(gates, gates + heads, parts[2], parts[3], w->a_log, w->dt_bias, 1, heads);
    moepack_gated_delta(out, mixed, channels, mixed + key, channels, mixed + 2 * key, channels, gates, gates + heads, recurrent_state, 1,
                        w->key_heads, heads, w->key_width, w->value_width);
    moepack_gated_rms_norm(gated, out, w->value_width, parts[1], w->value_width, w->gate_norm, heads, w->value_width, w->eps);
    float* const result_of[] = {normed};
    moepack_linear(result_of, gated, 1, &w->out_proj, 1, exact);
    add_to(x, normed, hidden);
}

// x [D] += attention(norm(x)), and the token's key and value go to `position` of the cache [kv_heads, positions, width].
API void moepack_attention_token(float* x, const AttentionWeights* w, float* keys, float* values, int64_t head_stride, int64_t position,
                                 const float* angles, int exact) {
    using W = AttentionWeights;
    const int64_t hidden = w->out_proj->rows, query = w->heads * w->width, key = w->kv_heads * w->width, width = w->width;
    float* normed = result<W, 0>(hidden);
    float* projected = result<W, 1>(2 * query + 2 * key);
    float* const parts[] = {projected, projected + 2 * query, projected + 2 * query + key};
    float *q = result<W, 2>(query), *k = result<W, 3>(key), *turned = result<W, 4>(query), *out = result<W, 5>(query);
    moepack_rms_norm(normed, x, hidden, w->norm, 1, hidden, w->eps);
    moepack_linear(parts, normed, 1, w->in_projs, 3, exact);
    moepack_rms_norm(q, parts[0], 2 * width, w->q_norm, w->heads, width, w->eps);  // every second width is a gate
    moepack_rms_norm(k, parts[1], width, w->k_norm, w->kv_heads, width, w->eps);
    moepack_rope(turned, q, angles, 1, w->heads, width, w->half);
    moepack_rope(parts[1], k, angles, 1, w->kv_heads, width, w->half);
    for (int64_t head = 0; head < w->kv_heads; ++head) {
        memcpy(keys + head * head_stride + position * width, parts[1] + head * width, size_t(width) * sizeof(float));
        memcpy(values + head * head_stride + position * width, parts[2] + head * width, size_t(width) * sizeof(float));
    }
    moepack_attention(q, turned, keys, head_stride, values, head_stride, 1, w->heads, w->kv_heads, position + 1, width);
    moepack_gated(out, q, width, parts[0] + width, 2 * width, w->heads, width);
    float* const result_of[] = {normed};
    moepack_linear(result_of, out, 1, &w->out_proj, 1, exact);
    add_to(x, normed, hidden);
}

// normed [D] = norm(x), and from it the choice: ids, weights [chosen]; weights[chosen] is the shared expert's.
API void moepack_route_token(int64_t* ids, float* weights, float* normed, const float* x, const RouterWeights* w, int exact) {
    const int64_t hidden = w->matrices[0]->columns;
    float* logits = result<RouterWeights, 0>(w->experts + 1);
    float* const parts[] = {logits, logits + w->experts};
    moepack_rms_norm(normed, x, hidden, w->norm, 1, hidden, w->eps);
    moepack_linear(parts, normed, 1, w->matrices, 2, exact);
    moepack_choose_experts(ids, weights, logits, w->experts, 1, w->experts, w->chosen);
    weights[w->chosen] = 1.0f / (1.0f + std::exp(-logits[w->experts]));
}

// x [width] += sum of weights[i] * rows[i] over count rows, in their order.
API void moepack_add_rows(float* x, const float* rows, const float* weights, int64_t count, int64_t width) {
    float* total = result<float, 0>(width);
    memset(total, 0, size_t(width) * sizeof(float));
    for (int64_t i = 0; i < count; ++i)
        for (int64_t c = 0; c < width; ++c) total[c] += weights[i] * rows[i * width + c];
    add_to(x, total, width);
}
