// One token through as many layers as have their experts in memory, in one call: the same operations in the same order
// as the model file's, so the same bits. Reason: streaming weights leaves nothing of the interpreter in the caches, and
// each operation called from there costs 10 us more than its work; a layer has twenty.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

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

// Rounded to nearest, ties to even, as torch does it.
uint16_t to_bf16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    if (value != value) return 0x7fc0;
    return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// Values to a place of a cache, counted in elements.
void append(void* cache, int64_t place, const float* values, int64_t count, bool is_bf16) {
    if (is_bf16)
        for (int64_t i = 0; i < count; ++i) static_cast<uint16_t*>(cache)[place + i] = to_bf16(values[i]);
    else memcpy(static_cast<float*>(cache) + place, values, size_t(count) * sizeof(float));
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

struct LayerWeights {
    const DeltaNetWeights* delta_net;  // one of the two is null
    const AttentionWeights* attention;
    const RouterWeights* router;
    const Expert* shared_expert;
};

struct LayerState {
    float *conv, *recurrent;  // of a DeltaNet: as in causal_conv and gated_delta
    void *keys, *values;      // of attention: [kv_heads, positions, width], float32 or bf16
    int64_t head_stride, is_bf16;
};

// What one token goes through and what becomes of it: ids and weights are for each layer, normed for the last one.
struct TokenRun {
    const LayerWeights* layers;
    const LayerState* states;
    const Expert* const* experts;  // [layers, E], null where an expert is not in memory
    const float* angles;           // rope of this position
    int64_t position, num_layers, pauses, exact;  // pauses: stop after each router
    float* normed;                 // [D]: what the experts are given
    int64_t* ids;                  // [layers, K], ascending
    float* weights;                // [layers, K + 1], in their order, the shared expert's behind
};

namespace {

// x [D] += DeltaNet(norm(x))
void mix_delta_net(float* x, const DeltaNetWeights* w, float* conv_state, float* recurrent_state, int exact) {
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

// x [D] += attention(norm(x)), and the token's key and value go to `position` of the cache.
void mix_attention(float* x, const AttentionWeights* w, const LayerState& cache, int64_t position, const float* angles, int exact) {
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
        const int64_t place = head * cache.head_stride + position * width;
        append(cache.keys, place, parts[1] + head * width, width, cache.is_bf16);
        append(cache.values, place, parts[2] + head * width, width, cache.is_bf16);
    }
    moepack_attention(q, turned, cache.keys, cache.head_stride, cache.values, cache.head_stride, int(cache.is_bf16), 1, w->heads,
                      w->kv_heads, position + 1, width);
    moepack_gated(out, q, width, parts[0] + width, 2 * width, w->heads, width);
    float* const result_of[] = {normed};
    moepack_linear(result_of, out, 1, &w->out_proj, 1, exact);
    add_to(x, normed, hidden);
}

// normed [D] = norm(x), and from it the choice: ids [chosen], ascending, and their weights, the shared expert's behind.
void route(int64_t* ids, float* weights, float* normed, const float* x, const RouterWeights* w, int exact) {
    const int64_t hidden = w->matrices[0]->columns, chosen = w->chosen;
    float* logits = result<RouterWeights, 0>(w->experts + 1);
    float* const parts[] = {logits, logits + w->experts};
    moepack_rms_norm(normed, x, hidden, w->norm, 1, hidden, w->eps);
    moepack_linear(parts, normed, 1, w->matrices, 2, exact);
    moepack_choose_experts(ids, weights, logits, w->experts, 1, w->experts, chosen);
    for (int64_t i = 1; i < chosen; ++i)
        for (int64_t at = i; at > 0 && ids[at] < ids[at - 1]; --at) {
            std::swap(ids[at], ids[at - 1]);
            std::swap(weights[at], weights[at - 1]);
        }
    weights[chosen] = 1.0f / (1.0f + std::exp(-logits[w->experts]));
}

}  // namespace

// x [width] += sum of weights[i] * rows[i] over count rows, in their order.
API void moepack_add_rows(float* x, const float* rows, const float* weights, int64_t count, int64_t width) {
    float* total = result<float, 0>(width);
    memset(total, 0, size_t(width) * sizeof(float));
    for (int64_t i = 0; i < count; ++i)
        for (int64_t c = 0; c < width; ++c) total[c] += weights[i] * rows[i * width + c];
    add_to(x, total, width);
}

// Run x [D] through the layers from `first` on. Returns the layer that has chosen its experts and not run them, because
// one is not in memory or the run pauses there; num_layers if all are done.
API int64_t moepack_run_token(float* x, const TokenRun* run, int64_t first) {
    const int exact = int(run->exact);
    for (int64_t layer = first; layer < run->num_layers; ++layer) {
        const LayerWeights& w = run->layers[layer];
        const LayerState& state = run->states[layer];
        if (w.delta_net) mix_delta_net(x, w.delta_net, state.conv, state.recurrent, exact);
        else mix_attention(x, w.attention, state, run->position, run->angles, exact);

        const int64_t chosen = w.router->chosen, hidden = w.router->matrices[0]->columns;
        int64_t* ids = run->ids + layer * chosen;
        float* weights = run->weights + layer * (chosen + 1);
        route(ids, weights, run->normed, x, w.router, exact);
        const Expert* const* held = run->experts + layer * w.router->experts;
        if (run->pauses || !std::all_of(ids, ids + chosen, [=](int64_t id) { return held[id]; })) return layer;

        static thread_local std::vector<const Expert*> experts;
        static thread_local std::vector<float*> rows;
        float* results = result<TokenRun, 0>((chosen + 1) * hidden);
        experts.clear();
        rows.clear();
        for (int64_t i = 0; i <= chosen; ++i) {
            experts.push_back(i < chosen ? held[ids[i]] : w.shared_expert);
            rows.push_back(results + i * hidden);
        }
        moepack_run_experts(rows.data(), run->normed, experts.data(), chosen + 1, exact);
        moepack_add_rows(x, results, weights, chosen + 1, hidden);
    }
    return run->num_layers;
}
