// The quantizers as Python calls them: on the caller's thread, for moe-convert has a thread for each expert in flight.
#include "kernels.h"

using namespace moepack;

// Shapes and result: struct QuantizeJob and QuantizeKernels::minmax.
API int64_t moepack_quantize_minmax(uint8_t* w_q, uint16_t* scales, uint16_t* biases, RoundingError* error, const uint8_t* values,
                                    int32_t storage, int64_t rows, int64_t columns, int32_t bits, int32_t group_size) {
    return kernels().quantize.minmax({values, Storage(storage), rows, columns, bits, group_size, w_q, scales, biases, error});
}
