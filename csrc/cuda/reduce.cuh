// Sums over a warp, a block and a cluster, each in a fixed order: the same input gives the same bits.
#pragma once

#include "coefficients.cuh"

namespace cbn {

// Sum over the threads of a warp whose numbers are equal modulo `lanes`, a power of two.
template <class T>
__device__ __forceinline__ T warp_sum(T value, int lanes) {
  for (int other = kWarp / 2; other >= lanes; other /= 2) value += __shfl_xor_sync(0xffffffffu, value, other);
  return value;
}

// Adds up the threads' sums, a struct of arrays [kinds, M] for each of a thread's channels, components in stored
// order, to shared.totals [kinds, M, K] in natural order. A few warps at a time add to a row each, which takes little
// memory and few barriers; then the rows are added.
template <class C, class Sums>
__device__ __forceinline__ void block_sum(const Block<C>& block, const Shared<C>& shared, Sums (&sums)[C::kChannels]) {
  using S = typename C::S;
  constexpr int kValues = sizeof(Sums) / sizeof(S), kRows = sum_rows(sizeof(S));
  const int lanes = C::kChannelsLast ? block.a.lanes : 1;
  const int warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp, size = kValues * shared.K;
  CBN_UNROLL
  for (int channel = 0; channel < C::kChannels; ++channel) {
    S* values = reinterpret_cast<S*>(&sums[channel]);
    CBN_UNROLL
    for (int i = 0; i < kValues; ++i) values[i] = warp_sum(values[i], lanes);
  }
  for (int first = 0; first < warps; first += kRows) {
    if (warp >= first && warp < first + kRows && threadIdx.x % kWarp < lanes) {
      CBN_UNROLL
      for (int channel = 0; channel < C::kChannels; ++channel) {
        const int j = block.lane * C::kChannels + channel, widest = shared.widest[j];
        CBN_UNROLL
        for (int i = 0; i < kValues; ++i) {
          const int kind = i / C::M, m = stored_at(i % C::M, widest);
          S& sum = shared.rows[(warp - first) * size + (kind * C::M + m) * shared.K + j];
          const S value = reinterpret_cast<const S*>(&sums[channel])[i];
          sum = first == 0 ? value : sum + value;
        }
      }
    }
    __syncthreads();
  }
  for (int i = threadIdx.x; i < size; i += blockDim.x) {
    double total = 0;
    for (int row = 0; row < kRows && row < warps; ++row) total += static_cast<double>(shared.rows[row * size + i]);
    shared.totals[i] = total;
  }
  __syncthreads();
}

// Element i of the cluster's totals: those of its blocks, added in the order of their ranks. Between two cluster_sync.
template <class C>
__device__ __forceinline__ double cluster_total(const Shared<C>& shared, int i) {
  const unsigned size = cluster_size();
  double total = 0;
  CBN_UNROLL
  for (unsigned rank = 0; rank < kLargestCluster; ++rank) {
    const double part = cluster_shared(shared.totals, rank < size ? rank : 0)[i];
    total += rank < size ? part : 0;
  }
  return total;
}

}  // namespace cbn
