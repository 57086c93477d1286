// What the channels of a block bring to the element functions of mixture.h: prepared in shared memory, one thread
// for each component of a channel, then kept in each thread's registers.
#pragma once

#include "points.cuh"
#include "statistics.cuh"

namespace cbn {

enum class Pass { kMoments, kNormalise, kGradientSums, kInputGradient };

constexpr bool reads_gradient(Pass pass) { return pass == Pass::kGradientSums || pass == Pass::kInputGradient; }

template <class C>
struct Shared {
  using S = typename C::S;
  static constexpr int M = C::M;

  double* totals;   // [3 or 2, M, K] sums of the block, components in natural order
  double* density;  // [3, M, K] precision, peak and mean of the components, in natural order
  double* origin;   // [K]
  S* rows;          // [sum_rows, 3 or 2, M, K] sums of some of the block's warps
  S* coefficients;  // [9, M, K] log-odds, then what the pass needs; components in stored order
  int* widest;      // [K] the component that is stored first
  int* flag;        // whether a channel's odds are not bounded
  unsigned char* values;
  int K;

  __device__ __forceinline__ explicit Shared(int K) : K(K) {
    unsigned char* base = shared_memory();
    const SharedMemory at = shared_memory_of(M, K, sizeof(S));
    totals = reinterpret_cast<double*>(base + at.totals);
    density = reinterpret_cast<double*>(base + at.density);
    origin = reinterpret_cast<double*>(base + at.origin);
    rows = reinterpret_cast<S*>(base + at.rows);
    coefficients = reinterpret_cast<S*>(base + at.coefficients);
    widest = reinterpret_cast<int*>(base + at.widest);
    flag = reinterpret_cast<int*>(base + at.flag);
    values = base + at.values;
  }

  __device__ __forceinline__ void store(int kind, int k, int j, double value) const {
    coefficients[(kind * M + k) * K + j] = static_cast<S>(value);
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

// Median of a few values of a channel.
template <class C>
__device__ double sampled_origin(const Arguments& a, int64_t channel) {
  using E = typename C::Element;
  double values[kOriginSamples];
  CBN_UNROLL
  for (int k = 0; k < kOriginSamples; ++k) {
    const int64_t point = sampled_point(k, a.points), n = image_of(a, point), s = point - n * a.spatial;
    const int64_t offset = C::kChannelsLast ? point * a.channels + channel : (n * a.channels + channel) * a.spatial + s;
    values[k] = static_cast<double>(static_cast<typename C::S>(static_cast<const E*>(a.x)[offset]));
  }
  return median(values);
}

// What z = x - origin is relative to: the median before there are batch statistics, then the mean of the heaviest
// component, which lies among the points too; in evaluation the mean of the widest component. A value of S: x - origin
// is then what the coefficients are made for.
template <class C, Pass pass>
__device__ double origin_of(const Block<C>& block, int j, int widest) {
  using S = typename C::S;
  const Arguments& a = block.a;
  const int64_t channel = block.first_channel + j;
  if (pass == Pass::kMoments) return static_cast<double>(static_cast<S>(sampled_origin<C>(a, channel)));
  const auto statistics = [&](int m) { return Component<S>{a, m * a.channels + channel}.used(); };
  int centre = widest;
  if (a.training) {
    centre = 0;
    for (int m = 1; m < a.components; ++m)
      if (statistics(m).mass > statistics(centre).mass) centre = m;
  }
  return statistics(centre).mean;
}

// E-step (eqs 8-9): the log-odds of the block's channels in shared.coefficients, and shared.origin. Returns whether the
// odds of all of them are bounded. Of components and channels that do not exist everything is 0, and no odds.
template <class C, Pass pass>
__device__ __forceinline__ bool prepare_odds(const Block<C>& block, const Shared<C>& shared) {
  using S = typename C::S;
  constexpr int M = C::M;
  const Arguments& a = block.a;
  const int K = shared.K, items = M * K;
  const bool assigned = a.groups != nullptr;

  if (threadIdx.x == 0) *shared.flag = assigned;
  for_each_component(block, shared, [&](int m, int j, const Component<S>& component) {
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
    const bool exists = block.first_channel + j < a.channels;
    if (exists && !assigned)
      for (int m = 1; m < a.components; ++m)
        if (shared.density[m * K + j] < shared.density[widest * K + j]) widest = m;
    shared.widest[j] = widest;
    shared.origin[j] = exists ? origin_of<C, pass>(block, j, widest) : 0;
  }
  __syncthreads();

  const auto store_odds = [&](int k, int j, const Parabola& odds) {
    shared.store(0, k, j, odds.curvature);
    shared.store(1, k, j, odds.centre);
    shared.store(2, k, j, odds.height);
  };
  for (int item = threadIdx.x; item < items; item += blockDim.x) {
    const int k = item / K, j = item % K;
    const bool exists = k < a.components && block.first_channel + j < a.channels;
    Parabola odds{0, 0, k == 0 ? 0 : kNoComponent};
    if (exists && k > 0) {
      const int widest = shared.widest[j];
      if (!odds_parabola(density_of(stored_at(k, widest), j), density_of(widest, j), shared.origin[j], odds))
        *shared.flag = 1;
    }
    store_odds(k, j, odds);
    if (!exists)
      for (int kind = 3; kind < 9; ++kind) shared.store(kind, k, j, 0);
  }
  __syncthreads();

  if (!*shared.flag) return true;
  if (!assigned)
    for_each_component(block, shared, [&](int k, int j, const Component<S>&) {
      store_odds(k, j, parabola(density_of(stored_at(k, shared.widest[j]), j), shared.origin[j]));
    });
  __syncthreads();
  return false;
}

// Of component m of channel j: its branch, for the passes that need the output.
template <class C>
__device__ __forceinline__ void store_branch(const Shared<C>& shared, int m, int j,
                                             const Component<typename C::S>& component, const Used& used) {
  const int k = stored_at(m, shared.widest[j]);
  const double scale = component.scale(used);
  shared.store(3, k, j, scale);
  shared.store(4, k, j, branch_offset(scale, component.bias(), used.mean, shared.origin[j]));
}

// Of component m of channel j: what the input's gradient needs.
template <class C>
__device__ __forceinline__ void store_gradient(const Shared<C>& shared, int m, int j,
                                               const Component<typename C::S>& component, const Used& used,
                                               double grad_weight, double grad_bias) {
  const int k = stored_at(m, shared.widest[j]);
  const double scale = component.scale(used), eps = component.a.eps;
  const double quadratic = variance_gradient(scale, grad_weight, used.var, eps, used.mass);
  shared.store(3, k, j, used.mean - shared.origin[j]);
  shared.store(4, k, j, scale);
  shared.store(5, k, j, component.bias());
  shared.store(6, k, j, mean_gradient(scale, grad_bias, used.mass));
  shared.store(7, k, j, quadratic);
  shared.store(8, k, j, -quadratic * used.var);
}

// Structs of arrays [kinds, M] of S, one for each of the thread's channels, from shared.coefficients.
template <class C, class Coefficients>
__device__ __forceinline__ void load_coefficients(const Block<C>& block, const Shared<C>& shared, int first_kind,
                                                  Coefficients (&coefficients)[C::kChannels]) {
  using S = typename C::S;
  constexpr int kValues = sizeof(Coefficients) / sizeof(S);
  CBN_UNROLL
  for (int channel = 0; channel < C::kChannels; ++channel) {
    S* values = reinterpret_cast<S*>(&coefficients[channel]);
    CBN_UNROLL
    for (int i = 0; i < kValues; ++i)
      values[i] = shared.coefficients[(first_kind * C::M + i) * shared.K + block.lane * C::kChannels + channel];
  }
}

}  // namespace cbn
