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
// order, to shared.totals [kinds, M, K] in natural order. One warp after the other adds: this needs no more
// memory than the result.
template <class C, class Sums>
__device__ __forceinline__ void block_sum(const Block<C>& block, const Shared<C>& shared,
                                          const Sums (&sums)[C::kChannels]) {
  using S = typename C::S;
  constexpr int kValues = sizeof(Sums) / sizeof(S);
  const int lanes = C::kChannelsLast ? block.a.lanes : 1;
  for (unsigned warp = 0; warp < blockDim.x / kWarp; ++warp) {
    if (threadIdx.x / kWarp == warp) {
      CBN_UNROLL
      for (int channel = 0; channel < C::kChannels; ++channel) {
        const int j = block.lane * C::kChannels + channel, widest = shared.widest[j];
        CBN_UNROLL
        for (int i = 0; i < kValues; ++i) {
          const double sum = warp_sum(static_cast<double>(reinterpret_cast<const S*>(&sums[channel])[i]), lanes);
          const int kind = i / C::M, m = stored_at(i % C::M, widest);
          double& total = shared.totals[(kind * C::M + m) * shared.K + j];
          if (threadIdx.x % kWarp < lanes) total = warp == 0 ? sum : total + sum;
        }
      }
    }
    __syncthreads();
  }
}

// Adds up the totals of the cluster's blocks, in the order of their ranks: shared.merged [kinds, M, K] in each.
template <class C>
__device__ __forceinline__ void cluster_sum(const Shared<C>& shared, int kinds) {
  cluster_sync();
  for (int i = threadIdx.x; i < kinds * C::M * shared.K; i += blockDim.x) {
    double sum = 0;
    for (unsigned rank = 0; rank < cluster_size(); ++rank) sum += cluster_shared(shared.totals, rank)[i];
    shared.merged[i] = sum;
  }
  cluster_sync();  // no block ends, or writes its totals, while others read them
}

}  // namespace cbn
