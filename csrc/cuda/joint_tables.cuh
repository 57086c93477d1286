// What joint mode's passes over all channels of a point take of each channel, laid out in tables by kernels of their
// own.
#pragma once

#include "coefficients.cuh"

namespace cbn {

// What is laid out for a channel: Rows of M, then its origin, padded so that it is read 4 numbers at a time.
template <class S, template <class, int> class Rows, int M>
struct ChannelRows {
  static constexpr int kRows = Rows<S, M>::kRows;
  Pack<S, 4> packs[(kRows * M + 1 + 3) / 4];

  __device__ __forceinline__ S& at(int i) { return packs[i / 4].element[i % 4]; }
  __device__ __forceinline__ S& origin() { return at(kRows * M); }
  __device__ __forceinline__ Rows<S, M> rows() {
    Rows<S, M> result;
    CBN_UNROLL
    for (int i = 0; i < kRows; ++i) {
      CBN_UNROLL
      for (int m = 0; m < M; ++m) result.row(i)[m] = at(i * M + m);
    }
    return result;
  }
};

// What a channel brings to the backward map.
template <class T, int M>
struct PointGradient {
  static constexpr int kRows = DirectGradient<T, M>::kRows + Scores<T, M>::kRows;
  DirectGradient<T, M> direct;
  Scores<T, M> scores;
  CBN_METHOD T* row(int i) {
    constexpr int kRowsOfDirect = DirectGradient<T, M>::kRows;
    return i < kRowsOfDirect ? direct.row(i) : scores.row(i - kRowsOfDirect);
  }
};

// What z = x - origin of a channel is relative to in the sums of Distances; a sample that is not finite must not spoil
// the points that are.
template <class C>
__device__ double origin_of_points(const Arguments& a, int64_t channel) {
  return finite_or(sampled_origin<C>(a, channel), Component<typename C::S>{a, channel}.read(a.mean, 0));
}

// Sums over the channels of a component, in a fixed order: of its peaks, and of its squared distances from
// the channels' medians. A block for each component.
template <class C>
__global__ void __launch_bounds__(kTableThreads, 1) sum_components_kernel(const __grid_constant__ Arguments a) {
  using S = typename C::S;
  double* const sums = reinterpret_cast<double*>(shared_memory());  // [2, threads]
  const int m = blockIdx.x;
  if (m >= a.components) return;
  const double prior = log_prior(Component<S>{a, m * a.channels}.prior(1));
  double height = 0, distance = 0;
  for (int64_t channel = threadIdx.x; channel < a.channels; channel += kTableThreads) {
    const LogDensity density = Component<S>{a, m * a.channels + channel}.density(1);
    height += density.peak;
    distance += squared_distance(density, origin_of_points<C>(a, channel));
  }
  sums[threadIdx.x] = height;
  sums[kTableThreads + threadIdx.x] = distance;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int thread = 1; thread < kTableThreads; ++thread) {
    height += sums[thread];
    distance += sums[kTableThreads + thread];
  }
  a.heights[m] = prior + height;
  a.heights[C::M + m] = distance;
}

// Whether the rows are for sums over the channels: of the log-odds, or of their gradients.
template <template <class, int> class Rows>
constexpr bool kAreForSums =
    std::is_same_v<Rows<float, 1>, Distances<float, 1> > || std::is_same_v<Rows<float, 1>, InputGradient<float, 1> >;

// What the channels bring to a pass: Distances or InputGradient for its sums over them, Branches or PointGradient for
// its map. A block for each compiled component.
template <class C, template <class, int> class Rows>
__global__ void __launch_bounds__(kTableThreads, 1) lay_out_kernel(const __grid_constant__ Arguments a) {
  using S = typename C::S;
  constexpr int M = C::M;
  constexpr bool kWeighs = std::is_same_v<Rows<S, M>, Distances<S, M> >;
  const int m = blockIdx.x;
  const bool exists = m < a.components;
  int reference = 0;
  for (int other = 1; kWeighs && other < a.components; ++other)
    if (a.heights[M + other] < a.heights[M + reference]) reference = other;
  const auto rows_of = [&](const Component<S>& component, double origin) -> Rows<double, 1> {
    if constexpr (kWeighs) {
      const Component<S> nearest{a, reference * a.channels + component.i % a.channels};
      return distances(component.density(1), nearest.density(1), origin);
    } else if constexpr (std::is_same_v<Rows<S, M>, Branches<S, M> >) {
      if (exists) component.keep_running();
      return component.branch(component.used(), origin);
    } else {
      const InputGradient<double, 1> gradient = component.input_gradient(
          component.used(), origin, component.read(a.grad_weight, 0), component.read(a.grad_bias, 0));
      if constexpr (kAreForSums<Rows>)
        return gradient;
      else
        return {direct_gradient(gradient), scores(component.density(1), origin)};
    }
  };
  auto* const table = static_cast<ChannelRows<S, Rows, M>*>(kAreForSums<Rows> ? a.sums_table : a.map_table);
  for (int64_t channel = threadIdx.x; channel < a.channels; channel += kTableThreads) {
    const S origin = static_cast<S>(kWeighs ? origin_of_points<C>(a, channel) : used_origin<S>(a, channel));
    if (m == 0) table[channel].origin() = origin;
    if (m == 0 && kWeighs && a.partials) static_cast<S*>(a.origins)[channel] = origin;
    Rows<double, 1> rows = rows_of({a, (exists ? m : 0) * a.channels + channel}, static_cast<double>(origin));
    CBN_UNROLL
    for (int i = 0; i < Rows<S, M>::kRows; ++i)
      table[channel].at(i * M + m) = exists ? static_cast<S>(*rows.row(i)) : S(0);
  }
}

}  // namespace cbn
