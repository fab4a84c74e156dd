// The table of kernels that each instruction set fills, and how one of them is picked.
//
// A kernel works on one thread's share, a range [begin, end) of what its operation splits; threads and shapes are the
// business of *_ops.cpp. The text of the kernels is the same for every instruction set: isa_*.cpp includes it once
// for each, with the target switched, beside the few int8 primitives that only intrinsics reach (int8_*.h).
#pragma once
#include "float_kernels.h"
#include "matrix_kernels.h"
#include "quantize_kernels.h"

#define INLINE static inline __attribute__((always_inline))
#define API extern "C" __attribute__((visibility("default")))

namespace moepack {

struct Kernels {
    const char* name;
    MatrixKernels matrix;
    FloatKernels floats;
    QuantizeKernels quantize;
};

// The best set that this processor has, unless another was asked for.
const Kernels& kernels();

}  // namespace moepack
