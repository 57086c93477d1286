// What kernels and launches are made of, by itself: compiled for a device or for the emulation, and called by name.
#include "cuda/device.cuh"
#include "cuda/runtime.h"

#include <exception>
#include <string>

namespace probe {

using namespace cbn;

constexpr int kThreads = 256;

__global__ void exp2(const float* x,  // [size]
                     float* y,        // [size]
                     int64_t size) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < size) y[i] = fast_exp2(x[i]);
}

__global__ void reciprocal(const float* x,  // [size]
                           float* y,        // [size]
                           int64_t size) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < size) y[i] = fast_reciprocal(x[i]);
}

// Launches a kernel on the first device; what went wrong, or an empty string.
template <class... Arguments>
const char* start(void (*kernel)(Arguments...), const Launch& shape, Arguments... arguments) {
  static std::string error;
  error.clear();
  try {
    launch(kernel, shape, current_stream(0), arguments...);
  } catch (const std::exception& failure) {
    error = failure.what();
  }
  return error.c_str();
}

const char* map(void (*kernel)(const float*, float*, int64_t), const float* x, float* y, int64_t size) {
  return start(kernel, {divide_up(size, kThreads), kThreads, 1, 0}, x, y, size);
}

}  // namespace probe

extern "C" const char* probe_exp2(const float* x, float* y, int64_t size) {
  return probe::map(probe::exp2, x, y, size);
}

extern "C" const char* probe_reciprocal(const float* x, float* y, int64_t size) {
  return probe::map(probe::reciprocal, x, y, size);
}

// With more threads than a block can have.
extern "C" const char* probe_refused_launch() {
  const float* none = nullptr;
  return probe::start(probe::exp2, {1, 2048, 1, 0}, none, static_cast<float*>(nullptr), int64_t{0});
}

// The runtime's, which this call clears; 0 if there is none.
extern "C" int probe_last_error() { return static_cast<int>(cudaGetLastError()); }
