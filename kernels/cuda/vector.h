// Products of quantized rows with a vector on NVIDIA's matrix units for halves. Put into kernel files by text, after
// half_numbers.h.
//
// matrix.h spends four instructions on a weight. Here two of four bits become halves by one mask, and 256 are multiplied
// at once: [16 rows, 16 columns] times [16, 8]. The eight columns of the right factor are four units of the vector (32
// numbers, as in matrix.h), each in a column of high halves and one of low ones. Every half unit is scaled by a power
// of two of its own, which `worth` undoes:
//
//   w x = sum over half units of scale * worth * (sum q high(x) + sum q low(x)) + bias * (sum x)
//
// Four units that follow each other are a span. Lane 4 g + t has rows g and g + 8 of a tile, and the t-th unit of each
// span: weights that lie together in a row. The right factor is zero where a lane's unit is not the column's, so that
// each lane is left with the sums of its own rows and unit, to be scaled and added up in float32. Three quarters of the
// products are with zero, but they take no instruction of their own. In what order the columns of a unit are taken is
// free, as long as weights and vector have the same one: it is that of unpack_eight.
//
// A simdgroup has a tile of 16 rows, or a share of its columns, for itself. It requests as many spans of weights as
// registers hold, and the scales of 16 spans (of 8, if groups are of 32); when a span has been used, one further on is
// requested into its registers. Four spans, for which the loop is unrolled, are a strip.

constant constexpr uint TILE_ROWS = 16;
constant constexpr uint SPAN_UNITS = 4;
constant constexpr uint STRIP_SPANS = 4;
constant constexpr uint STRIP_UNITS = 16;
constant constexpr uint UNIT_QUADS = 8;  // of four words: a unit's high halves, then its low ones
constant constexpr uint ZERO_PLACE = 2;  // of zeros behind a vector, in quads: in other banks than what is read beside
constant constexpr uint ZERO_QUADS = 6;  // ZERO_PLACE and four of zeros

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
inline Tile tile_of(thread const Weights& w, uint row, uint first, uint end, uint lane) {
  Tile tile;
  const uint last = w.rows - 1, at = min(row + lane / 4, last), other = min(row + lane / 4 + 8, last);
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
    load_packed<BITS>(tile.data[0] + ahead * (BITS * 16), words);
    load_packed<BITS>(tile.data[1] + ahead * (BITS * 16), words + BITS);
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
    const uint4 four = *(device const uint4*)(line + min(first, tile.groups - 8));
    lines.words[4 * i] = four.x;
    lines.words[4 * i + 1] = four.y;
    lines.words[4 * i + 2] = four.z;
    lines.words[4 * i + 3] = four.w;
  }
}

// What unpack_eight takes, of the i-th eight of a lane's unit.
template <int BITS>
inline void pick_eight(thread const uint* words, uint i, thread uint& low, thread uint& high) {
  high = 0;
  if (BITS == 8) {
    low = words[2 * i];
    high = words[2 * i + 1];
  } else if (BITS == 4) {
    low = words[i];
  } else if (BITS == 2) {
    low = words[i / 2];
    high = i % 2;
  } else {
    low = words[i == 3 ? 2 : i == 0 ? 0 : i - 1];
    if (i == 1) low = low >> 24 | words[1] << 8;
    if (i == 2) low = low >> 16 | words[2] << 16;
    if (i == 3) low >>= 8;
  }
}

// sums[i] += row g + 8 i of span s of a strip times the lane's unit of the vector, but for half_steps and the biases,
// whose part goes to sums[i + 2].
// lines    as load_lines has them: this span's are in lane `from`, this lane's own are the bytes `chosen` of a word
// halves   the lane's part of the right factor, four quads
// known    of its unit: the worth of each half, then the sum of each half's numbers
template <int BITS, bool IS_SMALL>
inline void add_span(thread const uint* words, thread const Lines& lines, uint s, uint lane, uint from, uint chosen,
    threadgroup const uint4* halves, uint4 known, thread float* sums) {
  float products[2][4] = {{0.0f, 0.0f, 0.0f, 0.0f}, {0.0f, 0.0f, 0.0f, 0.0f}};
#pragma unroll
  for (uint i = 0; i < 4; i++) {
    const uint eight = i % 2 * 2 + i / 2;  // the halves of the unit in turn: one does not wait for the other's sums
    uint low, high, first[4], second[4];
    pick_eight<BITS>(words, eight, low, high);
    unpack_eight<BITS>(low, high, first);
    pick_eight<BITS>(words + BITS, eight, low, high);
    unpack_eight<BITS>(low, high, second);
    const uint4 four = halves[eight];
    const uint a[8] = {first[0], second[0], first[1], second[1], first[2], second[2], first[3], second[3]};
    const uint b[4] = {four.x, four.y, four.z, four.w};
    simdgroup_multiply_halves(products[eight / 2], a, b);
    simdgroup_multiply_halves(products[eight / 2], a + 4, b + 2);
  }
  const float total = as_type<float>(known.z) + as_type<float>(known.w);
#pragma unroll
  for (uint i = 0; i < 2; i++) {
    float line[2];
#pragma unroll
    for (uint k = 0; k < 2; k++) {
      thread const uint* shown = lines.words + (2 * k + i) * 4 + (IS_SMALL ? s % 2 * 2 : s);
      uint pair = simd_shuffle(shown[0], from);
      if (IS_SMALL) {
        const uint second = simd_shuffle(shown[1], from);
        pair = lane % 4 < 2 ? pair : second;
      }
      line[k] = as_type<float>(permute_bytes(pair, 0, chosen));
    }
    const float first = products[0][2 * i + 1] + products[0][2 * i], second = products[1][2 * i + 1] + products[1][2 * i];
    const float product = fma(first, as_type<float>(known.x), second * as_type<float>(known.y));
    sums[i] = fma(product, line[0], sums[i]);
    sums[i + 2] = fma(line[1], total, sums[i + 2]);
  }
}

// Half a unit of float32, four by four, to its place in a vector of halves.
inline void put_half_unit(
    thread const float4* fours, uint half_unit, threadgroup uint4* halves, threadgroup uint4* known) {
  float largest = 0.0f, total = 0.0f;
#pragma unroll
  for (uint i = 0; i < 4; i++) {
    largest = max_magnitude(max_magnitude(largest, fours[i].x), fours[i].y);
    largest = max_magnitude(max_magnitude(largest, fours[i].z), fours[i].w);
    total += (fours[i].x + fours[i].y) + (fours[i].z + fours[i].w);
  }
  const Scaling scaling = scaling_of(largest);
  threadgroup uint4* unit = halves + half_unit / 2 * UNIT_QUADS + half_unit % 2 * 2;
#pragma unroll
  for (uint i = 0; i < 2; i++) {
    uint high[4], low[4];
    split_eight(fours[2 * i], fours[2 * i + 1], scaling.factor, high, low);
    unit[i] = uint4(high[0], high[1], high[2], high[3]);
    unit[i + 4] = uint4(low[0], low[1], low[2], low[3]);
  }
  threadgroup float* own = (threadgroup float*)(known + half_unit / 2) + half_unit % 2;
  own[0] = scaling.worth;
  own[2] = total;
}

struct Share {  // of a simdgroup in a tile: at most 16 spans (load_lines), the first of which begins a strip
  uint first;
  uint end;
};

// A vector as halves, in whole strips.
template <typename Quads>
struct Vector {
  threadgroup uint4* halves;
  threadgroup const uint4* zeros;
  Quads known;  // of each unit, as in add_span
  device const uint4* source;  // of the halves, if each simdgroup fetches its own
};

// In lanes 4 g the sums of rows `row` + g and + 8 of a quantized matrix times a vector, in the spans of a share.
// IS_SMALL: groups of 32. IS_OWN: the kernel before wrote the vector, and this simdgroup copies it for itself once the
// weights are requested; else it is there already, for the whole threadgroup.
template <int BITS, bool IS_SMALL, int AHEAD, bool IS_OWN, typename Quads>
inline float2 multiply_packed(
    thread const Weights& w, uint row, thread const Share& share, thread const Vector<Quads>& vector, uint lane) {
  constexpr uint LINE_SPANS = IS_SMALL ? 8 : 16;  // of one load_lines
  Tile tile = tile_of<BITS>(w, row, share.first, share.end, lane);
  const uint g = lane / 4, t = lane % 4;
  uint words[AHEAD * 2 * BITS];
  Lines lines;
#pragma unroll
  for (uint s = 0; s < AHEAD; s++) load_span<BITS>(tile, s, share.first + s, words + s * 2 * BITS);
  load_lines(tile, share.first, lane, lines);
  if (IS_OWN) {
    wait_for_last();
#pragma unroll 1
    for (uint i = lane; i < (share.end + STRIP_SPANS - 1) / STRIP_SPANS * (STRIP_UNITS * UNIT_QUADS); i += 32) {
      copy_sixteen(vector.halves + i, vector.source + i);
    }
    wait_for_copies();
    simdgroup_barrier(mem_flags::mem_threadgroup);
  }
  const bool is_column = g / 2 == t;  // whether the lane's unit is that of its column of the right factor
  const uint unit = share.first * SPAN_UNITS + t;
  threadgroup const uint4* halves = is_column ? vector.halves + unit * UNIT_QUADS + g % 2 * 4 : vector.zeros;
  const uint step = is_column ? SPAN_UNITS * UNIT_QUADS : 0;
  Quads known = vector.known + unit;
  const bool is_second = IS_SMALL ? t % 2 : t / 2;
  const uint chosen = is_second ? 0x3244u : 0x1044u;  // as the upper half of a float
  float sums[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll 1
  for (uint span = share.first; span < share.end; span += STRIP_SPANS) {
    const uint done = span - share.first;
    if (IS_SMALL && done > 0 && done % LINE_SPANS == 0) load_lines(tile, span, lane, lines);
    const uint strip = lane - t + done % LINE_SPANS / STRIP_SPANS * (IS_SMALL ? 2 : 1);  // the lane with its lines
#pragma unroll
    for (uint s = 0; s < STRIP_SPANS; s++) {
      thread uint* slot = words + s % AHEAD * 2 * BITS;
      const uint from = IS_SMALL ? strip + s / 2 : strip;
      add_span<BITS, IS_SMALL>(slot, lines, s, lane, from, chosen, halves, known[s * SPAN_UNITS], sums);
      load_span<BITS>(tile, s + AHEAD, span + s + AHEAD, slot);
      halves += step;
    }
    known += STRIP_UNITS;
    tile.data[0] += STRIP_UNITS * BITS * 4;
    tile.data[1] += STRIP_UNITS * BITS * 4;
  }
  for (uint i = 0; i < 2; i++) sums[i] = fma(sums[i], half_steps<BITS>(), sums[i + 2]);
  team_sums<2>(sums, 2);
  return float2(sums[0], sums[1]);
}

template <int BITS, int AHEAD, bool IS_OWN, typename Quads>
inline float2 multiply_bits(
    thread const Weights& w, uint row, thread const Share& share, thread const Vector<Quads>& vector, uint lane) {
  if (w.shift == 5) return multiply_packed<BITS, true, AHEAD, IS_OWN>(w, row, share, vector, lane);
  return multiply_packed<BITS, false, AHEAD, IS_OWN>(w, row, share, vector, lane);
}

// The same for any bits. AHEAD: spans of four bits under way.
template <int AHEAD, bool IS_OWN, typename Quads>
inline float2 multiply_tile(
    thread const Weights& w, uint row, thread const Share& share, thread const Vector<Quads>& vector, uint lane) {
  switch (w.storage) {
    case 2: return multiply_bits<2, 4, IS_OWN>(w, row, share, vector, lane);
    case 3: return multiply_bits<3, AHEAD, IS_OWN>(w, row, share, vector, lane);
    case 4: return multiply_bits<4, AHEAD, IS_OWN>(w, row, share, vector, lane);
    default: return multiply_bits<8, AHEAD / 2, IS_OWN>(w, row, share, vector, lane);
  }
}

// results[r] = row + r of a plain matrix times a vector that lies spread over `units` units, r < TILE_ROWS.
inline void multiply_plain(thread const Weights& w, uint row, thread const Share& share, device const float* x, uint units,
    uint lane, threadgroup float* results) {
  const Walk walk = {share.first * SPAN_UNITS + lane, min(share.end * SPAN_UNITS, count_units(w.columns)), 32, 0, units};
#pragma unroll 1
  for (uint r = 0; r < TILE_ROWS; r += 4) {
    float sums[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    if (w.storage == BF16 && w.columns % UNIT == 0) {
      bf16_products<4>(w, row + r, walk, (device const float4*)x, sums);
    } else {
      plain_products<4>(w, row + r, walk, (device const float4*)x, sums);
    }
    team_sums<4>(sums, 5);
    if (lane < 4) results[r + lane] = lane == 0 ? sums[0] : lane == 1 ? sums[1] : lane == 2 ? sums[2] : sums[3];
  }
}

// Sums as multiply_tile leaves them, to results[r].
inline void put_sums(float2 sums, uint lane, threadgroup float* results) {
  if (lane % 4 == 0) {
    results[lane / 4] = sums.x;
    results[lane / 4 + 8] = sums.y;
  }
}
