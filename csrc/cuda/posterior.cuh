// Who weighs the components at a point. A posterior prepares the channels of a block in shared memory, knows at which
// place it keeps a component, and gives each thread the weights of its elements: e, and a factor that they all have.
#pragma once

#include "coefficients.cuh"

namespace cbn {

// The channel's mixture weighs (eqs 8-9), by log-odds against the widest component, which is kept first.
struct ChannelPosterior {
  static constexpr bool kGiven = false, kConstant = false, kHasPlainForm = true;

  // The place of component m of channel j, or the component at place m.
  template <class C>
  static __device__ __forceinline__ int place(const Shared<C>& shared, int m, int j) {
    return stored_at(m, shared.first[j]);
  }

  // Puts the log-odds of the block's channels and their origins into shared memory; components and channels that do not
  // exist have no odds. Returns whether the odds of all of them are bounded.
  template <Pass pass, class C>
  static __device__ __forceinline__ bool prepare(const Block<C>& block, const Shared<C>& shared) {
    constexpr int M = C::M;
    const int K = shared.K, items = M * K;
    if (threadIdx.x == 0) *shared.flag = 0;
    // One component has no odds; its prior may be joint mode's, which is not the channel's.
    if constexpr (M > 1)
      for_each_component(block, shared, [&](int m, int j, const Component<typename C::S>& component) {
        const LogDensity density = component.density();
        shared.density[m * K + j] = density.precision;
        shared.density[items + m * K + j] = density.peak;
        shared.density[2 * items + m * K + j] = density.mean;
      });
    __syncthreads();

    const auto density_of = [&](int m, int j) -> LogDensity {
      const int item = m * K + j;
      return {shared.density[item], shared.density[items + item], shared.density[2 * items + item]};
    };
    for (int j = threadIdx.x; j < K; j += blockDim.x) {
      int widest = 0;
      if (block.first_channel + j < block.a.channels)
        for (int m = 1; m < block.a.components; ++m)
          if (shared.density[m * K + j] < shared.density[widest * K + j]) widest = m;
      shared.first[j] = widest;
      shared.origin[j] = origin_of<C, pass>(block, j);
    }
    __syncthreads();

    for_each_place(block, shared, [&](int k, int j, bool exists) {
      Parabola odds{0, 0, k == 0 ? 0 : kNoComponent};
      if (exists && k > 0 &&
          !odds_parabola(density_of(place(shared, k, j), j), density_of(shared.first[j], j), shared.origin[j], odds))
        *shared.flag = 1;
      shared.store(0, k, j, odds);
    });
    __syncthreads();

    if (M == 1 || (!C::kGeneralOnly && !*shared.flag)) return true;
    for_each_component(block, shared, [&](int k, int j, const Component<typename C::S>&) {
      shared.store(0, k, j, parabola(density_of(place(shared, k, j), j), shared.origin[j]));
    });
    __syncthreads();
    return false;
  }

  template <class C, bool kBounded>
  struct Weights {
    using S = typename C::S;
    static constexpr int M = C::M;
    LogOdds<S, M> odds[C::kChannels];

    __device__ __forceinline__ Weights(const Block<C>& block, const Shared<C>& shared) {
      load_coefficients(block, shared, 0, odds);
    }
    template <bool kPlain>
    __device__ __forceinline__ void move_to(const Walk<C>&) {}
    __device__ __forceinline__ S operator()(int v, S z, S (&e)[M]) const {
      return responsibilities<kBounded>(odds[C::kChannelsLast ? v : 0], z, e);
    }
    template <bool kPlain>
    __device__ __forceinline__ S covariance(int v, const S (&p)[M], S z, const S (&f)[M]) {
      return cbn::covariance<kBounded>(odds[C::kChannelsLast ? v : 0], p, z, f);
    }
  };
};

// Weights that are read: components keep their order.
struct GivenPosterior {
  static constexpr bool kGiven = true;

  template <class C>
  static __device__ __forceinline__ int place(const Shared<C>&, int m, int) {
    return m;
  }

  // There are no odds: what does not exist has coefficients of 0.
  template <Pass pass, class C>
  static __device__ __forceinline__ bool prepare(const Block<C>& block, const Shared<C>& shared) {
    for (int j = threadIdx.x; j < shared.K; j += blockDim.x) shared.origin[j] = origin_of<C, pass>(block, j);
    for_each_place(block, shared, [](int, int, bool) {});
    __syncthreads();
    return false;
  }
};

// The group of the point's image weighs (eqs 17-18): 1 for that component. A constant, whose gradient is 0.
struct GroupPosterior : GivenPosterior {
  static constexpr bool kConstant = true, kHasPlainForm = false;

  template <class C, bool>
  struct Weights {
    using S = typename C::S;
    static constexpr int M = C::M;
    int group[C::V];  // -1 where there is no element
    const Arguments& a;

    __device__ __forceinline__ Weights(const Block<C>& block, const Shared<C>&) : a(block.a) {}
    template <bool kPlain>
    __device__ __forceinline__ void move_to(const Walk<C>& walk) {
      CBN_UNROLL
      for (int v = 0; v < C::V; ++v) group[v] = -1;
      walk.for_each_piece(1, [&](int at, int64_t, unsigned image) {
        const int64_t its = a.groups[image];
        device_check(its >= 0 && its < a.components, "expected groups from 0 to M - 1");
        CBN_UNROLL
        for (int v = 0; v < C::V; ++v) group[v] = v == at ? static_cast<int>(its) : group[v];
      });
    }
    __device__ __forceinline__ S operator()(int v, S, S (&e)[M]) const {
      CBN_UNROLL
      for (int m = 0; m < M; ++m) e[m] = m == group[v] ? S(1) : S(0);
      return S(1);
    }
    template <bool kPlain>
    __device__ __forceinline__ S covariance(int, const S (&)[M], S, const S (&)[M]) {
      return S(0);
    }
  };
};

// Joint mode: the points' weights are read, [M, P]. For the reductions; its maps are joint.cuh's.
struct JointPosterior : GivenPosterior {
  static constexpr bool kConstant = false, kHasPlainForm = true;

  template <class C, bool>
  struct Weights {
    using S = typename C::S;
    static constexpr int M = C::M;
    static constexpr int kPoints = C::kChannelsLast ? 1 : C::V;  // of a chunk
    const Arguments& a;
    const int64_t begin;
    const bool whole;  // chunks lie together and aligned in the rows of weights
    int64_t point;
    int count;
    S p[kPoints][M];

    __device__ __forceinline__ Weights(const Block<C>& block, const Shared<C>&)
        : a(block.a), begin(block.begin), whole(block.a.points() % kPoints == 0) {}
    template <bool kPlain>
    __device__ __forceinline__ void move_to(const Walk<C>& walk) {
      point = begin + walk.point;
      const int elements = walk.template count<kPlain>();
      count = C::kChannelsLast ? elements > 0 : elements;
      load<kPlain>();
    }
    __device__ __forceinline__ S operator()(int v, S, S (&e)[M]) const {
      CBN_UNROLL
      for (int m = 0; m < M; ++m) e[m] = p[C::kChannelsLast ? 0 : v][m];
      return S(1);
    }

   private:
    // The weights of the chunk's points, 0 where there is none. Components that pad M have no coefficients: any weight
    // does.
    template <bool kPlain>
    __device__ __forceinline__ void load() {
      CBN_UNROLL
      for (int m = 0; m < M; ++m) {
        const S* row = static_cast<const S*>(a.posterior) + (m < a.components ? m : 0) * a.points() + point;
        Pack<S, kPoints> values{};
        if (kPlain || whole) {
          if (count > 0) values = *reinterpret_cast<const Pack<S, kPoints>*>(row);
        } else {
          CBN_UNROLL
          for (int v = 0; v < kPoints; ++v)
            if (v < count) values.element[v] = row[v];
        }
        CBN_UNROLL
        for (int v = 0; v < kPoints; ++v) p[v][m] = values.element[v];
      }
    }
  };
};

}  // namespace cbn
