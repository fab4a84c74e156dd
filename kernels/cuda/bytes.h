// Products of rows with a vector on NVIDIA's matrix units for bytes. Put into kernel files by text, after plain_rows.h
// and byte_numbers.h.
//
// matrix.h spends three instructions on a weight: a shift, a mask, a product. Here one mask serves four weights, which
// stay integers, and one product 512 of them: [16 rows, 32 columns] times [32, 8], unsigned by signed bytes. For that
// the vector becomes integers as well. Each 64 of its columns are scaled by a power of two, so that the largest has 22
// bits, and cut into three signed bytes, digits to the base 256, which are columns of the right factor:
//
//   sum q x = 2^-e sum over d of 256^(2 - d) (sum q digit[d])
//
// The sums in brackets are exact. What is lost of an input is 2^-22 of the largest among its 64: about what float32
// loses when it adds up as many.
//
// Lane 4 g + t has rows g and g + 8 of a tile, and of each SPAN of 128 columns the unit t (matrix.h): 32 columns that
// lie together in memory. Of the right factor's columns four belong to the span's first two units and four to its last
// two, zero for the lanes of the others: so both halves, which may have different scales, come out apart. Groups of 32
// take two passes, each with one unit of a half. In what order a lane takes the columns of its unit is free, if weights
// and digits have the same: the one that costs no shifts between bytes (column_of).
//
// A simdgroup has a tile for itself, or shares its columns with others; all of a threadgroup have one vector, whose
// digits they make together, in threadgroup memory. It requests weights first, AHEAD spans, then waits for the kernel
// before (wait_for_last) and helps with the digits; when a span has been used, one further on is
// requested into its registers. Scales and biases come by strips of 512 columns.

constant constexpr uint TILE_ROWS = 16;
constant constexpr uint SPAN_UNITS = 4;
constant constexpr uint STRIP_SPANS = 4;
constant constexpr uint STRIP_UNITS = 16;
constant constexpr uint STRIP = 512;
constant constexpr uint DIGIT_WORDS = 28;   // of a unit: 32 bytes a digit, and 16 so that units lie in other banks
constant constexpr uint STRIP_QUADS = 118;  // of four words: the digits, factors and totals of a strip
constant constexpr uint ZERO_QUADS = 2;     // after the strips
constant constexpr uint LINE = 16;          // scales of a row for a strip, at most
constant constexpr uint LINE_QUADS = 64;    // the scales and biases of a tile's strip
constant constexpr uint MAX_STRIPS = 8;     // of a row: 4096 columns

struct Scratch {  // threadgroup memory
  threadgroup uint* digits;
  threadgroup float* factors;  // of 64 columns each: what one of the first digit is worth
  threadgroup float* totals;   // of each unit: the sum of its inputs
  threadgroup uint* zeros;     // the digits of lanes that have none
};

inline Scratch scratch_at(threadgroup uint4* memory) {
  Scratch scratch;
  scratch.digits = (threadgroup uint*)memory;
  scratch.factors = (threadgroup float*)(memory + MAX_STRIPS * STRIP_UNITS * DIGIT_WORDS / 4);
  scratch.totals = scratch.factors + MAX_STRIPS * STRIP_UNITS / 2;
  scratch.zeros = (threadgroup uint*)(memory + MAX_STRIPS * STRIP_QUADS);
  return scratch;
}

// Sixteen inputs of half a unit, zeros beyond the last column.
inline void load_half(thread RowInputs& inputs, uint unit, uint half_unit, thread float* out) {
  const uint column = unit * UNIT + half_unit * HALF_UNIT, columns = inputs.columns;
  float4 fours[4], norms[4];
  if (inputs.is_aligned) {  // as nearly always: all of them requested together
#pragma unroll
    for (uint i = 0; i < 4; i++) fours[i] = load_quad(inputs.x, column + 4 * i, columns);
#pragma unroll
    for (uint i = 0; i < 4; i++) norms[i] = load_quad(inputs.norm, column + 4 * i, inputs.is_normed ? columns : 0);
  } else {
#pragma unroll
    for (uint i = 0; i < 4; i++) fours[i] = load_four(inputs.x, column + 4 * i, columns, false);
#pragma unroll
    for (uint i = 0; i < 4; i++) norms[i] = load_four(inputs.norm, column + 4 * i, inputs.is_normed ? columns : 0, false);
  }
#pragma unroll
  for (uint i = 0; i < 4; i++) {
    if (inputs.is_normed) {
      inputs.squares = add_squares(fours[i], inputs.squares);
      fours[i] = apply_norm(fours[i], norms[i], 1.0f);
    }
    out[4 * i] = fours[i].x;
    out[4 * i + 1] = fours[i].y;
    out[4 * i + 2] = fours[i].z;
    out[4 * i + 3] = fours[i].w;
  }
}

// Which of the 16 columns of half a unit is byte k of word w of a lane's digits.
template <int BITS>
inline constexpr int column_of(int w, int k) {
  return BITS == 2 ? 4 * k + w : BITS == 4 ? w / 2 * 8 + 2 * k + w % 2 : 4 * w + k;
}

// Four neighbouring weights of three bits as bytes.
inline uint spread_threes(uint bits) {
  return (bits & 7u) | (bits << 5 & 0x700u) | (bits << 10 & 0x70000u) | (bits << 15 & 0x7000000u);
}

// The eight weights of a unit that product j takes, as bytes in the order of column_of.
template <int BITS>
inline void unpack_eight(thread const uint* words, int j, thread uint& first, thread uint& second) {
  if (BITS == 8) {
    first = words[2 * j];
    second = words[2 * j + 1];
  } else if (BITS == 4) {
    first = words[j] & 0x0f0f0f0fu;
    second = words[j] >> 4 & 0x0f0f0f0fu;
  } else if (BITS == 2) {
    first = words[j / 2] >> 4 * (j % 2) & 0x03030303u;
    second = words[j / 2] >> (4 * (j % 2) + 2) & 0x03030303u;
  } else {
    uint three = words[0];  // bytes
    if (j == 1) three = words[0] >> 24 | words[1] << 8;
    if (j == 2) three = words[1] >> 16 | words[2] << 16;
    if (j == 3) three = words[2] >> 8;
    first = spread_threes(three);
    second = spread_threes(three >> 12);
  }
}

// Sixteen inputs, half a unit of the scratch, to digits. Four lanes in turn have the same 64 columns.
template <int BITS>
inline void put_digits(thread const float* x, thread const Scratch& scratch, uint half_index) {
  float largest = 0.0f, total = 0.0f;
#pragma unroll
  for (int i = 0; i < 16; i++) {
    largest = max_magnitude(largest, x[i]);
    total += x[i];
  }
  total += simd_shuffle_xor(total, 1);
  largest = max(largest, simd_shuffle_xor(largest, 1));
  largest = max(largest, simd_shuffle_xor(largest, 2));
  const Scaling scaling = scaling_of(largest);
  threadgroup uint* to = scratch.digits + half_index / 2 * DIGIT_WORDS + half_index % 2 * 4;
#pragma unroll
  for (int first = 0; first < 4; first += 2) {
    uint bytes[2][DIGITS];
#pragma unroll
    for (int w = 0; w < 2; w++) {
      uint numbers[4];
#pragma unroll
      for (int k = 0; k < 4; k++) numbers[k] = number_of(x[column_of<BITS>(first + w, k)], scaling.factor);
      pack_digits(numbers, bytes[w]);
    }
#pragma unroll
    for (uint d = 0; d < DIGITS; d++) *(threadgroup uint2*)(to + 8 * d + first) = uint2(bytes[0][d], bytes[1][d]);
  }
  if (half_index % 4 == 0) scratch.factors[half_index / 4] = scaling.worth;
  if (half_index % 2 == 0) scratch.totals[half_index / 2] = total;
}

struct Tile {  // the rows of a matrix that a simdgroup multiplies, as a lane sees them
  device const uchar* rows[2];   // g and g + 8
  device const ushort* line;     // of row lane % 16: the scales, in the upper lanes the biases
  uint units;
  uint groups;                   // of a row
  uint shift;                    // log2 of the group size
};

template <int BITS>
inline Tile tile_of(thread const Weights& w, uint row, uint lane) {
  Tile tile;
  const uint row_bytes = w.columns / 8 * BITS, last = w.rows - 1;
  tile.units = w.columns / UNIT;
  tile.groups = w.columns >> w.shift;
  tile.shift = w.shift;
  tile.rows[0] = w.data + min(row + lane / 4, last) * row_bytes;
  tile.rows[1] = w.data + min(row + lane / 4 + 8, last) * row_bytes;
  tile.line = (lane < TILE_ROWS ? w.scales : w.biases) + min(row + lane % TILE_ROWS, last) * tile.groups;
  return tile;
}

// The weights of a lane in a span, of both its rows. Beyond the last column: any, since their digits are zero.
template <int BITS>
inline void load_span(thread const Tile& tile, uint span, uint lane, thread uint* words) {
  const uint offset = min(span * SPAN_UNITS + lane % 4, tile.units - 1) * BITS * 4;
  if (BITS == 8) {  // slower past the L1 here, though not in vector.h
    load_packed<BITS>(tile.rows[0] + offset, words);
    load_packed<BITS>(tile.rows[1] + offset, words + BITS);
  } else {
    load_packed_once<BITS>(tile.rows[0] + offset, words);
    load_packed_once<BITS>(tile.rows[1] + offset, words + BITS);
  }
}

// Begin to copy the scales and biases of a strip to [2, TILE_ROWS, LINE].
inline void copy_lines(thread const Tile& tile, uint strip, uint lane, threadgroup ushort* lines) {
  const uint groups = STRIP >> tile.shift, first = strip * groups, count = min(groups, tile.groups - first);
  threadgroup ushort* to = lines + lane * LINE;
  device const ushort* from = tile.line + first;
  if (tile.groups % 4 == 0) {
#pragma unroll
    for (uint i = 0; i < LINE; i += 4) {
      if (i < count) copy_eight(to + i, from + i);
    }
  } else {
#pragma unroll 1
    for (uint i = 0; i < count; i++) to[i] = from[i];
  }
#pragma unroll 1
  for (uint i = count; i < groups; i++) to[i] = 0;
}

// Where a lane finds what a strip is multiplied by.
struct Cursor {
  threadgroup const uint* digits;   // of its unit in the first span, or zeros
  uint digit_step;                  // to the next span's
  threadgroup const float* factors;
  threadgroup const float* totals;  // of the units of its half
  threadgroup const ushort* line;   // of its group in row g: the scale; row g + 8 and the biases at fixed distances
  uint line_step;
};

inline Cursor cursor_at(
    thread const Scratch& scratch, threadgroup const ushort* lines, uint span, uint shift, uint lane) {
  const uint g = lane / 4, t = lane % 4;
  const bool has_digits = t / 2 == g / 4 && g % 4 < DIGITS;
  Cursor at;
  at.digits = has_digits ? scratch.digits + (span * SPAN_UNITS + t) * DIGIT_WORDS + g % 4 * 8 : scratch.zeros;
  at.digit_step = has_digits ? SPAN_UNITS * DIGIT_WORDS : 0;
  at.factors = scratch.factors + span * 2 + t / 2;
  at.totals = scratch.totals + span * SPAN_UNITS + t / 2 * 2;
  at.line = lines + g * LINE + (t / 2 * 64 >> shift);
  at.line_step = 128 >> shift;
  return at;
}

// sums[i] += this lane's part of rows g + 8 i of a tile times the span at the cursor, which moves on. IS_SMALL: groups
// of 32.
template <int BITS, bool IS_SMALL>
inline void add_span(thread const uint* words, thread Cursor& at, uint lane, thread float* sums) {
  const uint4 low = *(threadgroup const uint4*)at.digits, high = *(threadgroup const uint4*)(at.digits + 4);
  const uint digits[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
  const float2 totals = *(threadgroup const float2*)at.totals;
  const bool is_odd = lane % 2 != 0;
  // The first two of a half's digits are in even lanes, the third in odd ones.
  const float worth = at.factors[0] * (is_odd ? 1.0f / 16777216 : 1.0f / 256);
#pragma unroll
  for (uint pass = 0; pass < (IS_SMALL ? 2u : 1u); pass++) {
    float total = !IS_SMALL ? totals.x + totals.y : pass ? totals.y : totals.x;
    if (is_odd) total = 0.0f;  // once a row
    const uint mask = is_odd == (pass != 0) ? 0xffffffffu : 0u;
    int products[4] = {0, 0, 0, 0};
#pragma unroll
    for (int j = 0; j < 4; j++) {
      uint a[4];
      unpack_eight<BITS>(words, j, a[0], a[2]);
      unpack_eight<BITS>(words + BITS, j, a[1], a[3]);
      uint b[2] = {digits[2 * j], digits[2 * j + 1]};
      if (IS_SMALL) b[0] &= mask, b[1] &= mask;
      simdgroup_multiply_bytes(products, a, b);
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
      threadgroup const ushort* line = at.line + pass + 8 * i * LINE;
      const float scale = widen_bf16(line[0]), bias = widen_bf16(line[TILE_ROWS * LINE]);
      const float product = float(products[2 * i] * 256 + products[2 * i + 1]);
      sums[i] = fma(product, scale * worth, fma(bias, total, sums[i]));
    }
  }
  at.digits += at.digit_step;
  at.factors += 2;
  at.totals += SPAN_UNITS;
  at.line += at.line_step;
}

// The digits of all inputs, by all lanes of the threadgroup.
template <int BITS>
inline void put_strips(thread RowInputs& inputs, uint strips, thread const Scratch& scratch, uint index, uint threads) {
#pragma unroll 1
  for (uint i = index; i < strips * STRIP_UNITS * 2; i += threads) {
    float x[16];
    load_half(inputs, i / 2, i % 2, x);
    put_digits<BITS>(x, scratch, i);
  }
  if (index < ZERO_QUADS * 4) scratch.zeros[index] = 0;
}

struct Share {  // of a simdgroup in the work
  uint first_strip;  // of its tile
  uint end_strip;
  uint index;        // in the threadgroup, of `threads`
  uint threads;
  uint lane;
};

// A share of `strips` among `parts`.
inline Share share_of(uint strips, uint part, uint parts, uint index, uint threads) {
  const uint each = (strips + parts - 1) / parts;
  return {min(part * each, strips), min(part * each + each, strips), index, threads, index % 32};
}

// results[r] = this simdgroup's part of row + r of a packed matrix times the inputs, r < TILE_ROWS. Returns the sum of
// the squares of what this lane has loaded. A function of its own, so that each has the registers that it needs:
// together in a kernel they would spill.
// digits   the threadgroup's, MAX_STRIPS * STRIP_QUADS + ZERO_QUADS
// lines    the simdgroup's own, two times LINE_QUADS
template <int BITS, bool IS_SMALL>
MSL_NOINLINE float multiply_packed(Weights w, uint row, RowInputs inputs, Share share, threadgroup uint4* digits,
    threadgroup uint4* lines, threadgroup float* results) {
  constexpr int AHEAD = BITS == 8 ? 2 : 4;  // spans under way: more were slower
  const Scratch scratch = scratch_at(digits);
  const Tile tile = tile_of<BITS>(w, row, share.lane);
  const uint first = share.first_strip * STRIP_SPANS, end = share.end_strip * STRIP_SPANS;
  uint words[AHEAD * 2 * BITS];
  float sums[2] = {0.0f, 0.0f};
#pragma unroll
  for (int s = 0; s < AHEAD; s++) {
    if (first + s < end) load_span<BITS>(tile, first + s, share.lane, words + s * 2 * BITS);
  }
  if (first < end) copy_lines(tile, share.first_strip, share.lane, (threadgroup ushort*)lines);
  wait_for_last();
  put_strips<BITS>(inputs, (tile.units + STRIP_UNITS - 1) / STRIP_UNITS, scratch, share.index, share.threads);
  wait_for_copies();
  threadgroup_barrier(mem_flags::mem_threadgroup);
#pragma unroll 1
  for (uint pair = share.first_strip; pair < share.end_strip; pair += 2) {
#pragma unroll
    for (uint i = 0; i < 2; i++) {
      const uint strip = pair + i;
      if (strip >= share.end_strip) break;
      threadgroup ushort* own = (threadgroup ushort*)(lines + i * LINE_QUADS);
      threadgroup ushort* other = (threadgroup ushort*)(lines + (1 - i) * LINE_QUADS);
      if (strip + 1 < share.end_strip) copy_lines(tile, strip + 1, share.lane, other);
      Cursor at = cursor_at(scratch, own, strip * STRIP_SPANS, tile.shift, share.lane);
#pragma unroll
      for (int s = 0; s < int(STRIP_SPANS); s++) {
        thread uint* slot = words + (i * STRIP_SPANS + s) % AHEAD * 2 * BITS;
        add_span<BITS, IS_SMALL>(slot, at, share.lane, sums);
        const uint next = strip * STRIP_SPANS + s + AHEAD;
        if (next < end) load_span<BITS>(tile, next, share.lane, slot);
      }
      wait_for_copies();
      simdgroup_barrier(mem_flags::mem_threadgroup);
    }
  }
  team_sums<2>(sums, 2);
  if (share.lane % 4 == 0) {
    results[share.lane / 4] = sums[0];
    results[share.lane / 4 + 8] = sums[1];
  }
  return inputs.squares;
}

template <int BITS>
inline float multiply_bits(thread const Weights& w, uint row, thread const RowInputs& inputs, thread const Share& share,
    threadgroup uint4* digits, threadgroup uint4* lines, threadgroup float* results) {
  if (w.shift == 5) return multiply_packed<BITS, true>(w, row, inputs, share, digits, lines, results);
  return multiply_packed<BITS, false>(w, row, inputs, share, digits, lines, results);
}

// results[r] as multiply_packed has it, whatever the bits. All simdgroups of a threadgroup come here, with one matrix.
inline float multiply_tile(thread const Weights& w, uint row, thread const RowInputs& inputs, thread const Share& share,
    threadgroup uint4* digits, threadgroup uint4* lines, threadgroup float* results) {
  switch (w.storage) {
    case 2: return multiply_bits<2>(w, row, inputs, share, digits, lines, results);
    case 3: return multiply_bits<3>(w, row, inputs, share, digits, lines, results);
    case 4: return multiply_bits<4>(w, row, inputs, share, digits, lines, results);
    default: return multiply_bits<8>(w, row, inputs, share, digits, lines, results);
  }
}
