// The CPU backend: work cut into tasks for torch's threads, sums of the tasks added in a fixed order.
#include "../operator.h"

#include <algorithm>
#include <vector>

#include "capability.h"
#include "tasks.h"

namespace cbn {
namespace {

// Elements a task should have: with fewer, threads cost more than they bring.
constexpr int64_t kTaskElements = 1 << 15;
// Splits of one block's images at most. They depend on shapes alone, so that sums are the same for any number of
// threads.
constexpr int64_t kMostSplits = 64;

Tasks tasks_for(const Problem& p) {
  static const Capability capability = cpu_capability();
#if defined(__x86_64__)
  if (capability == Capability::kAvx512) return tasks_avx512(p);
  if (capability == Capability::kAvx2) return tasks_avx2(p);
#endif
  return tasks_baseline(p);
}

// Calls task(i) for i < count on torch's threads.
template <class F>
void parallel(int64_t count, int64_t elements_of_task, const F& task) {
  const int64_t grain = std::max<int64_t>(1, kTaskElements / std::max<int64_t>(1, elements_of_task));
  torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) task(i);
  });
}

// The problem for the tasks, its groups checked.
Work work_of(const Problem& p) {
  Work work{p, {}};
  if (p.mode == Mode::kGroups) {
    for (int64_t n = 0; n < p.images; ++n)
      STD_TORCH_CHECK(p.groups[n] >= 0 && p.groups[n] < p.components, "expected groups from 0 to ", p.components - 1,
                      ", got ", p.groups[n], " for image ", n);
  } else if (p.channels_last) {
    // Rows of channels are all alike: every point may be taken for an image.
    work.images = p.points();
    work.spatial = 1;
  }
  return work;
}

// Fills work.sampled; a group's points are numbered in the order of its images.
void sample(Work& work) {
  const int64_t S = work.spatial;
  const auto element = [&](int64_t n, int64_t s) {
    return work.channels_last ? (n * S + s) * work.channels : n * work.channels * S + s;
  };
  for (auto& row : work.sampled) row[0] = -1;
  if (work.points() == 0) return;
  if (work.mode != Mode::kGroups) {
    for (int k = 0; k < kOriginSamples; ++k) {
      const int64_t point = sampled_point(k, work.points());
      work.sampled[0][k] = element(point / S, point % S);
    }
    return;
  }
  int64_t points[kMaxComponents] = {}, passed[kMaxComponents] = {};
  int samples[kMaxComponents] = {};
  for (int64_t n = 0; n < work.images; ++n) points[work.groups[n]] += S;
  for (int64_t n = 0; n < work.images; ++n) {
    const int64_t m = work.groups[n];
    for (int& k = samples[m]; k < kOriginSamples && sampled_point(k, points[m]) < passed[m] + S; ++k)
      work.sampled[m][k] = element(n, sampled_point(k, points[m]) - passed[m]);
    passed[m] += S;
  }
}

// A problem cut into blocks of channels and splits of their images.
struct Plan {
  int64_t channels, channels_of_block, blocks, images, splits, elements_of_split;

  Plan(const Work& work, int lanes)
      : channels(work.channels),
        channels_of_block(work.channels_last ? lanes : 1),
        blocks((channels + channels_of_block - 1) / channels_of_block),
        images(work.images) {
    const int64_t elements = work.points() * channels_of_block;
    splits = std::max<int64_t>(1, std::min({elements / kTaskElements, images, kMostSplits}));
    elements_of_split = elements / splits;
  }

  int64_t begin(int64_t split) const { return images * split / splits; }
  int64_t channels_in(int64_t block) const { return std::min(channels_of_block, channels - block * channels_of_block); }

  // reduce(block, split) for all splits, then finish(block), then map(block, split) for all splits.
  template <class Reduce, class Finish, class Map>
  void run(Passes passes, const Reduce& reduce, const Finish& finish, const Map& map) const {
    const bool reduces = passes != Passes::kMap, maps = passes != Passes::kReduce;
    const int64_t threads = torch::stable::get_num_threads();
    // Blocks of channels_last lie between each other: threads that share rows would share cache lines' neighbours.
    const bool by_rows = channels_of_block > 1 && splits >= threads;
    if (blocks >= threads && !by_rows) {
      // A block that one thread takes whole is still in its cache when it is mapped.
      parallel(blocks, splits * elements_of_split, [&](int64_t block) {
        for (int64_t split = 0; split < splits && reduces; ++split) reduce(block, split);
        finish(block);
        for (int64_t split = 0; split < splits && maps; ++split) map(block, split);
      });
    } else {
      // Neighbouring tasks, which one thread takes, are the blocks of the same images.
      const auto parallel_splits = [&](const auto& task) {
        parallel(blocks * splits, elements_of_split, [&](int64_t i) { task(i % blocks, i / blocks); });
      };
      if (reduces) parallel_splits(reduce);
      for (int64_t block = 0; block < blocks; ++block) finish(block);
      if (maps) parallel_splits(map);
    }
  }

  // Calls visit(component, m, j) for the components of all channels j of the block.
  template <class S, class Visit>
  void for_each_component(const Work& work, int64_t block, const Visit& visit) const {
    for (int m = 0; m < work.components; ++m)
      for (int64_t j = 0; j < channels_in(block); ++j)
        visit(Component<S>{work, m * channels + block * channels_of_block + j}, m, j);
  }
};

// What the splits of a problem sum up, as ReduceTask writes it.
template <int kRows>
struct Partials {
  const Plan& plan;
  int components;
  std::vector<double> sums;

  struct Total {
    double sums[kRows];
    double origin;
  };

  Partials(const Work& work, const Plan& plan, Passes passes) : plan(plan), components(work.components) {
    if (passes != Passes::kMap) sums.resize(plan.blocks * plan.splits * stride());
  }

  int64_t stride() const { return (kRows + 1) * components * plan.channels_of_block; }
  double* of(int64_t block, int64_t split) { return sums.data() + (block * plan.splits + split) * stride(); }

  Total total(int64_t block, int m, int64_t j) {
    const int64_t channels = plan.channels_in(block), row = components * channels, first = m * channels + j;
    Total result{{}, of(block, 0)[kRows * row + first]};
    for (int64_t split = 0; split < plan.splits; ++split)
      for (int i = 0; i < kRows; ++i) result.sums[i] += of(block, split)[i * row + first];
    return result;
  }
};

template <class S>
void run_forward(const Problem& p, Passes passes) {
  Work work = work_of(p);
  if (passes != Passes::kMap) sample(work);
  const Tasks tasks = tasks_for(work);
  const Plan plan(work, tasks.lanes);
  Partials<3> partials(work, plan, passes);
  plan.run(
      passes,
      [&](int64_t block, int64_t split) {
        tasks.moments(work, block, plan.begin(split), plan.begin(split + 1), partials.of(block, split));
      },
      [&](int64_t block) {
        plan.for_each_component<S>(work, block, [&](const Component<S>& component, int m, int64_t j) {
          if (passes != Passes::kMap) {
            const auto total = partials.total(block, m, j);
            component.write_batch(component.finish(total.sums, total.origin));
          }
          if (passes != Passes::kReduce) component.keep_running();
        });
      },
      [&](int64_t block, int64_t split) { tasks.normalise(work, block, plan.begin(split), plan.begin(split + 1)); });
}

template <class S>
void run_backward(const Problem& p, Passes passes) {
  const Work work = work_of(p);
  const Tasks tasks = tasks_for(work);
  const Plan plan(work, tasks.lanes);
  Partials<2> partials(work, plan, passes);
  plan.run(
      passes,
      [&](int64_t block, int64_t split) {
        tasks.gradient_sums(work, block, plan.begin(split), plan.begin(split + 1), partials.of(block, split));
      },
      [&](int64_t block) {
        if (passes == Passes::kMap) return;
        plan.for_each_component<S>(work, block, [&](const Component<S>& component, int m, int64_t j) {
          const auto total = partials.total(block, m, j);
          component.write_gradients(component.finish(total.sums, total.origin, component.used()), total.sums[0]);
        });
      },
      [&](int64_t block, int64_t split) {
        tasks.input_gradient(work, block, plan.begin(split), plan.begin(split + 1));
      });
}

struct Cpu {
  struct Guard {
    explicit Guard(const Tensor&) {}
  };
  static void forward(const Problem& p, Passes passes, const Tensor&) {
    p.is_wide() ? run_forward<double>(p, passes) : run_forward<float>(p, passes);
  }
  static void backward(const Problem& p, Passes passes, const Tensor&) {
    p.is_wide() ? run_backward<double>(p, passes) : run_backward<float>(p, passes);
  }
  static bool writes_all_of_mask(const Problem&) { return false; }
  template <class F>
  static void for_each(int64_t count, const F& f, const Tensor&) {
    for (int64_t i = 0; i < count; ++i) f(i);
  }
};

}  // namespace
}  // namespace cbn

CBN_REGISTER(CPU, cbn::Cpu)
