// What the channels of a block bring to the element functions of mixture.h: prepared once per block in shared
// memory, one thread for each component of a channel, then kept in each thread's registers.
#pragma once

#include "points.cuh"

namespace cbn {

enum class Pass { kMoments, kNormalise, kGradientSums, kInputGradient };

constexpr bool reads_gradient(Pass pass) { return pass == Pass::kGradientSums || pass == Pass::kInputGradient; }

// Statistics of the block's channels: kind, component and channel of the block to a value.
template <class S>
struct Statistics {
  const S* kinds[3];
  int64_t component_stride;

  __device__ __forceinline__ double operator()(int kind, int m, int j) const {
    return kinds[kind][m * component_stride + j];
  }
};

template <class C>
struct Shared {
  using S = typename C::S;
  static constexpr int M = C::M;

  double* totals;   // [3 or 2, M, K] sums of the block, components in natural order, as everywhere below
  double* merged;   // [3 or 2, M, K] sums of the cluster
  double* density;  // [3, M, K] precision, peak and mean of the components, in the same memory
  double* origin;   // [K]
  S* coefficients;  // [9, M, K] components in stored order
  S* results;       // [3, M, K] mass, mean and var, or [2, M, K] gradients of weight and bias
  int* widest;      // [K] the component that is stored first
  int* flag;        // whether a channel's odds are not bounded
  unsigned char* values;
  int K;

  __device__ __forceinline__ explicit Shared(int K) : K(K) {
    unsigned char* base = shared_memory();
    const SharedMemory at = shared_memory_of(M, K, sizeof(S));
    totals = reinterpret_cast<double*>(base + at.totals);
    merged = reinterpret_cast<double*>(base + at.merged);
    density = reinterpret_cast<double*>(base + at.merged);
    origin = reinterpret_cast<double*>(base + at.origin);
    coefficients = reinterpret_cast<S*>(base + at.coefficients);
    results = reinterpret_cast<S*>(base + at.results);
    widest = reinterpret_cast<int*>(base + at.widest);
    flag = reinterpret_cast<int*>(base + at.flag);
    values = base + at.values;
  }

  __device__ __forceinline__ Statistics<S> statistics() const {
    return {{results, results + M * K, results + 2 * M * K}, K};
  }
};

// The running statistics, parameters and results of a call in global memory, for the channels of a block.
template <class C>
struct Global {
  using S = typename C::S;
  const Arguments& a;
  int64_t first_channel;

  __device__ __forceinline__ int64_t index(int m, int j) const { return m * a.channels + first_channel + j; }
  __device__ __forceinline__ double read(const void* values, int m, int j, double otherwise) const {
    return values ? static_cast<double>(static_cast<const S*>(values)[index(m, j)]) : otherwise;
  }
  __device__ __forceinline__ void write(void* values, int kind, int m, int j, double value) const {
    static_cast<S*>(values)[kind * a.components * a.channels + index(m, j)] = static_cast<S>(value);
  }
  // The statistics that normalise: the batch's, or in evaluation the running ones.
  __device__ __forceinline__ Statistics<S> used() const {
    const S* batch = static_cast<const S*>(a.batch);
    const int64_t kind = a.components * a.channels;
    if (!a.training) return at(nullptr, a.mean, a.var);
    return at(batch, batch + kind, batch + 2 * kind);
  }
  __device__ __forceinline__ Statistics<S> gradients() const { return at(a.grad_weight, a.grad_bias, nullptr); }

 private:
  __device__ __forceinline__ Statistics<S> at(const void* first, const void* second, const void* third) const {
    const auto shifted = [this](const void* values) {
      return values ? static_cast<const S*>(values) + first_channel : nullptr;
    };
    return {{shifted(first), shifted(second), shifted(third)}, a.channels};
  }
};

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

// Fills shared.coefficients: the log-odds [3, M, K], then what the pass needs, and shared.origin. `used` are the
// statistics that normalise (mass, mean, var), `gradients` those of weight and bias, for the passes that need
// them. Returns whether the odds of all channels of the block are bounded.
template <class C, Pass pass>
__device__ bool prepare(const Block<C>& block, const Shared<C>& shared, const Statistics<typename C::S>& used,
                        const Statistics<typename C::S>& gradients) {
  using S = typename C::S;
  constexpr int M = C::M;
  const Arguments& a = block.a;
  const Global<C> global{a, block.first_channel};
  const int K = shared.K, items = M * K;
  const bool assigned = a.groups != nullptr;
  const auto exists = [&](int m, int j) { return m < a.components && block.first_channel + j < a.channels; };

  __syncthreads();  // before, another use of the same memory may go on
  if (threadIdx.x == 0) *shared.flag = assigned;
  for (int item = threadIdx.x; item < items; item += blockDim.x) {
    const int m = item / K, j = item % K;
    if (!exists(m, j)) continue;
    const double prior = global.read(a.prior, m, j, 1), mean = global.read(a.mean, m, j, 0);
    const double var = global.read(a.var, m, j, 0);
    const LogDensity density = log_density(prior, mean, var, a.eps);
    shared.density[item] = density.precision;
    shared.density[items + item] = density.peak;
    shared.density[2 * items + item] = density.mean;
    // The origin is a value of S: x - origin is then what the coefficients are made for.
    if (pass == Pass::kMoments && m == 0)
      shared.origin[j] = static_cast<double>(static_cast<S>(sampled_origin<C>(a, block.first_channel + j)));
  }
  __syncthreads();

  const auto density_of = [&](int m, int j) -> LogDensity {
    const int item = m * K + j;
    return {shared.density[item], shared.density[items + item], shared.density[2 * items + item]};
  };
  const auto store = [&](int kind, int item, double value) {
    shared.coefficients[kind * items + item] = static_cast<S>(value);
  };
  const auto store_odds = [&](int item, const Parabola& odds) {
    store(0, item, odds.curvature);
    store(1, item, odds.centre);
    store(2, item, odds.height);
  };
  for (int item = threadIdx.x; item < items; item += blockDim.x) {
    const int k = item / K, j = item % K;
    if (!exists(k, j)) {
      for (int kind = 0; kind < 9; ++kind) store(kind, item, 0);
      store(2, item, k == 0 ? 0 : kNoComponent);
      if (k == 0) shared.origin[j] = shared.widest[j] = 0;
      continue;
    }
    int widest = 0;
    if (!assigned)
      for (int m = 1; m < a.components; ++m)
        if (shared.density[m * K + j] < shared.density[widest * K + j]) widest = m;
    const int m = stored_at(k, widest);
    const double mean = pass == Pass::kMoments ? 0 : used(1, m, j), var = pass == Pass::kMoments ? 0 : used(2, m, j);
    // Once there are batch statistics, the origin is the mean of the heaviest component: it lies among the points.
    int centre = widest;
    if (pass != Pass::kMoments && a.training) {
      centre = 0;
      for (int i = 1; i < a.components; ++i)
        if (used(0, i, j) > used(0, centre, j)) centre = i;
    }
    const double origin = pass == Pass::kMoments ? shared.origin[j] : used(1, centre, j);
    if (k == 0) {
      shared.widest[j] = widest;
      if (pass != Pass::kMoments) shared.origin[j] = origin;
    }
    Parabola odds{0, 0, 0};
    if (k > 0 && !odds_parabola(density_of(m, j), density_of(widest, j), origin, odds)) *shared.flag = 1;
    store_odds(item, odds);
    if (pass == Pass::kMoments) continue;

    const double bias = global.read(a.bias, m, j, 0);
    const double scale = branch_scale(global.read(a.weight, m, j, 1), var, a.eps);
    if (pass != Pass::kInputGradient) {
      store(3, item, scale);
      store(4, item, branch_offset(scale, bias, mean, origin));
      continue;
    }
    // Running statistics are constants.
    const double mass = a.training ? used(0, m, j) : 0;
    const double quadratic = variance_gradient(scale, gradients(0, m, j), var, a.eps, mass);
    store(3, item, mean - origin);
    store(4, item, scale);
    store(5, item, bias);
    store(6, item, mean_gradient(scale, gradients(1, m, j), mass));
    store(7, item, quadratic);
    store(8, item, -quadratic * var);
  }
  __syncthreads();

  if (!*shared.flag) return true;
  if (!assigned) {
    for (int item = threadIdx.x; item < items; item += blockDim.x) {
      const int k = item / K, j = item % K;
      if (exists(k, j)) store_odds(item, parabola(density_of(stored_at(k, shared.widest[j]), j), shared.origin[j]));
    }
  }
  __syncthreads();
  return false;
}

// `count` structs of arrays [kinds, M] of S, one for each of the thread's channels, from shared.coefficients.
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
