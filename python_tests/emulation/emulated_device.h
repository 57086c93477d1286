// CUDA on the host: the subset that csrc/cuda uses, for kernels compiled as plain C++ (see csrc/cuda/device.cuh).
//
// What a device only might do wrong is made to happen or is an error here: the threads of a block run in random order
// from one barrier to the next, shared memory starts as NaN and has exactly the bytes asked for, and a barrier or
// exchange that a thread misses, a misaligned access, a launch beyond the limits and a read from a block that may have
// ended all fail. Every failure is a std::runtime_error out of `launch`; what AddressSanitizer finds ends the process.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <string>
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__

namespace cbn {

struct Launch;

namespace emulation {

// Runs the threads of a launch within the limits, in an order that is made of the seed; what failed, or nothing.
std::string run(const Launch& launch, const std::function<void()>& thread, unsigned seed);

struct Index {
  unsigned x;
};

// The barriers and exchanges that a thread can arrive at; its source line tells one from another.
struct Site {
  const char* function;
  const char* file;
  int line;
};

// Waits for all threads of the block, of the cluster or, giving `bits` to the others, of the warp, whose bits are
// returned: 32 of them, valid until this thread's next exchange.
void wait_for_block(const Site& site);
void arrive_in_cluster(const Site& site);
void wait_for_cluster(const Site& site);  // after it arrived
const std::uint64_t* exchange_in_warp(unsigned mask, std::uint64_t bits, const Site& site);

unsigned lane();
const void* in_other_block(const void* own, unsigned rank);
void wait_for_copies(int pending);

// Ends the launch; the message goes on from "thread i of block j".
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

void check_aligned(const void* address, std::size_t bytes);

inline float flush_subnormal(float x) { return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.0f, x) : x; }

}  // namespace emulation

unsigned char* shared_memory();
unsigned cluster_size();
unsigned cluster_rank();

inline void cluster_arrive(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  emulation::arrive_in_cluster({"cluster_arrive", file, line});
}
inline void cluster_wait(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  emulation::wait_for_cluster({"cluster_wait", file, line});
}
inline void cluster_sync(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  emulation::arrive_in_cluster({"cluster_sync", file, line});
  emulation::wait_for_cluster({"cluster_sync", file, line});
}

template <class T>
const T* cluster_shared(const T* own, unsigned rank) {
  return static_cast<const T*>(emulation::in_other_block(own, rank));
}

inline float fast_exp2(float x) { return emulation::flush_subnormal(std::exp2(emulation::flush_subnormal(x))); }
inline float fast_reciprocal(float x) { return emulation::flush_subnormal(1 / emulation::flush_subnormal(x)); }

inline void atomic_or(unsigned* word, unsigned bits) { *word |= bits; }

// A thread's copies from global to shared memory happen at once or when they are waited for, each at random.
void copy_async(void* shared, const void* global, int bytes);
void commit_copies();
template <int kPending>
void wait_for_copies() {
  emulation::wait_for_copies(kPending);
}

template <class P>
P load_at_once(const P* address) {
  static_assert(sizeof(P) == 2 || sizeof(P) == 4 || sizeof(P) == 8 || sizeof(P) == 16);
  emulation::check_aligned(address, sizeof(P));
  return *address;
}

template <bool kIsReadAgain, class P>
void store_at_once(P* address, P value) {
  static_assert(sizeof(P) == 2 || sizeof(P) == 4 || sizeof(P) == 8 || sizeof(P) == 16);
  emulation::check_aligned(address, sizeof(P));
  *address = value;
}

inline void device_check(bool condition, const char* expectation) {
  if (!condition) emulation::fail("fails a check: %s", expectation);
}

}  // namespace cbn

extern cbn::emulation::Index threadIdx, blockIdx, blockDim, gridDim;

inline void __syncthreads(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  cbn::emulation::wait_for_block({"__syncthreads", file, line});
}

inline void __syncwarp(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  cbn::emulation::exchange_in_warp(0xffffffffu, 0, {"__syncwarp", file, line});
}

// The value of another lane, `source` of this one's.
template <class T, class Source>
T exchange(unsigned mask, T value, Source source, const cbn::emulation::Site& site) {
  static_assert(std::is_same_v<T, int> || std::is_same_v<T, float> || std::is_same_v<T, double>);
  std::uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  const std::uint64_t* all = cbn::emulation::exchange_in_warp(mask, bits, site);
  std::memcpy(&value, &all[source(cbn::emulation::lane())], sizeof(T));
  return value;
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  if (lanes < 0 || lanes > 31)
    cbn::emulation::fail("is at __shfl_xor_sync with lane mask %d (%s:%d)", lanes, file, line);
  return exchange(mask, value, [&](unsigned lane) { return lane ^ lanes; }, {"__shfl_xor_sync", file, line});
}

// Of lane `from` among the `width` neighbours.
template <class T>
T __shfl_sync(unsigned mask, T value, int from, int width, const char* file = __builtin_FILE(),
              int line = __builtin_LINE()) {
  if (from < 0 || from >= width || width > 32 || (width & (width - 1)) != 0)
    cbn::emulation::fail("is at __shfl_sync with lane %d of %d (%s:%d)", from, width, file, line);
  return exchange(mask, value, [&](unsigned lane) { return lane / width * width + from; }, {"__shfl_sync", file, line});
}

inline int __ffs(int bits) { return __builtin_ffs(bits); }

inline unsigned __ballot_sync(unsigned mask, int predicate, const char* file = __builtin_FILE(),
                              int line = __builtin_LINE()) {
  const std::uint64_t* all = cbn::emulation::exchange_in_warp(mask, predicate != 0, {"__ballot_sync", file, line});
  unsigned ballot = 0;
  for (int lane = 0; lane < 32; ++lane) ballot |= static_cast<unsigned>(all[lane]) << lane;
  return ballot;
}
