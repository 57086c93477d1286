// The CUDA backend of the operators: the plan chosen, kernels launched on the current stream.
#include "../operator.h"
#include "finish.cuh"
#include "runtime.h"
#include "tuning.h"

namespace cbn {
namespace {

// Threads of a block that works on the components of channels.
constexpr int kStatisticsThreads = 128;

Kernels kernels_of(const Problem& p) {
  switch (p.element) {
    case Element::kFloat:
      return kernels_float(p.components, p.channels_last, p.mode);
    case Element::kDouble:
      return kernels_double(p.components, p.channels_last, p.mode);
    case Element::kHalf:
      return kernels_half(p.components, p.channels_last, p.mode);
    default:
      return kernels_bfloat16(p.components, p.channels_last, p.mode);
  }
}

bool mask_is_aligned(const Problem& p) {
  return (p.channels_last ? p.channels : p.points()) % (p.has_posterior() ? 32 : 8) == 0;
}

// A problem on the current device.
struct Work {
  Kernels kernels;
  Arguments arguments;
  Extent extent;
  Device device;
  Tuning chosen = tuning();
  cudaStream_t stream;

  Work(const Problem& p, const Tensor& x)
      : kernels(kernels_of(p)),
        arguments{p},
        device(device_properties()),
        stream(current_stream(x.get_device_index())) {
    constexpr int64_t kMost = UINT32_MAX;
    STD_TORCH_CHECK(p.images <= kMost && p.spatial <= kMost, "expected at most ", kMost,
                    " images and as many points in each, got ", p.images, " and ", p.spatial);
    arguments.mask_is_aligned = mask_is_aligned(p);
    extent = {p.channels,
              p.points(),
              p.channels_last,
              static_cast<int>(x.element_size()),
              p.is_wide() ? 8 : 4,
              kernels.components,
              kernels.vector,
              kernels.most_threads,
              p.grad || p.residual ? 2 : 1};
  }

  // Elements that lie together and aligned in every tensor that the kernels read and write.
  int piece() const {
    const Arguments& a = arguments;
    int64_t piece = kernels.vector;
    const auto fits = [&](const void* tensor) {
      return reinterpret_cast<uintptr_t>(tensor) % (piece * extent.element_size) == 0;
    };
    while ((a.channels_last ? a.channels : a.spatial) % piece != 0 || !fits(a.x) || !fits(a.grad) ||
           !fits(a.residual) || !fits(a.out) || !fits(a.grad_residual))
      piece /= 2;
    return static_cast<int>(piece);
  }

  void launch_pass(Kernels::Kernel kernel, const Plan& plan) {
    Arguments& a = arguments;
    a.piece = piece();
    a.columns = plan.columns;
    a.channel_blocks = plan.channel_blocks;
    a.splits = plan.splits;
    a.points_of_split = plan.points_of_split;
    a.slots = plan.slots;
    launch(kernel, plan.launch(), stream, arguments);
  }

  template <bool kForward>
  void finish() const {
    constexpr int kComponentsOfBlock = kStatisticsThreads / kWarp;
    const Launch shape{divide_up(arguments.components * arguments.channels, kComponentsOfBlock), kStatisticsThreads, 1,
                       0};
    launch(arguments.is_wide() ? finish_kernel<double, kForward> : finish_kernel<float, kForward>, shape, stream,
           arguments);
  }

  // The streaming reduction; the residual is for the map.
  template <bool kForward>
  void reduce(Kernels::Kernel kernel, const Tensor& x) {
    Extent reduced = extent;
    if (kForward) reduced.tensors = 1;
    const Plan plan = plan_reduction(reduced, device, chosen);
    const int64_t rows = kForward ? kMomentRows : kGradientRows;
    const int64_t sums = plan.splits * rows * arguments.components * arguments.channels;
    const Tensor workspace = empty(x, {sums + arguments.channels}, statistics_type(x.scalar_type()));
    arguments.partials = workspace.mutable_data_ptr();
    arguments.origins = static_cast<char*>(arguments.partials) + sums * extent.statistic_size;
    launch_pass(kernel, plan);
    finish<kForward>();
  }

  // A cluster of blocks that keeps the values on chip; nothing where they do not fit.
  std::optional<Plan> resident_plan(Kernels::Kernel kernel) {
    if (device.cluster > 1 && chosen.cluster > 1)
      device.cluster = largest_cluster(reinterpret_cast<const void*>(kernel), kernels.most_threads);
    return plan_resident(extent, device, chosen);
  }

  // A pass of joint mode over all channels of each point: its weights, where they are to be found, or one that maps.
  void run_points(Kernels::Kernel kernel, const Tensor& x, bool weighs, Kernels::Kernel lay_out, int64_t bytes) {
    Arguments& a = arguments;
    const Kernels::Points& points = kernels.points;
    a.weighs = weighs;
    const int64_t heights = 2 * kernels.components * static_cast<int64_t>(sizeof(double));
    const int64_t sums = weighs ? a.channels * points.bytes_for_weights : 0;
    const Tensor workspace = empty(x, {heights + sums + a.channels * bytes}, ScalarType::Byte);
    a.heights = static_cast<double*>(workspace.mutable_data_ptr());
    char* const tables = reinterpret_cast<char*>(a.heights) + heights;
    a.map_table = tables + sums;
    a.sums_table = weighs ? tables : a.map_table;
    const Launch of_table{kernels.components, kTableThreads, 1, 0};
    if (weighs) {
      launch(points.sum_components, {kernels.components, kTableThreads, 1, 2 * kTableThreads * sizeof(double)}, stream,
             a);
      launch(points.lay_out_weights, of_table, stream, a);
    }
    if (lay_out) launch(lay_out, of_table, stream, a);
    launch(kernel, {divide_up(a.points(), points.points_of_block), points.threads, 1, points.shared}, stream, a);
  }

  void run_joint_forward(Passes passes, const Tensor& x) {
    const Kernels::Points& points = kernels.points;
    const bool weighs = arguments.weighs && passes == Passes::kMap;
    if (passes != Passes::kMap) {
      run_points(points.weigh, x, true, nullptr, 0);
      reduce<true>(kernels.forward.reduce, x);
    }
    if (passes != Passes::kReduce)
      run_points(kernels.forward.map, x, weighs, points.lay_out_forward, points.bytes_forward);
  }

  void run_joint_backward(Passes passes, const Tensor& x) {
    const Kernels::Points& points = kernels.points;
    if (passes != Passes::kMap) reduce<false>(kernels.backward.reduce, x);
    if (passes != Passes::kReduce)
      run_points(kernels.backward.map, x, false, points.lay_out_backward, points.bytes_backward);
  }

  template <bool kForward>
  void run(const Kernels::Direction& direction, Passes passes, const Tensor& x) {
    if (arguments.has_posterior()) return kForward ? run_joint_forward(passes, x) : run_joint_backward(passes, x);
    if (passes == Passes::kBoth)
      if (const std::optional<Plan> plan = resident_plan(direction.both)) return launch_pass(direction.both, *plan);
    if (passes != Passes::kMap) reduce<kForward>(direction.reduce, x);
    if (passes != Passes::kReduce) launch_pass(direction.map, plan_map(extent, device, chosen));
  }
};

struct Cuda {
  struct Guard : DeviceGuard {
    explicit Guard(const Tensor& t) : DeviceGuard(t.get_device_index()) {}
  };

  static void forward(const Problem& p, Passes passes, const Tensor& x) {
    Work work(p, x);
    if (p.points() > 0) return work.run<true>(work.kernels.forward, passes, x);
    if (passes != Passes::kMap) work.finish<true>();
    if (passes == Passes::kReduce) return;
    const int64_t count = p.components * p.channels;
    p.is_wide() ? for_each(count, KeepRunning<double>{p}, x) : for_each(count, KeepRunning<float>{p}, x);
  }

  static void backward(const Problem& p, Passes passes, const Tensor& x) {
    Work work(p, x);
    if (p.points() > 0) return work.run<false>(work.kernels.backward, passes, x);
    if (passes != Passes::kMap) work.finish<false>();
  }

  // What fills up the last word is zero as well: the same input gives the same mask.
  static bool writes_all_of_mask(const Problem& p) { return mask_is_aligned(p) && p.points() * p.channels % 32 == 0; }

  template <class F>
  static void for_each(int64_t count, const F& f, const Tensor& like) {
    if (count > 0)
      launch(for_each_kernel<F>, {divide_up(count, kStatisticsThreads), kStatisticsThreads, 1, 0},
             current_stream(like.get_device_index()), f, count);
  }
};

}  // namespace
}  // namespace cbn

CBN_REGISTER(CBN_DISPATCH_KEY, cbn::Cuda)

STABLE_TORCH_LIBRARY_IMPL(cbn_ext, CompositeExplicitAutograd, m) {
  m.impl("read_cuda_environment", TORCH_BOX(&cbn::read_cuda_environment));
}
