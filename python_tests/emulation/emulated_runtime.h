// CUDA's runtime on the host: the functions that csrc/cuda/runtime.h calls, under their names, for the emulated device.
//
// As on a device, an error is returned and also remembered as the last one, a kernel's blocks have more shared memory
// than usual only where that was asked for, and clusters may be smaller than the architecture allows.
#pragma once

#include <cstdint>
#include <functional>
#include <tuple>

#include "emulated_device.h"

enum cudaError_t { cudaSuccess, cudaErrorInvalidValue };
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrL2CacheSize,
  cudaDevAttrClusterLaunch
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension };

using cudaStream_t = void*;

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3() = default;
  explicit dim3(unsigned x) : x(x) {}
};

struct cudaFuncAttributes {
  int ptxVersion;
};

struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    dim3 clusterDim;
  } val;
};

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  std::size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

cudaError_t cudaGetLastError();  // and forgets it
const char* cudaGetErrorString(cudaError_t);
cudaError_t cudaGetDevice(int* index);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int index);
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* kernel);
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value);
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, const void* kernel, const cudaLaunchConfig_t* config);

namespace cbn {
namespace emulation {

// Calls `thread` for every thread of a launch of `kernel`.
cudaError_t launch(const void* kernel, const cudaLaunchConfig_t& config, const std::function<void()>& thread);

}  // namespace emulation

inline cudaStream_t current_stream(int) { return nullptr; }

struct DeviceGuard {
  explicit DeviceGuard(int) {}
};

}  // namespace cbn

template <class... P, class... A>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(P...), A... arguments) {
  const std::tuple<P...> parameters(arguments...);
  return cbn::emulation::launch(reinterpret_cast<const void*>(kernel), *config,
                                [&] { std::apply(kernel, parameters); });
}
