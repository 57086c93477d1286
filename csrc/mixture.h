// Compound batch normalization, per element: every formula once, for the host and the device.
//
// T is a scalar or a vector of lanes; a lane is one point x of one channel, or of several channels side by side.
// Statistics of a channel are prepared in double by the functions that take and give `double`; the element functions
// use them as T. Equations are those of "Compound Batch Normalization for Long-tailed Image Classification" (2022).
// Neither ATen nor the CUDA runtime is used here.
#pragma once

#include <cmath>
#include <cstdint>

// CBN_INLINE is for functions, CBN_METHOD for members. Functions have internal linkage on the host, which compiles them
// for several instruction sets that must not be merged at link time.
#if defined(__CUDACC__)
#define CBN_INLINE __host__ __device__ __forceinline__
#define CBN_METHOD __host__ __device__ __forceinline__
#define CBN_UNROLL _Pragma("unroll")
#else
#define CBN_INLINE static inline __attribute__((always_inline))
#define CBN_METHOD inline __attribute__((always_inline))
#if defined(__clang__)
#define CBN_UNROLL _Pragma("unroll")
#else
#define CBN_UNROLL _Pragma("GCC unroll 16")
#endif
#endif

namespace cbn {

constexpr int kMaxComponents = 16;
// Floor of the prior inside the logarithm: a component that lost its mass can come back.
constexpr double kPriorFloor = 1e-6;
// A component whose mass in the batch is below this has no batch statistics and keeps its running ones.
constexpr double kMassFloor = 1e-30;
// Log2-odds up to here are exponentiated as they are: sums over components and products with x stay in float's range.
constexpr double kBoundedOdds = 60.0;
// Height of the components that pad M to a compiled size: their responsibility is 0.
constexpr double kNoComponent = -1e30;
constexpr double kLog2E = 1.4426950408889634;
constexpr double kLn2 = 0.6931471805599453;

// What T can do beyond arithmetic: splat(double), exp2(x), reciprocal(x), max(a, b). Specialised beside each T.
template <class T>
struct Math;

// ---------------------------------------------------------------------------------------------------------------------
// E-step (eqs 8-9)
//
// log2 of pi_m N(x; mu_m, v_m), v = sigma^2 + eps, is k_m - h_m (x - mu_m)^2 with h = log2(e) / (2 v) and
// k = log2(pi) - log2(v) / 2. Relative to the component of largest variance, which is stored first, it is again
// `curvature (x - centre)^2 + height`, with curvature <= 0: bounded above by its height. Where all heights are small,
// M - 1 exponentials and no search for a maximum give the responsibilities ("bounded"); elsewhere (equal variances,
// hence a line and no bound, or well separated components) each of the M log-densities is kept and the maximum
// subtracted.
// ---------------------------------------------------------------------------------------------------------------------

// Structs of coefficients and of sums are rows of M: row(i) is the i-th.
template <class T, int M>
struct LogOdds {
  static constexpr int kRows = 3;
  T curvature[M];
  T centre[M];  // relative to the origin of z
  T height[M];
  CBN_METHOD T* row(int i) {
    T* const rows[] = {curvature, centre, height};
    return rows[i];
  }
};

// Where component m is stored when the widest one comes first; its own inverse.
CBN_INLINE int stored_at(int m, int widest) { return m == 0 ? widest : m == widest ? 0 : m; }

// log2 (pi_m N(x; mu_m, v_m)) = peak - precision (x - mean)^2
struct LogDensity {
  double precision;
  double peak;
  double mean;
};

CBN_INLINE double log_prior(double prior) { return kLog2E * std::log(prior > kPriorFloor ? prior : kPriorFloor); }

CBN_INLINE LogDensity log_density(double prior, double mean, double var, double eps) {
  const double v = var + eps;
  return {kLog2E / (2 * v), log_prior(prior) - kLog2E * 0.5 * std::log(v), mean};
}

// One component's `curvature (z - centre)^2 + height` for points z = x - origin.
using Parabola = LogOdds<double, 1>;

CBN_INLINE Parabola parabola(const LogDensity& component, double origin) {
  return {-component.precision, component.mean - origin, component.peak};
}

// A component's odds against the widest one; returns whether they are bounded.
CBN_INLINE bool odds_parabola(const LogDensity& component, const LogDensity& widest, double origin, Parabola& odds) {
  const double u = component.mean - widest.mean, excess = component.precision - widest.precision;
  const bool curved = excess > 0;
  odds = {-excess, curved ? widest.mean - origin + component.precision * u / excess : 0,
          component.peak - widest.peak + (curved ? u * u * component.precision * widest.precision / excess : 0)};
  return (curved || u == 0) && *odds.height <= kBoundedOdds;
}

// p_m = pi_m N_m / sum_k pi_k N_k (eq 8), as e_m times the factor returned.
template <bool kBounded, class T, int M>
CBN_INLINE T responsibilities(const LogOdds<T, M>& odds, T z, T (&e)[M]) {
  if constexpr (M == 1) return e[0] = Math<T>::splat(1);
  constexpr int kFirst = kBounded ? 1 : 0;
  CBN_UNROLL
  for (int m = kFirst; m < M; ++m) {
    const T t = z - odds.centre[m];
    e[m] = odds.curvature[m] * t * t + odds.height[m];
  }
  if constexpr (kBounded) {
    e[0] = Math<T>::splat(1);
  } else {
    T top = e[0];
    CBN_UNROLL
    for (int m = 1; m < M; ++m) top = Math<T>::max(top, e[m]);
    CBN_UNROLL
    for (int m = 0; m < M; ++m) e[m] = e[m] - top;
  }
  CBN_UNROLL
  for (int m = kFirst; m < M; ++m) e[m] = Math<T>::exp2(e[m]);
  T sum = e[0];
  CBN_UNROLL
  for (int m = 1; m < M; ++m) sum = sum + e[m];
  return Math<T>::reciprocal(sum);
}

// Joint mode, one mixture over the channels of a point: component m's log-odds against a reference component are the
// sum over the channels of its peaks and of t^2 - t_m^2, with t_m = sqrt(precision_m) (x - mean_m) and t the same for
// the reference. The difference is taken as (t - t_m) (t + t_m), both factors lines in z: components that are nearly
// equal differ by little, and so do their errors. The reference is the component that is nearest to the channels'
// medians: where it is far from the points itself, the odds of others lose digits.
template <class T, int M>
struct Distances {
  static constexpr int kRows = 4;
  T difference_slope[M];
  T difference_offset[M];
  T sum_slope[M];
  T sum_offset[M];
  CBN_METHOD T* row(int i) {
    T* const rows[] = {difference_slope, difference_offset, sum_slope, sum_offset};
    return rows[i];
  }
};

CBN_INLINE Distances<double, 1> distances(const LogDensity& component, const LogDensity& reference, double origin) {
  const double slope_m = std::sqrt(component.precision), slope = std::sqrt(reference.precision);
  const double offset_m = slope_m * (origin - component.mean), offset = slope * (origin - reference.mean);
  return {slope - slope_m, offset - offset_m, slope + slope_m, offset + offset_m};
}

// t_m^2
CBN_INLINE double squared_distance(const LogDensity& component, double x) {
  return component.precision * (x - component.mean) * (x - component.mean);
}

// What a channel adds to the sums of t^2 - t_m^2.
template <class T, int M>
CBN_INLINE void accumulate(T (&sums)[M], const Distances<T, M>& in, T z) {
  CBN_UNROLL
  for (int m = 0; m < M; ++m)
    sums[m] =
        sums[m] + (in.difference_slope[m] * z + in.difference_offset[m]) * (in.sum_slope[m] * z + in.sum_offset[m]);
}

// ---------------------------------------------------------------------------------------------------------------------
// M-step (eqs 10-12), from sums of z = x - origin, the origin near the channel's values so that squares keep their
// digits
// ---------------------------------------------------------------------------------------------------------------------

// The origin is the median of so many values of the channel, spread evenly: near its values whatever the running mean,
// and no outlier.
constexpr int kOriginSamples = 9;

// Which of a channel's points sample k is.
CBN_INLINE int64_t sampled_point(int k, int64_t points) {
  const int64_t point = k * (points < kOriginSamples ? 1 : points / kOriginSamples);
  return point < points ? point : points - 1;
}

CBN_INLINE double median(double (&values)[kOriginSamples]) {
  CBN_UNROLL
  for (int end = kOriginSamples - 1; end > 0; --end) {
    CBN_UNROLL
    for (int i = 0; i < end; ++i) {
      const double a = values[i], b = values[i + 1];
      values[i] = b < a ? b : a;
      values[i + 1] = b < a ? a : b;
    }
  }
  return values[kOriginSamples / 2];
}

// x, or `otherwise` where x is NaN or infinite.
CBN_INLINE double finite_or(double x, double otherwise) { return x - x == 0 ? x : otherwise; }

template <class T, int M>
struct Moments {
  static constexpr int kRows = 3;
  T mass[M];    // sum p
  T first[M];   // sum p z
  T second[M];  // sum p z^2
  CBN_METHOD T* row(int i) {
    T* const rows[] = {mass, first, second};
    return rows[i];
  }
};

// p is given as e times `factor`; 0 there leaves a point out.
template <class T, int M>
CBN_INLINE void accumulate(Moments<T, M>& sums, const T (&e)[M], T factor, T z) {
  const T first = factor * z, second = first * z;
  CBN_UNROLL
  for (int m = 0; m < M; ++m) {
    sums.mass[m] = sums.mass[m] + e[m] * factor;
    sums.first[m] = sums.first[m] + e[m] * first;
    sums.second[m] = sums.second[m] + e[m] * second;
  }
}

// A component of a channel; the variance is the biased one.
struct Statistics {
  double mass, mean, var;
};

// mean = origin + first / mass, var = second / mass - (first / mass)^2; without mass the running ones. NaN passes.
CBN_INLINE Statistics batch_statistics(double mass, double first, double second, double origin,
                                       const Statistics& running) {
  if (mass < kMassFloor) return {mass, running.mean, running.var};
  const double deviation = first / mass, var = second / mass - deviation * deviation;
  return {mass, origin + deviation, var < 0 ? 0 : var};
}

// Statistics of two parts of a batch to those of both (Chan, Golub, LeVeque 1979). A part without mass has the running
// ones, which stay where neither has mass.
CBN_INLINE Statistics merged(const Statistics& a, const Statistics& b) {
  const double mass = a.mass + b.mass;
  if (mass < kMassFloor) return {mass, a.mean, a.var};
  const double share = b.mass / mass, distance = b.mean - a.mean;
  return {mass, a.mean + share * distance, a.var + share * (b.var - a.var + (1 - share) * distance * distance)};
}

// ---------------------------------------------------------------------------------------------------------------------
// Normalise and combine (eqs 7, 16):  y = sum_m p_m (gamma_m (x - mu_m) r_m + beta_m),  r = 1 / sqrt(var + eps)
// ---------------------------------------------------------------------------------------------------------------------

template <class T, int M>
struct Branches {
  static constexpr int kRows = 2;
  T scale[M];   // gamma r
  T offset[M];  // beta - (mu - origin) gamma r
  CBN_METHOD T* row(int i) { return i == 0 ? scale : offset; }
};

CBN_INLINE double branch_scale(double weight, double var, double eps) { return weight / std::sqrt(var + eps); }

CBN_INLINE double branch_offset(double scale, double bias, double mean, double origin) {
  return bias - (mean - origin) * scale;
}

template <class T, int M>
CBN_INLINE T combine(const Branches<T, M>& branches, const T (&p)[M], T z) {
  T scale = p[0] * branches.scale[0];
  T offset = p[0] * branches.offset[0];
  CBN_UNROLL
  for (int m = 1; m < M; ++m) {
    scale = scale + p[m] * branches.scale[m];
    offset = offset + p[m] * branches.offset[m];
  }
  return scale * z + offset;
}

// A ReLU passes y and its gradient; NaN passes.
template <class T>
CBN_INLINE bool passes_relu(T y) {
  return !(y <= 0);
}

// Backward of the affine pairs, g = dL/dy:  dL/dbeta_m = sum g p_m,  dL/dgamma_m = sum g p_m (x - mu_m) r_m
template <class T, int M>
struct GradientSums {
  static constexpr int kRows = 2;
  T bias[M];   // sum g p
  T first[M];  // sum g p z
  CBN_METHOD T* row(int i) { return i == 0 ? bias : first; }
};

template <class T, int M>
CBN_INLINE void accumulate(GradientSums<T, M>& sums, const T (&e)[M], T factor, T z, T g) {
  const T bias = factor * g, first = bias * z;
  CBN_UNROLL
  for (int m = 0; m < M; ++m) {
    sums.bias[m] = sums.bias[m] + e[m] * bias;
    sums.first[m] = sums.first[m] + e[m] * first;
  }
}

CBN_INLINE double weight_gradient(double sum_bias, double sum_first, double mean, double origin, double var,
                                  double eps) {
  return (sum_first - (mean - origin) * sum_bias) / std::sqrt(var + eps);
}

// Backward of the input. With d = x - mu, dL/dmu = -r gamma dL/dbeta, dL/dvar = -r^2 gamma dL/dgamma / 2 and mass n:
//   f_m  = g (gamma r d + beta) + ( dL/dmu d + dL/dvar (d^2 - var) ) / n     what one unit of p_m is worth
//   f'_m = g gamma r + ( dL/dmu + 2 dL/dvar d ) / n
//   dL/dx = sum p f' + Cov_p(l', f),   l'_m = d/dx of the log-odds; the covariance is absent where p is a constant
// In joint mode F_m, the sum of f_m over the channels of the point, stands in the covariance for f_m.
template <class T, int M>
struct InputGradient {
  static constexpr int kRows = 6;
  T centre[M];     // mu - origin
  T scale[M];      // gamma r
  T bias[M];       // beta
  T linear[M];     // dL/dmu / n
  T quadratic[M];  // dL/dvar / n
  T constant[M];   // -quadratic var
  CBN_METHOD T* row(int i) {
    T* const rows[] = {centre, scale, bias, linear, quadratic, constant};
    return rows[i];
  }
};

// The output again, from what the backward pass has.
template <class T, int M>
CBN_INLINE T combine(const InputGradient<T, M>& in, const T (&p)[M], T z) {
  T y = p[0] * (in.scale[0] * (z - in.centre[0]) + in.bias[0]);
  CBN_UNROLL
  for (int m = 1; m < M; ++m) y = y + p[m] * (in.scale[m] * (z - in.centre[m]) + in.bias[m]);
  return y;
}

CBN_INLINE double mean_gradient(double scale, double grad_bias, double mass) {
  return mass < kMassFloor ? 0 : -scale * grad_bias / mass;
}

CBN_INLINE double variance_gradient(double scale, double grad_weight, double var, double eps, double mass) {
  return mass < kMassFloor ? 0 : -0.5 * scale * grad_weight / std::sqrt(var + eps) / mass;
}

// sum p f', and each f.
template <class T, int M>
CBN_INLINE T direct_gradient(const InputGradient<T, M>& in, const T (&p)[M], T z, T g, T (&f)[M]) {
  // f = d u + (g beta + constant) and f' = u + quadratic d, with u = g gamma r + linear + quadratic d
  T direct;
  CBN_UNROLL
  for (int m = 0; m < M; ++m) {
    const T d = z - in.centre[m];
    const T u = g * in.scale[m] + in.linear[m] + in.quadratic[m] * d;
    const T slope = u + in.quadratic[m] * d;
    f[m] = d * u + (g * in.bias[m] + in.constant[m]);
    direct = m == 0 ? p[0] * slope : direct + p[m] * slope;
  }
  return direct;
}

// Cov_p(l', f)
template <bool kBounded, class T, int M>
CBN_INLINE T covariance(const LogOdds<T, M>& odds, const T (&p)[M], T z, const T (&f)[M]) {
  T mean = p[0] * f[0], sum = Math<T>::splat(0);
  CBN_UNROLL
  for (int m = 1; m < M; ++m) mean = mean + p[m] * f[m];
  CBN_UNROLL
  for (int m = kBounded ? 1 : 0; m < M; ++m)
    sum = sum + p[m] * (odds.curvature[m] * (z - odds.centre[m])) * (f[m] - mean);
  return sum * Math<T>::splat(2 * kLn2);
}

// Joint mode: sum_m q_m l'_m, with the gradient of the log-odds q_m = p_m (F_m - sum_k p_k F_k).
template <class T, int M>
CBN_INLINE T joint_covariance(const LogOdds<T, M>& densities, const T (&q)[M], T z) {
  T sum = Math<T>::splat(0);
  CBN_UNROLL
  for (int m = 0; m < M; ++m) sum = sum + q[m] * (densities.curvature[m] * (z - densities.centre[m]));
  return sum * Math<T>::splat(2 * kLn2);
}

// ---------------------------------------------------------------------------------------------------------------------
// Temporal accumulation (eqs 13-15)
// ---------------------------------------------------------------------------------------------------------------------

CBN_INLINE double moved(double running, double batch, double momentum) {
  return (1 - momentum) * running + momentum * batch;
}

CBN_INLINE double unbiased(double var, double mass) { return var * (mass / (mass > 2 ? mass - 1 : 1)); }

}  // namespace cbn
