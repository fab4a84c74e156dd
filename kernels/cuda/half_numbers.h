// Weights and inputs as halves, as NVIDIA's matrix units take them. Put into kernel files by text, after matrix.h.
//
// A quantized integer among the bits of a half is a half as it stands: a subnormal one, which the units multiply like
// any other. So masks and shifts are all that unpacking takes; of eight neighbours of a row they make four pairs of a
// column and the one four further on. But the units line up products by their exponents and cut off what is more than
// 25 bits below the largest; a subnormal half has the exponent -14, however small it is. So integers lie as high in a
// half as comes for nothing.
//
// Inputs are scaled together by a power of two, so that the largest is just below 2^15. Each is then the sum of two
// halves, which keep 22 bits and more of it, and of a small one all that is more than 2^-39 of the largest.

// By what such a half has to be multiplied to be the integer again: 2^24, 2^20 or 2^18.
template <int BITS>
inline constexpr float half_steps() {
  return BITS == 8 ? 16777216.0f : BITS == 4 ? 1048576.0f : 262144.0f;
}

// Eight neighbouring weights as halves: columns 0 and 4, 1 and 5, 2 and 6, 3 and 7. They are the lowest bits of `low`;
// at 8 bits the last four are in `high`; at 2 bits they are the upper half of `low` if `high` is set.
template <int BITS>
inline void unpack_eight(uint low, uint high, thread uint* pairs) {
  if (BITS == 8) {
    const uint first = permute_bytes(low, high, 0x5140u), second = permute_bytes(low, high, 0x7362u);
    pairs[0] = permute_bytes(first, 0, 0x4140u);
    pairs[1] = permute_bytes(first, 0, 0x4342u);
    pairs[2] = permute_bytes(second, 0, 0x4140u);
    pairs[3] = permute_bytes(second, 0, 0x4342u);
  } else if (BITS == 4) {
    pairs[0] = low << 4 & 0x00f000f0u;
    pairs[1] = low & 0x00f000f0u;
    pairs[2] = low >> 4 & 0x00f000f0u;
    pairs[3] = low >> 8 & 0x00f000f0u;
  } else if (BITS == 3) {
    const uint both = (low & 0xfffu) | (low << 4 & 0x0fff0000u);
    pairs[0] = both << 6 & 0x01c001c0u;
    pairs[1] = both << 3 & 0x01c001c0u;
    pairs[2] = both & 0x01c001c0u;
    pairs[3] = both >> 3 & 0x01c001c0u;
  } else {
    const uint both = permute_bytes(low, 0, high ? 0x4342u : 0x4140u);
    pairs[0] = both << 6 & 0x00c000c0u;
    pairs[1] = both << 4 & 0x00c000c0u;
    pairs[2] = both << 2 & 0x00c000c0u;
    pairs[3] = both & 0x00c000c0u;
  }
}

// A float as the sum of two that have eleven bits, as the units' own floats do; 22 of its 24 are kept.
inline void split_eleven(float value, thread uint& high, thread uint& low) {
  high = as_type<uint>(value) & 0xffffe000u;
  low = as_type<uint>(value - as_type<float>(high));
}

// Two floats as pairs of halves: the nearest ones, and the nearest to what is left.
inline void split_pair(float first, float second, thread uint& high, thread uint& low) {
  high = pack_halves(first, second);
  low = pack_halves(first - first_half(high), second - second_half(high));
}

struct Scaling {
  float factor;  // that inputs are multiplied by
  float worth;   // 1 / factor
};

// For inputs of which the largest has this magnitude. The factor is at most 2^126, so that both are normal floats.
inline Scaling scaling_of(float largest) {
  const uint exponent = min(max(as_type<uint>(largest) >> 23, 15u), 254u);  // as floats store it, plus 127
  return {as_type<float>((127u + 14u + 127u - exponent) << 23), as_type<float>((exponent - 14u) << 23)};
}

// Eight neighbouring inputs as the halves that meet the pairs of unpack_eight: the higher ones, and the lower.
inline void split_eight(float4 first, float4 second, float factor, thread uint* high, thread uint* low) {
  split_pair(first.x * factor, second.x * factor, high[0], low[0]);
  split_pair(first.y * factor, second.y * factor, high[1], low[1]);
  split_pair(first.z * factor, second.z * factor, high[2], low[2]);
  split_pair(first.w * factor, second.w * factor, high[3], low[3]);
}
