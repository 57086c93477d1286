// The host's side of the emulated device: its facts, its limits and its errors.
#include "emulated_runtime.h"

#include <cxxabi.h>
#include <dlfcn.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "cuda/launch.h"

namespace cbn {
namespace emulation {
namespace {

constexpr int kMostThreads = 1024;
constexpr std::int64_t kMostBlocks = (std::int64_t{1} << 31) - 1;
constexpr int kUsualShared = 48 * 1024;
constexpr int kCache = 50 << 20;

// What CBN_EMULATED_DEVICE=multiprocessors,shared_memory,cluster says: bytes of a block, and the blocks of the largest
// cluster that can run; 1: the architecture has no clusters.
Device emulated_device() {
  const char* text = std::getenv("CBN_EMULATED_DEVICE");
  if (text == nullptr) return {4, 64 * 1024, kLargestCluster, kCache};
  Device device{0, 0, 0, kCache};
  char rest;
  if (std::sscanf(text, "%d,%d,%d%c", &device.multiprocessors, &device.shared_memory, &device.cluster, &rest) != 3 ||
      device.multiprocessors < 1 || device.shared_memory < 0 || device.cluster < 1)
    throw std::runtime_error("expected CBN_EMULATED_DEVICE=multiprocessors,shared_memory,cluster, got " +
                             std::string(text));
  return device;
}

// Bytes of shared memory that a kernel's blocks may have, where they were asked for; and every such call.
std::map<const void*, int> shared_limits;
std::vector<std::pair<const void*, int>> limit_calls;
cudaError_t last_error = cudaSuccess;
std::string error_text;

cudaError_t refused(const std::string& text) {
  error_text = text;
  return last_error = cudaErrorInvalidValue;
}

std::string check(const void* kernel, const Launch& launch) {
  const Device device = emulated_device();
  const auto limit = shared_limits.find(kernel);
  const int shared = std::min(device.shared_memory, limit == shared_limits.end() ? kUsualShared : limit->second);
  if (launch.blocks < 1 || launch.blocks > kMostBlocks) return "expected 1 to 2^31 - 1 blocks";
  if (launch.threads < 1 || launch.threads > kMostThreads) return "expected 1 to 1024 threads";
  if (launch.cluster < 1 || launch.cluster > device.cluster || launch.blocks % launch.cluster != 0)
    return "expected clusters of 1 to " + std::to_string(device.cluster) + " blocks that divide the number of blocks";
  if (launch.shared > static_cast<unsigned>(shared))
    return "expected at most " + std::to_string(shared) + " bytes of shared memory";
  return "";
}

// What was launched since the library was loaded: symbol and cluster of the kernel, and the most blocks.
std::map<std::pair<std::string, int>, std::int64_t> launches;

std::string symbol_of(const void* kernel) {
  Dl_info info;
  return dladdr(kernel, &info) && info.dli_saddr == kernel ? info.dli_sname : "kernel_without_external_linkage";
}

std::string demangled(const std::string& symbol) {
  int status = 0;
  char* name = abi::__cxa_demangle(symbol.c_str(), nullptr, nullptr, &status);
  const std::string result = status == 0 ? name : symbol;
  std::free(name);
  return result;
}

std::string described(const Launch& launch) {
  return std::to_string(launch.blocks) + " blocks, " + std::to_string(launch.threads) + " threads, clusters of " +
         std::to_string(launch.cluster) + ", " + std::to_string(launch.shared) + " bytes of shared memory";
}

}  // namespace

// A launch that breaks a limit is refused with an error; one that goes wrong while it runs throws.
cudaError_t launch(const void* kernel, const cudaLaunchConfig_t& config, const std::function<void()>& thread) {
  static std::mutex one_at_a_time;
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  const char* text = std::getenv("CBN_EMULATION_SEED");
  const unsigned seed = text ? std::stoul(text) : 0;
  const int clusters = config.numAttrs ? static_cast<int>(config.attrs->val.clusterDim.x) : 1;
  const Launch shape{config.gridDim.x, static_cast<int>(config.blockDim.x), clusters,
                     static_cast<unsigned>(config.dynamicSmemBytes)};
  const auto message = [&](const std::string& failure) {
    return "emulated " + demangled(symbol_of(kernel)) + ": " + failure + " [" + described(shape) +
           ", CBN_EMULATION_SEED=" + std::to_string(seed) + "]";
  };
  if (const std::string failure = check(kernel, shape); !failure.empty()) return refused(message(failure));
  std::int64_t& most_blocks = launches[{symbol_of(kernel), shape.cluster}];
  most_blocks = std::max(most_blocks, shape.blocks);
  if (const std::string failure = run(shape, thread, seed); !failure.empty())
    throw std::runtime_error(message(failure));
  return cudaSuccess;
}

}  // namespace emulation
}  // namespace cbn

using namespace cbn::emulation;

cudaError_t cudaGetLastError() { return std::exchange(last_error, cudaSuccess); }

const char* cudaGetErrorString(cudaError_t status) { return status == cudaSuccess ? "no error" : error_text.c_str(); }

cudaError_t cudaGetDevice(int* index) {
  *index = 0;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  const cbn::Device device = emulated_device();
  *value = attribute == cudaDevAttrMultiProcessorCount            ? device.multiprocessors
           : attribute == cudaDevAttrL2CacheSize                  ? device.cache
           : attribute == cudaDevAttrMaxSharedMemoryPerBlockOptin ? device.shared_memory
                                                                  : device.cluster > 1;
  return cudaSuccess;
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  attributes->ptxVersion = 90;
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int value) {
  limit_calls.push_back({kernel, value});
  if (value > emulated_device().shared_memory) return refused("more shared memory than the device has");
  shared_limits[kernel] = value;
  return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, const void*, const cudaLaunchConfig_t* config) {
  const cbn::Device device = emulated_device();
  const int size = static_cast<int>(config->attrs->val.clusterDim.x);
  *clusters = size <= device.cluster ? std::max(1, device.multiprocessors / size) : 0;
  return cudaSuccess;
}

// Lines of "symbol cluster blocks": what was launched since the library was loaded, with how many blocks at most.
extern "C" const char* cbn_emulation_launches() {
  static std::string lines;
  lines.clear();
  for (const auto& [kernel, most_blocks] : launches)
    lines += kernel.first + " " + std::to_string(kernel.second) + " " + std::to_string(most_blocks) + "\n";
  return lines.c_str();
}

// Lines of "symbol bytes": every call that set a kernel's limit of shared memory.
extern "C" const char* cbn_emulation_limits() {
  static std::string lines;
  lines.clear();
  for (const auto& [kernel, bytes] : limit_calls) lines += symbol_of(kernel) + " " + std::to_string(bytes) + "\n";
  return lines.c_str();
}
