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

// The same for one of two numbers, without a branch.
template <int kFew, int kMany>
__device__ __forceinline__ void wait_for_copies(bool many) {
  asm volatile(
      "{\n"
      "  .reg .pred many;\n"
      "  setp.ne.s32 many, %0, 0;\n"
      "  @many cp.async.wait_group %1;\n"
      "  @!many cp.async.wait_group %2;\n"
      "}" ::"r"(static_cast<int>(many)),
      "n"(kMany), "n"(kFew)
      : "memory");
}

// What is stored is not read again here: it goes first when the cache needs room. One instruction, of the value's size.
template <class P>
__device__ __forceinline__ void store_global(P* to, P value) {
  constexpr int kBytes = sizeof(P);
  using Narrow = std::conditional_t<kBytes == 2, unsigned short, unsigned>;
  using Word = std::conditional_t<kBytes <= 4, Narrow, std::conditional_t<kBytes == 8, uint2, uint4> >;
  Word word;
  memcpy(&word, &value, sizeof(Word));
  __stcs(reinterpret_cast<Word*>(to), word);
}

// Stops the kernel and the CUDA context with an error that names what was expected, whatever NDEBUG says.
__device__ __forceinline__ void device_check(bool condition, const char* expectation) {
  if (!condition) __assert_fail(expectation, "cbn_ext", 0, "");
}

}  // namespace cbn

#endif  // CBN_EMULATION
