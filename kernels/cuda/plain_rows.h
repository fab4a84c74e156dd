// Inputs of a row, and products of plain rows with it, in float32. Put into kernel files by text, after normed.h.
//
// Few rows are plain: the router's, DeltaNet's a and b. Latency bounds them, not bytes. So each has a simdgroup for
// itself, which requests the whole row before it waits for the kernel before; and what is read after that wait is
// requested together, with no branch in between: one such read takes as long as all.

constant constexpr uint ROW_STRIP = 256;  // columns of a simdgroup at a time, eight of a lane
constant constexpr uint ROW_STRIPS = 16;  // at most: more columns go by no fast way
constant constexpr uint TOGETHER_STRIPS = 4;  // whose inputs are requested together

struct RowInputs {  // a row, times 1 + norm if asked
  device const float* x;
  device const float* norm;
  uint columns;
  bool is_aligned;  // to four numbers
  bool is_normed;
  float squares;    // of what this lane has loaded
};

// Four columns of an aligned row, zeros from the last one on.
inline float4 load_quad(device const float* x, uint column, uint columns) {
  return column < columns ? *(device const float4*)(x + column) : float4(0.0f, 0.0f, 0.0f, 0.0f);
}

inline float add_eight(uint4 weights, float4 low, float4 high, float sum) {
  sum = fma(widen_bf16(weights.x), low.x, sum);
  sum = fma(as_type<float>(weights.x & 0xffff0000u), low.y, sum);
  sum = fma(widen_bf16(weights.y), low.z, sum);
  sum = fma(as_type<float>(weights.y & 0xffff0000u), low.w, sum);
  sum = fma(widen_bf16(weights.z), high.x, sum);
  sum = fma(as_type<float>(weights.z & 0xffff0000u), high.y, sum);
  sum = fma(widen_bf16(weights.w), high.z, sum);
  return fma(as_type<float>(weights.w & 0xffff0000u), high.w, sum);
}

// A row of bfloat16 in whole eights, of at most STRIPS strips: this lane's part of its product with the inputs.
template <uint STRIPS>
inline float multiply_strips(device const uchar* row, thread RowInputs& inputs, uint lane) {
  const uint columns = inputs.columns, first = lane * 8;
  uint4 weights[STRIPS];
#pragma unroll
  for (uint s = 0; s < STRIPS; s++) {
    const uint column = s * ROW_STRIP + first;
    weights[s] = column < columns ? load_early((device const uint4*)(row + column * 2)) : uint4(0, 0, 0, 0);
  }
  wait_for_last();
  float sum = 0.0f;
#pragma unroll
  for (uint start = 0; start < STRIPS; start += TOGETHER_STRIPS) {
    float4 fours[TOGETHER_STRIPS * 2], norms[TOGETHER_STRIPS * 2];
#pragma unroll
    for (uint i = 0; i < TOGETHER_STRIPS * 2; i++) {
      const uint column = (start + i / 2) * ROW_STRIP + first + i % 2 * 4;
      fours[i] = load_quad(inputs.x, column, columns);
      norms[i] = load_quad(inputs.norm, column, inputs.is_normed ? columns : 0);  // zeros change nothing
    }
#pragma unroll
    for (uint i = 0; i < TOGETHER_STRIPS * 2; i++) {
      inputs.squares = add_squares(fours[i], inputs.squares);
      fours[i] = apply_norm(fours[i], norms[i], 1.0f);
    }
#pragma unroll
    for (uint i = 0; i < TOGETHER_STRIPS; i++) {
      sum = add_eight(weights[start + i], fours[2 * i], fours[2 * i + 1], sum);
    }
  }
  return sum;
}

// A row of a plain matrix times the inputs, in every lane: {the product, this lane's part of the inputs' squares}. A
// function of its own, for the registers.
MSL_NOINLINE float2 multiply_plain_row(Weights w, uint row, RowInputs inputs, uint lane) {
  const ulong at = ulong(min(row, w.rows - 1)) * w.columns;
  device const uchar* data = w.data + at * 2;
  float sum = 0.0f;
  if (w.storage == BF16 && inputs.is_aligned && w.columns % 8 == 0 && w.columns <= ROW_STRIPS * ROW_STRIP) {
    if (w.columns <= 4 * ROW_STRIP) {
      sum = multiply_strips<4>(data, inputs, lane);
    } else if (w.columns <= 8 * ROW_STRIP) {
      sum = multiply_strips<8>(data, inputs, lane);
    } else {
      sum = multiply_strips<ROW_STRIPS>(data, inputs, lane);
    }
  } else {
    wait_for_last();
    for (uint column = lane; column < w.columns; column += 32) {
      float x = inputs.x[column];
      if (inputs.is_normed) {
        inputs.squares = fma(x, x, inputs.squares);
        x *= 1.0f + inputs.norm[column];
      }
      sum = fma(load_plain(w, at + column), x, sum);
    }
  }
  return float2(simd_sum(sum), inputs.squares);
}
