// Kernels over the components of channels: what is done once with complete sums, and other functions of an element.
#pragma once

#include "../statistics.h"
#include "reduce.cuh"

namespace cbn {

// Merges the splits' sums of a component and finishes it, a warp for each.
template <class S, bool kForward>
__global__ void finish_kernel(const __grid_constant__ Arguments a) {
  constexpr int kRows = kForward ? kMomentRows : kGradientRows;
  const int64_t size = a.components * a.channels;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * (blockDim.x / kWarp) + threadIdx.x / kWarp;
  if (i >= size) return;
  double sums[kRows] = {};
  for (int64_t split = threadIdx.x % kWarp; split < a.splits; split += kWarp)
    for (int row = 0; row < kRows; ++row)
      sums[row] += static_cast<const S*>(a.partials)[(split * kRows + row) * size + i];
  for (int row = 0; row < kRows; ++row) sums[row] = warp_sum(sums[row], 1);
  if (threadIdx.x % kWarp != 0) return;
  const Component<S> component{a, i};
  const double origin = a.splits ? static_cast<const S*>(a.origins)[i % a.channels] : 0;
  if constexpr (kForward)
    component.write_batch(component.finish(sums, origin));
  else
    component.write_gradients(component.finish(sums, origin, component.used()), sums[0]);
}

// f(i) for i < count, a thread for each.
template <class F>
__global__ void for_each_kernel(const __grid_constant__ F f, int64_t count) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < count) f(i);
}

}  // namespace cbn
