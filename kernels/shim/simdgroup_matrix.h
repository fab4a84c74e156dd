// Matrices of 8 x 8 spread over a simdgroup. The includer defines msl_lane(); the product is each target's own.
#pragma once

namespace metal {

// A lane holds two neighbours of a matrix: elements 2 lane and 2 lane + 1, row by row. Apple's lanes may hold others;
// the kernels only load, multiply and store.
struct simdgroup_float8x8 {
  float elements[2];
};

template <class T, int N>
MSL_FUNCTION simdgroup_float8x8 make_filled_simdgroup_matrix(T value) {
  return {{value, value}};
}

MSL_FUNCTION void simdgroup_load(simdgroup_float8x8& to, const float* from, ulong elements_per_row) {
  const float* row = from + msl_lane() / 4 * elements_per_row + msl_lane() % 4 * 2;
  to.elements[0] = row[0];
  to.elements[1] = row[1];
}

MSL_FUNCTION void simdgroup_store(const simdgroup_float8x8& from, float* to, ulong elements_per_row) {
  float* row = to + msl_lane() / 4 * elements_per_row + msl_lane() % 4 * 2;
  row[0] = from.elements[0];
  row[1] = from.elements[1];
}

}  // namespace metal
