// A component of a channel: what it brings to the element functions of mixture.h, and what is done once with its sums.
#pragma once

#include "mixture.h"
#include "problem.h"

namespace cbn {

// Sums of a component: the rows of Moments and of GradientSums.
constexpr int kMomentRows = Moments<double, 1>::kRows, kGradientRows = GradientSums<double, 1>::kRows;

// Element i of the [M, C] tensors of a problem, which are of S; where D is a vector, `count` elements from there on.
template <class S, class D = double>
struct Component {
  const Problem& p;
  int64_t i;
  int64_t count = 1;

  CBN_METHOD D read(const void* values, double otherwise, int kind = 0) const {
    if (!values) return D{} + otherwise;
    return Doubles<D>::load(static_cast<const S*>(values) + kind * p.components * p.channels + i, count);
  }
  // Into [kinds, M, C].
  CBN_METHOD void write(void* values, D value, int kind = 0) const {
    Doubles<D>::store(static_cast<S*>(values) + kind * p.components * p.channels + i, count, value);
  }

  CBN_METHOD D prior(double otherwise) const {
    if (p.prior && p.mode == Mode::kJoint)
      return D{} + static_cast<double>(static_cast<const S*>(p.prior)[i / p.channels]);
    return read(p.prior, otherwise);
  }

  // With the component's own prior of the channel, or in joint mode with 1: its prior counts once for all channels.
  CBN_METHOD BasicLogDensity<D> density() const { return density(read(p.prior, 1)); }
  CBN_METHOD BasicLogDensity<D> density(D prior) const {
    return log_density(prior, read(p.mean, 0), read(p.var, 0), p.eps);
  }

  // What normalises: the batch's statistics, or in evaluation the running ones, which are constants and need no mass.
  CBN_METHOD BasicStatistics<D> used() const {
    if (!p.training) return {D{}, read(p.mean, 0), read(p.var, 0)};
    return {read(p.batch, 0, 0), read(p.batch, 0, 1), read(p.batch, 0, 2)};
  }

  CBN_METHOD Branches<D, 1> branch(const BasicStatistics<D>& used, D origin) const {
    const D scale = branch_scale(read(p.weight, 1), used.var, p.eps);
    return {{scale}, {branch_offset(scale, read(p.bias, 0), used.mean, origin)}};
  }

  CBN_METHOD InputGradient<D, 1> input_gradient(const BasicStatistics<D>& used, D origin, D grad_weight,
                                                D grad_bias) const {
    const D scale = branch_scale(read(p.weight, 1), used.var, p.eps);
    const D quadratic = variance_gradient(scale, grad_weight, used.var, p.eps, used.mass);
    return {{used.mean - origin}, {scale},
            {read(p.bias, 0)},    {mean_gradient(scale, grad_bias, used.mass)},
            {quadratic},          {-quadratic * used.var}};
  }

  // Keeps the running statistics as this call uses them; they may move before the backward pass.
  CBN_METHOD void keep_running() const {
    write(p.running, prior(0), 0);
    write(p.running, read(p.mean, 0), 1);
    write(p.running, read(p.var, 0), 2);
  }

  // M-step (eqs 10-12) from the rows of Moments, rounded as it is kept.
  CBN_METHOD BasicStatistics<D> finish(const D (&sums)[kMomentRows], D origin) const {
    const BasicStatistics<D> batch =
        batch_statistics(sums[0], sums[1], sums[2], origin, {D{}, read(p.mean, 0), read(p.var, 0)});
    const auto rounded = [](D x) { return Doubles<D>::template rounded<S>(x); };
    return {rounded(batch.mass), rounded(batch.mean), rounded(batch.var)};
  }
  CBN_METHOD void write_batch(const BasicStatistics<D>& batch) const {
    write(p.batch, batch.mass, 0);
    write(p.batch, batch.mean, 1);
    write(p.batch, batch.var, 2);
  }

  // The weight's gradient from the rows of GradientSums; the bias's is the first of them.
  CBN_METHOD D finish(const D (&sums)[kGradientRows], D origin, const BasicStatistics<D>& used) const {
    return weight_gradient(sums[0], sums[1], used.mean, origin, used.var, p.eps);
  }
  CBN_METHOD void write_gradients(D weight, D bias) const {
    write(p.grad_weight, weight);
    write(p.grad_bias, bias);
  }
};

// What z = x - origin is relative to in a channel once there are statistics to use: the mean of the heaviest component,
// which lies among the points; in evaluation that of the widest one. Where D is a vector, of `count` channels.
template <class S, class D = double>
CBN_INLINE D used_origin(const Problem& p, int64_t channel, int64_t count = 1) {
  const auto used = [&](int m) { return Component<S, D>{p, m * p.channels + channel, count}.used(); };
  BasicStatistics<D> chosen = used(0);
  for (int m = 1; m < p.components; ++m) {
    const BasicStatistics<D> other = used(m);
    const auto better = p.training ? other.mass > chosen.mass : other.var > chosen.var;
    chosen = {better ? other.mass : chosen.mass, better ? other.mean : chosen.mean, better ? other.var : chosen.var};
  }
  return chosen.mean;
}

// Keeps element i of the running statistics [M, C] where no point is mapped.
template <class S>
struct KeepRunning {
  Problem problem;
  CBN_METHOD void operator()(int64_t i) const { Component<S>{problem, i}.keep_running(); }
};

// A [M, C] tensor in any memory.
template <class S>
struct Strided {
  S* data;
  int64_t component_stride, channel_stride;
  CBN_METHOD S& operator()(int64_t m, int64_t c) const { return data[m * component_stride + c * channel_stride]; }
};

// Temporal accumulation (eqs 13-15) of element i of [M, C].
template <class S>
struct MoveRunning {
  Strided<S> prior;  // its data null in split mode; in joint mode [M], with a channel stride of 0
  Strided<S> mean, var;
  const S* batch;  // [3, M, C]
  int64_t size;    // M C
  int64_t channels;
  double points, momentum;

  CBN_METHOD void operator()(int64_t i) const {
    const int64_t m = i / channels, c = i % channels;
    const double mass = batch[i];
    if (prior.data && (c == 0 || prior.channel_stride != 0))
      prior(m, c) = static_cast<S>(moved(prior(m, c), mass / points, momentum));
    if (mass < kMassFloor) return;
    mean(m, c) = static_cast<S>(moved(mean(m, c), batch[size + i], momentum));
    var(m, c) = static_cast<S>(moved(var(m, c), unbiased(batch[2 * size + i], mass), momentum));
  }
};

// Merges element i of the statistics [M, C] of a batch's parts, in their order.
template <class S>
struct MergeParts {
  const S* parts;  // [parts, 3, M, C]
  S* batch;        // [3, M, C]
  int64_t count, size;

  CBN_METHOD Statistics part(int64_t number, int64_t i) const {
    const S* from = parts + number * 3 * size + i;
    return {from[0], from[size], from[2 * size]};
  }

  CBN_METHOD void operator()(int64_t i) const {
    Statistics total = part(0, i);
    for (int64_t number = 1; number < count; ++number) total = merged(total, part(number, i));
    batch[i] = static_cast<S>(total.mass);
    batch[size + i] = static_cast<S>(total.mean);
    batch[2 * size + i] = static_cast<S>(total.var);
  }
};

}  // namespace cbn
