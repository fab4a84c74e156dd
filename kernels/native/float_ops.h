// The operations on float32 activations and states. Shapes: float_ops.cpp.
#pragma once
#include "kernels.h"

API void moepack_rms_norm(float* out, const float* x, int64_t x_stride, const float* weight, int64_t rows,
                          int64_t width, float eps);
API void moepack_gated_rms_norm(float* out, const float* x, int64_t x_stride, const float* gate, int64_t gate_stride,
                                const float* weight, int64_t rows, int64_t width, float eps);
API void moepack_gated(float* out, const float* x, int64_t x_stride, const float* gate, int64_t gate_stride,
                       int64_t rows, int64_t width);
API void moepack_silu_mul(float* out, const float* gate, int64_t gate_stride, const float* up, int64_t up_stride,
                          int64_t rows, int64_t width);
API void moepack_decay_and_strength(float* decay, float* strength, const float* a, const float* b, const float* a_log,
                                    const float* dt_bias, int64_t tokens, int64_t heads);
API void moepack_causal_conv(float* out, const float* x, int64_t x_stride, const float* weight, float* state,
                             int64_t tokens, int64_t channels, int64_t taps);
API void moepack_rope(float* out, const float* x, const float* angles, int64_t tokens, int64_t heads, int64_t width,
                      int64_t half);
API void moepack_choose_experts(int64_t* ids, float* weights, const float* logits, int64_t logits_stride,
                                int64_t tokens, int64_t experts, int64_t chosen);
API void moepack_gated_delta(float* out, const float* q, int64_t q_stride, const float* k, int64_t k_stride,
                             const float* v, int64_t v_stride, const float* decay, const float* beta, float* state,
                             int64_t tokens, int64_t key_heads, int64_t value_heads, int64_t key_width,
                             int64_t value_width);
API void moepack_attention(float* out, const float* q, const void* keys, int64_t key_head_stride, const void* values,
                           int64_t value_head_stride, int is_bf16, int64_t tokens, int64_t heads, int64_t kv_heads,
                           int64_t context, int64_t width);
