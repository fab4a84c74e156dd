// Packed weights past the L1 cache: a token's kernels read each once. Put into kernel files by text, after matrix.h.

// matrix.h's load_packed, past the L1, but for three bits: a lane's three words are three loads from one sector, which
// would be fetched three times.
template <int BITS>
inline void load_packed_once(device const uchar* unit, thread uint* words) {
  if (BITS == 3) return load_packed<BITS>(unit, words);
  if (BITS == 2) {
    const uint2 two = load_once((device const uint2*)unit);
    words[0] = two.x;
    words[1] = two.y;
    return;
  }
#pragma unroll
  for (uint i = 0; i < BITS / 4; i++) {
    const uint4 four = load_once((device const uint4*)unit + i);
    words[4 * i] = four.x;
    words[4 * i + 1] = four.y;
    words[4 * i + 2] = four.z;
    words[4 * i + 3] = four.w;
  }
}
