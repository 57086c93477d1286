// Compound batch normalization, per element: every formula once, for the host and the device.
//
// T is a scalar or a vector of lanes; a lane is one point x of one channel, or of several channels side by side.
// Statistics of a channel are prepared in D, double or a vector of doubles of neighbouring channels; the element
// functions use them as T. Equations are those of "Compound Batch Normalization for Long-tailed Image Classification"
// (2022). Neither ATen nor the CUDA runtime is used here.
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
// Precisions that differ by less, relative to the smaller one, count as differing by so much.
constexpr double kLeastExcess = 0x1p-40;
// Where ExpandedGradient keeps its digits: the square of the odds' centre's distance from the widest component, in the
// latter's standard deviations, is at most this times the root of the number of points.
constexpr double kNear = 40.0;
// Height of the components that pad M to a compiled size: their responsibility is 0.
constexpr double kNoComponent = -1e30;
constexpr double kLog2E = 1.4426950408889634;
constexpr double kLn2 = 0.6931471805599453;

// What T can do beyond arithmetic: splat(double), exp2(x), reciprocal(x), max(a, b). Specialised beside each T.
template <class T>
struct Math;

// What D can do beyond arithmetic and comparisons. Vectors are specialised beside their `Math`.
template <class D>
struct Doubles;

template <>
struct Doubles<double> {
  static CBN_METHOD double sqrt(double x) { return std::sqrt(x); }
  static CBN_METHOD double log2(double x) { return kLog2E * std::log(x); }
  // `count` neighbours in memory, here one.
  template <class S>
  static CBN_METHOD double load(const S* from, int64_t) {
    return static_cast<double>(*from);
  }
  template <class S>
  static CBN_METHOD void store(S* to, int64_t, double x) {
    *to = static_cast<S>(x);
  }
  template <class S>
  static CBN_METHOD double rounded(double x) {
    return static_cast<double>(static_cast<S>(x));
  }
};

// ---------------------------------------------------------------------------------------------------------------------
// E-step (eqs 8-9)
//
// log2 of pi_m N(x; mu_m, v_m), v = sigma^2 + eps, is peak - precision (x - mu_m)^2 with precision = log2(e) / (2 v)
// and peak = log2(pi_m / sqrt(v)), in other words peak - t^2 with t a line in x. Relative to the component of largest
// variance, which is stored first, it is again height - t^2: bounded above by its height. Where all heights are small,
// M - 1 exponentials and no search for a maximum give the responsibilities ("bounded"); elsewhere (variances as good as
// equal but other means, hence a line and no bound, or well separated components) each of the M log-densities is kept
// and the maximum subtracted. The square is completed here, in double: expanded, it would lose the digits of narrow
// components far from the origin.
// ---------------------------------------------------------------------------------------------------------------------

// Structs of coefficients and of sums are rows of M: row(i) is the i-th.
template <class T, int M>
struct LogOdds {
  static constexpr int kRows = 3;
  T slope[M];   // of t in z = x - origin
  T offset[M];  // of t
  T height[M];
  CBN_METHOD T* row(int i) {
    T* const rows[] = {slope, offset, height};
    return rows[i];
  }
};

// Where component m is stored when the widest one comes first; its own inverse.
CBN_INLINE int stored_at(int m, int widest) { return m == 0 ? widest : m == widest ? 0 : m; }

// log2 (pi_m N(x; mu_m, v_m)) = peak - precision (x - mean)^2
template <class D>
struct BasicLogDensity {
  static constexpr int kRows = 3;
  D precision;
  D peak;
  D mean;
  CBN_METHOD D* row(int i) { return i == 0 ? &precision : i == 1 ? &peak : &mean; }
};
using LogDensity = BasicLogDensity<double>;

template <class D>
CBN_INLINE D at_least(D x, D least) {
  return x > least ? x : least;
}

CBN_INLINE double log_prior(double prior) { return Doubles<double>::log2(at_least(prior, kPriorFloor)); }

template <class D>
CBN_INLINE BasicLogDensity<D> log_density(D prior, D mean, D var, double eps) {
  const D inverse = 1 / (var + eps), pi = at_least(prior, D{} + kPriorFloor);
  return {kLog2E / 2 * inverse, 0.5 * Doubles<D>::log2(pi * pi * inverse), mean};
}

// One component's `height - (slope z + offset)^2` for points z = x - origin.
template <class D>
using BasicParabola = LogOdds<D, 1>;
using Parabola = BasicParabola<double>;

template <class D>
CBN_INLINE BasicParabola<D> parabola(const BasicLogDensity<D>& component, D origin) {
  const D slope = Doubles<D>::sqrt(component.precision);
  return {{slope}, {slope * (origin - component.mean)}, {component.peak}};
}

// A component's odds against the widest one. Variances that are equal differ by a little: the line that is left where
// the means differ too has no bound.
template <class D>
CBN_INLINE BasicParabola<D> odds_parabola(const BasicLogDensity<D>& component, const BasicLogDensity<D>& widest,
                                          D origin) {
  const D excess = at_least(component.precision - widest.precision, kLeastExcess * widest.precision);
  const D u = component.mean - widest.mean, shift = component.precision * u / excess, slope = Doubles<D>::sqrt(excess);
  return {
      {slope}, {slope * (origin - widest.mean - shift)}, {component.peak - widest.peak + u * shift * widest.precision}};
}

template <class D>
CBN_INLINE auto is_bounded(const BasicParabola<D>& odds) {
  return *odds.height <= kBoundedOdds;
}

// Whether the odds' centre is near the widest component. ExpandedGradient has polynomials in the distance from the
// centre, whose quadratic terms come from the gradients of the mean and the variance: the more points, the less a point
// has of these.
template <class D>
CBN_INLINE auto is_near(const BasicParabola<D>& odds, const BasicLogDensity<D>& widest, D origin, int64_t points) {
  const D distance = *odds.offset + *odds.slope * (widest.mean - origin);  // times the slope
  const double most = kNear * std::sqrt(static_cast<double>(points)) * (kLog2E / 2);
  return distance * distance * widest.precision <= most * (*odds.slope * *odds.slope);
}

// p_m = pi_m N_m / sum_k pi_k N_k (eq 8), as e_m times the factor returned.
template <bool kBounded, class T, int M>
CBN_INLINE T responsibilities(const LogOdds<T, M>& odds, T z, T (&e)[M]) {
  if constexpr (M == 1) return e[0] = Math<T>::splat(1);
  constexpr int kFirst = kBounded ? 1 : 0;
  CBN_UNROLL
  for (int m = kFirst; m < M; ++m) {
    const T t = odds.slope[m] * z + odds.offset[m];
    e[m] = odds.height[m] - t * t;
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

template <class T>
CBN_INLINE T median(T (&values)[kOriginSamples]) {
  CBN_UNROLL
  for (int end = kOriginSamples - 1; end >= kOriginSamples / 2; --end) {
    CBN_UNROLL
    for (int i = 0; i < end; ++i) {
      const T a = values[i], b = values[i + 1];
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
template <class D>
struct BasicStatistics {
  D mass, mean, var;
};
using Statistics = BasicStatistics<double>;

// mean = origin + first / mass, var = second / mass - (first / mass)^2; without mass the running ones. NaN passes.
template <class D>
CBN_INLINE BasicStatistics<D> batch_statistics(D mass, D first, D second, D origin, const BasicStatistics<D>& running) {
  const D deviation = first / mass, var = second / mass - deviation * deviation;
  const auto absent = mass < kMassFloor;
  return {mass, absent ? running.mean : origin + deviation, absent ? running.var : var < 0 ? D{} : var};
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

template <class D>
CBN_INLINE D branch_scale(D weight, D var, double eps) {
  return weight / Doubles<D>::sqrt(var + eps);
}

template <class D>
CBN_INLINE D branch_offset(D scale, D bias, D mean, D origin) {
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

template <class D>
CBN_INLINE D weight_gradient(D sum_bias, D sum_first, D mean, D origin, D var, double eps) {
  return (sum_first - (mean - origin) * sum_bias) / Doubles<D>::sqrt(var + eps);
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

template <class D>
CBN_INLINE D mean_gradient(D scale, D grad_bias, D mass) {
  return mass < kMassFloor ? D{} : -scale * grad_bias / mass;
}

template <class D>
CBN_INLINE D variance_gradient(D scale, D grad_weight, D var, double eps, D mass) {
  return mass < kMassFloor ? D{} : -0.5 * scale * grad_weight / Doubles<D>::sqrt(var + eps) / mass;
}

// sum p f', and each f.
template <class T, int M>
CBN_INLINE T direct_gradient(const InputGradient<T, M>& in, const T (&p)[M], T z, T g, T (&f)[M]) {
  // f = d u + (g beta + constant) and f' = u + quadratic d, with u = g gamma r + linear + quadratic d
  T direct = Math<T>::splat(0);
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

// Cov_p(l', f), of log-densities
template <class T, int M>
CBN_INLINE T covariance(const LogOdds<T, M>& densities, const T (&p)[M], T z, const T (&f)[M]) {
  T mean = p[0] * f[0], sum = Math<T>::splat(0);
  CBN_UNROLL
  for (int m = 1; m < M; ++m) mean = mean + p[m] * f[m];
  CBN_UNROLL
  for (int m = 0; m < M; ++m)
    sum = sum + p[m] * densities.slope[m] * (densities.slope[m] * z + densities.offset[m]) * (f[m] - mean);
  return sum * Math<T>::splat(-2 * kLn2);
}

// sum p f' where p is a constant:  f' = g scale + slope z + constant
template <class T, int M>
struct DirectGradient {
  static constexpr int kRows = 4;
  Branches<T, M> branches;  // of the output
  T slope[M];               // 2 dL/dvar / n
  T constant[M];            // (dL/dmu - 2 dL/dvar (mu - origin)) / n
  CBN_METHOD T* row(int i) { return i < 2 ? branches.row(i) : i == 2 ? slope : constant; }
};

template <class D>
CBN_INLINE DirectGradient<D, 1> direct_gradient(const InputGradient<D, 1>& of) {
  const D slope = 2 * *of.quadratic;
  return {{{*of.scale}, {*of.bias - *of.scale * *of.centre}}, {slope}, {*of.linear - slope * *of.centre}};
}

// To be multiplied by the factor of e.
template <class T, int M>
CBN_INLINE T direct_gradient(const DirectGradient<T, M>& in, const T (&e)[M], T z, T g) {
  T scale = e[0] * in.branches.scale[0], slope = e[0] * in.slope[0], constant = e[0] * in.constant[0];
  CBN_UNROLL
  for (int m = 1; m < M; ++m) {
    scale = scale + e[m] * in.branches.scale[m];
    slope = slope + e[m] * in.slope[m];
    constant = constant + e[m] * in.constant[m];
  }
  return slope * z + (scale * g + constant);
}

// The whole gradient where the odds are bounded. Nothing changes when f_0 is taken off all f_m, and l'_0 = 0: the
// widest component costs no more than its f'_0. What is left, f_m - f_0 and its derivative, are polynomials in the
// component's own t, so that nothing is lost far from the origin; e_m carries a factor slope_m, which l'_m = -2 ln2
// slope_m t_m and the derivatives want, from the height. The widest component's rows are its own, the others'
// differences from it.
template <class T, int M>
struct ExpandedGradient {
  static constexpr int kRows = 9;
  LogOdds<T, M> odds;       // heights + log2 slope;                widest: none
  Branches<T, M> branches;  // of the output, as lines in t;        widest: in z
  T slope[M];               // of f' / slope in t, beside g's part; widest: 2 dL/dvar / n
  T constant[M];            // likewise;                            widest: (dL/dmu - 2 dL/dvar (mu - origin)) / n
  T value[M];               // of f at the odds' centre, g = 0;     widest: none
  T width[M];               // 1 / slope of the odds;               widest: none
  CBN_METHOD T* row(int i) {
    T* const rows[] = {slope, constant, value, width};
    return i < 3 ? odds.row(i) : i < 5 ? branches.row(i - 3) : rows[i - 5];
  }
};

template <class D>
CBN_INLINE ExpandedGradient<D, 1> expanded_gradient(const InputGradient<D, 1>& widest) {
  const DirectGradient<D, 1> direct = direct_gradient(widest);
  return {{}, direct.branches, {*direct.slope}, {*direct.constant}, {}, {}};
}

// Of another component, by its odds against the widest.
template <class D>
CBN_INLINE ExpandedGradient<D, 1> expanded_gradient(const InputGradient<D, 1>& of, const InputGradient<D, 1>& widest,
                                                    const BasicParabola<D>& odds) {
  const D width = 1 / *odds.slope, centre = -*odds.offset * width;
  const D d = centre - *of.centre, e = centre - *widest.centre;
  const auto value = [](const InputGradient<D, 1>& in, D at) {
    return (*in.linear + *in.quadratic * at) * at + *in.constant;
  };
  return {{{*odds.slope}, {*odds.offset}, {*odds.height + Doubles<D>::log2(*odds.slope)}},
          {{(*of.scale - *widest.scale) * width}, {*of.scale * d + *of.bias - (*widest.scale * e + *widest.bias)}},
          {(*of.quadratic - *widest.quadratic) * width * width},
          {(*of.linear + 2 * *of.quadratic * d - (*widest.linear + 2 * *widest.quadratic * e)) * width},
          {value(of, d) - value(widest, e)},
          {width}};
}

// A point's weights in these terms: e_m slope_m and t_m of all but the widest component, and the sum of all e.
template <class T, int M>
struct ExpandedWeights {
  T e[M], t[M];
  T sum;

  CBN_METHOD ExpandedWeights(const ExpandedGradient<T, M>& in, T z) : sum(Math<T>::splat(1)) {
    CBN_UNROLL
    for (int m = 1; m < M; ++m) {
      t[m] = in.odds.slope[m] * z + in.odds.offset[m];
      e[m] = Math<T>::exp2(in.odds.height[m] - t[m] * t[m]);
      sum = sum + e[m] * in.width[m];
    }
  }

  // The output times the sum.
  CBN_METHOD T combine(const ExpandedGradient<T, M>& in, T z) const {
    T y = sum * (in.branches.scale[0] * z + in.branches.offset[0]);
    CBN_UNROLL
    for (int m = 1; m < M; ++m) y = y + e[m] * in.width[m] * (in.branches.scale[m] * t[m] + in.branches.offset[m]);
    return y;
  }

  CBN_METHOD T gradient(const ExpandedGradient<T, M>& in, T z, T g) const {
    // sums of e (f'_m - f'_0), of e (f_m - f_0), and of e t without and with it
    T direct = Math<T>::splat(0), worth = direct, score = direct, product = direct;
    CBN_UNROLL
    for (int m = 1; m < M; ++m) {
      const T u = g * in.branches.scale[m] + (in.slope[m] * t[m] + in.constant[m]);
      const T f = u * t[m] + (g * in.branches.offset[m] + in.value[m]);
      const T weighted = e[m] * f;
      direct = direct + e[m] * (in.slope[m] * t[m] + u);
      worth = worth + weighted * in.width[m];
      product = product + weighted * t[m];
      score = score + e[m] * t[m];
    }
    const T factor = Math<T>::reciprocal(sum);
    const T covariance = product - worth * factor * score;
    return in.slope[0] * z + (g * in.branches.scale[0] + in.constant[0]) +
           (direct - covariance * Math<T>::splat(2 * kLn2)) * factor;
  }
};

// Joint mode: sum_m q_m l'_m, with the gradient of the log-odds q_m = p_m (F_m - sum_k p_k F_k), and l'_m a line in z.
template <class T, int M>
struct Scores {
  static constexpr int kRows = 2;
  T slope[M];
  T offset[M];
  CBN_METHOD T* row(int i) { return i == 0 ? slope : offset; }
};

template <class D>
CBN_INLINE Scores<D, 1> scores(const BasicLogDensity<D>& component, D origin) {
  const D slope = -2 * kLn2 * component.precision;
  return {{slope}, {slope * (origin - component.mean)}};
}

template <class T, int M>
CBN_INLINE T joint_covariance(const Scores<T, M>& in, const T (&q)[M], T z) {
  T slope = q[0] * in.slope[0], offset = q[0] * in.offset[0];
  CBN_UNROLL
  for (int m = 1; m < M; ++m) {
    slope = slope + q[m] * in.slope[m];
    offset = offset + q[m] * in.offset[m];
  }
  return slope * z + offset;
}

// ---------------------------------------------------------------------------------------------------------------------
// Temporal accumulation (eqs 13-15)
// ---------------------------------------------------------------------------------------------------------------------

CBN_INLINE double moved(double running, double batch, double momentum) {
  return (1 - momentum) * running + momentum * batch;
}

CBN_INLINE double unbiased(double var, double mass) { return var * (mass / (mass > 2 ? mass - 1 : 1)); }

}  // namespace cbn
