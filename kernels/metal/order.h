// Floats as integers in the same order, so that the largest of many is one reduction of integers, and so that NaN has a
// place: a compiler's fast mathematics may take comparisons with NaN out. Put into kernel files by text, by msl.py.

constant constexpr uint NOTHING = 0;  // below all
constant constexpr uint LOWEST = 1;   // where NaN may be put: below -inf, or above +inf
constant constexpr uint HIGHEST = 4294967295;

// The place of a float in their order; -0 is 0.
inline uint order_of(float value, uint nan) {
  const uint bits = as_type<uint>(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return nan;
  const bool is_negative = bits > 0x80000000u;
  return is_negative ? ~bits : bits | 0x80000000u;
}

// The float at a place; NaN at both of NaN's.
inline float float_at(uint order) { return as_type<float>(order & 0x80000000u ? order ^ 0x80000000u : ~order); }
