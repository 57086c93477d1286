// Who weighs the components at a point. A posterior prepares the channels of a block in shared memory, knows at which
// place it keeps a component, and gives each thread the weights of its elements: e, and a factor that they all have.
#pragma once

#include "coefficients.cuh"

namespace cbn {

// The channel's mixture weighs (eqs 8-9), by log-odds against the widest component, which is kept first.
struct ChannelPosterior {
  static constexpr bool kGiven = false, kConstant = false, kHasFastForms = true;

  // The place of component m of channel j, or the component at place m.
  template <class C>
  static __device__ __forceinline__ int place(const Shared<C>& shared, int m, int j) {
    return stored_at(m, shared.first[j]);
  }

  // Puts the log-odds of the block's channels and their origins into shared memory; components and channels that do not
  // exist have no odds. Returns whether the odds of all of them are bounded; where not, or where that is not `wanted`,
  // they are log-densities. One component has no odds; its prior may be joint mode's, which is not the channel's.
  template <Pass pass, class C>
  static __device__ __forceinline__ bool prepare(const Block<C>& block, const Shared<C>& shared, bool wanted) {
    if (threadIdx.x == 0) *shared.flag = 0;
    __syncthreads();
#pragma unroll 1
    for (bool bounded = C::M == 1 || wanted;; bounded = false) {
      for_each_component(block, shared, [&](const Item<C>& item) {
        LogDensity density{INFINITY, 0, 0};
        if (C::M > 1 && item.exists) density = item.component.density();
        const int widest = first_of_least<C>(density.precision);
        const LogDensity first{of_component<C>(density.precision, widest), of_component<C>(density.peak, widest),
                               of_component<C>(density.mean, widest)};
        const double origin = origin_of<pass>(block, item);
        if (!item.in_block) return;
        if (item.m == 0) shared.first[item.j] = widest;
        if (item.m == 0) shared.origin[item.j] = origin;
        const int k = stored_at(item.m, widest);
        Parabola odds{0, 0, k == 0 ? 0 : kNoComponent};
        if (C::M > 1 && item.exists && !bounded) {
          odds = parabola(density, origin);
        } else if (item.exists && k > 0) {
          odds = odds_parabola(density, first, origin);
          if (!is_bounded(odds) || (reads_gradient(pass) && !is_near(odds, first, origin, block.a.points())))
            *shared.flag = 1;
        }
        shared.store_odds(k, item.j, odds);
      });
      __syncthreads();
      if (C::M == 1 || !bounded || !*shared.flag) return bounded;
    }
  }

  template <class C, bool kBounded>
  struct Weights {
    using S = typename C::S;
    static constexpr int M = C::M;
    LogOdds<S, M> odds[C::kChannels];

    __device__ __forceinline__ Weights(const Block<C>& block, const Shared<C>& shared) {
      load_coefficients(block, shared, 0, odds);
    }
    template <bool kWhole, class W>
    __device__ __forceinline__ void move_to(const W&, int) {}
    __device__ __forceinline__ S operator()(int v, S z, S (&e)[M]) const {
      return responsibilities<kBounded>(odds[C::kChannelsLast ? v : 0], z, e);
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

  // There are no odds.
  template <Pass pass, class C>
  static __device__ __forceinline__ bool prepare(const Block<C>& block, const Shared<C>& shared, bool) {
    for_each_component(block, shared, [&](const Item<C>& item) {
      const double origin = origin_of<pass>(block, item);
      if (item.in_block && item.m == 0) shared.origin[item.j] = origin;
    });
    __syncthreads();
    return false;
  }
};

// The group of the point's image weighs (eqs 17-18): 1 for that component. A constant, whose gradient is 0.
struct GroupPosterior : GivenPosterior {
  static constexpr bool kConstant = true, kHasFastForms = false;

  template <class C, bool>
  struct Weights {
    using S = typename C::S;
    static constexpr int M = C::M;
    int group[C::V];  // -1 where there is no element
    const Arguments& a;

    __device__ __forceinline__ Weights(const Block<C>& block, const Shared<C>&) : a(block.a) {}
    template <bool kWhole, class W>
    __device__ __forceinline__ void move_to(const W& walk, int) {
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
  };
};

// Joint mode: the points' weights are read, [M, P]. For the reductions; its maps are joint.cuh's.
struct JointPosterior : GivenPosterior {
  static constexpr bool kConstant = false, kHasFastForms = true;

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
        : a(block.a), begin(block.begin()), whole(block.a.points() % kPoints == 0) {}
    template <bool kWhole, class W>
    __device__ __forceinline__ void move_to(const W& walk, int elements) {
      point = begin + walk.point;
      count = C::kChannelsLast ? elements > 0 : elements;
      load<kWhole>();
    }
    __device__ __forceinline__ S operator()(int v, S, S (&e)[M]) const {
      CBN_UNROLL
      for (int m = 0; m < M; ++m) e[m] = p[C::kChannelsLast ? 0 : v][m];
      return S(1);
    }

   private:
    // The weights of the chunk's points, 0 where there is none. Components that pad M have no coefficients: any weight
    // does.
    template <bool kWhole>
    __device__ __forceinline__ void load() {
      CBN_UNROLL
      for (int m = 0; m < M; ++m) {
        const S* row = static_cast<const S*>(a.posterior) + (m < a.components ? m : 0) * a.points() + point;
        Pack<S, kPoints> values{};
        if (kWhole || whole) {
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
