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

  Fused fused() const {
    const Arguments& a = arguments;
    if (!a.relu) return a.residual ? Fused::kAny : Fused::kNothing;
    if (a.mask) return a.mask_is_aligned ? Fused::kSum : Fused::kAny;
    return a.residual ? Fused::kAny : Fused::kRelu;
  }

  void launch_pass(Kernels::Pass kernels_of_pass, const Plan& plan) {
    Arguments& a = arguments;
    a.fused = fused();
    a.piece = piece();
    // Those loops count elements in 32 bits.
    a.chunks_are_whole = a.piece == kernels.vector && a.points() * a.channels <= UINT32_MAX &&
                         (!a.channels_last || a.channels % plan.channels_of_block == 0);
    a.columns = plan.columns;
    a.channel_blocks = plan.channel_blocks;
    a.splits = plan.splits;
    a.points_of_split = plan.points_of_split;
    a.slots = plan.slots;
    launch(a.chunks_are_whole ? kernels_of_pass.whole : kernels_of_pass.any, plan.launch(), stream, arguments);
  }

  template <bool kForward>
  void finish() const {
    constexpr int kComponentsOfBlock = kStatisticsThreads / kWarp;
    const Launch shape{divide_up(arguments.components * arguments.channels, kComponentsOfBlock), kStatisticsThreads, 1,
                       0};
    launch(arguments.is_wide() ? finish_kernel<double, kForward> : finish_kernel<float, kForward>, shape, stream,
           arguments);
  }

  // Memory for the sums of splits, and for what they are relative to.
  Tensor make_partials(const Tensor& x, int64_t splits, int rows) {
    const int64_t sums = splits * rows * arguments.components * arguments.channels;
    const Tensor workspace = empty(x, {sums + arguments.channels}, statistics_type(x.scalar_type()));
    arguments.splits = splits;
    arguments.partials = workspace.mutable_data_ptr();
    arguments.origins = static_cast<char*>(arguments.partials) + sums * extent.statistic_size;
    return workspace;
  }

  // The streaming reduction; the residual is for the map.
  template <bool kForward>
  void reduce(Kernels::Pass pass, const Tensor& x) {
    Extent reduced = extent;
    if (kForward) reduced.tensors = 1;
    const Plan plan = plan_reduction(reduced, device, chosen);
    const Tensor sums = make_partials(x, plan.splits, kForward ? kMomentRows : kGradientRows);
    launch_pass(pass, plan);
    finish<kForward>();
  }

  // A cluster of blocks that keeps the values on chip; nothing where they do not fit.
  std::optional<Plan> resident_plan(Kernels::Kernel kernel) {
    if (device.cluster > 1 && chosen.cluster > 1)
      device.cluster = largest_cluster(reinterpret_cast<const void*>(kernel), kernels.most_threads);
    return plan_resident(extent, device, chosen);
  }

  // Lays out the tables of a pass of joint mode over all channels of each point, for sums over them or a map or both.
  using Table = Kernels::Points::Table;
  Tensor lay_out_points(const Tensor& x, bool weighs, Table for_sums, Table for_map) {
    Arguments& a = arguments;
    const int64_t heights = 2 * kernels.components * static_cast<int64_t>(sizeof(double));
    const int64_t sums = a.channels * for_sums.bytes;
    const Tensor workspace = empty(x, {heights + sums + a.channels * for_map.bytes}, ScalarType::Byte);
    char* const memory = static_cast<char*>(workspace.mutable_data_ptr());
    a.weighs = weighs;
    a.heights = reinterpret_cast<double*>(memory);
    a.sums_table = memory + heights;
    a.map_table = memory + heights + sums;
    const Launch shape{kernels.components, kTableThreads, 1, 2 * kTableThreads * sizeof(double)};
    if (weighs) launch(kernels.points.sum_components, shape, stream, a);
    if (for_sums.lay_out) launch(for_sums.lay_out, shape, stream, a);
    if (for_map.lay_out) launch(for_map.lay_out, shape, stream, a);
    return workspace;
  }

  void launch_points(Kernels::Kernel kernel, const Extent& worked, int64_t splits, unsigned shared) {
    const PointLimits& limits = kernels.points.limits;
    arguments.points_of_thread = points_of_thread(worked, limits, device);
    const int64_t tiles = divide_up(worked.points, static_cast<int64_t>(arguments.points_of_thread) * limits.side);
    launch(kernel, {splits > 0 ? splits : tiles, limits.threads, 1, shared}, stream, arguments);
  }

  // The posterior, and the batch's statistics, in the same pass where that is no slower.
  void weigh_and_reduce(const Tensor& x) {
    const Kernels::Points& points = kernels.points;
    Extent weighed = extent;
    weighed.tensors = 1;
    const int64_t splits = splits_of_moments(weighed, points.limits, device, chosen);
    if (splits == 0) {
      const Tensor tables = lay_out_points(x, true, points.weights, {});
      launch_points(points.weigh, weighed, 0, points.shared);
      return reduce<true>(kernels.forward.reduce, x);
    }
    const Tensor sums = make_partials(x, splits, kMomentRows);
    const Tensor tables = lay_out_points(x, true, points.weights, {});
    launch_points(points.weigh, weighed, splits, points.limits.shared);
    finish<true>();
  }

  template <bool kForward>
  void run_joint(Passes passes, const Tensor& x) {
    const Kernels::Points& points = kernels.points;
    if (passes != Passes::kMap) kForward ? weigh_and_reduce(x) : reduce<false>(kernels.backward.reduce, x);
    if (passes == Passes::kReduce) return;
    const bool weighs = kForward && arguments.weighs && passes == Passes::kMap;
    const Table none{}, gradient = arguments.detach_responsibility ? none : points.their_gradient;
    const Tensor tables = kForward ? lay_out_points(x, weighs, weighs ? points.weights : none, points.forward)
                                   : lay_out_points(x, false, gradient, points.backward);
    launch_points(kForward ? kernels.forward.map.any : kernels.backward.map.any, extent, 0, points.shared);
  }

  template <bool kForward>
  void run(const Kernels::Direction& direction, Passes passes, const Tensor& x) {
    if (arguments.has_posterior()) return run_joint<kForward>(passes, x);
    if (passes == Passes::kBoth)
      if (const std::optional<Plan> plan = resident_plan(direction.both))
        return launch_pass({direction.both, direction.both}, *plan);
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
    const Kernels& kernels = work.kernels;
    if (p.points() > 0)
      return work.run<false>(p.detach_responsibility ? kernels.detached : kernels.backward, passes, x);
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
