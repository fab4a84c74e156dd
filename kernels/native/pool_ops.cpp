// The threads, as the interface sees them.
#include "kernels.h"
#include "pool.h"

API void moepack_set_threads(int threads) { moepack::Pool::get().resize(threads); }
API int moepack_threads() { return moepack::Pool::get().size(); }
