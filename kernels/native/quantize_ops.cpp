// The quantizers as Python calls them: on the caller's thread, for moe-convert has a thread for each expert in flight.
#include <cstring>

#include "kernels.h"
#include "scratch.h"

using namespace moepack;

// Shapes and result: struct QuantizeJob and QuantizeKernels::minmax.
API int64_t moepack_quantize_minmax(uint8_t* w_q, uint16_t* scales, uint16_t* biases, RoundingError* error, const uint8_t* values,
                                    int32_t storage, int64_t rows, int64_t columns, int32_t bits, int32_t group_size) {
    return kernels().quantize.minmax({values, Storage(storage), rows, columns, bits, group_size, w_q, scales, biases, error});
}

// Rows of a quantized matrix as bf16: out [rows, columns] is the nearest to what layout/quantized.py's dequantize gives.
API void moepack_dequantize_bf16(uint16_t* out, const uint8_t* w_q, const uint16_t* scales, const uint16_t* biases, int64_t rows,
                                 int64_t columns, int32_t bits, int32_t group_size) {
    const Matrix matrix = {w_q, scales, biases, rows, columns, bits, group_size, QUANTIZED};
    static thread_local Scratch memory;
    float* row = memory.get<float>(columns);
    for (int64_t r = 0; r < rows; ++r) {
        kernels().matrix.widen_row(matrix, r, row);
        for (int64_t c = 0; c < columns; ++c) {
            uint32_t value;
            memcpy(&value, row + c, sizeof value);
            out[r * columns + c] = uint16_t((value + 0x7fff + (value >> 16 & 1)) >> 16);
        }
    }
}
