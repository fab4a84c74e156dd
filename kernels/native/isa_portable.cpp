// What the compiler makes of plain C++ at the build's own target: the fallback everywhere, and the easiest to read.
#include <cmath>
#include <cstring>

#include "kernels.h"
#include "scratch.h"

namespace moepack {
namespace portable {

constexpr const char* ISA_NAME = "portable";
#include "vec.h"
#include "int8_portable.h"
#include "isa_body.inl"

}  // namespace portable
}  // namespace moepack
