// The executor of simt.h. Fibers with a switch of a dozen instructions; ucontext where it has not been written.
// Sanitizers must be told of each switch: SIMT_ADDRESS and SIMT_THREAD say which one is compiled in.
#include "simt.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <vector>

#if defined(__x86_64__) && !defined(SIMT_PORTABLE)
#define SIMT_SWITCH 1
#else
#include <ucontext.h>
#endif

extern "C" {
#ifdef SIMT_ADDRESS
void __sanitizer_start_switch_fiber(void** save, const void* bottom, size_t size);
void __sanitizer_finish_switch_fiber(void* save, const void** bottom, size_t* size);
#endif
#ifdef SIMT_THREAD
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void* fiber);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_acquire(void* address);
void __tsan_release(void* address);
#endif
#ifdef SIMT_SWITCH
void simt_switch(void** from, void* to);
#endif
}

#ifdef SIMT_SWITCH
asm(R"(
.text
.globl simt_switch
.type simt_switch,@function
simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp,(%rdi)
  movq %rsi,%rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");
#endif

namespace {

#ifdef SIMT_THREAD
const size_t STACK_BYTES = 16 << 10;
const bool FRESH_STACKS = true;  // ThreadSanitizer would take the next threadgroup's use of a stack for a race
#else
const size_t STACK_BYTES = 256 << 10;
const bool FRESH_STACKS = false;
#endif
const char* const OPERATIONS[] = {"running", "a shuffle", "simd_sum", "simd_max", "simd_min",
    "a simdgroup matrix operation", "simdgroup_barrier", "threadgroup_barrier", "finished"};

const unsigned MAX_COPIES = 256;
simt_copy copies[SIMT_MAX_THREADS][MAX_COPIES];  // of each lane: begun, and not waited for

struct Fiber {
  simt_place place;
  unsigned num_copies;
  simt_operation waits;
  // So far: their parity picks one of two sets of values, and of marks for TSan. Barriers of a simdgroup and of the
  // threadgroup are counted apart, since simdgroups may meet at different numbers of their own.
  unsigned exchanges, barriers[2];
  char* stack;
#ifdef SIMT_SWITCH
  void* stack_pointer;
#else
  ucontext_t context;
#endif
  void *address_save, *thread_fiber;
};

struct Simdgroup {
  uint64_t values[2][3 * SIMT_LANES];
  unsigned arrived;
};

struct Variable {
  void* memory;
  size_t size_bytes;
};

// Threadgroup memory. AddressSanitizer sees the ends of allocations; ThreadSanitizer would take an allocation for an
// access of the lane that made it, so there each threadgroup gets new addresses out of one mapping.
struct Arena {
#ifdef SIMT_THREAD
  char* base;
  size_t used, size_bytes;

  SIMT_UNCHECKED void open(size_t threadgroups) {
    used = 0;
    size_bytes = 2 * simt_threadgroup_limit * threadgroups;
    base = (char*)mmap(nullptr, size_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  }
  SIMT_UNCHECKED void* allocate(size_t bytes) {
    char* memory = base + used;
    used += (bytes + 63) / 64 * 64;
    if (used > size_bytes) abort();
    return memory;
  }
  SIMT_UNCHECKED void release(void*) {}
  SIMT_UNCHECKED void close() { munmap(base, size_bytes); }
#else
  void open(size_t) {}
  void* allocate(size_t bytes) { return malloc(bytes); }
  void release(void* memory) { free(memory); }
  void close() {}
#endif
};

struct Machine {
  std::vector<Fiber> fibers;
  std::vector<Simdgroup> simdgroups;
  std::vector<Variable> variables;
  std::vector<char*> stacks;
  std::vector<void*> thread_fibers;  // kept to the end of a launch: of those that are gone no race is reported
  size_t stacks_bytes;
  Arena arena;
  Fiber* current;
  unsigned arrived, finished;  // at the threadgroup's barrier; done
  simt_kernel kernel;
  void** buffers;
  size_t threadgroup_bytes;
  uint64_t chance;  // state of the random numbers by which copies are early; 0: all are late
  char error[256];
#ifdef SIMT_SWITCH
  void* stack_pointer;
#else
  ucontext_t context;
#endif
  void *address_save, *thread_fiber;
  const void* stack_bottom;
  size_t stack_size;
  char at_start, at_end, at_barrier[2], at_simdgroup[SIMT_MAX_THREADS / SIMT_LANES][2];  // marks for TSan
} machine;

SIMT_UNCHECKED void acquire(char* mark) {
#ifdef SIMT_THREAD
  __tsan_acquire(mark);
#else
  (void)mark;
#endif
}

SIMT_UNCHECKED void release(char* mark) {
#ifdef SIMT_THREAD
  __tsan_release(mark);
#else
  (void)mark;
#endif
}

SIMT_UNCHECKED void leave(bool for_ever) {  // from a fiber to the scheduler
  Fiber* fiber = machine.current;
#ifdef SIMT_ADDRESS
  __sanitizer_start_switch_fiber(for_ever ? nullptr : &fiber->address_save, machine.stack_bottom, machine.stack_size);
#endif
#ifdef SIMT_THREAD
  __tsan_switch_to_fiber(machine.thread_fiber, 1);  // 1: a switch orders nothing
#endif
  (void)for_ever;
#ifdef SIMT_SWITCH
  simt_switch(&fiber->stack_pointer, machine.stack_pointer);
#else
  swapcontext(&fiber->context, &machine.context);
#endif
#ifdef SIMT_ADDRESS
  __sanitizer_finish_switch_fiber(fiber->address_save, &machine.stack_bottom, &machine.stack_size);
#endif
}

SIMT_UNCHECKED void enter(Fiber* fiber) {  // from the scheduler to a fiber
  machine.current = fiber;
#ifdef SIMT_ADDRESS
  __sanitizer_start_switch_fiber(&machine.address_save, fiber->stack, STACK_BYTES);
#endif
#ifdef SIMT_THREAD
  __tsan_switch_to_fiber(fiber->thread_fiber, 1);
#endif
#ifdef SIMT_SWITCH
  simt_switch(&machine.stack_pointer, fiber->stack_pointer);
#else
  swapcontext(&machine.context, &fiber->context);
#endif
#ifdef SIMT_ADDRESS
  __sanitizer_finish_switch_fiber(machine.address_save, nullptr, nullptr);
#endif
}

SIMT_UNCHECKED void run_lane() {
#ifdef SIMT_ADDRESS
  __sanitizer_finish_switch_fiber(nullptr, &machine.stack_bottom, &machine.stack_size);
#endif
  acquire(&machine.at_start);
  machine.kernel(machine.buffers);
  release(&machine.at_end);  // for the caller alone: threadgroups of one launch are not ordered
  machine.current->waits = SIMT_DONE;
  machine.finished++;
  leave(true);
  abort();
}

// The lane waits; the last one of `group` releases them all.
SIMT_UNCHECKED void wait_for(unsigned* arrived, unsigned group_size, unsigned first, simt_operation operation) {
  Fiber* fiber = machine.current;
  fiber->waits = operation;
  if (++*arrived == group_size) {
    *arrived = 0;
    for (unsigned i = first; i < first + group_size; i++) {
      if (machine.fibers[i].waits != operation) return leave(false);  // diverged: the scheduler will say so
    }
    for (unsigned i = first; i < first + group_size; i++) machine.fibers[i].waits = SIMT_RUNNING;
  } else {
    leave(false);
  }
}

SIMT_UNCHECKED void wait_for_simdgroup(simt_operation operation) {
  const unsigned simdgroup = machine.current->place.simdgroup;
  wait_for(&machine.simdgroups[simdgroup].arrived, SIMT_LANES, simdgroup * SIMT_LANES, operation);
}

SIMT_UNCHECKED void free_stacks() {
  for (char* stacks : machine.stacks) munmap(stacks, machine.stacks_bytes);
  machine.stacks.clear();
}

SIMT_UNCHECKED void make_fibers(unsigned threads) {
  if (machine.fibers.size() == threads && !FRESH_STACKS) return;
  if (!FRESH_STACKS) free_stacks();
  machine.stacks_bytes = threads * STACK_BYTES;
  // Not the library's mmap: a sanitizer would take it for a write to all of it.
  const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  char* stacks = (char*)syscall(SYS_mmap, nullptr, machine.stacks_bytes, PROT_READ | PROT_WRITE, flags, -1, 0);
  machine.stacks.push_back(stacks);
  machine.fibers.assign(threads, Fiber());
  for (unsigned i = 0; i < threads; i++) machine.fibers[i].stack = stacks + i * STACK_BYTES;
  machine.simdgroups.assign(threads / SIMT_LANES, Simdgroup());
}

SIMT_UNCHECKED void prepare_stack(Fiber& fiber) {
#ifdef SIMT_SWITCH
  uint64_t* top = (uint64_t*)(fiber.stack + STACK_BYTES);
  *--top = 0;
  *--top = (uint64_t)run_lane;
  for (int i = 0; i < 6; i++) *--top = 0;
  fiber.stack_pointer = top;
#else
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack;
  fiber.context.uc_stack.ss_size = STACK_BYTES;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, run_lane, 0);
#endif
}

SIMT_UNCHECKED void prepare_threadgroup(const unsigned* position, const unsigned* grid, const unsigned* group) {
  const unsigned threads = group[0] * group[1] * group[2];
  make_fibers(threads);
  release(&machine.at_start);
  machine.arrived = machine.finished = 0;
  for (unsigned i = 0; i < threads; i++) {
    Fiber& fiber = machine.fibers[i];
    fiber.waits = SIMT_RUNNING;
    fiber.num_copies = 0;
    fiber.exchanges = fiber.barriers[0] = fiber.barriers[1] = 0;
    const unsigned thread[3] = {i % group[0], i / group[0] % group[1], i / group[0] / group[1]};
    for (int d = 0; d < 3; d++) {
      fiber.place.thread[d] = thread[d];
      fiber.place.threadgroup[d] = position[d];
      fiber.place.threads_per_threadgroup[d] = group[d];
      fiber.place.threadgroups[d] = grid[d];
    }
    fiber.place.index = i;
    fiber.place.lane = i % SIMT_LANES;
    fiber.place.simdgroup = i / SIMT_LANES;
    fiber.place.threads = threads;
    prepare_stack(fiber);
#ifdef SIMT_THREAD
    fiber.thread_fiber = __tsan_create_fiber(0);
    machine.thread_fibers.push_back(fiber.thread_fiber);
#endif
  }
  for (Simdgroup& simdgroup : machine.simdgroups) simdgroup.arrived = 0;
}

SIMT_UNCHECKED void finish_threadgroup() {
  size_t size_bytes = 0;
  for (Variable& variable : machine.variables) {
    size_bytes += variable.size_bytes;
    machine.arena.release(variable.memory);
    variable = {nullptr, 0};
  }
  machine.threadgroup_bytes = std::max(machine.threadgroup_bytes, size_bytes);
}

SIMT_UNCHECKED uint64_t advance(uint64_t& state) {
  state ^= state << 13;
  state ^= state >> 7;
  state ^= state << 17;
  return state;
}

struct Order {
  unsigned kind;
  uint64_t state;

  SIMT_UNCHECKED explicit Order(unsigned kind) : kind(kind), state(kind * 0x9E3779B97F4A7C15ull + 1) {}

  SIMT_UNCHECKED void arrange(std::vector<unsigned>& numbers) {
    const unsigned count = numbers.size();
    for (unsigned i = 0; i < count; i++) numbers[i] = kind == 1 ? count - 1 - i : i;
    for (unsigned i = count; kind > 1 && i > 1; i--) {
      std::swap(numbers[i - 1], numbers[advance(state) % i]);
    }
  }
};

// Runs the lanes of the prepared threadgroup to their ends; false if they cannot all get there.
SIMT_UNCHECKED bool run_threadgroup(Order& order, std::vector<unsigned>& lanes) {
  while (machine.finished < machine.fibers.size()) {
    bool ran = false;
    order.arrange(lanes);
    for (unsigned lane : lanes) {
      if (machine.fibers[lane].waits != SIMT_RUNNING) continue;
      ran = true;
      enter(&machine.fibers[lane]);
    }
    if (!ran) return false;
  }
  return true;
}

SIMT_UNCHECKED void fail_diverged(const unsigned* position) {
  unsigned counts[SIMT_DONE + 1] = {};
  for (Fiber& fiber : machine.fibers) counts[fiber.waits]++;
  int used = snprintf(machine.error, sizeof machine.error, "lanes diverged in threadgroup (%u, %u, %u):", position[0],
      position[1], position[2]);
  for (int i = 0; i <= SIMT_DONE; i++) {
    if (counts[i])
      used += snprintf(machine.error + used, sizeof machine.error - used, " %u at %s,", counts[i], OPERATIONS[i]);
  }
  machine.error[used - 1] = 0;
}

// The operands of all lanes of the simdgroup: four words of the left one and two of the right one each.
SIMT_UNCHECKED const unsigned* show_operands(const unsigned* a, const unsigned* b) {
  Fiber* fiber = machine.current;
  unsigned* shown = (unsigned*)machine.simdgroups[fiber->place.simdgroup].values[fiber->exchanges++ & 1];
  const unsigned lane = fiber->place.lane;
  for (unsigned i = 0; i < 4; i++) shown[6 * lane + i] = a[i];
  for (unsigned i = 0; i < 2; i++) shown[6 * lane + 4 + i] = b[i];
  wait_for_simdgroup(SIMT_MATRIX);
  return shown;
}

SIMT_UNCHECKED float float_of(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

SIMT_UNCHECKED float widen_half(unsigned bits) {
  const unsigned sign = (bits & 0x8000u) << 16, magnitude = bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return float_of(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
  const float value = float_of(magnitude << 13) * 0x1p112f;
  return sign ? -value : value;
}

// -14 for a subnormal half, however small it is.
SIMT_UNCHECKED int half_exponent(unsigned bits) {
  const int stored = bits >> 10 & 0x1fu;
  return (stored ? stored : 1) - 15;
}

constexpr int OF_ZERO = -1000;  // an exponent below all others

// sum + eight products, as the matrix units add them: what is more than 25 bits below the largest exponent is cut off,
// and the exponent of a product is the sum of its factors'.
SIMT_UNCHECKED float add_cut(float sum, const float* products, const int* exponents) {
  int exponent = sum == 0.0f ? OF_ZERO : __builtin_ilogbf(sum);
  float plain = sum;
  for (int i = 0; i < 8; i++) {
    if (products[i] != 0.0f && exponents[i] > exponent) exponent = exponents[i];
    plain += products[i];
  }
  if (exponent == OF_ZERO || !__builtin_isfinite(plain)) return plain;
  const double scale = __builtin_ldexp(1.0, 25 - exponent);
  int64_t total = (int64_t)(sum * scale);
  for (int i = 0; i < 8; i++) total += (int64_t)(products[i] * scale);
  int64_t unit = 1;
  while (total / unit >= 1 << 24 || total / unit <= -(1 << 24)) unit *= 2;
  return (float)((double)(total / unit * unit) * __builtin_ldexp(1.0, exponent - 25));
}

}  // namespace

SIMT_UNCHECKED const simt_place& simt_here() { return machine.current->place; }

SIMT_UNCHECKED bool simt_begin_copy(const simt_copy& copy) {
  Fiber* fiber = machine.current;
  if (machine.chance && advance(machine.chance) >> 32 & 1) return true;
  if (fiber->num_copies == MAX_COPIES) abort();
  copies[fiber->place.index][fiber->num_copies++] = copy;
  return false;
}

SIMT_UNCHECKED unsigned simt_take_copies(const simt_copy** taken) {
  Fiber* fiber = machine.current;
  const unsigned count = fiber->num_copies;
  *taken = copies[fiber->place.index];
  fiber->num_copies = 0;
  return count;
}

SIMT_UNCHECKED const uint64_t* simt_exchange(uint64_t value, simt_operation operation) {
  Fiber* fiber = machine.current;
  uint64_t* values = machine.simdgroups[fiber->place.simdgroup].values[fiber->exchanges++ & 1];
  values[fiber->place.lane] = value;
  wait_for_simdgroup(operation);
  return values;
}

SIMT_UNCHECKED void simt_multiply(float* to, const float* a, const float* b, const float* c) {
  Fiber* fiber = machine.current;
  float* shown = (float*)machine.simdgroups[fiber->place.simdgroup].values[fiber->exchanges++ & 1];
  const unsigned lane = fiber->place.lane, row = lane / 4, column = lane % 4 * 2;
  for (unsigned i = 0; i < 2; i++) {
    shown[2 * lane + i] = a[i];
    shown[64 + 2 * lane + i] = b[i];
  }
  wait_for_simdgroup(SIMT_MATRIX);
  for (unsigned i = 0; i < 2; i++) {
    float sum = c[i];
    for (unsigned k = 0; k < 8; k++) sum = __builtin_fmaf(shown[row * 8 + k], shown[64 + k * 8 + column + i], sum);
    to[i] = sum;
  }
}

SIMT_UNCHECKED void simt_multiply_bytes(int* sums, const unsigned* a, const unsigned* b) {
  const unsigned* shown = show_operands(a, b);
  const unsigned lane = machine.current->place.lane, g = lane / 4, t = lane % 4;
  for (unsigned i = 0; i < 4; i++) {
    const unsigned column = 2 * t + i % 2;
    for (unsigned k = 0; k < 32; k++) {  // byte k lies in lane k / 4 % 4 of a row's four, in the first word or the other
      const unsigned part = k / 16, shift = k % 4 * 8;
      const unsigned left = shown[6 * (4 * g + k / 4 % 4) + 2 * part + i / 2];
      const unsigned right = shown[6 * (4 * column + k / 4 % 4) + 4 + part];
      sums[i] += int(left >> shift & 0xffu) * (signed char)(right >> shift & 0xffu);
    }
  }
}

SIMT_UNCHECKED void simt_multiply_halves(float* sums, const unsigned* a, const unsigned* b) {
  const unsigned* shown = show_operands(a, b);
  const unsigned lane = machine.current->place.lane, g = lane / 4, t = lane % 4;
  for (unsigned i = 0; i < 4; i++) {
    float products[16];
    int exponents[16];
    for (unsigned k = 0; k < 16; k++) {  // number k lies in lane k / 2 % 4 of a row's four, in the first word or the other
      const unsigned part = k / 8, shift = k % 2 * 16;
      const unsigned left = shown[6 * (4 * g + k / 2 % 4) + 2 * part + i / 2];
      const unsigned right = shown[6 * (4 * (2 * t + i % 2) + k / 2 % 4) + 4 + part];
      products[k] = widen_half(left >> shift & 0xffffu) * widen_half(right >> shift & 0xffffu);
      exponents[k] = half_exponent(left >> shift) + half_exponent(right >> shift);
    }
    sums[i] = add_cut(add_cut(sums[i], products, exponents), products + 8, exponents + 8);
  }
}

SIMT_UNCHECKED void simt_multiply_tf32(float* sums, const unsigned* a, const unsigned* b) {
  const unsigned* shown = show_operands(a, b);
  const unsigned lane = machine.current->place.lane, g = lane / 4, t = lane % 4;
  for (unsigned i = 0; i < 4; i++) {
    float products[8];
    int exponents[8];
    for (unsigned k = 0; k < 8; k++) {
      const unsigned left = shown[6 * (4 * g + k % 4) + k / 4 * 2 + i / 2];
      const unsigned right = shown[6 * (4 * (2 * t + i % 2) + k % 4) + 4 + k / 4];
      products[k] = float_of(left & 0xffffe000u) * float_of(right & 0xffffe000u);
      exponents[k] = int(left >> 23 & 0xffu) + int(right >> 23 & 0xffu) - 254;
    }
    sums[i] = add_cut(sums[i], products, exponents);
  }
}

SIMT_UNCHECKED void simt_wait(simt_operation barrier, bool orders_memory) {
  Fiber* fiber = machine.current;
  const bool whole = barrier == SIMT_BARRIER;
  const unsigned parity = fiber->barriers[whole]++ & 1;
  char* mark = whole ? &machine.at_barrier[parity] : &machine.at_simdgroup[fiber->place.simdgroup][parity];
  if (orders_memory) release(mark);
  if (whole) {
    wait_for(&machine.arrived, machine.fibers.size(), 0, barrier);
  } else {
    wait_for_simdgroup(barrier);
  }
  if (orders_memory) acquire(mark);
}

SIMT_UNCHECKED void* simt_threadgroup_memory(unsigned number, size_t size_bytes) {
  if (machine.variables.size() <= number) machine.variables.resize(number + 1);
  Variable& variable = machine.variables[number];
  if (!variable.memory) {
    variable = {machine.arena.allocate(size_bytes), size_bytes};
    for (size_t i = 0; i < size_bytes; i++)
      ((volatile char*)variable.memory)[i] = (char)0xff;  // a memset would be watched
  }
  return variable.memory;
}

SIMT_UNCHECKED int simt_launch(
    simt_kernel kernel, void** buffers, const unsigned* grid, const unsigned* group, unsigned order_kind) {
  const unsigned threads = group[0] * group[1] * group[2], threadgroups = grid[0] * grid[1] * grid[2];
  machine.error[0] = 0;
  machine.threadgroup_bytes = 0;
  if (threads == 0 || threads > SIMT_MAX_THREADS || threads % SIMT_LANES) {
    snprintf(machine.error, sizeof machine.error, "a threadgroup of %u threads: a multiple of 32 up to 1024 is needed",
        threads);
    return 1;
  }
  machine.kernel = kernel;
  machine.buffers = buffers;
#ifdef SIMT_THREAD
  machine.thread_fiber = __tsan_get_current_fiber();
#endif
  Order order(order_kind);
  machine.chance = order_kind > 1 ? ~order.state : 0;
  std::vector<unsigned> numbers(threadgroups), lanes(threads);
  order.arrange(numbers);
  machine.arena.open(threadgroups);
  for (unsigned number : numbers) {
    const unsigned position[3] = {number % grid[0], number / grid[0] % grid[1], number / grid[0] / grid[1]};
    prepare_threadgroup(position, grid, group);
    const bool finished = run_threadgroup(order, lanes);
    finish_threadgroup();
    if (!finished) {
      fail_diverged(position);
      break;
    }
    if (machine.threadgroup_bytes > simt_threadgroup_limit) {
      snprintf(machine.error, sizeof machine.error, "%zu bytes of threadgroup memory: at most %zu",
          machine.threadgroup_bytes, simt_threadgroup_limit);
      break;
    }
  }
  machine.arena.close();
#ifdef SIMT_THREAD
  for (void* fiber : machine.thread_fibers) __tsan_destroy_fiber(fiber);
  machine.thread_fibers.clear();
#endif
  if (FRESH_STACKS) free_stacks();
  acquire(&machine.at_end);
  return machine.error[0] != 0;
}

const char* simt_error() { return machine.error; }

size_t simt_threadgroup_bytes() { return machine.threadgroup_bytes; }
