// Sums over a warp, a block and a cluster, each in a fixed order: the same input gives the same bits.
#pragma once

#include "posterior.cuh"

namespace cbn {

// Sum over the threads of a warp whose numbers are equal modulo `columns`, a power of two.
template <class T>
__device__ __forceinline__ T warp_sum(T value, int columns) {
  for (int other = kWarp / 2; other >= columns; other /= 2) value += __shfl_xor_sync(0xffffffffu, value, other);
  return value;
}

// Adds up the threads' sums, a struct of rows for each of a thread's channels, to shared.totals, components in natural
// order. A few warps at a time add to sums of their own, which takes little memory and few barriers; then these are
// added.
template <class C, class Sums>
__device__ __forceinline__ void block_sum(const Block<C>& block, const Shared<C>& shared, Sums (&sums)[C::kChannels]) {
  using S = typename C::S;
  constexpr int kWarps = warps_at_a_time(sizeof(S));
  const int columns = C::kChannelsLast ? block.a.columns : 1;
  const int warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp, size = Sums::kRows * C::M * shared.K;
  CBN_UNROLL
  for (int channel = 0; channel < C::kChannels; ++channel) {
    CBN_UNROLL
    for (int i = 0; i < Sums::kRows * C::M; ++i) {
      S& value = sums[channel].row(i / C::M)[i % C::M];
      value = warp_sum(value, columns);
    }
  }
  for (int first = 0; first < warps; first += kWarps) {
    if (warp >= first && warp < first + kWarps && threadIdx.x % kWarp < static_cast<unsigned>(columns)) {
      CBN_UNROLL
      for (int channel = 0; channel < C::kChannels; ++channel) {
        const int j = block.column() * C::kChannels + channel;
        CBN_UNROLL
        for (int i = 0; i < Sums::kRows * C::M; ++i) {
          const int row = i / C::M, m = C::Posterior::place(shared, i % C::M, j);
          S& sum = shared.sums[(warp - first) * size + (row * C::M + m) * shared.K + j];
          const S value = sums[channel].row(row)[i % C::M];
          sum = first == 0 ? value : sum + value;
        }
      }
    }
    __syncthreads();
  }
  for (int i = threadIdx.x; i < size; i += blockDim.x) {
    double total = 0;
    for (int of = 0; of < kWarps && of < warps; ++of) total += static_cast<double>(shared.sums[of * size + i]);
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
