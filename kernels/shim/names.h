// Opens the namespace that a kernel file is compiled in. Using-declarations, unlike `using namespace`, hide what CUDA
// and <math.h> have under the same names at global scope.
#pragma once

namespace metal_text {
using metal::as_type;
using metal::copy_eight;
using metal::copy_four;
using metal::copy_sixteen;
using metal::exp;
using metal::float2;
using metal::float4;
using metal::first_half;
using metal::fma;
using metal::half;
using metal::launch_next;
using metal::load_early;
using metal::load_once;
using metal::log;
using metal::make_filled_simdgroup_matrix;
using metal::max;
using metal::max_magnitude;
using metal::mem_flags;
using metal::min;
using metal::pack_halves;
using metal::permute_bytes;
using metal::rsqrt;
using metal::second_half;
using metal::simd_max;
using metal::simd_min;
using metal::simd_shuffle;
using metal::simd_shuffle_xor;
using metal::simd_sum;
using metal::simdgroup_barrier;
using metal::simdgroup_float8x8;
using metal::simdgroup_load;
using metal::simdgroup_multiply_accumulate;
using metal::simdgroup_multiply_bytes;
using metal::simdgroup_multiply_halves;
using metal::simdgroup_multiply_tf32;
using metal::simdgroup_store;
using metal::threadgroup_barrier;
using metal::uchar;
using metal::uint;
using metal::uint2;
using metal::uint3;
using metal::uint4;
using metal::ulong;
using metal::ushort;
using metal::wait_for_copies;
using metal::wait_for_last;
namespace precise = metal::precise;
}  // namespace metal_text
