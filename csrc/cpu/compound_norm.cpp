// The CPU backend: work cut into tasks for torch's threads, sums of the tasks added in a fixed order.
#include "../operator.h"

#include <algorithm>
#include <limits>
#include <vector>

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

#include "capability.h"
#include "tasks.h"

namespace cbn {
namespace {

// Elements a task should have: with fewer, threads cost more than they bring.
constexpr int64_t kTaskElements = 1 << 15;
// Elements that a channel's coefficients cost as much as.
constexpr int64_t kTableElements = 1 << 9;
// Splits of one part's images at most. They depend on shapes alone, so that sums are the same for any number of
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

// Results below the normal numbers are 0 on this thread: processors take a hundred times as long for them, and most
// responsibilities of well separated components are such. Such inputs keep their values: a subnormal half is widened
// through a subnormal float.
class FlushToZero {
#if defined(__x86_64__)
 public:
  FlushToZero() { _MM_SET_FLUSH_ZERO_MODE(_MM_FLUSH_ZERO_ON); }
  ~FlushToZero() { _mm_setcsr(before); }
  FlushToZero(const FlushToZero&) = delete;

 private:
  const unsigned before = _mm_getcsr();
#endif
};

// Calls work(begin, end) for parts of [0, count) on torch's threads, so many tasks at a time that threads bring
// something.
template <class F>
void parallel_parts(int64_t count, int64_t elements_of_task, const F& work) {
  const int64_t grain = std::max<int64_t>(1, kTaskElements / std::max<int64_t>(1, elements_of_task));
  torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
    const FlushToZero flush_to_zero;
    work(begin, end);
  });
}

// Calls task(i) for i < count on torch's threads.
template <class F>
void parallel(int64_t count, int64_t elements_of_task, const F& task) {
  parallel_parts(count, elements_of_task, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) task(i);
  });
}

// The problem for the tasks, its groups checked.
Work work_of(const Problem& p, const Tasks& tasks) {
  // Small maps would leave most lanes empty.
  const bool across = p.channels_last || p.spatial < std::min<int64_t>(tasks.lanes, p.channels);
  Work work{p, across, {}};
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
  for (int k = 0; k < kOriginSamples && work.mode != Mode::kGroups; ++k) {
    const int64_t point = sampled_point(k, work.points());
    work.sampled[0][k] = element(point / S, point % S);
  }
  if (work.mode != Mode::kGroups) return;
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

// Fills the table of channels with origins and what make(component, origin) gives, rows of one; the table.
template <class S, class Make>
std::vector<S> put_channels_table(Work& work, int lanes, const std::vector<double>& origins, const Make& make) {
  using Rows = decltype(make(Component<S>{work, 0}, 0.0));
  work.width = (work.channels + lanes - 1) / lanes * lanes;
  std::vector<S> table((1 + Rows::kRows * work.components) * work.width);
  parallel(work.channels, kTableElements, [&](int64_t c) {
    const S origin = table[c] = static_cast<S>(origins[c]);
    for (int m = 0; m < work.components; ++m) {
      Rows rows = make(Component<S>{work, m * work.channels + c}, static_cast<double>(origin));
      for (int i = 0; i < Rows::kRows; ++i)
        table[(1 + i * work.components + m) * work.width + c] = static_cast<S>(*rows.row(i));
    }
  });
  work.channels_table = table.data();
  return table;
}

void for_all_points(const Work& work, PointTask task) {
  parallel_parts(work.images, work.spatial * work.channels,
                 [&](int64_t begin, int64_t end) { task(work, begin, end); });
}

template <class S>
void weigh_points(Work& work, const Tasks& tasks) {
  const int64_t C = work.channels;
  std::vector<double> origins(C), peaks(work.components * C), distances_of(work.components * C);
  const auto density = [&](int m, int64_t c) { return Component<S>{work, m * C + c}.density(1); };
  parallel(C, kTableElements, [&](int64_t c) {
    // A sample that is not finite must not spoil the points that are.
    origins[c] = finite_or(tasks.sampled_origin(work, c), Component<S>{work, c}.read(work.mean, 0));
    for (int m = 0; m < work.components; ++m) {
      const LogDensity of = density(m, c);
      peaks[m * C + c] = of.peak;
      distances_of[m * C + c] = squared_distance(of, origins[c]);
    }
  });
  int reference = 0;
  double nearest = std::numeric_limits<double>::infinity();
  for (int m = 0; m < work.components; ++m) {
    double distance = 0;
    work.height[m] = log_prior(Component<S>{work, m * C}.prior(1));
    for (int64_t c = 0; c < C; ++c) {
      work.height[m] += peaks[m * C + c];
      distance += distances_of[m * C + c];
    }
    if (distance < nearest) reference = m;
    nearest = std::min(nearest, distance);
  }
  const auto table = put_channels_table<S>(work, tasks.lanes, origins, [&](const Component<S>& of, double origin) {
    return distances(of.density(1), density(reference, of.i % C), origin);
  });
  for_all_points(work, tasks.weigh_points);
}

template <class S>
void differentiate_weights(Work& work, const Tasks& tasks) {
  std::vector<double> origins(work.channels);
  for (int64_t c = 0; c < work.channels; ++c) origins[c] = used_origin<S>(work, c);
  const auto table = put_channels_table<S>(work, tasks.lanes, origins, [](const Component<S>& of, double origin) {
    return of.input_gradient(of.used(), origin, of.read(of.p.grad_weight, 0), of.read(of.p.grad_bias, 0));
  });
  for_all_points(work, tasks.differentiate_weights);
}

// A problem cut into parts, by channels and splits of the images; in each of them `reduce` and `map` are tasks.
struct Plan {
  const Work& work;
  const Passes passes;
  const int rows;  // of the sums that are reduced
  const ReduceTask reduce;
  const FinishTask finish;
  const MapTask map;
  const int64_t most_channels;
  const int64_t blocks = (work.channels + most_channels - 1) / most_channels;
  const int64_t elements = work.points() * most_channels;  // of a block: a part with all images
  const int64_t splits = std::max<int64_t>(1, std::min({elements / kTaskElements, work.images, kMostSplits}));
  const int64_t elements_of_split = elements / splits;
  const int64_t stride = (rows + 1) * work.components * most_channels;
  // As `reduce` writes them, [blocks, splits, stride]
  std::vector<double> sums = std::vector<double>(reduces() ? blocks * splits * stride : 0);

  bool reduces() const { return passes != Passes::kMap; }
  bool maps() const { return passes != Passes::kReduce; }

  Part part(int64_t block, int64_t split) const {
    const int64_t first = block * most_channels;
    return {first, std::min(most_channels, work.channels - first), work.images * split / splits,
            work.images * (split + 1) / splits};
  }
  void reduce_split(int64_t block, int64_t split) {
    reduce(work, part(block, split), sums.data() + block * splits * stride + split * stride_of(block));
  }
  void map_split(int64_t block, int64_t split) const { map(work, part(block, split)); }
  void finish_block(int64_t block) const {
    finish(work, part(block, 0), reduces() ? sums.data() + block * splits * stride : nullptr, splits);
  }

  // Reduces all splits, then finishes all blocks, then maps all splits.
  void run() {
    const int64_t threads = torch::stable::get_num_threads();
    // Blocks of channels_last lie between each other: threads that share rows would share cache lines' neighbours.
    const bool by_rows = work.channels_last && splits >= threads;
    if (blocks >= threads && !by_rows) {
      // A block that one thread takes whole is still in its cache when it is mapped.
      parallel(blocks, elements, [&](int64_t block) {
        for (int64_t split = 0; split < splits && reduces(); ++split) reduce_split(block, split);
        finish_block(block);
        for (int64_t split = 0; split < splits && maps(); ++split) map_split(block, split);
      });
    } else {
      // Neighbouring tasks, which one thread takes, are the blocks of the same images.
      const auto parallel_splits = [&](const auto& task) {
        parallel(blocks * splits, elements_of_split, [&](int64_t i) { task(i % blocks, i / blocks); });
      };
      if (reduces()) parallel_splits([&](int64_t block, int64_t split) { reduce_split(block, split); });
      for (int64_t block = 0; block < blocks; ++block) finish_block(block);
      if (maps()) parallel_splits([&](int64_t block, int64_t split) { map_split(block, split); });
    }
  }

 private:
  int64_t stride_of(int64_t block) const { return (rows + 1) * work.components * part(block, 0).channels; }
};

// Channels of a part: rows of them where they lie side by side, else so few that they stay in a cache.
int64_t channels_of_part(const Work& work, const Tasks& tasks) {
  if (work.across) return std::min<int64_t>(work.channels, tasks.columns * tasks.lanes);
  return std::clamp<int64_t>(kTaskElements / std::max<int64_t>(1, work.points()), 1, tasks.lanes);
}

template <class S>
void run_forward(const Problem& p, Passes passes) {
  const Tasks tasks = tasks_for(p);
  Work work = work_of(p, tasks);
  if (p.weighs || passes != Passes::kMap) sample(work);
  if (p.weighs && p.points() > 0) weigh_points<S>(work, tasks);
  Plan{work, passes, kMomentRows, tasks.moments, tasks.finish_moments, tasks.normalise, channels_of_part(work, tasks)}
      .run();
}

template <class S>
void run_backward(const Problem& p, Passes passes, const Tensor& x) {
  const Tasks tasks = tasks_for(p);
  Work work = work_of(p, tasks);
  const auto run = [&](Passes these) {
    Plan{work,
         these,
         kGradientRows,
         tasks.gradient_sums,
         tasks.finish_gradients,
         tasks.input_gradient,
         channels_of_part(work, tasks)}
        .run();
  };
  if (!p.has_posterior() || p.detach_responsibility || passes == Passes::kReduce) return run(passes);
  if (passes == Passes::kBoth) run(Passes::kReduce);
  const Tensor gradient = empty(x, {p.components, p.points()}, statistics_type(x.scalar_type()));
  work.posterior_gradient = gradient.mutable_data_ptr();
  differentiate_weights<S>(work, tasks);
  run(Passes::kMap);
}

struct Cpu {
  struct Guard {
    explicit Guard(const Tensor&) {}
  };
  static void forward(const Problem& p, Passes passes, const Tensor&) {
    p.is_wide() ? run_forward<double>(p, passes) : run_forward<float>(p, passes);
  }
  static void backward(const Problem& p, Passes passes, const Tensor& x) {
    p.is_wide() ? run_backward<double>(p, passes, x) : run_backward<float>(p, passes, x);
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
