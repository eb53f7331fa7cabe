// Metal's shading language on a CPU, as far as our kernels use it: one fiber for each thread of a threadgroup.
//
// A fiber runs until it meets the others: all threads of its simdgroup (simd_sum, matrix products) or of its
// threadgroup (a barrier).  Then the next one runs.  What a GPU leaves undefined is an error here: threads that
// meet at different places, an index outside of an array, two threads that write one element of an output, and
// threadgroup memory that one thread writes and another reads or writes without a barrier in between.
#pragma once
#include <stdint.h>
#include <stdio.h>
#include <string.h>

typedef unsigned int uint;
typedef unsigned short ushort;

// Not from cmath, which takes as long to compile as a kernel.
#define INFINITY __builtin_inff()

#define METAL_FUNC inline
#define thread
#define constant

// Nothing here is shared with another library of the process.
namespace {
namespace emulator {

constexpr int LANES = 32, MAX_THREADS = 1024;

// ---- Fibers ----------------------------------------------------------------------------------------------

extern "C" void emulator_switch(void** from, void* to) __asm__("emulator_switch") __attribute__((visibility("hidden")));
#if defined(__x86_64__)
__asm__(R"(
.text
emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  retq
)");
constexpr int SAVED = 6;  // words below the return address
#elif defined(__aarch64__)
__asm__(R"(
.text
.p2align 2
emulator_switch:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp d8, d9, [sp, #80]
  stp d10, d11, [sp, #96]
  stp d12, d13, [sp, #112]
  stp d14, d15, [sp, #128]
  stp x29, x30, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp d8, d9, [sp, #80]
  ldp d10, d11, [sp, #96]
  ldp d12, d13, [sp, #112]
  ldp d14, d15, [sp, #128]
  ldp x29, x30, [sp, #144]
  add sp, sp, #160
  ret
)");
constexpr int SAVED = 19;
#else
#error "no fibers for this processor"
#endif

enum State { RUNS, AT_SIMDGROUP, AT_BARRIER, DONE };
struct Fiber {
  void* stack_pointer;
  State state;
  int line;  // of the call that waits
  int turn;  // of the slots of an exchange
};

static Fiber fibers[MAX_THREADS];
static char* stacks;              // one after the other
static int64_t stack_bytes;       // of each
static void* scheduler;
static int now, n_threads;        // the thread that runs; threads of a threadgroup
static int epoch, first_epoch;    // counts barriers in all runs; the first of this threadgroup
static int threadgroup_number;    // from 1, in each run
static int threadgroup_bytes;     // of its arrays
static int64_t bytes_read;        // of device memory, once for each threadgroup
static bool backwards;            // the order in which simdgroups and their threads run
static char message[200];         // the first error
static void (*body)(int);         // the kernel as one thread

inline void wait(State state, int line) {
  fibers[now].state = state;
  fibers[now].line = line;
  emulator_switch(&fibers[now].stack_pointer, scheduler);
}

// The thread that runs stops here.
template <typename... A>
[[noreturn]] __attribute__((noinline)) void fail(const char* format, A... a) {
  snprintf(message, sizeof message, format, a...);
  wait(DONE, 0);
  __builtin_trap();
}

inline void fiber_main() {
  body(now);
  wait(DONE, 0);
}

inline void start(int i) {
  void** top = (void**)(stacks + (i + 1) * stack_bytes) - 2;
#if defined(__x86_64__)
  // A function begins eight bytes after a multiple of 16.
  fibers[i].stack_pointer = top - 2 - SAVED;
  memset(fibers[i].stack_pointer, 0, (SAVED + 4) * sizeof(void*));
  top[-2] = (void*)fiber_main;
#else
  fibers[i].stack_pointer = top - 1 - SAVED;
  memset(fibers[i].stack_pointer, 0, (SAVED + 3) * sizeof(void*));
  top[-1] = (void*)fiber_main;  // x30
#endif
  fibers[i].state = RUNS;
  fibers[i].turn = 0;
}

// Whether threads `first` to `first + count` wait at the same place.
inline bool together(int first, int count, const char* otherwise) {
  for (int i = first + 1; i < first + count; i++)
    if (fibers[i].state != fibers[first].state || fibers[i].line != fibers[first].line) {
      snprintf(message, sizeof message, "%s: lines %d and %d", otherwise, fibers[first].line, fibers[i].line);
      return false;
    }
  return true;
}

// All threads of a simdgroup, until they wait for other simdgroups.
inline bool run_simdgroup(int first) {
  const int count = n_threads - first < LANES ? n_threads - first : LANES;
  do {
    for (int i = 0; i < count; i++) {
      now = first + (backwards ? count - 1 - i : i);
      emulator_switch(&scheduler, fibers[now].stack_pointer);
      if (message[0]) return false;
    }
    if (!together(first, count, "threads of a simdgroup part")) return false;
  } while (fibers[first].state == AT_SIMDGROUP);
  return true;
}

inline bool run_threadgroup() {
  threadgroup_number++;
  threadgroup_bytes = 0;
  first_epoch = epoch + 1;
  const int simdgroups = (n_threads + LANES - 1) / LANES;
  for (int i = 0; i < n_threads; i++) start(i);
  do {
    epoch++;
    for (int i = 0; i < simdgroups; i++)
      if (!run_simdgroup((backwards ? simdgroups - 1 - i : i) * LANES)) return false;
    if (!together(0, n_threads, "not all threads reach a barrier")) return false;
  } while (fibers[0].state == AT_BARRIER);
  return true;
}

inline void set_up(int threads, bool last_first, char* memory, int64_t memory_of_a_thread) {
  threadgroup_number = bytes_read = 0;
  stacks = memory;
  stack_bytes = memory_of_a_thread;
  n_threads = threads;
  backwards = last_first;
  message[0] = 0;
}

// ---- Pointers with an address space and bounds -----------------------------------------------------------

struct device_space { static constexpr int64_t counts = 1; };
struct constant_space { static constexpr int64_t counts = 0; };  // a few numbers, which are not memory traffic

// An input.  `readers` has the last threadgroup that read each element.
template <typename Space, typename T>
struct pointer {
  T *at, *begin, *end;
  int* readers;
  T& operator[](int64_t i) const {
    if (at + i < begin || at + i >= end)
      fail("index %lld of an array of %lld", (long long)(at + i - begin), (long long)(end - begin));
    int& reader = readers[at + i - begin];
    if (reader != threadgroup_number) bytes_read += sizeof(T) * Space::counts;
    reader = threadgroup_number;
    return at[i];
  }
  T& operator*() const { return (*this)[0]; }
  pointer operator+(int64_t i) const { return {at + i, begin, end, readers}; }
};

// An output.  Each element has one thread that writes it, and no thread reads it.
template <typename T>
struct output_reference {
  T& value;
  int& writer;
  void operator=(T x) const {
    const int me = threadgroup_number * MAX_THREADS + now;
    if (writer != 0 && writer != me) fail("two threads write one element of the output");
    writer = me;
    value = x;
  }
};
template <typename T>
struct output_pointer {
  T* values;
  int* writers;
  int64_t at, size;
  output_reference<T> operator[](int64_t i) const {
    if (at + i < 0 || at + i >= size)
      fail("index %lld of an output of %lld", (long long)(at + i), (long long)size);
    return {values[at + i], writers[at + i]};
  }
  output_pointer operator+(int64_t i) const { return {values, writers, at + i, size}; }
};

// Threadgroup memory.  Of each element: which thread wrote and read it last, and in which epoch.
struct Access {
  int write_epoch, writer, read_epoch, reader;
};
constexpr int SEVERAL = -1;

inline void note_read(Access& a) {
  if (a.write_epoch == epoch && a.writer != now) fail("a thread reads what another writes, without a barrier");
  a.reader = a.read_epoch == epoch && a.reader != now ? SEVERAL : now;
  a.read_epoch = epoch;
}
inline void note_write(Access& a) {
  if ((a.write_epoch == epoch && a.writer != now) || (a.read_epoch == epoch && a.reader != now))
    fail("a thread writes what another writes or reads, without a barrier");
  a.write_epoch = epoch;
  a.writer = now;
}

template <typename T>
struct reference {
  T& value;
  Access& access;
  operator T() const { note_read(access); return value; }
  T operator=(T x) const { note_write(access); return value = x; }
  T operator=(const reference& x) const { return *this = T(x); }
  template <typename X> T operator+=(X x) const { return *this = T(*this) + x; }
  template <typename X> T operator*=(X x) const { return *this = T(*this) * x; }
  template <typename X> T operator/=(X x) const { return *this = T(*this) / x; }
};

constexpr int MAX_THREADGROUP_BYTES = 32 << 10;

template <typename T>
struct threadgroup_pointer {
  T* values;
  Access* accesses;
  int64_t at, size;
  reference<T> operator[](int64_t i) const {
    if (at + i < 0 || at + i >= size)
      fail("index %lld of threadgroup memory of %lld", (long long)(at + i), (long long)size);
    return {values[at + i], accesses[at + i]};
  }
  threadgroup_pointer operator+(int64_t i) const { return {values, accesses, at + i, size}; }
};

template <typename T, int N>
struct threadgroup_array {
  T values[N];
  Access accesses[N];
  int filled_in;  // which epoch; statics begin with 0
  // Each thread declares it; the first of a threadgroup finds it full of NaN.
  void declare() {
    if (filled_in >= first_epoch) return;
    filled_in = epoch;
    memset((void*)values, 0xff, sizeof values);
    threadgroup_bytes += sizeof values;
    if (threadgroup_bytes > MAX_THREADGROUP_BYTES) fail("%d bytes of threadgroup memory", threadgroup_bytes);
  }
  reference<T> operator[](int64_t i) { return threadgroup_pointer<T>(*this)[i]; }
  threadgroup_pointer<T> operator+(int64_t i) { return {values, accesses, i, N}; }
  operator threadgroup_pointer<T>() { return *this + 0; }
};

// ---- What the threads of a simdgroup do together ---------------------------------------------------------

// A thread can be one exchange ahead of the others, so two sets of slots are enough.
template <typename T> struct Slots { static T values[2][MAX_THREADS]; };
template <typename T> T Slots<T>::values[2][MAX_THREADS];

template <typename T>
inline const T* exchange(T value, int line) {
  T* slots = Slots<T>::values[fibers[now].turn ^= 1];
  slots[now] = value;
  wait(AT_SIMDGROUP, line);
  return slots + now / LANES * LANES;
}
inline int lanes() { const int first = now / LANES * LANES; return n_threads - first < LANES ? n_threads - first : LANES; }

inline void place(int lane, int& row, int& column) {
  const int quad = lane / 4;
  row = (quad & 4) + lane / 2 % 4;
  column = (quad & 2) * 2 + lane % 2 * 2;
}

}  // namespace emulator

// ---- Metal's names ---------------------------------------------------------------------------------------

struct uint3 { uint x, y, z; };
struct ulong2 { unsigned long x, y; ulong2(unsigned long x, unsigned long y) : x(x), y(y) {} };

struct bfloat {
  uint16_t bits;
  bfloat() = default;
  bfloat(float x) {
    uint32_t u;
    memcpy(&u, &x, 4);
    bits = x != x ? 0x7fc0 : (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  }
  operator float() const {
    const uint32_t u = uint32_t(bits) << 16;
    float x;
    memcpy(&x, &u, 4);
    return x;
  }
};
struct half {
  _Float16 value;
  half() = default;
  half(float x) : value(_Float16(x)) {}
  operator float() const { return float(value); }
};
typedef bfloat bfloat16_t;
typedef half float16_t;

namespace metal {
template <typename T, int N> struct vec;
template <typename T> struct vec<T, 2> {
  T x, y;
  vec() = default;
  explicit vec(T a) : x(a), y(a) {}
  vec(T a, T b) : x(a), y(b) {}
  T& operator[](int i) { return i ? y : x; }
};
inline float max(float a, float b) { return a > b || b != b ? a : b; }
inline float min(float a, float b) { return a < b || b != b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline int min(int a, int b) { return a < b ? a : b; }
inline float exp(float x) { return __builtin_expf(x); }
inline float log(float x) { return __builtin_logf(x); }
}  // namespace metal
typedef metal::vec<float, 2> float2;

struct mem_flags { enum flags { mem_none, mem_device, mem_threadgroup }; };
inline void threadgroup_barrier(mem_flags::flags, int line = __builtin_LINE()) {
  emulator::wait(emulator::AT_BARRIER, line);
}

template <typename T> inline T simd_shuffle_xor(T value, ushort mask, int line = __builtin_LINE()) {
  const T* all = emulator::exchange(value, line);
  return all[(emulator::now % emulator::LANES) ^ mask];
}
template <typename T> inline T simd_shuffle(T value, ushort lane, int line = __builtin_LINE()) {
  return emulator::exchange(value, line)[lane];
}
template <typename T> inline T simd_sum(T value, int line = __builtin_LINE()) {
  const T* all = emulator::exchange(value, line);
  T sum = 0;
  for (int i = 0; i < emulator::lanes(); i++) sum += all[i];
  return sum;
}
template <typename T> inline T simd_max(T value, int line = __builtin_LINE()) {
  const T* all = emulator::exchange(value, line);
  for (int i = 0; i < emulator::lanes(); i++) value = metal::max(value, all[i]);
  return value;
}
template <typename T> inline T simd_min(T value, int line = __builtin_LINE()) {
  const T* all = emulator::exchange(value, line);
  for (int i = 0; i < emulator::lanes(); i++) value = metal::min(value, all[i]);
  return value;
}

template <typename T, int R, int C> struct simdgroup_matrix {
  T elements[2];
  T* thread_elements() { return elements; }
};
template <typename T, typename P>
inline void emulator_load(simdgroup_matrix<T, 8, 8>& m, P from, unsigned long stride, bool transposed) {
  int row, column;
  emulator::place(emulator::now % emulator::LANES, row, column);
  for (int j = 0; j < 2; j++)
    m.elements[j] = transposed ? from[(column + j) * stride + row] : from[row * stride + column + j];
}
// The pointer's elements have the matrix's type, as Metal demands.
template <typename T, typename Space>
inline void simdgroup_load(
    simdgroup_matrix<T, 8, 8>& m, emulator::pointer<Space, const T> from, unsigned long stride,
    ulong2 = {0, 0}, bool transposed = false) {
  emulator_load(m, from, stride, transposed);
}
template <typename T>
inline void simdgroup_load(
    simdgroup_matrix<T, 8, 8>& m, emulator::threadgroup_pointer<T> from, unsigned long stride,
    ulong2 = {0, 0}, bool transposed = false) {
  emulator_load(m, from, stride, transposed);
}
template <typename A, typename B>
inline void simdgroup_multiply_accumulate(
    simdgroup_matrix<float, 8, 8>& d, simdgroup_matrix<A, 8, 8>& a, simdgroup_matrix<B, 8, 8>& b,
    simdgroup_matrix<float, 8, 8>& c, int line = __builtin_LINE()) {
  struct Both { float a[2], b[2]; };
  const Both* all = emulator::exchange(
      Both{{float(a.elements[0]), float(a.elements[1])}, {float(b.elements[0]), float(b.elements[1])}}, line);
  int row, column;
  emulator::place(emulator::now % emulator::LANES, row, column);
  // The thread that holds (row, j): of an even column j of the left matrix, and of a row j of the right one.
  auto holder = [](int row, int column) { return (row & 3) * 2 + (row & 4) * 4 + (column & 2) / 2 + (column & 4) * 2; };
  float sums[2] = {c.elements[0], c.elements[1]};
  for (int j = 0; j < 8; j++) {
    const float left = all[holder(row, j)].a[j & 1];
    const Both& right = all[holder(j, column)];
    sums[0] += left * right.b[0];
    sums[1] += left * right.b[1];
  }
  d.elements[0] = sums[0];
  d.elements[1] = sums[1];
}

using namespace metal;
}  // namespace
