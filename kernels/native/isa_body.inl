// What every isa_*.cpp includes inside its namespace, after its int8 primitives.
#include "float_kernels.inl"
#include "matrix_kernels.inl"
#include "quantize.inl"

extern const Kernels KERNELS;
const Kernels KERNELS = {ISA_NAME, MATRIX_KERNELS, FLOAT_KERNELS, QUANTIZE_KERNELS};
