// Weights as they lie in a pack, and products of their rows with a vector. Put into kernel files by text, by msl.py.
//
// A lane takes a UNIT of consecutive columns of a row at a time: as many 32-bit words as the weights have bits.
// `lanes` neighbouring lanes share a row and go along it together: 32 for rows of 1024 columns and more, fewer for
// shorter ones, so that none is idle. A simdgroup thus holds 32 / lanes teams, each of which works on several rows at
// once: their weights are all requested before any is used, and the inputs are read once for all of them.
//
// Inputs lie spread: the first four columns of every unit, then the next four of every unit, and so on. Neighbouring
// lanes then read neighbouring memory; with the columns in their order, each would read from a cache line of its own.
//
// A weight is q * scale + bias. The integer goes straight into the mantissa of a float between 1 and 2, which saves its
// conversion: sum (q * scale + bias) x = scale * 2^bits * (sum (1 + q / 2^bits) x - sum x) + bias * sum x. The first
// sum is some five times the result, so float32 keeps five times its rounding: 3e-7 of a term. Below 8 bits one shift
// serves two integers, one of which is then smaller beside the 1: sixteen times at 2 bits, thirty at 4.

constant constexpr uint UNIT = 32;
constant constexpr uint HALF_UNIT = 16;
constant constexpr uint QUADS = 8;       // of four columns in a unit
constant constexpr uint SIMDGROUPS = 4;  // of a threadgroup, where a kernel leaves it open

constant constexpr uint BF16 = 16;  // storages beside the bits of packed integers, which are 2, 3, 4 and 8
constant constexpr uint F16 = 17;
constant constexpr uint F32 = 32;

struct MatrixForm {  // where a matrix lies
  ulong data;        // bytes from the base of its memory, a multiple of 16; rows follow each other without gaps
  ulong scales;      // bfloat16 [rows, columns / group_size]
  ulong biases;      // the same
  uint storage;
  uint group_size;
  uint rows;
  uint columns;
  uint first_out;    // linears: the first of its places in the result
  uint first_group;  // linears: its first threadgroup
};

struct ExpertForm {  // where an expert's matrices lie, from the expert's own place
  MatrixForm gate;
  MatrixForm up;
  MatrixForm down;
  ulong bank;  // which of the memories holds it
};

struct Place {   // an expert to be run
  ulong offset;  // bytes from the base of its bank
  uint form;     // which of the forms it has
  uint rank;     // among the experts of its token
};

struct Segment {  // an expert to be run for some tokens of a prompt
  Place place;
  uint first;     // of their pairs with it
  uint count;
};

struct Weights {  // a MatrixForm at a base
  device const uchar* data;
  device const ushort* scales;
  device const ushort* biases;
  uint storage;
  uint shift;  // log2 of the group size
  uint rows;
  uint columns;
};

struct Inputs {  // of one unit
  float x[UNIT];
  float ones[4];   // the sums of each half's, by the place in a pair
  float total[2];  // of each half's
};

inline Weights weights_at(device const uchar* base, constant MatrixForm& form) {
  Weights w;
  w.data = base + form.data;
  w.scales = (device const ushort*)(base + form.scales);
  w.biases = (device const ushort*)(base + form.biases);
  w.storage = form.storage;
  w.shift = form.group_size == 32 ? 5 : form.group_size == 64 ? 6 : 7;
  w.rows = form.rows;
  w.columns = form.columns;
  return w;
}

// The memory of an expert: of its bank, from its offset.
inline device const uchar* expert_at(
    device const uchar* bank0, device const uchar* bank1, device const uchar* bank2, ulong bank, ulong offset) {
  return (bank == 0 ? bank0 : bank == 1 ? bank1 : bank2) + offset;
}

inline float widen_bf16(uint bits) { return as_type<float>(bits << 16); }

// Where the spread inputs of `units` units hold a column.
inline uint spread_place(uint column, uint units) {
  return (column % UNIT / 4 * units + column / UNIT) * 4 + column % 4;
}

// Columns of whole units that hold so many.
inline uint count_units(uint columns) { return (columns + UNIT - 1) / UNIT; }

// How many neighbouring integers of a word come with one shift.
template <int BITS>
inline constexpr int pair_size() {
  return BITS == 8 ? 1 : 2;
}

// Integers pair_size() * i and on of a unit, moved to the top of a float's mantissa; the bits around them are anything.
template <int BITS>
inline uint move_pair(thread const uint* words, int i) {
  const int width = BITS * pair_size<BITS>(), each = (BITS == 3 ? 24 : 32) / width;
  const int part = i / each;  // a word, or of 3 bits the eight integers of three bytes
  uint word = words[BITS == 3 ? 0 : part];
  if (BITS == 3 && part == 1) word = words[0] >> 24 | words[1] << 8;
  if (BITS == 3 && part == 2) word = words[1] >> 16 | words[2] << 16;
  if (BITS == 3 && part == 3) word = words[2] >> 8;
  const int left = 23 - width - width * (i % each);
  return left >= 0 ? word << (left & 31) : word >> (-left & 31);
}

// The inputs of a unit, from the device's memory or the threadgroup's. Their sums are what the ones in the mantissas
// add to a product: alike for all rows.
template <int BITS, typename Spread>
inline void load_inputs(Spread x, uint unit, uint units, thread Inputs& in) {
  for (uint i = 0; i < QUADS; i++) {
    const float4 four = x[i * units + unit];
    in.x[4 * i] = four.x;
    in.x[4 * i + 1] = four.y;
    in.x[4 * i + 2] = four.z;
    in.x[4 * i + 3] = four.w;
  }
  for (uint i = 0; i < 4; i++) in.ones[i] = 0.0f;
  for (uint j = 0; j < UNIT; j++) in.ones[j / HALF_UNIT * 2 + j % pair_size<BITS>()] += in.x[j];
  for (uint i = 0; i < 2; i++) in.total[i] = in.ones[2 * i] + in.ones[2 * i + 1];
}

// The sum of q x over half a unit. `one` is the bits of 1.0f.
template <int BITS>
inline float packed_dot(thread const uint* words, uint half_unit, thread const Inputs& in, uint one) {
  const int size = pair_size<BITS>(), pairs = int(HALF_UNIT) / size;
  // What is to be taken off comes first: what is left keeps its bits.
  float sums[2] = {-in.ones[2 * half_unit], -in.ones[2 * half_unit + 1]};
  for (int i = 0; i < pairs; i++) {
    const uint moved = move_pair<BITS>(words, int(half_unit) * pairs + i);
    for (int j = 0; j < size; j++) {
      const uint mask = ((1u << BITS) - 1u) << (23 - BITS * (size - j));
      sums[j] = fma(as_type<float>((moved & mask) | one), in.x[half_unit * HALF_UNIT + i * size + j], sums[j]);
    }
  }
  if (size == 1) return sums[0] * float(1 << BITS);
  return fma(sums[0], float(1 << 2 * BITS), sums[1] * float(1 << BITS));
}

// A unit of packed integers.
template <int BITS>
inline void load_packed(device const uchar* unit, thread uint* words) {
  if (BITS == 2) {
    const uint2 two = *(device const uint2*)unit;
    words[0] = two.x;
    words[1] = two.y;
  } else if (BITS == 3) {
    for (int i = 0; i < 3; i++) words[i] = ((device const uint*)unit)[i];
  } else {
    for (int i = 0; i < BITS / 4; i++) {
      const uint4 four = ((device const uint4*)unit)[i];
      words[4 * i] = four.x;
      words[4 * i + 1] = four.y;
      words[4 * i + 2] = four.z;
      words[4 * i + 3] = four.w;
    }
  }
}

inline float load_plain(thread const Weights& w, ulong index) {
  if (w.storage == F32) return ((device const float*)w.data)[index];
  if (w.storage == F16) return float(((device const half*)w.data)[index]);
  return widen_bf16(((device const ushort*)w.data)[index]);
}

// The sums over a team of two to the power of `shift` lanes, in each of them: all values a step at a time, for a
// shuffle takes long.
template <int COUNT>
inline void team_sums(thread float* values, uint shift) {
  for (uint i = 0; i < shift; i++) {
#pragma unroll
    for (uint r = 0; r < COUNT; r++) values[r] += simd_shuffle_xor(values[r], ushort(1u << i));
  }
}

// Which of a row's units a lane takes, and where the inputs are.
struct Walk {
  uint first;  // unit, then every step-th before `end`
  uint end;
  uint step;
  uint skipped;  // the unit at which the inputs begin
  uint units;    // over which they are spread
};

// A unit of every row, with its scales and biases.
template <int BITS, int COUNT, int EACH>
inline void load_rows(thread const Weights* w, thread const uint* data_at, thread const uint* group_at, uint unit,
    thread uint* words, thread uint* scales, thread uint* biases) {
  for (uint m = 0; m < COUNT; m++) {
    for (uint r = m * EACH; r < (m + 1) * EACH; r++) {
      const uint group = group_at[r] + (unit * UNIT >> w[m].shift);
      load_packed<BITS>(w[m].data + (data_at[r] + unit * BITS * 4), words + r * BITS);
      scales[r] = w[m].scales[group];
      biases[r] = w[m].biases[group];
    }
  }
}

// For packed rows, whose columns are whole units: COUNT matrices, EACH rows of each. Rows are found by 32-bit offsets:
// a matrix has less than 4 GiB.
template <int BITS, int COUNT, int EACH, typename Spread>
inline void packed_products(
    thread const Weights* w, uint row, thread const Walk& walk, Spread x, thread float* sums) {
  const uint columns = w[0].columns, row_bytes = columns / 8 * BITS;
  // The bits of 1.0f, where the compiler does not know them: NVIDIA's take one constant in (a & b) | c, not two.
  const uint one = as_type<uint>(float(min(columns, 1u)));
  uint data_at[COUNT * EACH], group_at[COUNT * EACH];
  for (uint m = 0; m < COUNT; m++) {
    for (uint r = 0; r < EACH; r++) {
      const uint at = min(row + r, w[m].rows - 1);
      data_at[m * EACH + r] = at * row_bytes;
      group_at[m * EACH + r] = at * (columns >> w[m].shift);
    }
  }
  for (uint unit = walk.first; unit < walk.end; unit += walk.step) {
    uint words[COUNT * EACH * BITS], scales[COUNT * EACH], biases[COUNT * EACH];
    load_rows<BITS, COUNT, EACH>(w, data_at, group_at, unit, words, scales, biases);
    Inputs in;
    load_inputs<BITS>(x, unit - walk.skipped, walk.units, in);
#pragma unroll
    for (uint half_unit = 0; half_unit < 2; half_unit++) {
#pragma unroll
      for (uint r = 0; r < COUNT * EACH; r++) {
        const float sum = fma(widen_bf16(biases[r]), in.total[half_unit], sums[r]);
        sums[r] = fma(widen_bf16(scales[r]), packed_dot<BITS>(words + r * BITS, half_unit, in, one), sum);
      }
    }
  }
}

// For plain rows: four columns at a time, beyond the last of which nothing is read.
template <int EACH, typename Spread>
inline void plain_products(thread const Weights& w, uint row, thread const Walk& walk, Spread x, thread float* sums) {
  for (uint unit = walk.first; unit < walk.end; unit += walk.step) {
#pragma unroll 1
    for (uint i = 0; i < QUADS && unit * UNIT + i * 4 < w.columns; i++) {
      const uint column = unit * UNIT + i * 4, count = min(w.columns - column, 4u);
      const float4 four = x[i * walk.units + unit - walk.skipped];
#pragma unroll
      for (uint r = 0; r < EACH; r++) {
        const ulong start = ulong(min(row + r, w.rows - 1)) * w.columns + column;
        sums[r] = fma(load_plain(w, start), four.x, sums[r]);
        if (count > 1) sums[r] = fma(load_plain(w, start + 1), four.y, sums[r]);
        if (count > 2) sums[r] = fma(load_plain(w, start + 2), four.z, sums[r]);
        if (count > 3) sums[r] = fma(load_plain(w, start + 3), four.w, sums[r]);
      }
    }
  }
}

// For bfloat16 rows of whole units, two weights to a word.
template <int EACH, typename Spread>
inline void bf16_products(thread const Weights& w, uint row, thread const Walk& walk, Spread x, thread float* sums) {
  for (uint unit = walk.first; unit < walk.end; unit += walk.step) {
    for (uint i = 0; i < QUADS / 2; i++) {
      const float4 low = x[2 * i * walk.units + unit - walk.skipped];
      const float4 high = x[(2 * i + 1) * walk.units + unit - walk.skipped];
      const ulong at = (unit * UNIT + 8 * i) * 2ul;
#pragma unroll
      for (uint r = 0; r < EACH; r++) {
        const ulong start = ulong(min(row + r, w.rows - 1)) * w.columns * 2;
        const uint4 words = *(device const uint4*)(w.data + start + at);
        sums[r] = fma(widen_bf16(words.x), low.x, sums[r]);
        sums[r] = fma(as_type<float>(words.x & 0xffff0000u), low.y, sums[r]);
        sums[r] = fma(widen_bf16(words.y), low.z, sums[r]);
        sums[r] = fma(as_type<float>(words.y & 0xffff0000u), low.w, sums[r]);
        sums[r] = fma(widen_bf16(words.z), high.x, sums[r]);
        sums[r] = fma(as_type<float>(words.z & 0xffff0000u), high.y, sums[r]);
        sums[r] = fma(widen_bf16(words.w), high.z, sums[r]);
        sums[r] = fma(as_type<float>(words.w & 0xffff0000u), high.w, sums[r]);
      }
    }
  }
}

// sums[m * EACH + r] += row + r of matrix m times x, which lies spread: the part of this lane, to be added up over the
// team. Two matrices may go together if they have one number of columns and one storage, of at most four bits.
template <int COUNT, int EACH, typename Spread>
inline void add_products(thread const Weights* w, uint row, thread const Walk& walk, Spread x, thread float* sums) {
  if (row >= w[0].rows) return;
  switch (w[0].storage) {
    case 2: return packed_products<2, COUNT, EACH>(w, row, walk, x, sums);
    case 3: return packed_products<3, COUNT, EACH>(w, row, walk, x, sums);
    case 4: return packed_products<4, COUNT, EACH>(w, row, walk, x, sums);
  }
  const int SOME = EACH < 2 ? EACH : 2;  // more rows of more bits take so many registers that fewer lanes run
#pragma unroll
  for (uint r = 0; COUNT == 1 && r < EACH; r += SOME) {
    if (w[0].storage == 8) {
      packed_products<8, 1, SOME>(w, row + r, walk, x, sums + r);
    } else if (w[0].storage == BF16 && w[0].columns % UNIT == 0) {
      bf16_products<SOME>(w[0], row + r, walk, x, sums + r);
    } else {
      plain_products<SOME>(w[0], row + r, walk, x, sums + r);
    }
  }
}
