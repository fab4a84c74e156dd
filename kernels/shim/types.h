// The Metal Shading Language's types and mathematics, as far as the kernels use them, for a C++ or CUDA compiler.
// The includer defines MSL_FUNCTION (how a function is declared) and has memcpy and the <math.h> functions at hand.
#pragma once

namespace metal {

typedef unsigned int uint;
typedef unsigned short ushort;
typedef unsigned char uchar;
typedef unsigned long ulong;  // 64 bits in MSL, and on every 64-bit Unix

template <class To, class From>
MSL_FUNCTION To as_type(From from) {
  static_assert(sizeof(To) == sizeof(From), "as_type: sizes differ");
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

// IEEE half precision, for reading only: the kernels compute in float.
struct half {
  ushort bits;
  MSL_FUNCTION operator float() const {
    const uint sign = uint(bits & 0x8000u) << 16, magnitude = bits & 0x7fffu;
    if (magnitude >= 0x7c00u) return as_type<float>(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
    // The bits read as a float are 2^-112 times the value, subnormal numbers included.
    const float value = as_type<float>(magnitude << 13) * 5.192296858534828e33f;  // 2^112
    return as_type<float>(as_type<uint>(value) | sign);
  }
};

template <class T, int N>
struct vec;
template <class T>
struct alignas(2 * sizeof(T)) vec<T, 2> {
  T x, y;
  vec() = default;
  MSL_FUNCTION vec(T x, T y) : x(x), y(y) {}
};
template <class T>
struct alignas(4 * sizeof(T)) vec<T, 3> {
  T x, y, z;
  vec() = default;
  MSL_FUNCTION vec(T x, T y, T z) : x(x), y(y), z(z) {}
};
template <class T>
struct alignas(4 * sizeof(T)) vec<T, 4> {
  T x, y, z, w;
  vec() = default;
  MSL_FUNCTION vec(T all) : x(all), y(all), z(all), w(all) {}
  MSL_FUNCTION vec(T x, T y, T z, T w) : x(x), y(y), z(z), w(w) {}
};
typedef vec<uint, 2> uint2;
typedef vec<uint, 3> uint3;
typedef vec<uint, 4> uint4;
typedef vec<float, 2> float2;
typedef vec<float, 4> float4;

template <class T>
MSL_FUNCTION T min(T a, T b) {
  return b < a ? b : a;
}
template <class T>
MSL_FUNCTION T max(T a, T b) {
  return a < b ? b : a;
}
MSL_FUNCTION float fma(float a, float b, float c) { return ::fmaf(a, b, c); }
MSL_FUNCTION float exp(float x) { return ::expf(x); }
MSL_FUNCTION float log(float x) { return ::logf(x); }
MSL_FUNCTION float rsqrt(float x) { return 1.0f / ::sqrtf(x); }
namespace precise {  // right for large arguments too, whatever the compiler's mathematics mode
MSL_FUNCTION float sin(float x) { return ::sinf(x); }
MSL_FUNCTION float cos(float x) { return ::cosf(x); }
}  // namespace precise

enum class mem_flags { mem_none = 0, mem_device = 1, mem_threadgroup = 2 };

}  // namespace metal
