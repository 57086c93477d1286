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
  static constexpr int kRows = InputGradient<T, M>::kRows + 2;
  InputGradient<T, M> input;
  LogOdds<T, M> densities;  // their heights play no part
  CBN_METHOD T* row(int i) {
    constexpr int kRowsOfInput = InputGradient<T, M>::kRows;
    return i < kRowsOfInput ? input.row(i) : densities.row(i - kRowsOfInput);
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

// What the channels bring to a pass: Distances for its weights (Pass::kMoments), Branches or PointGradient. A block for
// each compiled component.
template <class C, Pass pass>
__global__ void __launch_bounds__(kTableThreads, 1) lay_out_kernel(const __grid_constant__ Arguments a) {
  using S = typename C::S;
  constexpr int M = C::M;
  const int m = blockIdx.x;
  const bool exists = m < a.components;
  int reference = 0;
  for (int other = 1; pass == Pass::kMoments && other < a.components; ++other)
    if (a.heights[M + other] < a.heights[M + reference]) reference = other;
  // make(component, origin) gives its rows.
  const auto lay_out = [&](auto* table, auto make) {
    for (int64_t channel = threadIdx.x; channel < a.channels; channel += kTableThreads) {
      const S origin =
          static_cast<S>(pass == Pass::kMoments ? origin_of_points<C>(a, channel) : used_origin<S>(a, channel));
      if (m == 0) table[channel].origin() = origin;
      if (m == 0 && pass == Pass::kMoments && a.partials) static_cast<S*>(a.origins)[channel] = origin;
      auto rows = make(Component<S>{a, (exists ? m : 0) * a.channels + channel}, static_cast<double>(origin));
      for (int i = 0; i < rows.kRows; ++i) table[channel].at(i * M + m) = exists ? static_cast<S>(*rows.row(i)) : S(0);
    }
  };
  if constexpr (pass == Pass::kMoments) {
    lay_out(static_cast<ChannelRows<S, Distances, M>*>(a.sums_table), [&](auto component, double origin) {
      const Component<S> nearest{a, reference * a.channels + component.i % a.channels};
      return distances(component.density(1), nearest.density(1), origin);
    });
  } else if constexpr (pass == Pass::kNormalise) {
    lay_out(static_cast<ChannelRows<S, Branches, M>*>(a.map_table), [&](auto component, double origin) {
      if (exists) component.keep_running();
      return component.branch(component.used(), origin);
    });
  } else {
    lay_out(static_cast<ChannelRows<S, PointGradient, M>*>(a.map_table), [&](auto component, double origin) {
      PointGradient<double, 1> rows{};
      rows.input = component.input_gradient(component.used(), origin, component.read(a.grad_weight, 0),
                                            component.read(a.grad_bias, 0));
      const Parabola density = parabola(component.density(1), origin);
      rows.densities.curvature[0] = density.curvature[0];
      rows.densities.centre[0] = density.centre[0];
      return rows;
    });
  }
}

}  // namespace cbn
