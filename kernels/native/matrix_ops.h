// The operations with weight matrices. Shapes: matrix_ops.cpp.
#pragma once
#include "kernels.h"

API void moepack_linear(float* const* outs, const float* x, int64_t tokens, const moepack::Matrix* const* matrices,
                        int64_t count, int exact);
API void moepack_run_experts(float* const* outs, const float* x, const moepack::Expert* const* experts, int64_t count,
                             int exact);
API void moepack_add_expert(float* out, const float* x, const int64_t* tokens, const float* weights, int64_t count,
                            const moepack::Expert* expert, int exact);
API void moepack_embed(float* out, const moepack::Matrix* m, const int64_t* rows, int64_t count);
API int64_t moepack_read_stream(const uint8_t* from, int64_t size_bytes);
