// A row of inputs by four columns, and its norm. Put into kernel files by text, after matrix.h.

// Four columns of a row that need not start on 16 bytes; zero beyond the last one.
inline float4 load_four(device const float* x, uint column, uint columns, bool is_aligned) {
  float4 four = 0.0f;
  if (column >= columns) return four;
  if (is_aligned) return *(device const float4*)(x + column);
  four.x = x[column];
  if (column + 1 < columns) four.y = x[column + 1];
  if (column + 2 < columns) four.z = x[column + 2];
  if (column + 3 < columns) four.w = x[column + 3];
  return four;
}

inline float add_squares(float4 x, float sum) {
  return fma(x.x, x.x, fma(x.y, x.y, fma(x.z, x.z, fma(x.w, x.w, sum))));
}

// The weight of a norm is centred on zero.
inline float4 apply_norm(float4 x, float4 norm, float factor) {
  x.x *= factor * (1.0f + norm.x);
  x.y *= factor * (1.0f + norm.y);
  x.z *= factor * (1.0f + norm.z);
  x.w *= factor * (1.0f + norm.w);
  return x;
}

// normed = rms_norm(x, norm), spread (matrix.h), by all threads of a threadgroup; factor is 1 / rms.
inline void keep_normed(device const float* x, device const float* norm, uint columns, bool is_aligned, float factor,
    uint index, uint threads, device float* normed) {
  const uint units = count_units(columns);
  for (uint i = index; i * 4 < columns; i += threads) {
    const float4 four = load_four(x, i * 4, columns, is_aligned);
    const float4 weight = load_four(norm, i * 4, columns, is_aligned);
    ((device float4*)normed)[i % QUADS * units + i / QUADS] = apply_norm(four, weight, factor);
  }
}
