// What the channels of a block bring to the element functions of mixture.h: prepared in shared memory, one thread for
// each component of a channel, then kept in each thread's registers.
#pragma once

#include "../statistics.h"
#include "points.cuh"

namespace cbn {

enum class Pass { kMoments, kNormalise, kGradientSums, kInputGradient };

constexpr bool reads_gradient(Pass pass) { return pass == Pass::kGradientSums || pass == Pass::kInputGradient; }

// The first rows of shared memory's coefficients are those of the posterior, LogOdds; the pass's follow.
constexpr int kRowsOfPosterior = LogOdds<float, 1>::kRows;

template <class C>
struct Shared {
  using S = typename C::S;
  static constexpr int M = C::M;

  double* totals;   // [kSumRows, M, K] sums of the block, components in natural order
  double* density;  // [3, M, K] precision, peak and mean of the components, in natural order
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
    density = reinterpret_cast<double*>(base + at.density);
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
};

// Calls visit(m, j, component) for the components of the block's channels.
template <class C, class Visit>
__device__ __forceinline__ void for_each_component(const Block<C>& block, const Shared<C>& shared, Visit visit) {
  for (int item = threadIdx.x; item < block.a.components * shared.K; item += blockDim.x) {
    const int m = item / shared.K, j = item % shared.K;
    const int64_t channel = block.first_channel + j;
    if (channel < block.a.channels) visit(m, j, Component<typename C::S>{block.a, m * block.a.channels + channel});
  }
}

// Calls visit(k, j, exists) for the places of coefficients; components and channels that do not exist have some, too.
template <class C, class Visit>
__device__ __forceinline__ void for_each_place(const Block<C>& block, const Shared<C>& shared, Visit visit) {
  for (int item = threadIdx.x; item < C::M * shared.K; item += blockDim.x) {
    const int k = item / shared.K, j = item % shared.K;
    const bool exists = k < block.a.components && block.first_channel + j < block.a.channels;
    visit(k, j, exists);
    if (!exists) shared.store(kRowsOfPosterior, k, j, InputGradient<double, 1>{});
  }
}

// Median of a few values of a channel.
template <class C>
__device__ double sampled_origin(const Arguments& a, int64_t channel) {
  using E = typename C::Element;
  double values[kOriginSamples];
  CBN_UNROLL
  for (int k = 0; k < kOriginSamples; ++k) {
    const int64_t point = sampled_point(k, a.points()), n = image_of(a, point), s = point - n * a.spatial;
    const int64_t offset = C::kChannelsLast ? point * a.channels + channel : (n * a.channels + channel) * a.spatial + s;
    values[k] = static_cast<double>(static_cast<typename C::S>(static_cast<const E*>(a.x)[offset]));
  }
  return median(values);
}

// What z = x - origin of a channel of the block is relative to; the median before there are statistics of the batch. A
// value of S: x - origin is then what the coefficients are made for.
template <class C, Pass pass>
__device__ double origin_of(const Block<C>& block, int j) {
  using S = typename C::S;
  const int64_t channel = block.first_channel + j;
  if (channel >= block.a.channels) return 0;
  if (pass == Pass::kMoments) return static_cast<double>(static_cast<S>(sampled_origin<C>(block.a, channel)));
  return used_origin<S>(block.a, channel);
}

// Coefficients of each of the thread's channels, a struct of rows, from shared memory's from a row on.
template <class C, class Coefficients>
__device__ __forceinline__ void load_coefficients(const Block<C>& block, const Shared<C>& shared, int first_row,
                                                  Coefficients (&coefficients)[C::kChannels]) {
  CBN_UNROLL
  for (int channel = 0; channel < C::kChannels; ++channel) {
    const int j = block.column * C::kChannels + channel;
    CBN_UNROLL
    for (int i = 0; i < Coefficients::kRows; ++i) {
      CBN_UNROLL
      for (int k = 0; k < C::M; ++k)
        coefficients[channel].row(i)[k] = shared.coefficients[((first_row + i) * C::M + k) * shared.K + j];
    }
  }
}

}  // namespace cbn
