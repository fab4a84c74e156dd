// Weights as they lie in a pack, and products of their rows with a vector. Put into kernel files by text, by msl.py.
//
// A lane takes UNIT consecutive columns of a row at a time. `lanes` neighbouring lanes share a row and go along it
// together: 32 for rows of 512 columns and more, fewer for shorter ones, so that none is idle. A simdgroup thus holds
// 32 / lanes teams, each of which works on ROWS rows at once: their weights are all requested before any is used.
//
// A weight is q * scale + bias. The integer goes straight into the mantissa of a float between 1 and 2, which saves its
// conversion: sum (q * scale + bias) x = scale * 2^bits * (sum (1 + q / 2^bits) x - sum x) + bias * sum x. The first
// sum is some five times the result, so float32 keeps five times its rounding: 3e-7 of a term. At 2 and 4 bits one shift
// serves two integers, one of which is then smaller beside the 1: sixteen and thirty times.

constant constexpr uint UNIT = 16;
constant constexpr uint ROWS = 4;
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
  float even;  // sum of x[0], x[2], ...
  float odd;
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

// A word's bits from `low` on, as a float from 1 to below 2: the bits of `mask`, below 2^23, are its mantissa.
inline float mantissa(uint word, int left, uint mask) {
  const uint moved = left >= 0 ? word << (left & 31) : word >> (-left & 31);
  return as_type<float>((moved & mask) | 0x3f800000u);
}

// The sum of (1 + q / 2^BITS) x over the first COUNT integers of a word.
template <int BITS, int COUNT>
inline float mantissa_dot(uint word, thread const float* x) {
  float sum = 0.0f;
  for (int j = 0; j < COUNT; j++) {
    sum = fma(mantissa(word, 23 - BITS - BITS * j, ((1u << BITS) - 1u) << (23 - BITS)), x[j], sum);
  }
  return sum;
}

// The same for all integers of a word of 2 or 4 bits, two of which come with one shift: the sums of (1 + q / 4^BITS) x over
// the even places, and of (1 + q / 2^BITS) x over the odd ones.
template <int BITS>
inline void add_pairs(uint word, thread const float* x, thread float& low, thread float& high) {
  for (int j = 0; j < 16 / BITS; j++) {
    const int left = 23 - 2 * BITS - 2 * BITS * j;
    low = fma(mantissa(word, left, ((1u << BITS) - 1u) << (23 - 2 * BITS)), x[2 * j], low);
    high = fma(mantissa(word, left, ((1u << BITS) - 1u) << (23 - BITS)), x[2 * j + 1], high);
  }
}

// UNIT packed integers: as many words as they fill, for 3 bits two words of eight integers.
template <int BITS>
inline uint4 load_packed(device const uchar* unit) {
  if (BITS == 8) return *(device const uint4*)unit;
  uint4 words = 0u;
  if (BITS == 2) words.x = *(device const uint*)unit;
  if (BITS == 3) {  // they start on any multiple of two bytes
    device const ushort* halves = (device const ushort*)unit;
    const uint first = halves[0], second = halves[1], third = halves[2];
    words.x = first | (second & 0xffu) << 16;
    words.y = second >> 8 | third << 8;
  }
  if (BITS == 4) {
    const uint2 two = *(device const uint2*)unit;
    words.x = two.x;
    words.y = two.y;
  }
  return words;
}

// The sum of q x over a unit.
template <int BITS>
inline float packed_dot(uint4 words, thread const Inputs& in) {
  if (BITS == 2 || BITS == 4) {
    float low = 0.0f, high = 0.0f;
    add_pairs<BITS>(words.x, in.x, low, high);
    if (BITS == 4) add_pairs<BITS>(words.y, in.x + 8, low, high);
    return fma(float(1 << 2 * BITS), low - in.even, float(1 << BITS) * (high - in.odd));
  }
  float sum;
  if (BITS == 8) {
    sum = mantissa_dot<BITS, 4>(words.x, in.x) + mantissa_dot<BITS, 4>(words.y, in.x + 4);
    sum += mantissa_dot<BITS, 4>(words.z, in.x + 8) + mantissa_dot<BITS, 4>(words.w, in.x + 12);
  } else {
    sum = mantissa_dot<BITS, 8>(words.x, in.x) + mantissa_dot<BITS, 8>(words.y, in.x + 8);
  }
  return float(1 << BITS) * (sum - (in.even + in.odd));
}

inline float load_plain(thread const Weights& w, ulong index) {
  if (w.storage == F32) return ((device const float*)w.data)[index];
  if (w.storage == F16) return float(((device const half*)w.data)[index]);
  return widen_bf16(((device const ushort*)w.data)[index]);
}

// sums[r] += row + r times the inputs at `column`, for plain rows; beyond the last column nothing is read.
inline void add_plain(thread const Weights& w, uint row, uint column, thread const Inputs& in, thread float* sums) {
  const uint count = min(UNIT, w.columns - column);
  for (uint r = 0; r < ROWS; r++) {
    const ulong start = ulong(min(row + r, w.rows - 1)) * w.columns + column;
    for (uint j = 0; j < count; j++) sums[r] = fma(load_plain(w, start + j), in.x[j], sums[r]);
  }
}

// And for bfloat16 rows of whole units, two weights to a word.
inline void add_bf16(thread const Weights& w, uint row, uint column, thread const Inputs& in, thread float* sums) {
  for (uint r = 0; r < ROWS; r++) {
    device const uchar* unit = w.data + (ulong(min(row + r, w.rows - 1)) * w.columns + column) * 2;
    for (uint half_unit = 0; half_unit < 2; half_unit++) {
      const uint4 words = ((device const uint4*)unit)[half_unit];
      const uint pairs[4] = {words.x, words.y, words.z, words.w};
      for (uint j = 0; j < 4; j++) {
        sums[r] = fma(widen_bf16(pairs[j]), in.x[half_unit * 8 + 2 * j], sums[r]);
        sums[r] = fma(as_type<float>(pairs[j] & 0xffff0000u), in.x[half_unit * 8 + 2 * j + 1], sums[r]);
      }
    }
  }
}

// Inputs from x at `column`: zero beyond `columns`. x is read four at a time where a row is whole units.
template <bool WHOLE>
inline void load_inputs(device const float* x, uint column, uint columns, thread Inputs& in) {
  if (WHOLE || columns % UNIT == 0) {
    for (uint j = 0; j < UNIT / 4; j++) {
      const float4 four = *(device const float4*)(x + column + 4 * j);
      in.x[4 * j] = four.x;
      in.x[4 * j + 1] = four.y;
      in.x[4 * j + 2] = four.z;
      in.x[4 * j + 3] = four.w;
    }
  } else {
    for (uint j = 0; j < UNIT; j++) in.x[j] = column + j < columns ? x[column + j] : 0.0f;
  }
}

inline void sum_inputs(thread Inputs& in) {
  in.even = in.odd = 0.0f;
  for (uint j = 0; j < UNIT; j += 2) {
    in.even += in.x[j];
    in.odd += in.x[j + 1];
  }
}

// The first row of a lane's team, counted from the threadgroup's first.
inline uint team_row(uint simdgroup, uint lane, uint lanes) { return (simdgroup * 32 + lane) / lanes * ROWS; }

// The sum over a team, in each of its lanes.
inline float team_sum(float value, uint lanes) {
  for (uint mask = lanes / 2; mask > 0; mask /= 2) value += simd_shuffle_xor(value, mask);
  return value;
}

// What the inputs are multiplied by before anything else, 1 + norm, and their sum of squares so far: of linears.
struct Norm {
  device const float* weight;
  bool is_wanted;
  float squares;
};

template <bool WHOLE>
inline void take_inputs(device const float* x, uint column, uint columns, thread Norm& norm, thread Inputs& in) {
  load_inputs<WHOLE>(x, column, columns, in);
  if (norm.is_wanted) {
    Inputs weight;
    load_inputs<WHOLE>(norm.weight, column, columns, weight);
    for (uint j = 0; j < UNIT; j++) {
      norm.squares = fma(in.x[j], in.x[j], norm.squares);
      in.x[j] *= 1.0f + weight.x[j];
    }
  }
  sum_inputs(in);
}

// For packed rows, whose columns are whole units. The weights of all rows are requested before any is used. Rows are found
// by 32-bit offsets: a matrix has less than 4 GiB.
template <int BITS, int COUNT>
inline void packed_products(thread const Weights* w, uint row, uint lane, uint lanes, device const float* x,
    thread Norm& norm, thread float* sums) {
  const uint columns = w[0].columns, row_bytes = columns / 8 * BITS;
  uint data_at[COUNT * ROWS], group_at[COUNT * ROWS];
  for (uint m = 0; m < COUNT; m++) {
    for (uint r = 0; r < ROWS; r++) {
      const uint at = min(row + r, w[m].rows - 1);
      data_at[m * ROWS + r] = at * row_bytes;
      group_at[m * ROWS + r] = at * (columns >> w[m].shift);
    }
  }
  for (uint column = lane % lanes * UNIT; column < columns; column += lanes * UNIT) {
    uint4 words[COUNT * ROWS];
    uint scales[COUNT * ROWS], biases[COUNT * ROWS];
    for (uint m = 0; m < COUNT; m++) {
      for (uint r = 0; r < ROWS; r++) {
        const uint group = group_at[m * ROWS + r] + (column >> w[m].shift);
        words[m * ROWS + r] = load_packed<BITS>(w[m].data + (data_at[m * ROWS + r] + column / 8 * BITS));
        scales[m * ROWS + r] = w[m].scales[group];
        biases[m * ROWS + r] = w[m].biases[group];
      }
    }
    Inputs in;
    take_inputs<true>(x, column, columns, norm, in);
    const float total = in.even + in.odd;
    for (uint r = 0; r < COUNT * ROWS; r++) {
      const float sum = fma(widen_bf16(biases[r]), total, sums[r]);
      sums[r] = fma(widen_bf16(scales[r]), packed_dot<BITS>(words[r], in), sum);
    }
  }
}

template <int COUNT>
inline void plain_products(thread const Weights* w, uint row, uint lane, uint lanes, device const float* x,
    thread Norm& norm, thread float* sums) {
  const uint columns = w[0].columns;
  for (uint column = lane % lanes * UNIT; column < columns; column += lanes * UNIT) {
    Inputs in;
    take_inputs<false>(x, column, columns, norm, in);
    for (uint m = 0; m < COUNT; m++) {
      if (w[m].storage == BF16 && columns % UNIT == 0) {
        add_bf16(w[m], row, column, in, sums + m * ROWS);
      } else {
        add_plain(w[m], row, column, in, sums + m * ROWS);
      }
    }
  }
}

// sums[m * ROWS + r] = row + r of matrix m times x, the part of this lane: to be added up over the team. The matrices have
// one storage and one number of columns.
template <int COUNT>
inline void row_products(thread const Weights* w, uint row, uint lane, uint lanes, device const float* x,
    thread Norm& norm, thread float* sums) {
  for (uint r = 0; r < COUNT * ROWS; r++) sums[r] = 0.0f;
  if (row >= w[0].rows && !norm.is_wanted) return;  // every lane of a simdgroup needs the sum of squares
  switch (w[0].storage) {
    case 2: return packed_products<2, COUNT>(w, row, lane, lanes, x, norm, sums);
    case 3: return packed_products<3, COUNT>(w, row, lane, lanes, x, norm, sums);
    case 4: return packed_products<4, COUNT>(w, row, lane, lanes, x, norm, sums);
    case 8: return packed_products<8, COUNT>(w, row, lane, lanes, x, norm, sums);
  }
  plain_products<COUNT>(w, row, lane, lanes, x, norm, sums);
}
