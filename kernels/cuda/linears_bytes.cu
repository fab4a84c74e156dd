#include <metal_stdlib>
using namespace metal;
#include "matrix.h"
#include "normed.h"
#include "sums.h"
#include "packed.h"
#include "plain_rows.h"
#include "byte_numbers.h"
#include "bytes.h"

// metal/linears.metal on NVIDIA's matrix units for bytes: the same formula and arguments.
//
// Threads: grid (threadgroups of all matrices, T); a threadgroup multiplies `tiles` tiles of rows, each by `parts`
// simdgroups, which share out its columns (bytes.h) and meet in threadgroup memory; of a plain matrix a row by each
// simdgroup (plain_rows.h). Bound by the bytes of the weights.
// Reference: rms_norm, linears. Test: test_metal_matrices.py.

constant constexpr uint MAX_SIMDGROUPS = 8;
constant constexpr uint DIGIT_QUADS = 946;     // MAX_STRIPS * STRIP_QUADS + ZERO_QUADS
constant constexpr uint ALL_LINE_QUADS = 1024;  // MAX_SIMDGROUPS * 2 * LINE_QUADS

struct LinearsShape {
  uint count;
  uint tiles;
  uint parts;
  uint columns;
  uint x_stride;
  uint out_stride;
  uint is_normed;
  uint keeps_normed;
  uint accumulates;
  float eps;
};

[[kernel, max_total_threads_per_threadgroup(256)]] void linears(device const uchar* weights [[buffer(0)]],
    constant MatrixForm* matrices [[buffer(1)]], device const float* x [[buffer(2)]],
    device const float* norm [[buffer(3)]], device float* normed [[buffer(4)]], device float* out [[buffer(5)]],
    constant LinearsShape& shape [[buffer(6)]], uint3 group [[threadgroup_position_in_grid]],
    uint index [[thread_index_in_threadgroup]], uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint simdgroups [[simdgroups_per_threadgroup]], uint lane [[thread_index_in_simdgroup]]) {
  threadgroup uint4 digits[DIGIT_QUADS];
  threadgroup uint4 lines[ALL_LINE_QUADS];
  threadgroup float results[MAX_SIMDGROUPS][TILE_ROWS];
  threadgroup float partial[32];
  launch_next();
  uint which = 0;
  while (which + 1 < shape.count && matrices[which + 1].first_group <= group.x) which++;
  const Weights w = weights_at(weights, matrices[which]);
  const uint tiles = shape.tiles, parts = shape.parts, columns = shape.columns, tile = simdgroup / parts;
  const bool is_plain = w.storage >= BF16, is_aligned = (columns | shape.x_stride) % 4 == 0;
  const uint rows = is_plain ? simdgroups : tiles * TILE_ROWS;  // of the threadgroup
  const uint first_row = (group.x - matrices[which].first_group) * rows;
  const RowInputs inputs = {x + ulong(group.y) * shape.x_stride, norm, columns, is_aligned, shape.is_normed != 0, 0.0f};
  float own;
  if (is_plain) {
    const float2 result = multiply_plain_row(w, first_row + simdgroup, inputs, lane);
    own = simdgroup == 0 ? result.y : 0.0f;
    if (lane == 0) results[0][simdgroup] = result.x;
  } else {
    const Share share = share_of((columns + STRIP - 1) / STRIP, simdgroup % parts, parts, index, simdgroups * 32);
    const uint row = min(first_row + tile * TILE_ROWS, w.rows - 1);  // a tile beyond the last row is not stored
    own = multiply_tile(w, row, inputs, share, digits, lines + simdgroup * 2 * LINE_QUADS, results[simdgroup]);
  }
  const float squares = threadgroup_sum(own, partial, simdgroup, simdgroups, lane);
  const float factor = shape.is_normed ? rsqrt(squares / float(columns) + shape.eps) : 1.0f;
  if (index < rows && first_row + index < w.rows) {
    float sum = 0.0f;
    if (is_plain) {
      sum = results[0][index];
    } else {
      for (uint s = 0; s < parts; s++) sum += results[index / TILE_ROWS * parts + s][index % TILE_ROWS];
    }
    const ulong at = ulong(group.y) * shape.out_stride + matrices[which].first_out + first_row + index;
    out[at] = shape.accumulates ? fma(sum, factor, out[at]) : sum * factor;
  }
  if (shape.keeps_normed && group.x == 0) {
    device float* kept = normed + ulong(group.y) * count_units(columns) * UNIT;
    keep_normed(inputs.x, norm, columns, is_aligned, factor, index, simdgroups * 32, kept);
  }
}
