// The CPU operators: arguments checked and laid out, work cut into tasks for torch's threads, sums merged in
// a fixed order.
#include "../compound_norm.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "../checks.h"
#include "../layout.h"
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
  const bool fused = p.relu || p.residual;
#if defined(__x86_64__)
  if (capability == Capability::kAvx512) return tasks_avx512(p.element, p.components, fused);
  if (capability == Capability::kAvx2) return tasks_avx2(p.element, p.components, fused);
#endif
  return tasks_baseline(p.element, p.components, fused);
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
      const int widest = largest_component(var, problem.components);
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

const void* data(const std::optional<Tensor>& t) { return t ? t->const_data_ptr() : nullptr; }

// What forward and backward have in common: x laid out, and the problem without its results.
struct Arguments {
  Tensor x, running;  // [3, M, C]
  std::optional<Tensor> groups, weight, bias;
  Problem problem{};

  Arguments(const Tensor& input, const Tensor& running, const OptionalTensor& groups_in,
            const OptionalTensor& weight_in, const OptionalTensor& bias_in)
      : running(running) {
    const bool channels_last = reads_channels_last(input);
    x = laid_out(input, channels_last);
    if (groups_in) groups = cbn::contiguous(*groups_in);
    if (weight_in) weight = cbn::contiguous(*weight_in);
    if (bias_in) bias = cbn::contiguous(*bias_in);
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
    p.components = static_cast<int>(running.size(1));
    p.prior = component(p, running.const_data_ptr(), 0);
    p.mean = component(p, running.const_data_ptr(), p.components);
    p.var = component(p, running.const_data_ptr(), 2 * p.components);
    p.weight = data(weight);
    p.bias = data(bias);
  }

  // `batch` [3, M, C] or [0]
  void set_batch(void* batch) {
    problem.batch_mass = component(problem, batch, 0);
    problem.batch_mean = component(problem, batch, problem.components);
    problem.batch_var = component(problem, batch, 2 * problem.components);
  }

  template <class Run>
  void run(const Run& one) const {
    if (groups)
      run_groups(problem, *groups, one);
    else
      one(problem);
  }
};

Tensor empty(const Tensor& like, const std::vector<int64_t>& shape, ScalarType type) {
  return torch::stable::new_empty(like, {shape.data(), shape.size()}, type);
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> forward_cpu(const Tensor& x, const OptionalTensor& residual,
                                                       const OptionalTensor& groups, const OptionalTensor& prior,
                                                       const Tensor& mean, const Tensor& var,
                                                       const OptionalTensor& weight, const OptionalTensor& bias,
                                                       bool training, bool relu, double eps) {
  check_forward(x, residual, groups, prior, mean, var, weight, bias);
  const int64_t components = mean.size(0), channels = mean.size(1);
  const std::vector<int64_t> statistics = {3, components, channels};
  const Tensor running = empty(mean, statistics, mean.scalar_type());
  const size_t bytes =
      components * channels * (mean.scalar_type() == ScalarType::Double ? sizeof(double) : sizeof(float));
  char* row = static_cast<char*>(running.mutable_data_ptr());
  for (const OptionalTensor& used : {prior, OptionalTensor(mean), OptionalTensor(var)}) {
    if (used)
      std::memcpy(row, cbn::contiguous(*used).const_data_ptr(), bytes);
    else
      std::memset(row, 0, bytes);
    row += bytes;
  }

  Arguments arguments(x, running, groups, weight, bias);
  Problem& p = arguments.problem;
  const Tensor y = torch::stable::empty_like(arguments.x);
  const Tensor batch = empty(mean, training ? statistics : std::vector<int64_t>{0}, mean.scalar_type());
  const std::vector<int64_t> mask_shape = {relu && residual ? mask_bytes(x) : 0};
  const Tensor mask = torch::stable::new_zeros(x, {mask_shape.data(), mask_shape.size()}, ScalarType::Byte);
  std::optional<Tensor> added;
  if (residual) added = laid_out(*residual, p.channels_last);
  p.out = y.mutable_data_ptr();
  p.residual = data(added);
  p.mask = relu && residual ? static_cast<uint32_t*>(mask.mutable_data_ptr()) : nullptr;
  p.relu = relu;
  arguments.set_batch(batch.mutable_data_ptr());
  p.eps = eps;
  p.training = training;
  arguments.run(run_forward);
  return {y, mask, running, batch};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward_cpu(const Tensor& grad, const Tensor& x, const OptionalTensor& mask,
                                                        const OptionalTensor& groups, const Tensor& running,
                                                        const Tensor& batch, const OptionalTensor& weight,
                                                        const OptionalTensor& bias, bool training, bool relu,
                                                        bool detach_responsibility, double eps) {
  check_backward(grad, x, mask, groups, running, batch, weight, bias, training, relu);
  Arguments arguments(x, cbn::contiguous(running), groups, weight, bias);
  Problem& p = arguments.problem;
  const Tensor g = laid_out(grad, p.channels_last), used_batch = cbn::contiguous(batch);
  std::optional<Tensor> bits;
  if (mask) bits = cbn::contiguous(*mask);
  const Tensor grad_x = torch::stable::empty_like(arguments.x);
  const Tensor grad_residual = mask ? torch::stable::empty_like(grad_x) : empty(x, {0}, x.scalar_type());
  const std::vector<int64_t> shape = {running.size(1), running.size(2)};
  const Tensor grad_weight = empty(running, shape, running.scalar_type());
  const Tensor grad_bias = torch::stable::empty_like(grad_weight);
  p.grad = g.const_data_ptr();
  p.out = grad_x.mutable_data_ptr();
  p.mask = bits ? static_cast<uint32_t*>(bits->mutable_data_ptr()) : nullptr;
  p.grad_residual = mask ? grad_residual.mutable_data_ptr() : nullptr;
  p.relu = relu;
  arguments.set_batch(used_batch.mutable_data_ptr());
  p.grad_weight = grad_weight.mutable_data_ptr();
  p.grad_bias = grad_bias.mutable_data_ptr();
  p.eps = eps;
  p.training = training;
  p.detach_responsibility = detach_responsibility;
  arguments.run(run_backward);
  return {grad_x, grad_residual, grad_weight, grad_bias};
}

void update_running_cpu(OptionalTensor prior, Tensor mean, Tensor var, const Tensor& batch, int64_t points,
                        double momentum) {
  if (points == 0) return;
  check_update_running(prior, mean, var, batch);
  const auto update = [&](auto zero) {
    using S = decltype(zero);
    const auto at = [](const Tensor& t, int64_t m, int64_t c) -> S& {
      return static_cast<S*>(t.data_ptr())[m * t.stride(0) + c * t.stride(1)];
    };
    const Tensor batch_mass = torch::stable::select(batch, 0, 0), batch_mean = torch::stable::select(batch, 0, 1),
                 batch_var = torch::stable::select(batch, 0, 2);
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
  if (mean.scalar_type() == ScalarType::Double)
    update(double{});
  else
    update(float{});
}

}  // namespace cbn
