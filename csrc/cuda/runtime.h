// The host's side of CUDA: errors, what a device allows, launches. With CBN_EMULATION the runtime's functions are
// those of the emulation.
#pragma once

#include <torch/headeronly/util/Exception.h>

#include <map>
#include <mutex>
#include <utility>

#include "launch.h"

#if defined(CBN_EMULATION)
#include "emulated_runtime.h"
#define CBN_DISPATCH_KEY CPU  // in place of the CPU operators
#else
#define CBN_DISPATCH_KEY CUDA

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/headeronly/util/shim_utils.h>

namespace cbn {

using DeviceGuard = torch::stable::accelerator::DeviceGuard;

inline cudaStream_t current_stream(int device) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

}  // namespace cbn

#endif

namespace cbn {

inline void check(cudaError_t status) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // or the next launch of PyTorch would be blamed for it
  STD_TORCH_CHECK(false, "CUDA error: ", cudaGetErrorString(status));
}

// What `find` gives, which is called once for each key.
template <class Key, class Find>
auto once_for(const Key& key, Find find) {
  static std::mutex mutex;
  static std::map<Key, decltype(find())> known;
  const std::lock_guard<std::mutex> lock(mutex);
  auto found = known.find(key);
  if (found == known.end()) found = known.emplace(key, find()).first;
  return found->second;
}

static __global__ void compiled_version() {}

inline int current_device() {
  int index = 0;
  check(cudaGetDevice(&index));
  return index;
}

// What the current device allows.
inline Device device_properties() {
  const int index = current_device();
  return once_for(index, [&] {
    Device device{};
    int clusters = 0;
    check(cudaDeviceGetAttribute(&device.multiprocessors, cudaDevAttrMultiProcessorCount, index));
    check(cudaDeviceGetAttribute(&device.shared_memory, cudaDevAttrMaxSharedMemoryPerBlockOptin, index));
    check(cudaDeviceGetAttribute(&device.cache, cudaDevAttrL2CacheSize, index));
    check(cudaDeviceGetAttribute(&clusters, cudaDevAttrClusterLaunch, index));
    // Code compiled for an older device knows no clusters, also when it runs on a newer one.
    cudaFuncAttributes attributes;
    check(cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(&compiled_version)));
    device.cluster = clusters && attributes.ptxVersion >= 90 ? kLargestCluster : 1;
    return device;
  });
}

// What CUDA is told of a launch; `cluster` is where it keeps the cluster's size.
inline cudaLaunchConfig_t configuration(const Launch& shape, cudaStream_t stream, cudaLaunchAttribute& cluster) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(shape.blocks));
  config.blockDim = dim3(static_cast<unsigned>(shape.threads));
  config.dynamicSmemBytes = shape.shared;
  config.stream = stream;
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = static_cast<unsigned>(shape.cluster);
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  config.attrs = &cluster;
  config.numAttrs = shape.cluster > 1 ? 1 : 0;
  return config;
}

// Lets blocks of a kernel have all of the current device's shared memory. Once: a limit that followed the launches
// could be lowered by another thread between two calls, and under a captured graph.
inline void allow_all_shared_memory(const void* kernel) {
  once_for(std::pair(current_device(), kernel), [&] {
    const int most = device_properties().shared_memory;
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most));
    return most;
  });
}

// The largest cluster of blocks with so many threads and all of the shared memory that the current device can run: a
// part of a GPU may have too few multiprocessors side by side.
inline int largest_cluster(const void* kernel, int threads) {
  return once_for(std::pair(current_device(), kernel), [&] {
    const Device device = device_properties();
    allow_all_shared_memory(kernel);
    for (int cluster = device.cluster; cluster > 1; cluster /= 2) {
      const Launch shape{cluster, threads, cluster, static_cast<unsigned>(device.shared_memory)};
      cudaLaunchAttribute attribute{};
      const cudaLaunchConfig_t config = configuration(shape, nullptr, attribute);
      int active = 0;
      if (cudaOccupancyMaxActiveClusters(&active, kernel, &config) == cudaSuccess && active > 0) return cluster;
      cudaGetLastError();
    }
    return 1;
  });
}

// Starts a kernel on a stream of the current device.
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), const Launch& shape, cudaStream_t stream, Arguments... arguments) {
  constexpr unsigned kUsualShared = 48 << 10;  // that a block may have without asking
  if (shape.shared > kUsualShared) allow_all_shared_memory(reinterpret_cast<const void*>(kernel));
  cudaLaunchAttribute cluster{};
  const cudaLaunchConfig_t config = configuration(shape, stream, cluster);
  check(cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...));
}

}  // namespace cbn
