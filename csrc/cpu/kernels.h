// The four loops of the CPU operator over the element functions of mixture.h, for the instruction set of the including file.
//
// A vector holds neighbouring points of one channel, or in channels_last neighbouring channels of one point; what belongs to
// a channel is then a vector too, with equal lanes in the first case. Everything has internal linkage: the same templates
// are compiled for several instruction sets.
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
// Values of a channel whose mean is the origin of its moments.
constexpr int64_t kOriginSamples = 8;

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

  // Calls visit(offset, count) for all elements of the images [begin, end), a vector of `count` lanes at a time.
  template <class F>
  __attribute__((always_inline)) void for_each_vector(int64_t begin, int64_t end, F visit) const {
    const int64_t C = problem.channels, S = problem.spatial;
    const bool last = problem.channels_last;
    const int64_t steps = last ? S : (S + kLanes - 1) / kLanes, stride = last ? C : kLanes;
    const int64_t full = last ? channels : kLanes, tail = last ? channels : S - (steps - 1) * kLanes;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t base = image(i) * C * S + first_channel * (last ? 1 : S);
      for (int64_t k = 0; k < steps; ++k) visit(base + k * stride, k + 1 < steps ? full : tail);
    }
  }

  // Mean of a few values of a channel: an origin near the data, whatever the running mean.
  double sampled_origin(int64_t channel) const {
    const int64_t C = problem.channels, S = problem.spatial, points = problem.count * S;
    const int64_t samples = points < kOriginSamples ? points : kOriginSamples;
    double sum = 0;
    for (int64_t k = 0; k < samples; ++k) {
      const int64_t point = k * (points / samples), n = image(point / S), s = point % S;
      const int64_t offset = problem.channels_last ? (n * S + s) * C + channel : (n * C + channel) * S + s;
      sum += static_cast<double>(load<E>(x() + offset, 1)[0]);
    }
    return sum / static_cast<double>(samples);
  }
};

// One channel's statistics and parameters in double, components in stored order (the widest first).
template <class S>
struct Channel {
  int components;
  double prior[kMaxComponents] = {}, running_mean[kMaxComponents] = {}, running_var[kMaxComponents] = {};
  double mass[kMaxComponents] = {}, mean[kMaxComponents] = {}, var[kMaxComponents] = {};  // of what normalises
  double weight[kMaxComponents] = {}, bias[kMaxComponents] = {};
  double grad_weight[kMaxComponents] = {}, grad_bias[kMaxComponents] = {};

  // `batch`, `gradients`: the batch's statistics and the affine gradients are known.
  Channel(const Problem& p, int64_t channel, bool batch, bool gradients) : components(p.components) {
    double var_in_order[kMaxComponents];
    for (int m = 0; m < components; ++m) var_in_order[m] = read(p.var, m * p.channels + channel);
    const int widest = widest_component(var_in_order, components);
    for (int k = 0; k < components; ++k) {
      const int64_t i = stored_at(k, widest) * p.channels + channel;
      prior[k] = p.prior ? read(p.prior, i) : 1;
      running_mean[k] = read(p.mean, i);
      running_var[k] = read(p.var, i);
      mass[k] = batch ? read(p.batch_mass, i) : 0;
      mean[k] = batch ? read(p.batch_mean, i) : running_mean[k];
      var[k] = batch ? read(p.batch_var, i) : running_var[k];
      weight[k] = p.weight ? read(p.weight, i) : 1;
      bias[k] = p.bias ? read(p.bias, i) : 0;
      grad_weight[k] = gradients ? read(p.grad_weight, i) : 0;
      grad_bias[k] = gradients ? read(p.grad_bias, i) : 0;
    }
  }

  static double read(const void* values, int64_t i) { return static_cast<double>(static_cast<const S*>(values)[i]); }
};

// Coefficients of a block: a struct of arrays of vectors, filled from the same struct of doubles, a channel at a time.
template <class E, template <class, int> class Coefficients, int M>
CBN_INLINE void set_channel(Coefficients<Vec<typename E::Scalar>, M>& lanes, int channel, bool channels_last,
                            const Coefficients<double, M>& values) {
  using S = typename E::Scalar;
  constexpr int kCount = sizeof(values) / sizeof(double);
  auto* vectors = reinterpret_cast<Vec<S>*>(&lanes);
  const auto* scalars = reinterpret_cast<const double*>(&values);
  for (int i = 0; i < kCount; ++i) {
    if (channels_last)
      vectors[i][channel] = static_cast<S>(scalars[i]);
    else
      vectors[i] = Vec<S>{} + static_cast<S>(scalars[i]);
  }
}

// Prepares a block: its origin, its log-odds, and what `prepare(channel, j)` sets for each channel j.
template <class E, int M>
struct Prepared {
  using S = typename E::Scalar;
  LogOdds<Vec<S>, M> odds{};
  Vec<S> origin{};
  bool bounded = true;

  template <class F>
  Prepared(const Block<E>& block, bool batch, bool gradients, bool sampled, F prepare) {
    const Problem& p = block.problem;
    // One channel that is not bounded makes its neighbours in the vector take the other form too.
    for (int pass = 0; pass < 2; ++pass) {
      bool all_bounded = true;
      for (int j = 0; j < block.channels; ++j) {
        const Channel<S> channel(p, block.first_channel + j, batch, gradients);
        // The origin is a value of S, so that x - origin is what the coefficients were made for.
        const S at = static_cast<S>(sampled ? block.sampled_origin(block.first_channel + j) : channel.mean[0]);
        LogOdds<double, M> scalar;
        all_bounded &= log_odds(scalar, channel.prior, channel.running_mean, channel.running_var, p.components, p.eps,
                                static_cast<double>(at), pass == 1);
        set_channel<E>(odds, j, p.channels_last, scalar);
        if (p.channels_last)
          origin[j] = at;
        else
          origin = Vec<S>{} + at;
        prepare(channel, j, static_cast<double>(at));
      }
      bounded = pass == 0 && all_bounded;
      if (bounded) break;
    }
  }
};

// Lane l is 1 where l < count, else 0.
template <class S>
CBN_INLINE Vec<S> lanes_below(int64_t count) {
  Vec<S> mask{};
  for (int64_t l = 0; l < kLanesOf<S>; ++l) mask[l] = l < count;
  return mask;
}

// Sums over vectors: in float for a while, then in double. Sums<V, M> is a struct of arrays of vectors.
template <class E, template <class, int> class Sums, int M>
struct LongSums {
  using V = Vec<typename E::Scalar>;
  static constexpr int kLanes = Block<E>::kLanes;
  static constexpr int kCount = sizeof(Sums<V, M>) / sizeof(V);

  Sums<V, M> current{};
  int vectors = 0;
  double total[kCount][kLanes] = {};

  __attribute__((always_inline)) void added() {
    if (++vectors == kVectorsPerFlush) flush();
  }

  void flush() {
    auto* sums = reinterpret_cast<V*>(&current);
    for (int i = 0; i < kCount; ++i) {
      for (int l = 0; l < kLanes; ++l) total[i][l] += static_cast<double>(sums[i][l]);
      sums[i] = V{};
    }
    vectors = 0;
  }

  // [kinds of sums, components in stored order, channels], then the origin [channels].
  void write(double* out, const Block<E>& block, V origin) {
    flush();
    for (int i = 0; i < kCount; ++i) {
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

template <class E, int M>
void moments(const Problem& problem, int64_t index, int64_t begin, int64_t end, double* sums) {
  using S = typename E::Scalar;
  const Block<E> block(problem, index);
  const Prepared<E, M> prepared(block, false, false, true, [](const auto&, int, double) {});
  LongSums<E, Moments, M> result;
  with_bounded(prepared.bounded, [&](auto bounded) {
    const auto odds = prepared.odds;
    const auto origin = prepared.origin;
    block.for_each_vector(begin, end, [&](int64_t offset, int64_t count) __attribute__((always_inline)) {
      const Vec<S> z = load<E>(block.x() + offset, count) - origin;
      Vec<S> p[M];
      responsibilities<bounded.value>(odds, z, p);
      if (count < Block<E>::kLanes) {
        const Vec<S> mask = lanes_below<S>(count);
        for (int m = 0; m < M; ++m) p[m] = p[m] * mask;
      }
      accumulate(result.current, p, z);
      result.added();
    });
  });
  result.write(sums, block, prepared.origin);
}

template <class E, int M>
void normalise(const Problem& problem, int64_t index, int64_t begin, int64_t end) {
  using S = typename E::Scalar;
  const Block<E> block(problem, index);
  Branches<Vec<S>, M> lanes{};
  const Prepared<E, M> prepared(block, problem.training, false, false, [&](const auto& channel, int j, double origin) {
    Branches<double, M> values{};
    for (int k = 0; k < channel.components; ++k) {
      values.scale[k] = branch_scale(channel.weight[k], channel.var[k], problem.eps);
      values.offset[k] = branch_offset(values.scale[k], channel.bias[k], channel.mean[k], origin);
    }
    set_channel<E>(lanes, j, problem.channels_last, values);
  });
  with_bounded(prepared.bounded, [&](auto bounded) {
    const auto odds = prepared.odds;
    const auto origin = prepared.origin;
    const auto branches = lanes;
    block.for_each_vector(begin, end, [&](int64_t offset, int64_t count) __attribute__((always_inline)) {
      const Vec<S> z = load<E>(block.x() + offset, count) - origin;
      store<E>(block.out() + offset, count, cbn::normalise<bounded.value>(odds, branches, z));
    });
  });
}

template <class E, int M>
void gradient_sums(const Problem& problem, int64_t index, int64_t begin, int64_t end, double* sums) {
  using S = typename E::Scalar;
  const Block<E> block(problem, index);
  const Prepared<E, M> prepared(block, problem.training, false, false, [](const auto&, int, double) {});
  LongSums<E, GradientSums, M> result;
  with_bounded(prepared.bounded, [&](auto bounded) {
    const auto odds = prepared.odds;
    const auto origin = prepared.origin;
    block.for_each_vector(begin, end, [&](int64_t offset, int64_t count) __attribute__((always_inline)) {
      const Vec<S> z = load<E>(block.x() + offset, count) - origin;
      const Vec<S> g = load<E>(block.grad() + offset, count);  // 0 beyond `count`, and so are the sums there
      Vec<S> p[M];
      responsibilities<bounded.value>(odds, z, p);
      accumulate(result.current, p, z, g);
      result.added();
    });
  });
  result.write(sums, block, prepared.origin);
}

template <class E, int M>
void input_gradient(const Problem& problem, int64_t index, int64_t begin, int64_t end) {
  using S = typename E::Scalar;
  const Block<E> block(problem, index);
  InputGradient<Vec<S>, M> lanes{};
  const Prepared<E, M> prepared(block, problem.training, true, false, [&](const auto& channel, int j, double origin) {
    InputGradient<double, M> values{};
    for (int k = 0; k < channel.components; ++k) {
      const double var = channel.var[k], mass = problem.training ? channel.mass[k] : 0;
      values.centre[k] = channel.mean[k] - origin;
      values.scale[k] = branch_scale(channel.weight[k], var, problem.eps);
      values.bias[k] = channel.bias[k];
      values.linear[k] = mean_gradient(values.scale[k], channel.grad_bias[k], mass);
      values.quadratic[k] = variance_gradient(values.scale[k], channel.grad_weight[k], var, problem.eps, mass);
      values.constant[k] = -values.quadratic[k] * var;
    }
    set_channel<E>(lanes, j, problem.channels_last, values);
  });
  with_bounded(prepared.bounded, [&](auto bounded) {
    const auto odds = prepared.odds;
    const auto origin = prepared.origin;
    const auto coefficients = lanes;
    const bool detach = problem.detach_responsibility;
    block.for_each_vector(begin, end, [&](int64_t offset, int64_t count) __attribute__((always_inline)) {
      const Vec<S> z = load<E>(block.x() + offset, count) - origin;
      const Vec<S> g = load<E>(block.grad() + offset, count);
      Vec<S> p[M];
      responsibilities<bounded.value>(odds, z, p);
      store<E>(block.out() + offset, count, cbn::input_gradient<bounded.value>(odds, coefficients, p, z, g, detach));
    });
  });
}

template <class E, int M>
Tasks make_tasks() {
  return {Block<E>::kLanes, moments<E, M>, normalise<E, M>, gradient_sums<E, M>, input_gradient<E, M>};
}

// M is compiled for these; the components in between are padded by ones without responsibility.
template <class E>
Tasks tasks_of(int components) {
  if (components == 1) return make_tasks<E, 1>();
  if (components == 2) return make_tasks<E, 2>();
  if (components <= 4) return make_tasks<E, 4>();
  if (components <= 8) return make_tasks<E, 8>();
  return make_tasks<E, kMaxComponents>();
}

inline Tasks tasks(Element element, int components) {
  switch (element) {
    case Element::kFloat:
      return tasks_of<Float>(components);
    case Element::kDouble:
      return tasks_of<Double>(components);
    case Element::kHalf:
      return tasks_of<Half>(components);
    default:
      return tasks_of<BFloat16>(components);
  }
}

}  // namespace
}  // namespace cbn
