// The part of CUDA that the kernels use, under the names they use. With CBN_EMULATION the same names run on the
// host.
#pragma once

#include "../mixture.h"
#include "launch.h"

#if defined(CBN_EMULATION)
#include "emulated_device.h"
#else

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/shim_utils.h>

#include <cassert>
#include <map>
#include <mutex>

namespace cbn {

#if defined(__CUDACC__)

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
// The same address in the shared memory of another block of the cluster.
template <class T>
__device__ __forceinline__ const T* cluster_shared(const T* own, unsigned rank) {
  return static_cast<const T*>(__cluster_map_shared_rank(own, rank));
}
#else
__device__ __forceinline__ unsigned cluster_size() { return 1; }
__device__ __forceinline__ unsigned cluster_rank() { return 0; }
__device__ __forceinline__ void cluster_sync() { __syncthreads(); }
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

// Integers of so many bytes, that move in one instruction.
template <size_t kBytes>
struct Word;
template <>
struct Word<2> {
  using Type = unsigned short;
};
template <>
struct Word<4> {
  using Type = unsigned;
};
template <>
struct Word<8> {
  using Type = uint2;
};
template <>
struct Word<16> {
  using Type = uint4;
};

// What is stored is not read again here: it goes first when the cache needs room.
template <class P>
__device__ __forceinline__ void store_global(P* to, P value) {
  using W = typename Word<sizeof(P)>::Type;
  W word;
  memcpy(&word, &value, sizeof(P));
  __stcs(reinterpret_cast<W*>(to), word);
}

// Stops the kernel and the CUDA context with an error that names what was expected, whatever NDEBUG says.
__device__ __forceinline__ void device_check(bool condition, const char* expectation) {
  if (!condition) __assert_fail(expectation, "cbn_ext", 0, "");
}

#endif  // __CUDACC__

inline void check(cudaError_t status) {
  STD_TORCH_CHECK(status == cudaSuccess, "CUDA error: ", cudaGetErrorString(status));
}

using DeviceGuard = torch::stable::accelerator::DeviceGuard;
using Stream = cudaStream_t;

inline Stream current_stream(int device) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return static_cast<Stream>(stream);
}

#if defined(__CUDACC__)

static __global__ void compiled_version() {}

inline Device device_properties(int index) {
  static std::mutex mutex;
  static std::map<int, Device> known;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find(index);
  if (found != known.end()) return found->second;
  Device device{};
  int clusters = 0;
  check(cudaDeviceGetAttribute(&device.multiprocessors, cudaDevAttrMultiProcessorCount, index));
  check(cudaDeviceGetAttribute(&device.shared_memory, cudaDevAttrMaxSharedMemoryPerBlockOptin, index));
  check(cudaDeviceGetAttribute(&clusters, cudaDevAttrClusterLaunch, index));
  // Code compiled for an older device knows no clusters, also when it runs on a newer one.
  cudaFuncAttributes attributes;
  check(cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(&compiled_version)));
  device.cluster = clusters && attributes.ptxVersion >= 90 ? kLargestCluster : 1;
  return known[index] = device;
}

#endif

struct Launch {
  int64_t blocks;
  int threads;
  int cluster;
  unsigned shared;
};

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), const Launch& shape, Stream stream, Arguments... arguments) {
  const void* function = reinterpret_cast<const void*>(kernel);
  // What a block may have without asking.
  constexpr unsigned kUsualShared = 48 << 10;
  if (shape.shared > kUsualShared)
    check(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shape.shared)));
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(shape.blocks));
  config.blockDim = dim3(static_cast<unsigned>(shape.threads));
  config.dynamicSmemBytes = shape.shared;
  config.stream = stream;
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = static_cast<unsigned>(shape.cluster);
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  config.attrs = &cluster;
  config.numAttrs = shape.cluster > 1 ? 1 : 0;
  check(cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...));
}

}  // namespace cbn

#endif  // CBN_EMULATION
