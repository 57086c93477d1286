// What the channels of a block bring to the element functions of mixture.h: prepared in shared memory, a lane for each
// component of a channel, then kept in each thread's registers.
#pragma once

#include "../statistics.h"
#include "points.cuh"

namespace cbn {

// kDirectGradient is the input's gradient where the responsibilities are constants.
enum class Pass { kMoments, kNormalise, kGradientSums, kInputGradient, kDirectGradient };

constexpr bool reads_gradient(Pass pass) { return pass != Pass::kMoments && pass != Pass::kNormalise; }

// The first rows of shared memory's coefficients are those of the posterior, LogOdds; the pass's follow. Those of
// ExpandedGradient are both.
constexpr int kRowsOfPosterior = LogOdds<float, 1>::kRows;

template <class C>
struct Shared {
  using S = typename C::S;
  static constexpr int M = C::M;

  double* totals;   // [kSumRows, M, K] sums of the block, components in natural order
  double* odds;     // [3, M, K] LogOdds, in the posterior's order
  double* origin;   // [K]
  S* sums;          // [warps at a time, kSumRows, M, K] sums of some of the block's warps
  S* coefficients;  // [kCoefficientRows, M, K] components in the posterior's order
  int* first;       // [K] the posterior's
  int* flag;        // the posterior's
  unsigned char* values;
  int K;

  __device__ __forceinline__ explicit Shared(int K) : K(K) {
    unsigned char* base = shared_memory();
    const SharedMemory at = shared_memory_of(M, K, sizeof(S));
    totals = reinterpret_cast<double*>(base + at.totals);
    odds = reinterpret_cast<double*>(base + at.odds);
    origin = reinterpret_cast<double*>(base + at.origin);
    sums = reinterpret_cast<S*>(base + at.sums);
    coefficients = reinterpret_cast<S*>(base + at.coefficients);
    first = reinterpret_cast<int*>(base + at.first);
    flag = reinterpret_cast<int*>(base + at.flag);
    values = base + at.values;
  }

  // Component k, in the posterior's order, of channel j: coefficients, a struct of rows of one, from a row on.
  template <class Coefficients>
  __device__ __forceinline__ void store(int row, int k, int j, Coefficients from) const {
    CBN_UNROLL
    for (int i = 0; i < Coefficients::kRows; ++i)
      coefficients[((row + i) * M + k) * K + j] = static_cast<S>(*from.row(i));
  }
  __device__ __forceinline__ void store_odds(int k, int j, Parabola from) const {
    CBN_UNROLL
    for (int i = 0; i < Parabola::kRows; ++i) odds[(i * M + k) * K + j] = *from.row(i);
    store(0, k, j, from);
  }
  __device__ __forceinline__ Parabola load_odds(int k, int j) const {
    return {odds[k * K + j], odds[(M + k) * K + j], odds[(2 * M + k) * K + j]};
  }
};

// A component of a channel of the block, or none. The M lanes of a channel are neighbours.
template <class C>
struct Item {
  int m, j;
  bool in_block;  // among the M, K of shared memory
  bool exists;
  Component<typename C::S> component;
};

// Calls visit(item) for the components of the block's channels, with whole warps.
template <class C, class Visit>
__device__ __forceinline__ void for_each_component(const Block<C>& block, const Shared<C>& shared, Visit visit) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll 1
  for (int first = threadIdx.x - lane; first < C::M * shared.K; first += blockDim.x) {
    const int m = (first + lane) % C::M, j = (first + lane) / C::M;
    const int64_t channel = block.first_channel() + j;
    const bool exists = j < shared.K && m < block.a.components && channel < block.a.channels;
    visit(Item<C>{m, j, j < shared.K, exists, {block.a, exists ? m * block.a.channels + channel : 0}});
  }
}

// A value of another one of the channel's lanes.
template <class C>
__device__ __forceinline__ double of_component(double value, int m) {
  return __shfl_sync(0xffffffffu, value, m, C::M);
}

// The first of the channel's lanes with the least value, the same for all of them; NaN is none.
template <class C>
__device__ __forceinline__ int first_of_least(double value) {
  double least = value;
  CBN_UNROLL
  for (int other = C::M / 2; other > 0; other /= 2) {
    const double its = __shfl_xor_sync(0xffffffffu, least, other);
    least = its < least || least != least ? its : least;
  }
  const unsigned lanes = __ballot_sync(0xffffffffu, value == least) >> (threadIdx.x % kWarp / C::M * C::M);
  const int first = __ffs(static_cast<int>(lanes & ((1u << C::M) - 1)));
  return first > 0 ? first - 1 : 0;
}

// Median of a few values of a channel.
template <class C>
__device__ double sampled_origin(const Arguments& a, int64_t channel) {
  using E = typename C::Element;
  using S = typename C::S;
  S values[kOriginSamples];
  const int64_t between = sampled_point(1, a.points()), images = image_of(a, between);
  int64_t point = 0, n = 0, s = 0;
  CBN_UNROLL
  for (int k = 0; k < kOriginSamples; ++k) {
    const int64_t offset = C::kChannelsLast ? point * a.channels + channel : (n * a.channels + channel) * a.spatial + s;
    values[k] = static_cast<S>(static_cast<const E*>(a.x)[offset]);
    if (point + between >= a.points()) continue;
    point += between;
    n += images;
    s += between - images * a.spatial;
    if (s >= a.spatial) {
      s -= a.spatial;
      ++n;
    }
  }
  return static_cast<double>(median(values));
}

// What z = x - origin is relative to in the channel of an item's lanes: the median before there are statistics of the
// batch; then as used_origin says. A value of S: x - origin is then what the coefficients are made for.
template <Pass pass, class C>
__device__ __forceinline__ double origin_of(const Block<C>& block, const Item<C>& item) {
  if constexpr (pass == Pass::kMoments) {
    const int64_t channel = block.first_channel() + item.j;
    return channel < block.a.channels ? sampled_origin<C>(block.a, channel) : 0;
  } else {
    const Statistics used = item.exists ? item.component.used() : Statistics{-1, 0, -1};
    return of_component<C>(used.mean, first_of_least<C>(block.a.training ? -used.mass : -used.var));
  }
}

// Coefficients of each of the thread's channels, a struct of rows, from shared memory's from a row on.
template <class C, class Coefficients>
__device__ __forceinline__ void load_coefficients(const Block<C>& block, const Shared<C>& shared, int first_row,
                                                  Coefficients (&coefficients)[C::kChannels]) {
  CBN_UNROLL
  for (int channel = 0; channel < C::kChannels; ++channel) {
    const int j = block.column() * C::kChannels + channel;
    CBN_UNROLL
    for (int i = 0; i < Coefficients::kRows; ++i) {
      CBN_UNROLL
      for (int k = 0; k < C::M; ++k)
        coefficients[channel].row(i)[k] = shared.coefficients[((first_row + i) * C::M + k) * shared.K + j];
    }
  }
}

}  // namespace cbn
