// Products of quantized rows with a vector on NVIDIA's matrix units for bytes. Put into kernel files by text, after
// matrix.h and byte_numbers.h.
//
// As in bytes.h weights stay integers, and 512 are multiplied at once: [16 rows, 32 columns] times [32, 8], unsigned
// by signed bytes. Each 64 columns of the vector are scaled together, or the 16 that one product takes of them; their
// sums are exact. Experts differ in bits, so digits have one order for all, that which costs two bits nothing; for
// others eight permutations turn those of a span.
//
// Four units that follow each other are a span. Lane 4 g + t has rows g and g + 8 of a tile, and the t-th unit of
// each span: weights that lie together in a row. Columns 0 to 3 of the right factor are the digits of the span's
// first two units, 4 to 7 those of its last two; it is zero where a lane's unit is none of the column's. Even lanes
// are left with the sums of the higher two digits, odd ones with that of the lowest. Groups of 32 take two passes,
// each with one of the two units that share columns.
//
// A simdgroup has a tile of 16 rows, or a share of its columns, for itself. It requests a few spans of weights
// (multiply_tile), and the scales of 16 in gate_up, 8 in down (half as many if groups are of 32); when a span has been
// used, one further on is requested into its registers. Four spans, for which the loop is unrolled, are a strip. A lane
// loads scales that others need: they go by way of the threadgroup's memory.

constant constexpr uint TILE_ROWS = 16;
constant constexpr uint SPAN_UNITS = 4;
constant constexpr uint STRIP_SPANS = 4;
constant constexpr uint STRIP_UNITS = 16;
constant constexpr uint DIGIT_WORDS = 8;        // of a unit
constant constexpr uint UNIT_QUADS = 6;         // of four words: a unit's digits
constant constexpr uint ZERO_PLACE = 1;         // of zeros behind vectors, in quads: in other banks than what is read
constant constexpr uint ZERO_QUADS = 3;         // ZERO_PLACE, and zeros as long as a digit
constant constexpr uint KNOWN_QUADS = 3;        // of 64 columns, as put_hidden leaves them: worths, sums of either unit
constant constexpr uint LINE_QUADS = 8;         // of two groups' scales and biases: a quad for rows g and g + 8
constant constexpr uint FIRST_HALF = 0x1044u;   // permute_bytes: the lower half of a word as the upper one of a float
constant constexpr uint SECOND_HALF = 0x3244u;  // the upper half

// Which rows of a matrix are a tile: neighbours, or those whose products are the columns that product j takes
// (unpack_eight) of two units of a vector: eight neighbours in each, or of two bits four pairs.
constant constexpr uint TOGETHER = 0;
constant constexpr uint EIGHTS = 1;
constant constexpr uint PAIRS = 2;

struct TileRows {
  uint first;
  uint order;
};

// The tile whose products are the columns that product j takes of the `pair`-th two units of a vector.
inline TileRows rows_of(uint pair, uint j, bool is_two_bits) {
  const uint first = pair * (2 * UNIT);
  if (is_two_bits) return {first + j / 2 * HALF_UNIT + j % 2 * 2, PAIRS};
  return {first + j * 8, EIGHTS};
}

inline uint row_at(TileRows rows, uint i) {
  if (rows.order == TOGETHER) return rows.first + i;
  return rows.first + i / 8 * UNIT + (rows.order == EIGHTS ? i % 8 : i / 2 % 4 * 4 + i % 2);
}

struct Tile {  // of a quantized matrix, as a lane sees it
  device const uchar* data[2];  // of its unit in the first span, in rows g and g + 8
  device const ushort* scales;
  device const ushort* biases;
  uint other;      // from row g's scales to row g + 8's
  uint end;        // of the spans in which the lane has a unit, counted from the row's first
  uint groups;
  uint shift;      // log2 of the units of a group
};

template <int BITS>
inline Tile tile_of(thread const Weights& w, TileRows rows, uint first, uint end, uint lane) {
  Tile tile;
  const uint last = w.rows - 1, at = min(row_at(rows, lane / 4), last);
  const uint other = min(row_at(rows, lane / 4 + 8), last);
  const uint units = w.columns / UNIT, unit = first * SPAN_UNITS + lane % 4;
  tile.groups = w.columns >> w.shift;
  tile.shift = w.shift - 5;
  tile.data[0] = w.data + (at * units + unit) * (BITS * 4);
  tile.data[1] = w.data + (other * units + unit) * (BITS * 4);
  tile.scales = w.scales + at * tile.groups;
  tile.biases = w.biases + at * tile.groups;
  tile.other = (other - at) * tile.groups;
  tile.end = min(end, (units + SPAN_UNITS - 1 - lane % 4) / SPAN_UNITS);
  return tile;
}

// What a lane has of a span in both its rows. Where it has nothing, words keep what they had: the vector is zero there.
template <int BITS>
inline void load_span(thread const Tile& tile, uint ahead, uint span, thread uint* words) {
  if (span < tile.end) {
    load_packed_once<BITS>(tile.data[0] + ahead * (BITS * 16), words);
    load_packed_once<BITS>(tile.data[1] + ahead * (BITS * 16), words + BITS);
  }
}

struct Lines {  // the scales of both rows, then their biases
  uint words[16];
};

// load_lines for groups of 128 columns, and for rows whose number of groups is not a multiple of eight.
MSL_NOINLINE Lines gather_lines(Tile tile, uint first) {
  Lines lines;
#pragma unroll
  for (uint i = 0; i < 4; i++) {
    device const ushort* line = (i < 2 ? tile.scales : tile.biases) + (i % 2 ? tile.other : 0);
#pragma unroll
    for (uint k = 0; k < 4; k++) {
      const uint group = first + (tile.shift == 2 ? k : 2 * k), last = tile.groups - 1;
      const uint next = tile.shift == 2 ? group : group + 1;
      lines.words[4 * i + k] = uint(line[min(next, last)]) << 16 | line[min(group, last)];
    }
  }
  return lines;
}

// Of the 64 bytes of a row's scales from a span on, lane t has four words, of two groups each. Groups of 128 columns,
// which would last for twice as many spans, are there twice each. Beyond the last group any do: the vector is zero.
inline void load_lines(thread const Tile& tile, uint span, uint lane, thread Lines& lines) {
  const uint first = (span * SPAN_UNITS >> tile.shift) + lane % 4 * (tile.shift == 2 ? 4 : 8);
  if (tile.shift == 2 || tile.groups % 8 != 0) {
    lines = gather_lines(tile, first);
    return;
  }
#pragma unroll
  for (uint i = 0; i < 4; i++) {
    device const ushort* line = (i < 2 ? tile.scales : tile.biases) + (i % 2 ? tile.other : 0);
    const uint4 four = load_once((device const uint4*)(line + min(first, tile.groups - 8)));
    lines.words[4 * i] = four.x;
    lines.words[4 * i + 1] = four.y;
    lines.words[4 * i + 2] = four.z;
    lines.words[4 * i + 3] = four.w;
  }
}

// What load_lines has, to where add_span finds it. WORDS: of a line that are wanted, 16 at most.
template <uint WORDS>
inline void put_lines(thread const Lines& from, uint lane, threadgroup uint4* lines) {
  threadgroup uint4* own = lines + lane % 4 * 4 * LINE_QUADS + lane / 4;
  if (WORDS == 16 || lane % 4 * 4 < WORDS) {
#pragma unroll
    for (uint k = 0; k < 4; k++) {
      own[k * LINE_QUADS] = uint4(from.words[k], from.words[4 + k], from.words[8 + k], from.words[12 + k]);
    }
  }
}

// Where a unit has the words of a digit (0 is the highest): in such an order that lanes read from different banks.
inline constexpr uint digit_place(uint digit) { return digit * 2 % DIGITS * DIGIT_WORDS; }

// Sixteen inputs to their digits: byte k of word w is that of input 4 k + w.
inline void put_digits(thread const float4* fours, float factor, threadgroup uint* to) {
  uint words[4][DIGITS];
#pragma unroll
  for (uint w = 0; w < 4; w++) {
    uint numbers[4];
#pragma unroll
    for (uint k = 0; k < 4; k++) {
      numbers[k] = number_of(w == 0 ? fours[k].x : w == 1 ? fours[k].y : w == 2 ? fours[k].z : fours[k].w, factor);
    }
    pack_digits(numbers, words[w]);
  }
#pragma unroll
  for (uint d = 0; d < DIGITS; d++) {
    *(threadgroup uint4*)(to + digit_place(d)) = uint4(words[0][d], words[1][d], words[2][d], words[3][d]);
  }
}

// Eight weights of three bits: each byte has an even one in its lowest bits and above it the odd one that follows.
inline uint spread_pairs(uint bits) {
  const uint halves = (bits & 0x0000ffffu) | (bits << 4 & 0xffff0000u);
  return (halves & 0x00ff00ffu) | (halves << 2 & 0xff00ff00u);
}

// The eight weights of a unit that product j takes, as bytes: of two bits columns s, s + 4, s + 8 and s + 12 of a half,
// for s = 2 j and then 2 j + 1; else the even ones of eight, then the odd ones.
template <int BITS>
inline void unpack_eight(thread const uint* words, uint j, thread uint& first, thread uint& second) {
  if (BITS == 8) {
    first = permute_bytes(words[2 * j], words[2 * j + 1], 0x6420u);
    second = permute_bytes(words[2 * j], words[2 * j + 1], 0x7531u);
  } else if (BITS == 4) {
    first = words[j] & 0x0f0f0f0fu;
    second = words[j] >> 4 & 0x0f0f0f0fu;
  } else if (BITS == 2) {
    first = words[j / 2] >> 4 * (j % 2) & 0x03030303u;
    second = words[j / 2] >> (4 * (j % 2) + 2) & 0x03030303u;
  } else {
    uint threes = words[0];
    if (j == 1) threes = words[0] >> 24 | words[1] << 8;
    if (j == 2) threes = words[1] >> 16 | words[2] << 16;
    if (j == 3) threes = words[2] >> 8;
    const uint pairs = spread_pairs(threes);
    first = pairs & 0x07070707u;
    second = pairs >> 3 & 0x07070707u;
  }
}

// A digit of a lane's unit, in the order of unpack_eight.
template <int BITS>
inline void load_digits(threadgroup const uint* digits, thread uint* words) {
#pragma unroll
  for (uint h = 0; h < 2; h++) {
    const uint4 four = ((threadgroup const uint4*)digits)[h];
    words[4 * h] = BITS == 2 ? four.x : permute_bytes(four.x, four.z, 0x5140u);
    words[4 * h + 1] = BITS == 2 ? four.y : permute_bytes(four.y, four.w, 0x5140u);
    words[4 * h + 2] = BITS == 2 ? four.z : permute_bytes(four.x, four.z, 0x7362u);
    words[4 * h + 3] = BITS == 2 ? four.w : permute_bytes(four.y, four.w, 0x7362u);
  }
}

// sums[i] += rows g + 8 i of a span times the digits that this lane has sums of, but for their place among the digits;
// sums[i + 2] += the biases times the sum of the inputs.
// line     both rows' scales, then their biases, of two groups each: this lane's are the bytes `chosen` of a word;
//          groups of 32 take one half after the other, whatever is chosen
// digits   the lane's part of the right factor
// known    of 64 columns: the worths of one in the first digit of the inputs of each product, as bfloat16, or if IS_ONE
//          one float for all of them; in the last two words the sums of each unit's inputs
template <int BITS, bool IS_SMALL, bool IS_ONE>
inline void add_span(thread const uint* words, uint4 line, uint chosen, uint lane, threadgroup const uint* digits,
    uint4 known, thread float* sums) {
  uint right[8];
  load_digits<BITS>(digits, right);
  const uint scales[2] = {line.x, line.y}, biases[2] = {line.z, line.w};
#pragma unroll
  for (uint pass = 0; pass < (IS_SMALL ? 2u : 1u); pass++) {
    const uint mask = lane % 2 == pass ? 0xffffffffu : 0u;
    if (IS_SMALL) chosen = pass ? SECOND_HALF : FIRST_HALF;
    const float first = as_type<float>(known.z), second = as_type<float>(known.w);
    const float total = !IS_SMALL ? first + second : pass ? second : first;
    int products[IS_ONE ? 1 : 4][4];
#pragma unroll
    for (uint j = 0; j < 4; j++) {
      thread int* own = products[IS_ONE ? 0 : j];
      if (j == 0 || !IS_ONE) own[0] = own[1] = own[2] = own[3] = 0;
      uint a[4], b[2] = {right[2 * j], right[2 * j + 1]};
      unpack_eight<BITS>(words, j, a[0], a[2]);
      unpack_eight<BITS>(words + BITS, j, a[1], a[3]);
      if (IS_SMALL) b[0] &= mask, b[1] &= mask;
      simdgroup_multiply_bytes(own, a, b);
    }
#pragma unroll
    for (uint i = 0; i < 2; i++) {
      float product = 0.0f;
#pragma unroll
      for (uint j = 0; j < (IS_ONE ? 1u : 4u); j++) {
        const uint two = j < 2 ? known.x : known.y;
        const float worth = as_type<float>(IS_ONE ? two : permute_bytes(two, 0, j % 2 ? SECOND_HALF : FIRST_HALF));
        const float sum = float(products[j][2 * i] * 256 + products[j][2 * i + 1]);
        product = j == 0 ? sum * worth : fma(sum, worth, product);
      }
      sums[i] = fma(product, as_type<float>(permute_bytes(scales[i], 0, chosen)), sums[i]);
      sums[i + 2] = fma(as_type<float>(permute_bytes(biases[i], 0, chosen)), total, sums[i + 2]);
    }
  }
}

// Words of a line, of two groups each, that a simdgroup has at a time.
template <bool IS_OWN>
inline constexpr uint line_words() {
  return IS_OWN ? 8 : 16;
}

// Of a simdgroup in a tile: the first span begins a strip. At most line_words spans, but for groups of 32, whose lines
// are loaded anew.
struct Share {
  uint first;
  uint end;
};

// A vector as digits, in whole strips, and what a simdgroup needs beside it.
struct Vector {
  threadgroup uint4* digits;
  threadgroup uint4* known;        // of each 64 columns, as in add_span
  threadgroup const uint4* zeros;  // two, as long as a digit
  threadgroup uint4* lines;        // scales under way: LINE_QUADS for each two groups
  device const uint4* source;      // where its digits are if the kernel before wrote it, for so many units
  uint units;
};

// Half a unit of a vector that lies spread over `units` units to its place. Four lanes in turn have 64 columns.
inline void put_half_unit(device const float4* x, uint units, uint half_unit, thread const Vector& vector) {
  float4 fours[4];
  float largest = 0.0f, total = 0.0f;
#pragma unroll
  for (uint i = 0; i < 4; i++) {
    fours[i] = 0.0f;
    if (half_unit / 2 < units) fours[i] = x[(half_unit % 2 * 4 + i) * units + half_unit / 2];
  }
#pragma unroll
  for (uint i = 0; i < 4; i++) {
    largest = max_magnitude(max_magnitude(largest, fours[i].x), fours[i].y);
    largest = max_magnitude(max_magnitude(largest, fours[i].z), fours[i].w);
    total += (fours[i].x + fours[i].y) + (fours[i].z + fours[i].w);
  }
  largest = max(largest, simd_shuffle_xor(largest, 1));
  largest = max(largest, simd_shuffle_xor(largest, 2));
  const Scaling scaling = scaling_of(largest);
  threadgroup uint* digits = (threadgroup uint*)(vector.digits + half_unit / 2 * UNIT_QUADS);
  put_digits(fours, scaling.factor, digits + half_unit % 2 * 4);
  const float unit = total + simd_shuffle_xor(total, 1), other = simd_shuffle_xor(unit, 2);
  if (half_unit % 4 == 0) {
    vector.known[half_unit / 4] =
        uint4(as_type<uint>(scaling.worth), 0, as_type<uint>(unit), as_type<uint>(other));
  }
}

// The first `wanted` units of a vector, whole strips, from its source to their places.
inline void fetch_vector(uint wanted, uint lane, thread const Vector& vector) {
#pragma unroll 1
  for (uint i = lane; i < wanted * UNIT_QUADS; i += 32) copy_sixteen(vector.digits + i, vector.source + i);
  device const uint4* about = vector.source + vector.units * UNIT_QUADS;
  for (uint i = lane; i < wanted / 2; i += 32) {
    const uint4 worths = about[KNOWN_QUADS * i];
    device const float4* totals = (device const float4*)(about + KNOWN_QUADS * i);
    const float4 first = totals[1], second = totals[2];
    const float sums[2] = {(first.x + first.y) + (first.z + first.w), (second.x + second.y) + (second.z + second.w)};
    vector.known[i] = uint4(worths.x, worths.y, as_type<uint>(sums[0]), as_type<uint>(sums[1]));
  }
}

// In lanes 4 g the sums of rows g and g + 8 of a tile of a quantized matrix times a vector, in the spans of a share.
// IS_OWN: the vector has a source, from which this simdgroup copies it for itself once the weights are requested. Else
// it is there already, for the whole threadgroup, each 64 columns scaled as one.
// IS_SMALL: groups of 32. AHEAD: spans under way.
template <int BITS, bool IS_SMALL, int AHEAD, bool IS_OWN>
inline float2 multiply_packed(
    thread const Weights& w, TileRows rows, thread const Share& share, thread const Vector& vector, uint lane) {
  constexpr uint LINE_WORDS = line_words<IS_OWN>();
  constexpr uint WORDS = IS_SMALL ? 2 : 1;  // of a span's scales
  Tile tile = tile_of<BITS>(w, rows, share.first, share.end, lane);
  const uint g = lane / 4, t = lane % 4;
  uint words[AHEAD * 2 * BITS];
  Lines lines;
#pragma unroll
  for (uint s = 0; s < AHEAD; s++) load_span<BITS>(tile, s, share.first + s, words + s * 2 * BITS);
  load_lines(tile, share.first, lane, lines);
  if (IS_OWN) {
    wait_for_last();
    fetch_vector((share.end + STRIP_SPANS - 1) / STRIP_SPANS * STRIP_UNITS, lane, vector);
  }
  put_lines<LINE_WORDS>(lines, lane, vector.lines);
  if (IS_OWN) wait_for_copies();
  simdgroup_barrier(mem_flags::mem_threadgroup);
  const bool has_digits = t / 2 == g / 4 && g % 4 < DIGITS;
  threadgroup const uint* digits = (threadgroup const uint*)vector.zeros;
  if (has_digits) {
    threadgroup const uint4* unit = vector.digits + (share.first * SPAN_UNITS + t) * UNIT_QUADS;
    digits = (threadgroup const uint*)unit + digit_place(g % 4);
  }
  const uint step = has_digits ? SPAN_UNITS * UNIT_QUADS * 4 : 0;
  threadgroup const uint4* known = vector.known + share.first * 2 + t / 2;
  threadgroup const uint4* first_line = vector.lines + (IS_SMALL ? t / 2 * LINE_QUADS : 0) + g;
  threadgroup const uint4* line = first_line;
  const uint chosen = t / 2 ? SECOND_HALF : FIRST_HALF;
  float sums[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll 1
  for (uint span = share.first; span < share.end; span += STRIP_SPANS) {
    if (IS_SMALL && line == first_line + LINE_WORDS * LINE_QUADS) {  // done with all that were loaded
      line = first_line;
      load_lines(tile, span, lane, lines);
      simdgroup_barrier(mem_flags::mem_threadgroup);
      put_lines<LINE_WORDS>(lines, lane, vector.lines);
      simdgroup_barrier(mem_flags::mem_threadgroup);
    }
#pragma unroll
    for (uint s = 0; s < STRIP_SPANS; s++) {
      thread uint* slot = words + s % AHEAD * 2 * BITS;
      const uint4 own = line[s * WORDS * LINE_QUADS];
      add_span<BITS, IS_SMALL, !IS_OWN>(slot, own, chosen, lane, digits, known[2 * s], sums);
      load_span<BITS>(tile, s + AHEAD, span + s + AHEAD, slot);
      digits += step;
    }
    known += 2 * STRIP_SPANS;
    line += STRIP_SPANS * WORDS * LINE_QUADS;
    tile.data[0] += STRIP_UNITS * BITS * 4;
    tile.data[1] += STRIP_UNITS * BITS * 4;
  }
  const bool is_odd = lane % 2 != 0;
  const float place = is_odd ? 1.0f / 16777216 : 1.0f / 256;  // of this lane's digits, before the first one's
  for (uint i = 0; i < 2; i++) sums[i] = fma(sums[i], place, is_odd ? 0.0f : sums[i + 2]);
  team_sums<2>(sums, 2);
  return float2(sums[0], sums[1]);
}

template <int BITS, int AHEAD, bool IS_OWN>
inline float2 multiply_bits(
    thread const Weights& w, TileRows rows, thread const Share& share, thread const Vector& vector, uint lane) {
  if (w.shift == 5) return multiply_packed<BITS, true, AHEAD, IS_OWN>(w, rows, share, vector, lane);
  return multiply_packed<BITS, false, AHEAD, IS_OWN>(w, rows, share, vector, lane);
}

// The same for any bits. Beside each are the spans under way, by measurement: at 3 and 8 bits fewer in down (IS_OWN),
// which has four times the sums of a span in registers.
template <bool IS_OWN>
inline float2 multiply_tile(
    thread const Weights& w, TileRows rows, thread const Share& share, thread const Vector& vector, uint lane) {
  switch (w.storage) {
    case 2: return multiply_bits<2, 4, IS_OWN>(w, rows, share, vector, lane);
    case 3: return multiply_bits<3, IS_OWN ? 2 : 4, IS_OWN>(w, rows, share, vector, lane);
    case 4: return multiply_bits<4, 2, IS_OWN>(w, rows, share, vector, lane);
    default: return multiply_bits<8, IS_OWN ? 1 : 2, IS_OWN>(w, rows, share, vector, lane);
  }
}

// results[i] = the i-th row of a tile of a plain matrix times a vector that lies spread over `units` units.
inline void multiply_plain(thread const Weights& w, TileRows rows, thread const Share& share, device const float* x,
    uint units, uint lane, threadgroup float* results) {
  const Walk walk = {
      share.first * SPAN_UNITS + lane, min(share.end * SPAN_UNITS, count_units(w.columns)), 32, 0, units};
#pragma unroll 1
  for (uint i = 0; i < TILE_ROWS; i += 2) {  // two are neighbours in every order
    float sums[2] = {0.0f, 0.0f};
    if (w.storage == BF16 && w.columns % UNIT == 0) {
      bf16_products<2>(w, row_at(rows, i), walk, (device const float4*)x, sums);
    } else {
      plain_products<2>(w, row_at(rows, i), walk, (device const float4*)x, sums);
    }
    team_sums<2>(sums, 5);
    if (lane < 2) results[i + lane] = lane == 0 ? sums[0] : sums[1];
  }
}

// Sums as multiply_tile leaves them, to results[r].
inline void put_sums(float2 sums, uint lane, threadgroup float* results) {
  if (lane % 4 == 0) {
    results[lane / 4] = sums.x;
    results[lane / 4 + 8] = sums.y;
  }
}
