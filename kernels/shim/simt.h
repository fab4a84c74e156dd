// Runs kernels on one CPU thread: each lane of a threadgroup is a fiber, threadgroups run one after another.
//
// A lane runs until it meets a simdgroup operation or a barrier, then the next one does, in an order that the caller
// chooses: code that lacks a barrier gives other numbers in another order, and ThreadSanitizer, which is told of each
// barrier, names the two accesses. Lanes that do not all arrive at the same operation are an error, not a hang.
#pragma once
#include <stddef.h>
#include <stdint.h>

#define SIMT_UNCHECKED __attribute__((no_sanitize("thread", "address", "undefined")))

enum { SIMT_LANES = 32, SIMT_MAX_THREADS = 1024 };

// What a lane can wait at. Lanes of a simdgroup that wait at different operations have diverged.
enum simt_operation {
  SIMT_RUNNING,
  SIMT_SHUFFLE,
  SIMT_SUM,
  SIMT_MAX,
  SIMT_MIN,
  SIMT_MATRIX,
  SIMT_SIMD_BARRIER,
  SIMT_BARRIER,
  SIMT_DONE
};

struct simt_place {  // of a lane: the grid's builtins
  unsigned thread[3], threadgroup[3], threads_per_threadgroup[3], threadgroups[3];
  unsigned index, lane, simdgroup, threads;
};

typedef void (*simt_kernel)(void** buffers);

const simt_place& simt_here();

// A copy of 4-byte words. The lane does it itself, so that a sanitizer watches it: when it waits for its copies and
// takes them, and not before; but at once if simt_begin_copy says so, by chance, in a random order of lanes.
struct simt_copy {
  void* to;
  const void* from;
  unsigned words;
};
bool simt_begin_copy(const simt_copy& copy);
unsigned simt_take_copies(const simt_copy** copies);

// This lane's value to its simdgroup; returns what all 32 lanes gave. Valid until the lane's next operation.
const uint64_t* simt_exchange(uint64_t value, simt_operation operation);

// to = a b + c for matrices of 8 x 8 of which each lane holds elements 2 lane and 2 lane + 1, row by row.
void simt_multiply(float* to, const float* a, const float* b, const float* c);

// sums [16, 8] += a [16, 32], unsigned bytes, times b [32, 8], signed bytes, held by the lanes as shim/cuda.h says.
void simt_multiply_bytes(int* sums, const unsigned* a, const unsigned* b);

// sums [16, 8] += a [16, 16] times b [16, 8] of halves, or [16, 8] times [8, 8] of floats of which only the upper 19 bits
// count, held as shim/cuda.h says. What lies 26 bits below the largest of the numbers added is cut off, and so is what the
// sum has too much: the units do no better.
void simt_multiply_halves(float* sums, const unsigned* a, const unsigned* b);
void simt_multiply_tf32(float* sums, const unsigned* a, const unsigned* b);
void simt_wait(simt_operation barrier, bool orders_memory);

// Memory of a threadgroup variable: the same for all lanes, new for each threadgroup, filled with NaN.
void* simt_threadgroup_memory(unsigned variable, size_t size_bytes);

extern "C" {
extern const size_t simt_threadgroup_limit;  // bytes: the kernels' own file says

// Returns 0, or 1 with simt_error() set. order: 0 lanes and threadgroups ascending, 1 descending, else a random seed.
int simt_launch(simt_kernel kernel, void** buffers, const unsigned* grid, const unsigned* group, unsigned order);
const char* simt_error();
size_t simt_threadgroup_bytes();  // threadgroup memory of the last launch
}
