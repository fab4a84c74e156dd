// Kernels on float32 activations and states, for the instruction set around this include.
#include "rows.inl"
#include "multiply.inl"
#include "delta.inl"
#include "attention.inl"

static constexpr FloatKernels FLOAT_KERNELS = {
    rms_norm, gated_rms_norm, gated, silu_mul, decay_and_strength, causal_conv, rope, choose_experts,
    gated_delta, gated_delta_scratch,
    attend, attend_tile, attend_fold, attend_scratch, attend_partial,
};
