// Inputs as bytes, as NVIDIA's matrix units take them. Put into kernel files by text, after matrix.h.
//
// Inputs are scaled together by a power of two, so that the largest has 22 bits, rounded, and cut into three signed
// bytes, digits to the base 256, the highest one first. What is lost of an input is 2^-22 of the largest among them.

constant constexpr uint DIGITS = 3;

struct Scaling {
  float factor;  // that inputs are multiplied by
  float worth;   // of one in the first digit
};

// For inputs of which the largest has this magnitude.
inline Scaling scaling_of(float largest) {
  // largest * factor < 2^22 - 2^15 - 2^7: a mantissa near 2 counts as the next power of two.
  const uint exponent = min(max((as_type<uint>(largest) + 0x20400u) >> 23, 24u), 254u);  // of 2, from -127 on
  return {as_type<float>((127u + 127u + 21u - exponent) << 23), as_type<float>((exponent - 21u + 16u) << 23)};
}

// An input's integer, in the mantissa beside 1.5 * 2^23, with half of what a digit can hold added to the lower two:
// so that what becomes negative below has been carried into the next one. Its bytes are digits then, but for their
// signs.
inline uint number_of(float value, float factor) { return as_type<uint>(fma(value, factor, 12582912.0f + 32896.0f)); }

// Its digits, each in the lowest byte; the bytes above are anything.
inline uint first_digit(uint number) { return ((number >> 16) + 0x40u) ^ 0x80u; }
inline uint second_digit(uint number) { return number >> 8 ^ 0x80u; }
inline uint third_digit(uint number) { return number ^ 0x80u; }

// The digits of four numbers, side by side: words[d] has the d-th of each.
inline void pack_digits(thread const uint* numbers, thread uint* words) {
  const uint low[2] = {permute_bytes(numbers[0], numbers[1], 0x5140u), permute_bytes(numbers[2], numbers[3], 0x5140u)};
  const uint high[2] = {permute_bytes(numbers[0], numbers[1], 0x0062u), permute_bytes(numbers[2], numbers[3], 0x0062u)};
  words[2] = permute_bytes(low[0], low[1], 0x5410u) ^ 0x80808080u;
  words[1] = permute_bytes(low[0], low[1], 0x7632u) ^ 0x80808080u;
  words[0] = (permute_bytes(high[0], high[1], 0x5410u) + 0x40404040u) ^ 0x80808080u;
}
