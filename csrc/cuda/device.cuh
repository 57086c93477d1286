// The part of CUDA that the kernels use, under the names they use. With CBN_EMULATION the same names run on the
// host.
#pragma once

#include "../mixture.h"
#include "launch.h"

#if defined(CBN_EMULATION)
#include "emulated_device.h"
#else

#include <cuda_runtime.h>

#include <cassert>
#include <cstring>
#include <type_traits>

namespace cbn {

// The block's dynamic shared memory.
__device__ __forceinline__ unsigned char* shared_memory() {
  extern __shared__ __align__(16) unsigned char bytes[];
  return bytes;
}

// The cluster of blocks that this block is launched in; a block alone is a cluster of one.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
__device__ __forceinline__ unsigned cluster_size() { return __clusterSizeInBlocks(); }
__device__ __forceinline__ unsigned cluster_rank() { return __clusterRelativeBlockRank(); }
__device__ __forceinline__ void cluster_sync() {
  __cluster_barrier_arrive();
  __cluster_barrier_wait();
}
// The two halves of a barrier after which no memory is read: a thread arrives when it needs the other blocks no more,
// and waits before its own block ends. Relaxed, or it would wait until all that it stored is visible.
__device__ __forceinline__ void cluster_arrive() { __cluster_barrier_arrive_relaxed(); }
__device__ __forceinline__ void cluster_wait() { __cluster_barrier_wait(); }
// The same address in the shared memory of another block of the cluster.
template <class T>
__device__ __forceinline__ const T* cluster_shared(const T* own, unsigned rank) {
  return static_cast<const T*>(__cluster_map_shared_rank(own, rank));
}
#else
__device__ __forceinline__ unsigned cluster_size() { return 1; }
__device__ __forceinline__ unsigned cluster_rank() { return 0; }
__device__ __forceinline__ void cluster_sync() { __syncthreads(); }
__device__ __forceinline__ void cluster_arrive() {}
__device__ __forceinline__ void cluster_wait() {}
template <class T>
__device__ __forceinline__ const T* cluster_shared(const T* own, unsigned) {
  return own;
}
#endif

__device__ __forceinline__ float fast_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float fast_reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ void atomic_or(unsigned* word, unsigned bits) { atomicOr(word, bits); }

// Copies 4, 8 or 16 bytes, aligned to their size, from global to shared memory, while the thread goes on.
__device__ __forceinline__ void copy_async(void* shared, const void* global, int bytes) {
  const unsigned to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  if (bytes == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(global) : "memory");
  else if (bytes == 8)
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(to), "l"(global) : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(to), "l"(global) : "memory");
}

// Makes a group of the thread's copies since the last group.
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most `kPending` of the thread's groups are under way; the thread sees the others' bytes.
template <int kPending>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// A word of as many bytes as P has: loads and stores of it are one instruction.
template <class P>
struct WordOf {
  static_assert(sizeof(P) == 2 || sizeof(P) == 4 || sizeof(P) == 8 || sizeof(P) == 16);
  using Narrow = std::conditional_t<sizeof(P) == 2, unsigned short, unsigned>;
  using type = std::conditional_t<sizeof(P) <= 4, Narrow, std::conditional_t<sizeof(P) == 8, uint2, uint4> >;
};

template <class P>
__device__ __forceinline__ P load_at_once(const P* from) {
  using Word = typename WordOf<P>::type;
  const Word word = *reinterpret_cast<const Word*>(from);
  P value;
  memcpy(&value, &word, sizeof(P));
  return value;
}

// What is not read again soon goes first when the cache needs room.
template <bool kIsReadAgain, class P>
__device__ __forceinline__ void store_at_once(P* to, P value) {
  using Word = typename WordOf<P>::type;
  Word word;
  memcpy(&word, &value, sizeof(P));
  if constexpr (kIsReadAgain)
    *reinterpret_cast<Word*>(to) = word;
  else
    __stcs(reinterpret_cast<Word*>(to), word);
}

// Stops the kernel and the CUDA context with an error that names what was expected, whatever NDEBUG says.
__device__ __forceinline__ void device_check(bool condition, const char* expectation) {
  if (!condition) __assert_fail(expectation, "cbn_ext", 0, "");
}

}  // namespace cbn

#endif  // CBN_EMULATION
