// The four loops of the CPU operator over the element functions of mixture.h, for the instruction set of the
// including file.
//
// A vector holds neighbouring points of one channel, or in channels_last neighbouring channels of one point;
// what belongs to a channel is then a vector too, with equal lanes in the first case. Everything has internal
// linkage: the same templates are compiled for several instruction sets.
#pragma once

#include <cmath>
#include <cstdint>

#include "../mixture.h"
#include "tasks.h"
#include "vec.h"

namespace cbn {
namespace {

// Vectors added in float before the sums move on to double.
constexpr int kVectorsPerFlush = 64;

// One block of channels of a problem, as vectors.
template <class E>
struct Block {
  using Memory = typename E::Memory;
  using S = typename E::Scalar;
  using V = Vec<S>;
  static constexpr int kLanes = kLanesOf<S>;

  const Problem& problem;
  int64_t first_channel;
  int channels;  // of this block

  Block(const Problem& p, int64_t block) : problem(p), first_channel(p.channels_last ? block * kLanes : block) {
    const int64_t left = p.channels - first_channel;
    channels = !p.channels_last ? 1 : left < kLanes ? static_cast<int>(left) : kLanes;
  }

  const Memory* x() const { return static_cast<const Memory*>(problem.x); }
  const Memory* grad() const { return static_cast<const Memory*>(problem.grad); }
  Memory* out() const { return static_cast<Memory*>(problem.out); }
  int64_t image(int64_t i) const { return problem.images ? problem.images[i] : i; }

  // Calls visit(offset, count) for all elements of the images [begin, end), a vector of `count` lanes at a
  // time.
  template <class F>
  __attribute__((always_inline)) void for_each_vector(int64_t begin, int64_t end, F visit) const {
    const int64_t C = problem.channels, S = problem.spatial;
    const bool last = problem.channels_last;
    // Rows of channels follow each other from image to image, unless the images are chosen ones.
    const int64_t run = last && problem.images == nullptr ? end - begin : 1;
    const int64_t steps = last ? run * S : (S + kLanes - 1) / kLanes, stride = last ? C : kLanes;
    const int64_t full = last ? channels : kLanes, tail = last ? channels : S - (steps - 1) * kLanes;
    for (int64_t i = begin; i < end; i += run) {
      const int64_t base = image(i) * C * S + first_channel * (last ? 1 : S);
      for (int64_t k = 0; k < steps; ++k) visit(base + k * stride, k + 1 < steps ? full : tail);
    }
  }

  double sampled_origin(int64_t channel) const {
    const int64_t C = problem.channels, S = problem.spatial, points = problem.count * S;
    if (points == 0) return 0;
    double values[kOriginSamples];
    for (int k = 0; k < kOriginSamples; ++k) {
      const int64_t point = sampled_point(k, points), n = image(point / S), s = point % S;
      const int64_t offset = problem.channels_last ? (n * S + s) * C + channel : (n * C + channel) * S + s;
      values[k] = static_cast<double>(load<E>(x() + offset, 1)[0]);
    }
    return median(values);
  }
};

enum class Pass { kMoments, kNormalise, kGradientSums, kInputGradient };

// What one channel brings to the element functions, in double, components in stored order (the widest first).
struct ChannelCoefficients {
  bool bounded;
  double origin;
  LogOdds<double, kMaxComponents> odds;
  Branches<double, kMaxComponents> branches;       // where needs_branches() says so
  InputGradient<double, kMaxComponents> gradient;  // for kInputGradient
};

// The output is computed by the pass, or its sign recomputed.
inline bool needs_branches(const Problem& p, Pass pass) {
  return pass == Pass::kNormalise || (pass != Pass::kMoments && p.relu && p.mask == nullptr);
}

// Not inlined, and for all M at once: this runs once per channel and task, and stands in every kernel.
template <class E>
__attribute__((noinline)) ChannelCoefficients channel_coefficients(const Block<E>& block, int64_t channel, Pass pass,
                                                                   bool force_unbounded) {
  using S = typename E::Scalar;
  const Problem& p = block.problem;
  const auto read = [](const void* values, int64_t i) { return static_cast<double>(static_cast<const S*>(values)[i]); };
  const bool batch = p.training && pass != Pass::kMoments;
  double var_in_order[kMaxComponents] = {}, mass_in_order[kMaxComponents] = {};
  for (int m = 0; m < p.components; ++m) {
    const int64_t i = m * p.channels + channel;
    var_in_order[m] = read(p.var, i);
    if (batch) mass_in_order[m] = read(p.batch_mass, i);
  }
  const int widest = largest_component(var_in_order, p.components);
  const int centre = batch ? largest_component(mass_in_order, p.components) : widest;

  ChannelCoefficients result{};
  // The origin is a value of S: x - origin is then what the coefficients are made for.
  result.origin = pass == Pass::kMoments ? block.sampled_origin(channel)
                                         : read(batch ? p.batch_mean : p.mean, centre * p.channels + channel);
  result.origin = static_cast<double>(static_cast<S>(result.origin));
  double prior[kMaxComponents] = {}, running_mean[kMaxComponents] = {}, running_var[kMaxComponents] = {};
  for (int k = 0; k < p.components; ++k) {
    const int64_t i = stored_at(k, widest) * p.channels + channel;
    prior[k] = p.prior ? read(p.prior, i) : 1;
    running_mean[k] = read(p.mean, i);
    running_var[k] = read(p.var, i);
    const double mean = batch ? read(p.batch_mean, i) : running_mean[k];
    const double var = batch ? read(p.batch_var, i) : running_var[k];
    const double bias = p.bias ? read(p.bias, i) : 0;
    const double scale = branch_scale(p.weight ? read(p.weight, i) : 1, var, p.eps);
    if (needs_branches(p, pass)) {
      result.branches.scale[k] = scale;
      result.branches.offset[k] = branch_offset(scale, bias, mean, result.origin);
    }
    if (pass == Pass::kInputGradient) {
      InputGradient<double, kMaxComponents>& in = result.gradient;
      in.centre[k] = mean - result.origin;
      in.scale[k] = scale;
      in.bias[k] = bias;
      if (batch) {  // running statistics are constants
        const double mass = read(p.batch_mass, i);
        in.linear[k] = mean_gradient(scale, read(p.grad_bias, i), mass);
        in.quadratic[k] = variance_gradient(scale, read(p.grad_weight, i), var, p.eps, mass);
        in.constant[k] = -in.quadratic[k] * var;
      }
    }
  }
  result.bounded =
      log_odds(result.odds, prior, running_mean, running_var, p.components, p.eps, result.origin, force_unbounded);
  return result;
}

// Coefficients of all components of one channel, a struct of arrays of doubles, into the same struct of
// arrays of vectors with M components: into one lane in channels_last, into all of them else.
template <class S>
__attribute__((noinline)) void set_lanes(S* vectors, const double* values, int arrays, int M, int lane, bool all) {
  for (int i = 0; i < arrays; ++i)
    for (int m = 0; m < M; ++m)
      for (int l = all ? 0 : lane; l < (all ? kLanesOf<S> : lane + 1); ++l)
        vectors[(i * M + m) * kLanesOf<S> + l] = static_cast<S>(values[i * kMaxComponents + m]);
}

// What a block brings to the element functions.
template <class E, int M>
struct BlockCoefficients {
  using S = typename E::Scalar;
  bool bounded;
  Vec<S> origin{};
  LogOdds<Vec<S>, M> odds{};
  Branches<Vec<S>, M> branches{};
  InputGradient<Vec<S>, M> gradient{};

  BlockCoefficients(const Block<E>& block, Pass pass) : bounded(true) {
    // Where one channel is not bounded, its neighbours in the vector take the other form too.
    if (!set(block, pass, false)) {
      bounded = false;
      set(block, pass, true);
    }
  }

 private:
  template <template <class, int> class Coefficients>
  void set(Coefficients<Vec<S>, M>& lanes, const Coefficients<double, kMaxComponents>& values, int lane, bool all) {
    set_lanes(reinterpret_cast<S*>(&lanes), reinterpret_cast<const double*>(&values),
              sizeof(lanes) / sizeof(Vec<S>) / M, M, lane, all);
  }

  bool set(const Block<E>& block, Pass pass, bool force_unbounded) {
    bool all_bounded = true;
    const bool all = !block.problem.channels_last;
    for (int j = 0; j < block.channels; ++j) {
      const ChannelCoefficients channel = channel_coefficients(block, block.first_channel + j, pass, force_unbounded);
      all_bounded &= channel.bounded;
      set_lanes(reinterpret_cast<S*>(&origin), &channel.origin, 1, 1, j, all);
      set(odds, channel.odds, j, all);
      if (needs_branches(block.problem, pass)) set(branches, channel.branches, j, all);
      if (pass == Pass::kInputGradient) set(gradient, channel.gradient, j, all);
    }
    return all_bounded;
  }
};

// Sums over vectors: in float for a while, then in double. Sums<V, M> is a struct of arrays of vectors.
template <class E, template <class, int> class Sums, int M>
struct LongSums {
  using V = Vec<typename E::Scalar>;
  static constexpr int kLanes = Block<E>::kLanes;
  static constexpr int kArrays = sizeof(Sums<V, M>) / sizeof(V) / M;

  double total[kArrays * M][kLanes] = {};

  // Not inlined: `current` has a copy made of it here, and itself stays in registers.
  __attribute__((noinline)) void add(Sums<V, M> current) {
    const auto* sums = reinterpret_cast<const V*>(&current);
    for (int i = 0; i < kArrays * M; ++i)
      for (int l = 0; l < kLanes; ++l) total[i][l] += static_cast<double>(sums[i][l]);
  }

  // [kinds of sums, components in stored order, channels], then the origin [channels].
  __attribute__((noinline)) void write(double* out, const Block<E>& block, V origin) const {
    for (int i = 0; i < kArrays * M; ++i) {
      if (i % M >= block.problem.components) continue;
      if (block.problem.channels_last) {
        for (int l = 0; l < block.channels; ++l) *out++ = total[i][l];
      } else {
        double sum = 0;
        for (int l = 0; l < kLanes; ++l) sum += total[i][l];
        *out++ = sum;
      }
    }
    for (int l = 0; l < block.channels; ++l) *out++ = static_cast<double>(origin[l]);
  }
};

// Runs loop(bool_constant<bounded>): the two forms of the E-step are two loops.
template <class F>
CBN_INLINE void with_bounded(bool bounded, F loop) {
  if (bounded)
    loop(std::true_type{});
  else
    loop(std::false_type{});
}

// The gradient that the ReLU lets pass: by the mask, or, where there was no residual, by the sign of the output again,
// for which the responsibilities need not be normalised.
template <bool kFused, class E, int M>
CBN_INLINE Vec<typename E::Scalar> passed_gradient(const Block<E>& block, const BlockCoefficients<E, M>& coefficients,
                                                   const Vec<typename E::Scalar> (&p)[M], Vec<typename E::Scalar> z,
                                                   int64_t offset, int64_t count) {
  using V = Vec<typename E::Scalar>;
  const V g = load<E>(block.grad() + offset, count);
  if (!kFused) return g;
  if (block.problem.mask) return Math<V>::where_set(get_bits(block.problem.mask, offset, count), g);
  return combine(coefficients.branches, p, z) <= 0 ? V{} : g;
}

// Sums add(current, e, inverse, z, offset, count) over all vectors of a block's images [begin, end).
template <template <class, int> class Sums, class E, int M, class Add>
CBN_INLINE void reduce(const Block<E>& block, const BlockCoefficients<E, M>& coefficients, int64_t begin, int64_t end,
                       double* sums, Add add) {
  using V = Vec<typename E::Scalar>;
  LongSums<E, Sums, M> totals;
  with_bounded(coefficients.bounded, [&](auto bounded) {
    Sums<V, M> current{};
    int vectors = 0;
    block.for_each_vector(begin, end, [&](int64_t offset, int64_t count) __attribute__((always_inline)) {
      const V z = load<E>(block.x() + offset, count) - coefficients.origin;
      V e[M];
      const V sum = unnormalised_responsibilities<bounded.value>(coefficients.odds, z, e);
      const V inverse = M == 1 ? sum : Math<V>::reciprocal(sum);
      add(current, e, inverse, z, offset, count);
      if (++vectors == kVectorsPerFlush) {
        totals.add(current);
        current = {};
        vectors = 0;
      }
    });
    totals.add(current);
  });
  totals.write(sums, block, coefficients.origin);
}

template <class E, int M>
void moments(const Problem& problem, int64_t index, int64_t begin, int64_t end, double* sums) {
  using V = Vec<typename E::Scalar>;
  const Block<E> block(problem, index);
  const BlockCoefficients<E, M> coefficients(block, Pass::kMoments);
  reduce<Moments>(block, coefficients, begin, end, sums,
                  [](Moments<V, M>& current, V(&e)[M], V inverse, V z, int64_t, int64_t count)
                      __attribute__((always_inline)) {
                        if (count < Block<E>::kLanes) inverse = inverse * lanes_below<typename E::Scalar>(count);
                        accumulate(current, e, inverse, z);
                      });
}

template <class E, int M, bool kFused>
void gradient_sums(const Problem& problem, int64_t index, int64_t begin, int64_t end, double* sums) {
  using V = Vec<typename E::Scalar>;
  const Block<E> block(problem, index);
  const BlockCoefficients<E, M> coefficients(block, Pass::kGradientSums);
  reduce<GradientSums>(block, coefficients, begin, end, sums,
                       [&](GradientSums<V, M>& current, V(&e)[M], V inverse, V z, int64_t offset, int64_t count)
                           __attribute__((always_inline)) {
                             // The gradient is 0 beyond `count`, and so is what is added there.
                             accumulate(current, e, inverse, z,
                                        passed_gradient<kFused>(block, coefficients, e, z, offset, count));
                           });
}

template <class E, int M, bool kFused>
void normalise(const Problem& problem, int64_t index, int64_t begin, int64_t end) {
  using V = Vec<typename E::Scalar>;
  const Block<E> block(problem, index);
  const BlockCoefficients<E, M> coefficients(block, Pass::kNormalise);
  const auto* residual = static_cast<const typename E::Memory*>(problem.residual);
  uint32_t* const mask = problem.mask;
  const bool relu = problem.relu;
  with_bounded(coefficients.bounded, [&](auto bounded) {
    block.for_each_vector(begin, end, [&](int64_t offset, int64_t count) __attribute__((always_inline)) {
      const V z = load<E>(block.x() + offset, count) - coefficients.origin;
      V y = cbn::normalise<bounded.value>(coefficients.odds, coefficients.branches, z);
      if constexpr (kFused) {
        if (residual) y = y + load<E>(residual + offset, count);
        if (mask) set_bits<Block<E>::kLanes>(mask, offset, count, Math<V>::above_zero(y));
        if (relu) y = Math<V>::max(y, V{});
      }
      store<E>(block.out() + offset, count, y);
    });
  });
}

template <class E, int M, bool kFused>
void input_gradient(const Problem& problem, int64_t index, int64_t begin, int64_t end) {
  using V = Vec<typename E::Scalar>;
  const Block<E> block(problem, index);
  const BlockCoefficients<E, M> coefficients(block, Pass::kInputGradient);
  auto* grad_residual = static_cast<typename E::Memory*>(problem.grad_residual);
  const bool detach = problem.detach_responsibility;
  with_bounded(coefficients.bounded, [&](auto bounded) {
    block.for_each_vector(begin, end, [&](int64_t offset, int64_t count) __attribute__((always_inline)) {
      const V z = load<E>(block.x() + offset, count) - coefficients.origin;
      V p[M];
      responsibilities<bounded.value>(coefficients.odds, z, p);
      const V g = passed_gradient<kFused>(block, coefficients, p, z, offset, count);
      if (kFused && grad_residual) store<E>(grad_residual + offset, count, g);
      store<E>(block.out() + offset, count,
               cbn::input_gradient<bounded.value>(coefficients.odds, coefficients.gradient, p, z, g, detach));
    });
  });
}

template <class E, int M, bool kFused>
Tasks make_tasks() {
  return {Block<E>::kLanes, moments<E, M>, normalise<E, M, kFused>, gradient_sums<E, M, kFused>,
          input_gradient<E, M, kFused>};
}

// M is compiled for these; the components in between are padded by ones without responsibility.
template <class E, bool kFused>
Tasks tasks_of(int components) {
  if (components == 1) return make_tasks<E, 1, kFused>();
  if (components == 2) return make_tasks<E, 2, kFused>();
  if (components <= 4) return make_tasks<E, 4, kFused>();
  if (components <= 8) return make_tasks<E, 8, kFused>();
  return make_tasks<E, kMaxComponents, kFused>();
}

// The plain kernels pay nothing for what the fused ones ask at every vector.
template <class E>
Tasks tasks_of(int components, bool fused) {
  return fused ? tasks_of<E, true>(components) : tasks_of<E, false>(components);
}

inline Tasks tasks(Element element, int components, bool fused) {
  switch (element) {
    case Element::kFloat:
      return tasks_of<Float>(components, fused);
    case Element::kDouble:
      return tasks_of<Double>(components, fused);
    case Element::kHalf:
      return tasks_of<Half>(components, fused);
    default:
      return tasks_of<BFloat16>(components, fused);
  }
}

}  // namespace
}  // namespace cbn
