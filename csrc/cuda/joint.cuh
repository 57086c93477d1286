// Joint mode's two passes over all channels of a point: its weights (eqs 8-9), and the gradient of their logarithms,
// from sums of the f_m of mixture.h. All else reads what they leave.
#pragma once

#include "reduce.cuh"

namespace cbn {

// Channels whose terms a thread adds up in the statistics' type before the sums move on to double.
constexpr int kChannelsPerFlush = 32;

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

// How the threads of a block share points and channels. Contiguous: lanes take neighbouring points, warps take turns at
// the channels. channels_last: lanes take neighbouring channels of the warp's points.
template <class C>
struct PointBlock {
  static constexpr bool kLast = C::kChannelsLast;
  static constexpr int kWarps = kPointThreads / kWarp;
  static constexpr int kPoints = (kLast ? kWarp : kWarp / 2) / C::M;            // of a thread
  static constexpr int kPointsOfBlock = kPoints * (kLast ? kWarps : kWarp);     // all of them
  static constexpr int kTotals = kPointsOfBlock * C::M * (kLast ? 1 : kWarps);  // doubles in shared memory

  const Arguments& a;
  int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  int64_t first = static_cast<int64_t>(blockIdx.x) * kPointsOfBlock;
  double* totals = reinterpret_cast<double*>(shared_memory());

  __device__ __forceinline__ explicit PointBlock(const Arguments& a) : a(a) {}

  // The number of the thread's point k in the block.
  __device__ __forceinline__ int number(int k) const { return kLast ? warp * kPoints + k : k * kWarp + lane; }
  // A point that does not exist is read as the last one, and not written.
  __device__ __forceinline__ int64_t point(int number) const {
    const int64_t point = first + number, last = a.points() - 1;
    return point < last ? point : last;
  }
  // Where channel 0 of a point lies.
  __device__ __forceinline__ int64_t offset(int64_t point) const {
    if (kLast) return point * a.channels;
    const int64_t n = image_of(a, point);
    return n * a.channels * a.spatial + point - n * a.spatial;
  }
  __device__ __forceinline__ double& total(int number, int m, int part) const {
    return totals[((kLast ? 0 : part) * C::M + m) * kPointsOfBlock + number];
  }
};

// Sums over the channels of each point: add(sums [M], rows, z, offset, channel, point) for each channel, then
// finish(totals [M], point), one thread for each point.
template <class C, template <class, int> class Rows, class Add, class Finish>
__device__ __forceinline__ void sum_channels(const Arguments& a, Add add, Finish finish) {
  using S = typename C::S;
  using B = PointBlock<C>;
  constexpr int M = C::M;
  const B block(a);
  const auto* table = static_cast<const ChannelRows<S, Rows, M>*>(a.channels_table);
  const auto* x = static_cast<const typename C::Element*>(a.x);
  const int64_t stride = B::kLast ? 1 : a.spatial;
  int64_t point[B::kPoints], offset[B::kPoints];
  CBN_UNROLL
  for (int k = 0; k < B::kPoints; ++k) {
    point[k] = block.point(block.number(k));
    offset[k] = block.offset(point[k]);
    CBN_UNROLL
    for (int m = 0; m < M; ++m) block.total(block.number(k), m, block.warp) = 0;
  }
  constexpr int kTurn = B::kLast ? kWarp : B::kWarps;  // channels
  // All threads of a warp take as many turns: they add up together.
  for (int64_t begin = 0; begin < a.channels; begin += kTurn * kChannelsPerFlush) {
    S sums[B::kPoints][M] = {};
    for (int turn = 0; turn < kChannelsPerFlush; ++turn) {
      const int64_t channel = begin + turn * kTurn + (B::kLast ? block.lane : block.warp);
      if (channel >= a.channels) break;
      ChannelRows<S, Rows, M> of_channel = table[channel];
      const Rows<S, M> rows = of_channel.rows();
      CBN_UNROLL
      for (int k = 0; k < B::kPoints; ++k) {
        const int64_t at = offset[k] + channel * stride;
        add(sums[k], rows, static_cast<S>(x[at]) - of_channel.origin(), at, channel, point[k]);
      }
    }
    CBN_UNROLL
    for (int k = 0; k < B::kPoints; ++k) {
      CBN_UNROLL
      for (int m = 0; m < M; ++m) {
        const S sum = B::kLast ? warp_sum(sums[k][m], 1) : sums[k][m];
        if (!B::kLast || block.lane == 0) block.total(block.number(k), m, block.warp) += static_cast<double>(sum);
      }
    }
  }
  __syncthreads();
  for (int number = threadIdx.x; number < B::kPointsOfBlock; number += kPointThreads) {
    if (block.first + number >= a.points()) continue;
    double totals[M];
    CBN_UNROLL
    for (int m = 0; m < M; ++m) {
      totals[m] = 0;
      for (int part = 0; part < (B::kLast ? 1 : B::kWarps); ++part) totals[m] += block.total(number, m, part);
    }
    finish(totals, block.first + number);
  }
}

// The posterior [M, P]: each log-density is its height and a sum over the channels.
template <class C>
__global__ void __launch_bounds__(kPointThreads, 1) weigh_kernel(const __grid_constant__ Arguments a) {
  using S = typename C::S;
  constexpr int M = C::M;
  sum_channels<C, Distances>(
      a, [](S(&sums)[M], const Distances<S, M>& rows, S z, int64_t, int64_t, int64_t) { accumulate(sums, rows, z); },
      [&](double (&totals)[M], int64_t point) {
        S p[M], sum = 0;
        double top = -1e300;
        CBN_UNROLL
        for (int m = 0; m < M; ++m) {
          totals[m] = m < a.components ? a.heights[m] + totals[m] : kNoComponent;
          top = top < totals[m] ? totals[m] : top;
        }
        CBN_UNROLL
        for (int m = 0; m < M; ++m) sum += p[m] = Math<S>::exp2(static_cast<S>(totals[m] - top));
        const S factor = Math<S>::reciprocal(sum);
        CBN_UNROLL
        for (int m = 0; m < M; ++m)
          if (m < a.components) static_cast<S*>(a.posterior)[m * a.points() + point] = p[m] * factor;
      });
}

// The gradient of the log-odds [M, P]: q_m = p_m (F_m - sum_k p_k F_k).
template <class C, bool kRelu>
__device__ __forceinline__ void differentiate_weights(const Arguments& a) {
  using S = typename C::S;
  constexpr int M = C::M;
  const int64_t P = a.points();
  const S* const posterior = static_cast<const S*>(a.posterior);
  const auto weight = [&](int m, int64_t point) { return m < a.components ? posterior[m * P + point] : S(0); };
  sum_channels<C, InputGradient>(
      a,
      [&](S(&sums)[M], const InputGradient<S, M>& rows, S z, int64_t at, int64_t channel, int64_t point) {
        S g = static_cast<S>(static_cast<const typename C::Element*>(a.grad)[at]), p[M] = {}, f[M];
        if (kRelu) {
          bool passed;
          if (a.mask) {
            const int64_t bit = C::kChannelsLast ? at : channel * P + point;
            passed = a.mask[bit / 32] >> bit % 32 & 1;
          } else {
            CBN_UNROLL
            for (int m = 0; m < M; ++m) p[m] = weight(m, point);
            passed = passes_relu(combine(rows, p, z));
          }
          g = passed ? g : S(0);
        }
        direct_gradient(rows, p, z, g, f);
        CBN_UNROLL
        for (int m = 0; m < M; ++m) sums[m] += f[m];
      },
      [&](const double (&totals)[M], int64_t point) {
        double mean = 0;
        CBN_UNROLL
        for (int m = 0; m < M; ++m) mean += static_cast<double>(weight(m, point)) * totals[m];
        CBN_UNROLL
        for (int m = 0; m < M; ++m)
          if (m < a.components)
            static_cast<S*>(a.posterior_gradient)[m * P + point] =
                static_cast<S>(static_cast<double>(weight(m, point)) * (totals[m] - mean));
      });
}

template <class C>
__global__ void __launch_bounds__(kPointThreads, 1) differentiate_weights_kernel(const __grid_constant__ Arguments a) {
  a.relu ? differentiate_weights<C, true>(a) : differentiate_weights<C, false>(a);
}

// What z = x - origin of a channel is relative to in the sums of Distances; a sample that is not finite must not spoil
// the points that are.
template <class C>
__device__ double origin_of_points(const Arguments& a, int64_t channel) {
  return finite_or(sampled_origin<C>(a, channel), Component<typename C::S>{a, channel}.read(a.mean, 0));
}

// Sums over the channels of a component, in a fixed order: of its peaks, and of its squared
// distances from the channels' medians. A block for each component.
template <class C>
__global__ void __launch_bounds__(kPointThreads, 1) sum_components_kernel(const __grid_constant__ Arguments a) {
  using S = typename C::S;
  double* const sums = reinterpret_cast<double*>(shared_memory());  // [2, threads]
  const int m = blockIdx.x;
  if (m >= a.components) return;
  const double prior = log_prior(Component<S>{a, m * a.channels}.prior(1));
  double height = 0, distance = 0;
  for (int64_t channel = threadIdx.x; channel < a.channels; channel += kPointThreads) {
    const LogDensity density = Component<S>{a, m * a.channels + channel}.density(1);
    height += density.peak;
    distance += squared_distance(density, origin_of_points<C>(a, channel));
  }
  sums[threadIdx.x] = height;
  sums[kPointThreads + threadIdx.x] = distance;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int thread = 1; thread < kPointThreads; ++thread) {
    height += sums[thread];
    distance += sums[kPointThreads + thread];
  }
  a.heights[m] = prior + height;
  a.heights[C::M + m] = distance;
}

// Lays out what the channels bring: Distances, or InputGradient. A block for each compiled component.
template <class C, bool kForward>
__global__ void __launch_bounds__(kPointThreads, 1) lay_out_kernel(const __grid_constant__ Arguments a) {
  using S = typename C::S;
  constexpr int M = C::M;
  using Table = std::conditional_t<kForward, ChannelRows<S, Distances, M>, ChannelRows<S, InputGradient, M>>;
  auto* table = static_cast<Table*>(a.channels_table);
  const int m = blockIdx.x;
  const bool exists = m < a.components;
  int reference = 0;
  for (int other = 1; kForward && other < a.components; ++other)
    if (a.heights[M + other] < a.heights[M + reference]) reference = other;
  for (int64_t channel = threadIdx.x; channel < a.channels; channel += kPointThreads) {
    const S origin = static_cast<S>(kForward ? origin_of_points<C>(a, channel) : used_origin<S>(a, channel));
    if (m == 0) table[channel].origin() = origin;
    const Component<S> component{a, (exists ? m : 0) * a.channels + channel};
    const auto store = [&](auto rows) {
      for (int i = 0; i < rows.kRows; ++i) table[channel].at(i * M + m) = exists ? static_cast<S>(*rows.row(i)) : S(0);
    };
    if constexpr (kForward)
      store(distances(component.density(1), Component<S>{a, reference * a.channels + channel}.density(1),
                      static_cast<double>(origin)));
    else
      store(component.input_gradient(component.used(), static_cast<double>(origin), component.read(a.grad_weight, 0),
                                     component.read(a.grad_bias, 0)));
  }
}

}  // namespace cbn
