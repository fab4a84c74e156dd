// Products with weight matrices as they lie in a pack. Meaning of the bytes: layout/quantized.py.
#pragma once
#include <cstdint>

namespace moepack {

enum Storage : int32_t { QUANTIZED = 0, BF16 = 1, F16 = 2, F32 = 3 };

// Weights [rows, columns]. The fields are filled in by native_matrix.py: keep both in the same order.
struct Matrix {
    const uint8_t* data;     // quantized: rows of columns * bits / 8 bytes, row after row; else plain values
    const uint16_t* scales;  // bf16 [rows, columns / group_size]; null unless quantized
    const uint16_t* biases;
    int64_t rows, columns;
    int32_t bits, group_size, storage;

    int64_t groups() const { return columns / group_size; }
    int64_t row_bytes() const { return columns * bits / 8; }
};

struct Expert {
    const Matrix *gate, *up, *down;  // gate, up [I, D]; down [D, I]
};

// Activations as int8, one scale per group of a row: x ~ q * scale. What rounding loses of a group's sum is kept in
// `residual`, so that the product is exact in the mean of the weights: with weights w = s * v + b, v in 0..2^bits-1,
//
//     w . x ~ s * (scale * (v . q) + residual) + b * sum,    residual = (2^bits - 1)/2 * (sum - scale * sum q)
//
// which halves the error for nothing. Rows are padded with zeros to a multiple of 256 values, groups to one of 16.
struct Activations {
    int64_t tokens, columns, groups, row_stride, group_stride;
    int32_t bits, group_size;  // of the matrices that these meet
    bool one_token;            // for dot_row_walk: the order of values may be the kernel's own
    int8_t* q;                 // [tokens, row_stride]
    float *scale, *sum, *residual;  // [tokens, group_stride] each
};

// Every out is [tokens, out_stride] and gets columns [begin, end), one for each row of the matrix.
struct MatrixKernels {
    // Fill tokens [begin, end) of a; token t is row index[t] of x, or row t without an index.
    void (*quantize)(Activations& a, const float* x, const int64_t* index, int64_t begin, int64_t end);
    // One token (a.one_token): each row is read once, in memory order, which is what DRAM is fastest at.
    void (*dot_row_walk)(const Matrix& m, const Activations& a, float* out, int64_t begin, int64_t end);
    // Several tokens: weights are unpacked once and meet every token from the cache.
    void (*dot_tile)(const Matrix& m, const Activations& a, float* out, int64_t out_stride, int64_t begin, int64_t end);
    // In float32, any storage, any number of tokens.
    void (*float_rows)(const Matrix& m, const float* x, const int64_t* index, int64_t tokens, float* out, int64_t out_stride, int64_t begin,
                       int64_t end);
    // One row in float32: bit for bit what the reference's dequantize gives.
    void (*widen_row)(const Matrix& m, int64_t row, float* out);
    // out[index[t]] += weights[t] * y[t] for columns [begin, end) of [tokens, width]
    void (*add_weighted)(float* out, const float* y, const int64_t* index, const float* weights, int64_t tokens, int64_t width, int64_t begin,
                         int64_t end);
    // Read memory as fast as it goes: the limit that the others are measured against.
    int64_t (*read_stream)(const uint8_t* from, int64_t size_bytes);
};

}  // namespace moepack
