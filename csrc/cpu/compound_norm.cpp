// The CPU operators: arguments checked and laid out, work cut into tasks for torch's threads, sums merged in
// a fixed order.
#include "../compound_norm.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <vector>

#include "../checks.h"
#include "../mixture.h"
#include "capability.h"
#include "tasks.h"

namespace cbn {
namespace {

// Elements a task should have: with fewer, threads cost more than they bring.
constexpr int64_t kTaskElements = 1 << 15;
// Splits of one block's images at most. They depend on shapes alone, so that sums are the same for any number
// of threads.
constexpr int64_t kMostSplits = 64;

Tasks tasks_for(const Problem& p) {
  static const Capability capability = cpu_capability();
#if defined(__x86_64__)
  if (capability == Capability::kAvx512) return tasks_avx512(p.element, p.components);
  if (capability == Capability::kAvx2) return tasks_avx2(p.element, p.components);
#endif
  return tasks_baseline(p.element, p.components);
}

// Calls task(i) for i < count on torch's threads.
template <class F>
void parallel(int64_t count, int64_t elements_of_task, const F& task) {
  const int64_t grain = std::max<int64_t>(1, kTaskElements / std::max<int64_t>(1, elements_of_task));
  torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) task(i);
  });
}

// A problem cut into blocks of channels and splits of their images.
struct Plan {
  int64_t channels, channels_of_block, blocks, images, splits, elements_of_split;

  Plan(const Problem& p, int lanes)
      : channels(p.channels),
        channels_of_block(p.channels_last ? lanes : 1),
        blocks((channels + channels_of_block - 1) / channels_of_block),
        images(p.count) {
    const int64_t elements = images * p.spatial * channels_of_block;
    splits = std::max<int64_t>(1, std::min({elements / kTaskElements, images, kMostSplits}));
    elements_of_split = elements / splits;
  }

  int64_t begin(int64_t split) const { return images * split / splits; }
  int64_t channels_in(int64_t block) const { return std::min(channels_of_block, channels - block * channels_of_block); }

  // reduce(block, split) for all splits, then finish(block), then map(block, split) for all splits.
  template <class Reduce, class Finish, class Map>
  void run(const Reduce& reduce, const Finish& finish, const Map& map) const {
    const int64_t threads = torch::stable::get_num_threads();
    // Blocks of channels_last lie between each other: threads that share rows would share cache lines' neighbours.
    const bool by_rows = channels_of_block > 1 && splits >= threads;
    if (blocks >= threads && !by_rows) {
      // A block that one thread takes whole is still in its cache when it is mapped.
      parallel(blocks, splits * elements_of_split, [&](int64_t block) {
        for (int64_t split = 0; split < splits; ++split) reduce(block, split);
        finish(block);
        for (int64_t split = 0; split < splits; ++split) map(block, split);
      });
    } else {
      // Neighbouring tasks, which one thread takes, are the blocks of the same images.
      parallel(blocks * splits, elements_of_split, [&](int64_t i) { reduce(i % blocks, i / blocks); });
      for (int64_t block = 0; block < blocks; ++block) finish(block);
      parallel(blocks * splits, elements_of_split, [&](int64_t i) { map(i % blocks, i / blocks); });
    }
  }
};

// Statistics and parameters as double, whichever of float and double they are kept in.
double get(const Problem& p, const void* values, int64_t i) {
  return p.element == Element::kDouble ? static_cast<const double*>(values)[i] : static_cast<const float*>(values)[i];
}

void set(const Problem& p, void* values, int64_t i, double value) {
  if (p.element == Element::kDouble)
    static_cast<double*>(values)[i] = value;
  else
    static_cast<float*>(values)[i] = static_cast<float>(value);
}

// What the splits of a problem sum up: `kinds` sums for each component and channel, and the origin of each
// channel.
struct Partials {
  const Problem& problem;
  const Plan& plan;
  int kinds;
  std::vector<double> sums;

  Partials(const Problem& problem, const Plan& plan, int kinds) : problem(problem), plan(plan), kinds(kinds) {
    sums.resize(plan.blocks * plan.splits * stride());
  }

  int64_t stride() const { return (kinds * problem.components + 1) * plan.channels_of_block; }
  double* of(int64_t block, int64_t split) { return sums.data() + (block * plan.splits + split) * stride(); }

  // Calls finish(i, totals, origin) for each component and channel of the block; i indexes statistics [M, C].
  template <class Finish>
  void merge(int64_t block, const Finish& finish) {
    const int64_t channels = plan.channels_in(block);
    for (int64_t j = 0; j < channels; ++j) {
      const int64_t channel = block * plan.channels_of_block + j;
      double var[kMaxComponents];
      for (int m = 0; m < problem.components; ++m) var[m] = get(problem, problem.var, m * plan.channels + channel);
      const int widest = widest_component(var, problem.components);
      for (int k = 0; k < problem.components; ++k) {
        double totals[3] = {};
        for (int64_t split = 0; split < plan.splits; ++split)
          for (int kind = 0; kind < kinds; ++kind)
            totals[kind] += of(block, split)[(kind * problem.components + k) * channels + j];
        const double origin = of(block, 0)[kinds * problem.components * channels + j];
        finish(stored_at(k, widest) * plan.channels + channel, totals, origin);
      }
    }
  }
};

void run_forward(const Problem& p) {
  const Tasks tasks = tasks_for(p);
  const Plan plan(p, tasks.lanes);
  Partials partials(p, plan, p.training ? 3 : 0);
  plan.run(
      [&](int64_t block, int64_t split) {
        if (p.training) tasks.moments(p, block, plan.begin(split), plan.begin(split + 1), partials.of(block, split));
      },
      [&](int64_t block) {
        if (!p.training) return;
        partials.merge(block, [&](int64_t i, const double* totals, double origin) {
          double mean = get(p, p.mean, i), var = get(p, p.var, i);
          if (!(totals[0] < kMassFloor)) mean_and_variance(totals[0], totals[1], totals[2], origin, mean, var);
          set(p, p.batch_mass, i, totals[0]);
          set(p, p.batch_mean, i, mean);
          set(p, p.batch_var, i, var);
        });
      },
      [&](int64_t block, int64_t split) { tasks.normalise(p, block, plan.begin(split), plan.begin(split + 1)); });
}

void run_backward(const Problem& p) {
  const Tasks tasks = tasks_for(p);
  const Plan plan(p, tasks.lanes);
  Partials partials(p, plan, 2);
  const void* mean = p.training ? p.batch_mean : p.mean;
  const void* var = p.training ? p.batch_var : p.var;
  plan.run(
      [&](int64_t block, int64_t split) {
        tasks.gradient_sums(p, block, plan.begin(split), plan.begin(split + 1), partials.of(block, split));
      },
      [&](int64_t block) {
        partials.merge(block, [&](int64_t i, const double* totals, double origin) {
          set(p, p.grad_bias, i, totals[0]);
          set(p, p.grad_weight, i,
              weight_gradient(totals[0], totals[1], get(p, mean, i), origin, get(p, var, i), p.eps));
        });
      },
      [&](int64_t block, int64_t split) { tasks.input_gradient(p, block, plan.begin(split), plan.begin(split + 1)); });
}

// A row of [M, C]: what belongs to component m.
const void* component(const Problem& p, const void* values, int64_t m) {
  const int64_t size = p.element == Element::kDouble ? sizeof(double) : sizeof(float);
  return values == nullptr ? nullptr : static_cast<const char*>(values) + m * p.channels * size;
}

void* component(const Problem& p, void* values, int64_t m) {
  return const_cast<void*>(component(p, static_cast<const void*>(values), m));
}

// Split mode (eqs 17-18): each component is a batch normalization of the images of its group.
template <class Run>
void run_groups(const Problem& p, const Tensor& groups, const Run& run) {
  const int64_t* group_of = groups.const_data_ptr<int64_t>();
  std::vector<std::vector<int64_t>> images(p.components);
  for (int64_t n = 0; n < groups.size(0); ++n) {
    STD_TORCH_CHECK(group_of[n] >= 0 && group_of[n] < p.components, "expected groups from 0 to ", p.components - 1,
                    ", got ", group_of[n], " for image ", n);
    images[group_of[n]].push_back(n);
  }
  for (int m = 0; m < p.components; ++m) {
    Problem one = p;
    one.components = 1;
    one.images = images[m].data();
    one.count = static_cast<int64_t>(images[m].size());
    one.mean = component(p, p.mean, m);
    one.var = component(p, p.var, m);
    one.weight = component(p, p.weight, m);
    one.bias = component(p, p.bias, m);
    one.batch_mass = component(p, p.batch_mass, m);
    one.batch_mean = component(p, p.batch_mean, m);
    one.batch_var = component(p, p.batch_var, m);
    one.grad_weight = component(p, p.grad_weight, m);
    one.grad_bias = component(p, p.grad_bias, m);
    run(one);
  }
}

// Whether channels vary fastest, in any number of dimensions; of (N, C) it is true of the contiguous layout.
bool is_channels_last(const Tensor& x) {
  int64_t stride = x.size(1);
  if (x.size(1) > 1 && x.stride(1) != 1) return false;
  for (int64_t d = x.dim() - 1; d >= 2; --d) {
    if (x.size(d) > 1 && x.stride(d) != stride) return false;
    stride *= x.size(d);
  }
  return x.size(0) <= 1 || x.stride(0) == stride;
}

// t in x's layout, copied only where it is in another one.
Tensor laid_out(const Tensor& t, bool channels_last) {
  if (!channels_last) return torch::stable::contiguous(t);
  if (is_channels_last(t)) return t;
  Tensor moved = t;
  for (int64_t d = 1; d + 1 < t.dim(); ++d) moved = torch::stable::transpose(moved, d, d + 1);
  moved = torch::stable::contiguous(moved);
  for (int64_t d = t.dim() - 2; d >= 1; --d) moved = torch::stable::transpose(moved, d, d + 1);
  return moved;
}

const void* data(const std::optional<Tensor>& t) { return t ? t->const_data_ptr() : nullptr; }

// The arguments of one call, checked, and in a layout the kernels read; owns what had to be copied.
struct Arguments {
  Tensor x, mean, var;
  std::optional<Tensor> prior, weight, bias;
  Problem problem{};

  Arguments(const Tensor& input, const OptionalTensor& groups, const OptionalTensor& prior_in, const Tensor& mean_in,
            const Tensor& var_in, const OptionalTensor& weight_in, const OptionalTensor& bias_in) {
    check_input(input);
    check_components(mean_in, kMaxComponents);
    const int64_t components = mean_in.size(0);
    const auto statistic = [&](const Tensor& t, const char* name) {
      check_statistic(t, name, input, components);
      return torch::stable::contiguous(t);
    };
    mean = statistic(mean_in, "mean");
    var = statistic(var_in, "var");
    if (weight_in) weight = statistic(*weight_in, "weight");
    if (bias_in) bias = statistic(*bias_in, "bias");
    if (groups) {
      check_groups(*groups, input);
    } else {
      STD_TORCH_CHECK(prior_in || components == 1, "expected prior or groups for ", components,
                      " components, got neither");
      if (prior_in) prior = statistic(*prior_in, "prior");
    }

    const bool one_point = input.numel() == input.size(0) * input.size(1);
    const bool channels_last = is_channels_last(input) && (one_point || !input.is_contiguous());
    x = laid_out(input, channels_last);
    Problem& p = problem;
    switch (x.scalar_type()) {
      case ScalarType::Float:
        p.element = Element::kFloat;
        break;
      case ScalarType::Double:
        p.element = Element::kDouble;
        break;
      case ScalarType::Half:
        p.element = Element::kHalf;
        break;
      default:
        p.element = Element::kBFloat16;
    }
    p.channels_last = channels_last;
    p.channels = x.size(1);
    p.count = x.size(0);
    p.spatial = p.channels == 0 || p.count == 0 ? 0 : x.numel() / p.channels / p.count;
    if (channels_last && !groups) {
      // Rows of channels are all alike: every point may be taken for an image.
      p.count *= p.spatial;
      p.spatial = 1;
    }
    p.x = x.const_data_ptr();
    p.components = static_cast<int>(components);
    p.prior = data(prior);
    p.mean = mean.const_data_ptr();
    p.var = var.const_data_ptr();
    p.weight = data(weight);
    p.bias = data(bias);
  }

  template <class Run>
  void run(const OptionalTensor& groups, const Run& one) const {
    if (groups)
      run_groups(problem, torch::stable::contiguous(*groups), one);
    else
      one(problem);
  }
};

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> forward_cpu(const Tensor& x, const OptionalTensor& groups,
                                                       const OptionalTensor& prior, const Tensor& mean,
                                                       const Tensor& var, const OptionalTensor& weight,
                                                       const OptionalTensor& bias, bool training, double eps) {
  Arguments arguments(x, groups, prior, mean, var, weight, bias);
  Problem& p = arguments.problem;
  Tensor y = torch::stable::empty_like(arguments.x);
  const std::vector<int64_t> shape =
      training ? std::vector<int64_t>{p.components, p.channels} : std::vector<int64_t>{0};
  const auto statistic = [&] { return torch::stable::new_empty(arguments.mean, {shape.data(), shape.size()}); };
  Tensor mass = statistic(), batch_mean = statistic(), batch_var = statistic();
  p.out = y.mutable_data_ptr();
  p.batch_mass = mass.mutable_data_ptr();
  p.batch_mean = batch_mean.mutable_data_ptr();
  p.batch_var = batch_var.mutable_data_ptr();
  p.eps = eps;
  p.training = training;
  arguments.run(groups, run_forward);
  return {y, mass, batch_mean, batch_var};
}

std::tuple<Tensor, Tensor, Tensor> backward_cpu(const Tensor& grad, const Tensor& x, const OptionalTensor& groups,
                                                const OptionalTensor& prior, const Tensor& mean, const Tensor& var,
                                                const Tensor& batch_mass, const Tensor& batch_mean,
                                                const Tensor& batch_var, const OptionalTensor& weight,
                                                const OptionalTensor& bias, bool training, bool detach_responsibility,
                                                double eps) {
  Arguments arguments(x, groups, prior, mean, var, weight, bias);
  Problem& p = arguments.problem;
  check_same_shape(grad, x);
  const Tensor g = laid_out(grad, p.channels_last);
  const auto statistic = [&](const Tensor& t, const char* name) {
    if (!training) return t;
    check_statistic(t, name, x, p.components);
    return torch::stable::contiguous(t);
  };
  const Tensor mass = statistic(batch_mass, "batch_mass");
  const Tensor used_mean = statistic(batch_mean, "batch_mean");
  const Tensor used_var = statistic(batch_var, "batch_var");
  Tensor grad_x = torch::stable::empty_like(arguments.x);
  Tensor grad_weight = torch::stable::empty_like(arguments.mean), grad_bias = torch::stable::empty_like(arguments.mean);
  p.grad = g.const_data_ptr();
  p.out = grad_x.mutable_data_ptr();
  p.batch_mass = mass.mutable_data_ptr();
  p.batch_mean = used_mean.mutable_data_ptr();
  p.batch_var = used_var.mutable_data_ptr();
  p.grad_weight = grad_weight.mutable_data_ptr();
  p.grad_bias = grad_bias.mutable_data_ptr();
  p.eps = eps;
  p.training = training;
  p.detach_responsibility = detach_responsibility;
  arguments.run(groups, run_backward);
  return {grad_x, grad_weight, grad_bias};
}

void update_running_cpu(OptionalTensor prior, Tensor mean, Tensor var, const Tensor& batch_mass,
                        const Tensor& batch_mean, const Tensor& batch_var, int64_t points, double momentum) {
  if (points == 0) return;
  check_components(mean, kMaxComponents);
  const ScalarType type = mean.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double,
                  "expected running statistics of float32 or float64, got ", type);
  const auto same_as_mean = [&](const Tensor& t, const char* name) {
    STD_TORCH_CHECK(shape_of(t) == shape_of(mean) && t.scalar_type() == type, "expected ", name, " of shape ",
                    shape_of(mean), " and ", type, ", got ", shape_of(t), " and ", t.scalar_type());
  };
  same_as_mean(var, "var");
  same_as_mean(batch_mass, "batch_mass");
  same_as_mean(batch_mean, "batch_mean");
  same_as_mean(batch_var, "batch_var");
  if (prior) same_as_mean(*prior, "prior");

  const auto update = [&](auto zero) {
    using S = decltype(zero);
    const auto at = [](const Tensor& t, int64_t m, int64_t c) -> S& {
      return static_cast<S*>(t.data_ptr())[m * t.stride(0) + c * t.stride(1)];
    };
    for (int64_t m = 0; m < mean.size(0); ++m) {
      for (int64_t c = 0; c < mean.size(1); ++c) {
        const double mass = at(batch_mass, m, c);
        if (prior)
          at(*prior, m, c) = static_cast<S>(moved(at(*prior, m, c), mass / static_cast<double>(points), momentum));
        if (mass < kMassFloor) continue;
        at(mean, m, c) = static_cast<S>(moved(at(mean, m, c), at(batch_mean, m, c), momentum));
        at(var, m, c) = static_cast<S>(moved(at(var, m, c), unbiased(at(batch_var, m, c), mass), momentum));
      }
    }
  };
  if (type == ScalarType::Double)
    update(double{});
  else
    update(float{});
}

}  // namespace cbn
