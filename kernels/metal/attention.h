// Several queries of a simdgroup along the keys and values that they share. Put into kernel files after sums.h.
//
// A lane holds two times four dimensions of each row. The QUERIES x STEP scores of a step are summed over the lanes
// together, one for each lane; the softmax is taken along the way (online).

constant constexpr uint QUERIES = 4;  // of a simdgroup
constant constexpr uint STEP = 8;     // positions at a time
constant constexpr uint EACH = 8;     // dimensions of a lane: Dh <= 256
constant constexpr uint MAX_WIDTH = 256;

// Dimensions 4 lane to 4 lane + 3 of a row, and those 128 further on; zero beyond its width. ALIGNED: rows start on 16
// bytes and have whole quads.
template <bool ALIGNED>
inline void load_dimensions(device const float* row, uint width, uint lane, thread float* out) {
  for (uint j = 0; j < EACH; j += 4) {
    const uint i = 32 * j + 4 * lane;
    if (ALIGNED) {
      const float4 quad = i < width ? *(device const float4*)(row + i) : float4(0.0f);
      out[j] = quad.x;
      out[j + 1] = quad.y;
      out[j + 2] = quad.z;
      out[j + 3] = quad.w;
    } else {
      for (uint c = 0; c < 4; c++) out[j + c] = i + c < width ? row[i + c] : 0.0f;
    }
  }
}

// Positions first, first + stride, ... up to the end, STEP of them each time, for `count` queries that are `q_stride`
// apart; query h sees those below the `limit` of lanes h * STEP ... These lanes get the query's `largest` score, each
// with the `total` weight of every STEP-th position; `sum` are the weighted values.
template <bool ALIGNED>
inline void walk_positions(device const float* q, uint q_stride, uint count, device const float* keys,
    device const float* values, uint width, uint first, uint end, uint stride, uint limit, uint lane,
    thread float* sum, thread float* largest, thread float* total) {
  const float scale = rsqrt(float(width));
  float query[QUERIES * EACH];
  for (uint h = 0; h < QUERIES; h++) {
    load_dimensions<ALIGNED>(q + ulong(min(h, count - 1)) * q_stride, width, lane, query + h * EACH);
    for (uint j = 0; j < EACH; j++) {
      query[h * EACH + j] *= scale;
      sum[h * EACH + j] = 0.0f;
    }
  }
  *largest = -INFINITY;
  *total = 0.0f;
  for (uint s = first; s < end; s += stride) {
    float scores[QUERIES * STEP];
    float row[EACH];
    for (uint p = 0; p < STEP; p++) {
      load_dimensions<ALIGNED>(keys + ulong(min(s + p, end - 1)) * width, width, lane, row);
      for (uint h = 0; h < QUERIES; h++) {
        float score = 0.0f;
        for (uint j = 0; j < EACH; j++) score = fma(query[h * EACH + j], row[j], score);
        scores[h * STEP + p] = score;
      }
    }
    const float dealt = deal_sums(scores, lane);
    const float score = s + lane % STEP < limit ? dealt : -INFINITY;
    float top = max(*largest, score);
    for (uint mask = 1; mask < STEP; mask *= 2) top = max(top, simd_shuffle_xor(top, mask));
    const float kept = exp(*largest - top), weight = exp(score - top);
    *total = fma(*total, kept, weight);
    *largest = top;
    for (uint h = 0; h < QUERIES; h++) {
      const float factor = simd_shuffle(kept, h * STEP);
      for (uint j = 0; j < EACH; j++) sum[h * EACH + j] *= factor;
    }
    for (uint p = 0; p < STEP; p++) {
      load_dimensions<ALIGNED>(values + ulong(min(s + p, end - 1)) * width, width, lane, row);
      for (uint h = 0; h < QUERIES; h++) {
        const float share = simd_shuffle(weight, h * STEP + p);
        for (uint j = 0; j < EACH; j++) sum[h * EACH + j] = fma(share, row[j], sum[h * EACH + j]);
      }
    }
  }
}
