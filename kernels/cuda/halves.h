// Products of many rows of x with quantized weights on NVIDIA's matrix units for halves. Put into kernel files by text,
// after half_numbers.h.
//
// A row of x is split once, into halves and the power of two that scales it (split_rows.cu). So two products of halves
// give one in nearly float32:
//
//   w x = sum over blocks of 32 columns of scale * (sum q low(x) + sum q high(x)) + sum over groups of bias * (sum x)
//
// The units cut off what does not fit where an addition outside rounds: they add up one block at a time, the lower
// halves first, and float32 outside does the rest. The sum over groups is a product of matrices too, [rows, groups] by
// [groups, tokens], of float32 as two of the units' own floats of eleven bits.
//
// A threadgroup multiplies TILE_TOKENS rows of x (tokens), or fewer, with TILE_ROWS rows of weights, of which each
// simdgroup has ROW_TILES tiles of 16: the left factor, so that tokens come in eights. So every weight is unpacked once
// for all tokens, in the registers where the units want it: lane 4 g + t has the columns 8 t to 8 t + 7 of a block for
// rows g and g + 8. Tokens lie in threadgroup memory in the order in which lanes take them. What the next block needs is
// copied while one is computed.

constant constexpr uint TOKEN_EIGHTS = 8;
constant constexpr uint TILE_TOKENS = 64;
constant constexpr uint ROW_TILES = 4;
constant constexpr uint SIMD_ROWS = 64;       // of a simdgroup
constant constexpr uint TILE_ROWS = 256;
constant constexpr uint HALVES_THREADS = 128;
constant constexpr uint ROW_QUADS = 8;        // of four words: a block of a row of x, high halves then low ones
constant constexpr uint EIGHT_QUADS = 64;     // a block of eight tokens
constant constexpr uint INPUT_QUADS = 512;    // a block of all tokens
constant constexpr uint WEIGHT_QUADS = 512;   // a span of all rows, of the most bits
constant constexpr uint LINE = 4;             // scales of a row in threadgroup memory
constant constexpr uint LINE_QUADS = 128;     // of all rows
constant constexpr uint HALVES_QUADS = 2352;  // two of each, and the tokens' tables
constant constexpr uint SUMMED = 1024;        // columns, of which a row's sums are together
constant constexpr uint SUMS = 56;            // 32 over blocks of 32 columns, 16 of 64, 8 of 128

struct Parts {  // rows of x as halves, as split_rows.cu has them
  device const uint4* halves;   // [rows, blocks, ROW_QUADS]
  device const float* sums;
  device const float* factors;
  uint blocks;
};

struct HalvesMemory {  // of a threadgroup
  threadgroup uint4* inputs;
  threadgroup uint4* weights;
  threadgroup ushort* lines;
  threadgroup uint* tokens;   // which rows of the parts
  threadgroup uint* starts;   // where their halves begin
  threadgroup float* factors;
};

inline HalvesMemory halves_memory(threadgroup uint4* memory) {
  HalvesMemory at;
  at.inputs = memory;
  at.weights = memory + 2 * INPUT_QUADS;
  at.lines = (threadgroup ushort*)(at.weights + 2 * WEIGHT_QUADS);
  at.tokens = (threadgroup uint*)(at.weights + 2 * WEIGHT_QUADS + 2 * LINE_QUADS);
  at.starts = at.tokens + TILE_TOKENS;
  at.factors = (threadgroup float*)(at.starts + TILE_TOKENS);
  return at;
}

// Note which row of the parts is token `place`.
inline void put_token(thread const Parts& parts, thread const HalvesMemory& at, uint place, uint row) {
  at.tokens[place] = row;
  at.starts[place] = row * parts.blocks * ROW_QUADS;
  at.factors[place] = parts.factors[row];
}

// The rows of one matrix, or of two side by side: half of a simdgroup's tiles each.
struct RowTile {
  Weights w;
  device const uchar* second_data;  // of the second, which is like the first
  device const ushort* second_scales;
  device const ushort* second_biases;
  uint first;
  uint half_rows;  // of a simdgroup: of the first matrix, then of the second; all if there is one
};

struct RowPlace {
  uint which;
  uint row;  // as it is, which may be beyond the last
};

inline RowTile tile_of_one(thread const Weights& w, uint first) {
  return {w, w.data, w.scales, w.biases, first, SIMD_ROWS};
}

inline RowTile tile_of_two(thread const Weights& w, thread const Weights& second, uint first) {
  return {w, second.data, second.scales, second.biases, first, SIMD_ROWS / 2};
}

inline RowPlace place_of(thread const RowTile& tile, uint simdgroup, uint r) {
  const uint which = r / tile.half_rows;
  return {which, tile.first + simdgroup * tile.half_rows + r % tile.half_rows};
}

// Blocks of weights that are copied together: 32 bytes of a row, or what comes next to it.
template <int BITS>
inline constexpr uint span_blocks() {
  return BITS == 8 ? 1 : 2;
}

// Begin to copy a block of tokens. Lanes that write together, or read, do so to different banks.
inline void copy_inputs(thread const Parts& parts, thread const HalvesMemory& at, uint block, uint count, uint index) {
  threadgroup uint4* to = at.inputs + block % 2 * INPUT_QUADS;
#pragma unroll
  for (uint i = 0; i < TILE_TOKENS * ROW_QUADS / HALVES_THREADS; i++) {
    const uint token = index / ROW_QUADS + i * (HALVES_THREADS / ROW_QUADS), quad = index % ROW_QUADS;
    const uint place = quad / 4 * 32 + ((token % 8 * 4 + quad % 4) ^ (quad / 4 * 4));
    if (token < count) {
      device const uint4* from = parts.halves + (at.starts[token] + block * ROW_QUADS + quad);
      copy_sixteen(to + token / 8 * EIGHT_QUADS + place, from);
    }
  }
}

// Begin to copy a span of all rows from a block on.
template <int BITS>
inline void copy_weights(thread const RowTile& tile, thread const HalvesMemory& at, uint block, uint index) {
  constexpr uint SIZE = BITS == 2 ? 8 : BITS == 3 ? 4 : 16;  // of a copy: to what a row's blocks are aligned
  constexpr uint OF_BLOCK = 4 * BITS / SIZE, OF_SPAN = OF_BLOCK * span_blocks<BITS>();
  const uint blocks = tile.w.columns / UNIT;
  threadgroup uchar* to = (threadgroup uchar*)(at.weights + block / span_blocks<BITS>() % 2 * WEIGHT_QUADS);
#pragma unroll
  for (uint simdgroup = 0; simdgroup < SIMDGROUPS; simdgroup++) {
#pragma unroll
    for (uint i = 0; i < SIMD_ROWS * OF_SPAN / HALVES_THREADS; i++) {
      const uint n = index + i * HALVES_THREADS, r = n / OF_SPAN, part = n % OF_SPAN;
      const uint which_block = part / OF_BLOCK, byte = part % OF_BLOCK * SIZE;
      if (block + which_block >= blocks) continue;
      const RowPlace place = place_of(tile, simdgroup, r);
      device const uchar* data = place.which ? tile.second_data : tile.w.data;
      device const uchar* from = data + min(place.row, tile.w.rows - 1) * (blocks * BITS * 4);
      threadgroup uchar* into = to + (which_block * TILE_ROWS + simdgroup * SIMD_ROWS + r) * (BITS * 4) + byte;
      from += (block + which_block) * (BITS * 4) + byte;
      if (SIZE == 4) copy_four(into, from);
      if (SIZE == 8) copy_eight(into, from);
      if (SIZE == 16) copy_sixteen(into, from);
    }
  }
}

// Begin to copy the scales of LINE groups of all rows.
inline void copy_lines(thread const RowTile& tile, thread const HalvesMemory& at, uint line, uint index) {
  const uint groups = tile.w.columns >> tile.w.shift, first = line * LINE;
#pragma unroll
  for (uint i = 0; i < TILE_ROWS / HALVES_THREADS; i++) {
    const uint r = index + i * HALVES_THREADS;
    const RowPlace place = place_of(tile, r / SIMD_ROWS, r % SIMD_ROWS);
    device const ushort* scales = place.which ? tile.second_scales : tile.w.scales;
    scales += min(place.row, tile.w.rows - 1) * groups + first;
    threadgroup ushort* to = at.lines + (line % 2 * TILE_ROWS + r) * LINE;
    if (groups % LINE == 0) {
      copy_eight(to, scales);
    } else {
#pragma unroll 1
      for (uint k = 0; k < LINE && first + k < groups; k++) to[k] = scales[k];
    }
  }
}

// The columns of a lane in a block of a row.
template <int BITS>
inline void load_eight(threadgroup const uchar* row, uint t, thread uint* pairs) {
  if (BITS == 8) {
    const uint2 two = *(threadgroup const uint2*)(row + t * 8);
    unpack_eight<BITS>(two.x, two.y, pairs);
  } else if (BITS == 4) {
    unpack_eight<BITS>(*(threadgroup const uint*)(row + t * 4), 0, pairs);
  } else if (BITS == 3) {
    threadgroup const uint* words = (threadgroup const uint*)row;
    const ulong both = ulong(words[min(t, 2u)]) << 32 | words[t == 0 ? 0 : t - 1];
    unpack_eight<BITS>(uint(both >> (t == 0 ? 0 : 32 - 8 * t)), 0, pairs);
  } else {
    unpack_eight<BITS>(*(threadgroup const ushort*)(row + t * 2), 0, pairs);
  }
}

// Two neighbouring bfloat16 numbers of `groups` a row, zero beyond the last.
inline uint load_pair(device const ushort* row, uint group, uint groups) {
  if (groups % 2 == 0) return group < groups ? *(device const uint*)(row + group) : 0;
  const uint first = group < groups ? row[group] : 0, second = group + 1 < groups ? row[group + 1] : 0;
  return second << 16 | first;
}

// sums += bias * (sum x), over all groups, eight at a time: lane 4 g + t has groups 2 t and 2 t + 1.
inline void add_biases(thread const RowTile& tile, thread const Parts& parts, thread const HalvesMemory& at, uint count,
    uint simdgroup, uint lane, thread float* sums) {
  const uint g = lane / 4, t = lane % 4, shift = tile.w.shift, groups = tile.w.columns >> shift;
  const uint each = (parts.blocks * UNIT + SUMMED - 1) / SUMMED;
  device const float* totals = parts.sums + (shift == 5 ? 0 : shift == 6 ? 32 * each : 48 * each) + 2 * t;
#pragma unroll 1
  for (uint first = 0; first < groups; first += 8) {
    uint high[ROW_TILES * 4], low[ROW_TILES * 4];
#pragma unroll
    for (uint i = 0; i < ROW_TILES * 2; i++) {
      const RowPlace place = place_of(tile, simdgroup, i * 8 + g);
      const uint from = min(place.row, tile.w.rows - 1) * groups;
      const uint biases = load_pair((place.which ? tile.second_biases : tile.w.biases) + from, first + 2 * t, groups);
      const uint to = i / 2 * 4 + i % 2;
      split_eleven(widen_bf16(biases), high[to], low[to]);
      split_eleven(as_type<float>(biases & 0xffff0000u), high[to + 2], low[to + 2]);
    }
#pragma unroll
    for (uint j = 0; j < TOKEN_EIGHTS; j++) {
      if (j * 8 >= count) break;
      const float2 two = *(device const float2*)(totals + ulong(at.tokens[j * 8 + g]) * (SUMS * each) + first);
      uint x_high[2], x_low[2];
      split_eleven(two.x, x_high[0], x_low[0]);
      split_eleven(two.y, x_high[1], x_low[1]);
#pragma unroll
      for (uint m = 0; m < ROW_TILES; m++) {
        float products[4] = {0.0f, 0.0f, 0.0f, 0.0f};
        simdgroup_multiply_tf32(products, low + m * 4, x_high);
        simdgroup_multiply_tf32(products, high + m * 4, x_low);
        simdgroup_multiply_tf32(products, high + m * 4, x_high);
#pragma unroll
        for (uint i = 0; i < 4; i++) sums[(j * ROW_TILES + m) * 4 + i] += products[i];
      }
    }
  }
}

// sums += a block of this simdgroup's rows times all tokens.
template <int BITS>
inline void add_block(thread const HalvesMemory& at, uint block, uint line, uint count, uint simdgroup, uint lane,
    thread float* sums) {
  const uint g = lane / 4, t = lane % 4;
  threadgroup const uint4* inputs = at.inputs + block % 2 * INPUT_QUADS;
  threadgroup const uchar* weights =
      (threadgroup const uchar*)(at.weights + block / span_blocks<BITS>() % 2 * WEIGHT_QUADS);
  weights += (block % span_blocks<BITS>() * TILE_ROWS + simdgroup * SIMD_ROWS + g) * (BITS * 4);
  threadgroup const ushort* lines = at.lines + (line / LINE % 2 * TILE_ROWS + simdgroup * SIMD_ROWS + g) * LINE;
  uint a[ROW_TILES][8];
  float scales[ROW_TILES][2];
#pragma unroll
  for (uint m = 0; m < ROW_TILES; m++) {
#pragma unroll
    for (uint i = 0; i < 2; i++) {
      uint pairs[4];
      load_eight<BITS>(weights + (m * 16 + i * 8) * (BITS * 4), t, pairs);
#pragma unroll
      for (uint k = 0; k < 4; k++) a[m][2 * k + i] = pairs[k];
      scales[m][i] = half_steps<BITS>() * widen_bf16(lines[(m * 16 + i * 8) * LINE + line % LINE]);
    }
  }
#pragma unroll
  for (uint j = 0; j < TOKEN_EIGHTS; j++) {
    if (j * 8 >= count) break;
    const uint4 high = inputs[j * EIGHT_QUADS + lane], low = inputs[j * EIGHT_QUADS + 32 + (lane ^ 4)];
    const uint b[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
    float products[ROW_TILES][4];
#pragma unroll
    for (uint k = 0; k < 4; k++) {
#pragma unroll
      for (uint m = 0; m < ROW_TILES; m++) {
        if (k == 0) products[m][0] = products[m][1] = products[m][2] = products[m][3] = 0.0f;
        simdgroup_multiply_halves(products[m], a[m] + k % 2 * 4, b + 2 * k);
      }
    }
#pragma unroll
    for (uint m = 0; m < ROW_TILES; m++) {
#pragma unroll
      for (uint i = 0; i < 4; i++) {
        thread float& sum = sums[(j * ROW_TILES + m) * 4 + i];
        sum = fma(products[m][i], scales[m][i / 2], sum);
      }
    }
  }
}

// sums [TOKEN_EIGHTS, ROW_TILES, 4] = this simdgroup's rows times `count` tokens of the parts, which put_token has
// noted, the last one again up to a multiple of eight. Row m * 16 + g + i / 2 * 8 of its own meets
// token j * 8 + 2 t + i % 2.
template <int BITS>
inline void multiply_tokens(thread const RowTile& tile, thread const Parts& parts, thread const HalvesMemory& at,
    uint count, uint index, uint simdgroup, uint lane, thread float* sums) {
  const uint blocks = tile.w.columns / UNIT, shift = tile.w.shift - 5;
  copy_inputs(parts, at, 0, count, index);
  copy_weights<BITS>(tile, at, 0, index);
  copy_lines(tile, at, 0, index);
#pragma unroll
  for (uint i = 0; i < TOKEN_EIGHTS * ROW_TILES * 4; i++) sums[i] = 0.0f;
  add_biases(tile, parts, at, count, simdgroup, lane, sums);
#pragma unroll 1
  for (uint block = 0; block < blocks; block++) {
    wait_for_copies();
    threadgroup_barrier(mem_flags::mem_threadgroup);
    const uint group = block >> shift, next = block + span_blocks<BITS>();
    if (block + 1 < blocks) copy_inputs(parts, at, block + 1, count, index);
    if (block % span_blocks<BITS>() == 0 && next < blocks) copy_weights<BITS>(tile, at, next, index);
    if (block == group << shift && group % LINE == 0 && (group + LINE) << shift < blocks) {
      copy_lines(tile, at, group / LINE + 1, index);
    }
    add_block<BITS>(at, block, group, count, simdgroup, lane, sums);
  }
}

// The same whatever the bits.
inline void multiply_tile(thread const RowTile& tile, thread const Parts& parts, thread const HalvesMemory& at,
    uint count, uint index, uint simdgroup, uint lane, thread float* sums) {
  switch (tile.w.storage) {
    case 2: return multiply_tokens<2>(tile, parts, at, count, index, simdgroup, lane, sums);
    case 3: return multiply_tokens<3>(tile, parts, at, count, index, simdgroup, lane, sums);
    case 4: return multiply_tokens<4>(tile, parts, at, count, index, simdgroup, lane, sums);
    default: return multiply_tokens<8>(tile, parts, at, count, index, simdgroup, lane, sums);
  }
}
