// A tile of a matrix product in float32: TILE tokens by TILE rows, STEP columns at a time, by four simdgroups of which
// each owns a quarter in four matrices of 8 x 8. Put into kernel files by text, after matrix.h.

constant constexpr uint TILE = 32;
constant constexpr uint STEP = 32;
constant constexpr uint STRIDE = 36;  // of a row of a tile: a few more than it holds, so that rows lie in other banks
constant constexpr uint TILE_FLOATS = 1152;
constant constexpr uint TILE_THREADS = 128;

inline void clear_tile(thread simdgroup_float8x8* sums) {
  for (uint i = 0; i < 4; i++) sums[i] = make_filled_simdgroup_matrix<float, 8>(0.0f);
}

// Eight neighbouring packed weights, which fill BITS bytes.
template <int BITS>
inline void widen_eight(device const uchar* bytes, float scale, float bias, thread float* out) {
  uint low, high = 0;
  if (BITS == 2) low = *(device const ushort*)bytes;
  if (BITS == 3) low = bytes[0] | uint(bytes[1]) << 8 | uint(bytes[2]) << 16;
  if (BITS == 4) low = *(device const uint*)bytes;
  if (BITS == 8) {
    low = ((device const uint*)bytes)[0];
    high = ((device const uint*)bytes)[1];
  }
  for (int j = 0; j < 8; j++) {
    const uint word = BITS == 8 && j >= 4 ? high : low;
    const uint q = word >> (BITS == 8 ? j % 4 * 8 : j * BITS) & ((1u << BITS) - 1u);
    out[j] = fma(float(q), scale, bias);  // q * scale is exact
  }
}

inline void widen_packed(thread const Weights& w, ulong row, uint column, thread float* out) {
  device const uchar* bytes = w.data + (row * w.columns + column) / 8 * w.storage;
  const ulong group = row * (w.columns >> w.shift) + (column >> w.shift);
  const float scale = widen_bf16(w.scales[group]), bias = widen_bf16(w.biases[group]);
  switch (w.storage) {
    case 2: return widen_eight<2>(bytes, scale, bias, out);
    case 3: return widen_eight<3>(bytes, scale, bias, out);
    case 4: return widen_eight<4>(bytes, scale, bias, out);
    default: return widen_eight<8>(bytes, scale, bias, out);
  }
}

// rows[k * STRIDE + n] = weight (row + n, column + k), zero outside the matrix: eight columns of a row for each thread.
inline void load_rows(thread const Weights& w, uint row, uint column, threadgroup float* rows, uint index) {
  const uint n = index / 4, first = index % 4 * 8;
  const bool is_row = row + n < w.rows;
  float eight[8];
  if (is_row && w.storage < BF16) {
    widen_packed(w, row + n, column + first, eight);
  } else {
    for (uint j = 0; j < 8; j++) {
      const uint k = column + first + j;
      eight[j] = is_row && k < w.columns ? load_plain(w, ulong(row + n) * w.columns + k) : 0.0f;
    }
  }
  for (uint j = 0; j < 8; j++) rows[(first + j) * STRIDE + n] = eight[j];
}

// sums += inputs [TILE, STEP] times rows [STEP, TILE]: simdgroup (a, b) has 16 tokens from 16 a and 16 rows from 16 b.
inline void add_tile(
    threadgroup const float* inputs, threadgroup const float* rows, thread simdgroup_float8x8* sums, uint simdgroup) {
  threadgroup const float* left = inputs + simdgroup / 2 * 16 * STRIDE;
  threadgroup const float* right = rows + simdgroup % 2 * 16;
  for (uint k = 0; k < STEP; k += 8) {
    simdgroup_float8x8 a[2];
    simdgroup_float8x8 b[2];
    for (uint i = 0; i < 2; i++) {
      simdgroup_load(a[i], left + i * 8 * STRIDE + k, STRIDE);
      simdgroup_load(b[i], right + k * STRIDE + i * 8, STRIDE);
    }
    for (uint i = 0; i < 4; i++) simdgroup_multiply_accumulate(sums[i], a[i / 2], b[i % 2], sums[i]);
  }
}

// products [TILE, TILE], by token and row.
inline void store_tile(thread simdgroup_float8x8* sums, threadgroup float* products, uint simdgroup) {
  threadgroup float* mine = products + simdgroup / 2 * 16 * TILE + simdgroup % 2 * 16;
  for (uint i = 0; i < 4; i++) simdgroup_store(sums[i], mine + i / 2 * 8 * TILE + i % 2 * 8, TILE);
}
