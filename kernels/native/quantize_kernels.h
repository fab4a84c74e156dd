// From float rows to the integers, scales and biases of a pack. The definition, bit for bit: quantize_minmax of
// convert/quantizers.py; meaning of the bytes: layout/quantized.py.
#pragma once
#include <cstdint>

#include "matrix_kernels.h"

namespace moepack {

constexpr int64_t LARGEST_GROUP = 128;

// What rounding did to the weights: sums over all of them, and the largest single error.
struct RoundingError {
    double squared_error, squared_weight, largest;
};

// Weights [rows, columns], at any address, and where their three arrays go. Groups are of 32, 64 or 128.
struct QuantizeJob {
    const uint8_t* values;
    Storage storage;
    int64_t rows, columns;
    int32_t bits, group_size;
    uint8_t* w_q;
    uint16_t *scales, *biases;
    RoundingError* error;  // added to
};

struct QuantizeKernels {
    // Each group's smallest weight becomes 0, its largest 2^bits - 1. Returns the first row that holds NaN or infinity
    // or whose range bf16 cannot hold, -1 if all is well.
    int64_t (*minmax)(const QuantizeJob& job);
};

}  // namespace moepack
