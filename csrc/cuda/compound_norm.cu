// The CUDA operators: arguments checked and laid out, the plan chosen, kernels launched on the current stream.
#include "../compound_norm.h"

#include <torch/csrc/stable/ops.h>

#include <optional>
#include <vector>

#include "../checks.h"
#include "../layout.h"
#include "reduce.cuh"
#include "runtime.h"
#include "statistics.cuh"
#include "tuning.h"

namespace cbn {

constexpr int kStatisticsThreads = 128;

// Merges the splits' sums of a component and finishes it, a warp for each.
template <class S, bool kForward>
__global__ void finish_kernel(const __grid_constant__ Arguments a) {
  constexpr int kKinds = kForward ? kMomentSums : kGradientSums;
  const int64_t size = a.components * a.channels;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * (blockDim.x / kWarp) + threadIdx.x / kWarp;
  if (i >= size) return;
  double sums[kKinds] = {};
  for (int64_t split = threadIdx.x % kWarp; split < a.splits; split += kWarp)
    for (int kind = 0; kind < kKinds; ++kind)
      sums[kind] += static_cast<const S*>(a.partials)[(split * kKinds + kind) * size + i];
  for (int kind = 0; kind < kKinds; ++kind) sums[kind] = warp_sum(sums[kind], 1);
  if (threadIdx.x % kWarp != 0) return;
  const Component<S> component{a, i};
  const double origin = a.splits ? static_cast<const S*>(a.origins)[i % a.channels] : 0;
  if constexpr (kForward) {
    if (a.training) component.write_batch(component.finish_moments(sums, origin));
    component.keep_running();
  } else {
    component.write_gradients(component.finish_weight_gradient(sums, origin, component.used()), sums[0]);
  }
}

// A [M, C] tensor of running statistics, in any memory.
template <class S>
struct Running {
  S* data;
  int64_t component_stride, channel_stride;

  __device__ __forceinline__ S& operator()(int64_t m, int64_t c) const {
    return data[m * component_stride + c * channel_stride];
  }
};

// Temporal accumulation (eqs 13-15), a thread for each component of a channel.
template <class S>
__global__ void update_kernel(Running<S> prior,  // its data null in split mode
                              Running<S> mean, Running<S> var,
                              const S* batch,  // [3, M, C]
                              int64_t size,    // M C
                              int64_t channels, double points, double momentum) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= size) return;
  const int64_t m = i / channels, c = i % channels;
  const double mass = batch[i];
  if (prior.data) prior(m, c) = static_cast<S>(moved(prior(m, c), mass / points, momentum));
  if (mass < kMassFloor) return;
  mean(m, c) = static_cast<S>(moved(mean(m, c), batch[size + i], momentum));
  var(m, c) = static_cast<S>(moved(var(m, c), unbiased(batch[2 * size + i], mass), momentum));
}

namespace {

const void* data(const OptionalTensor& t) { return t ? t->const_data_ptr() : nullptr; }

Tensor empty(const Tensor& like, const std::vector<int64_t>& shape, ScalarType type) {
  return torch::stable::new_empty(like, {shape.data(), shape.size()}, type);
}

// What forward and backward have in common; owns what had to be copied.
struct Call {
  Tensor x;
  OptionalTensor groups, weight, bias;
  bool channels_last, wide;
  Kernels kernels{};
  Arguments arguments{};
  Extent extent{};
  Device device;
  cudaStream_t stream;

  Call(const Tensor& input, const OptionalTensor& groups_in, int64_t components, const OptionalTensor& weight_in,
       const OptionalTensor& bias_in)
      : channels_last(reads_channels_last(input)), wide(input.scalar_type() == ScalarType::Double) {
    x = laid_out(input, channels_last);
    if (groups_in) groups = cbn::contiguous(*groups_in);
    if (weight_in) weight = cbn::contiguous(*weight_in);
    if (bias_in) bias = cbn::contiguous(*bias_in);
    const int m = static_cast<int>(components);
    switch (x.scalar_type()) {
      case ScalarType::Float:
        kernels = kernels_float(m, channels_last);
        break;
      case ScalarType::Double:
        kernels = kernels_double(m, channels_last);
        break;
      case ScalarType::Half:
        kernels = kernels_half(m, channels_last);
        break;
      default:
        kernels = kernels_bfloat16(m, channels_last);
    }
    device = device_properties();
    stream = current_stream(x.get_device_index());
    Arguments& a = arguments;
    a.channels = x.size(1);
    const int64_t images = x.size(0), planes = images * a.channels;
    a.spatial = planes ? x.numel() / planes : 0;
    a.points = images * a.spatial;
    constexpr int64_t kMost = UINT32_MAX;
    STD_TORCH_CHECK(images <= kMost && a.spatial <= kMost, "expected at most ", kMost,
                    " images and as many points in "
                    "each, got ",
                    images, " and ", a.spatial);
    a.x = x.const_data_ptr();
    a.groups = groups ? groups->const_data_ptr<int64_t>() : nullptr;
    a.components = m;
    a.weight = data(weight);
    a.bias = data(bias);
    a.mask_in_bytes = (channels_last ? a.channels : a.points) % 8 == 0;
    extent = {a.channels,
              a.points,
              channels_last,
              static_cast<int>(x.element_size()),
              wide ? 8 : 4,
              kernels.components,
              kernels.vector,
              kernels.most_threads,
              1};
  }

  // Elements that lie together and aligned in every tensor that the kernels read and write.
  int run() const {
    const Arguments& a = arguments;
    int64_t run = kernels.vector;
    const auto fits = [&](const void* tensor) {
      return reinterpret_cast<uintptr_t>(tensor) % (run * extent.element_size) == 0;
    };
    while ((channels_last ? a.channels : a.spatial) % run != 0 || !fits(a.x) || !fits(a.grad) || !fits(a.residual) ||
           !fits(a.out) || !fits(a.grad_residual))
      run /= 2;
    return static_cast<int>(run);
  }

  void launch_pass(Kernels::Kernel kernel, const Plan& plan) {
    Arguments& a = arguments;
    a.run = run();
    a.lanes = plan.lanes;
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
    launch(wide ? finish_kernel<double, kForward> : finish_kernel<float, kForward>, shape, stream, arguments);
  }

  // A reduction, what is done with its results, and a map.
  template <bool kForward>
  void run_both(Kernels::Kernel reduce, Kernels::Kernel map, Kernels::Kernel both) {
    const Tuning chosen = tuning();
    if (device.cluster > 1 && chosen.cluster > 1)
      device.cluster = largest_cluster(reinterpret_cast<const void*>(both), kernels.most_threads);
    if (const std::optional<Plan> plan = plan_resident(extent, device, chosen)) return launch_pass(both, *plan);
    Extent reduced = extent;
    if (kForward) reduced.tensors = 1;  // the residual is for the map
    const Plan plan = plan_reduction(reduced, device, chosen);
    const int64_t kinds = kForward ? kMomentSums : kGradientSums;
    const int64_t sums = plan.splits * kinds * arguments.components * arguments.channels;
    const Tensor workspace = empty(x, {sums + arguments.channels}, statistics_type(x.scalar_type()));
    arguments.partials = workspace.mutable_data_ptr();
    arguments.origins = static_cast<char*>(arguments.partials) + sums * extent.statistic_size;
    launch_pass(reduce, plan);
    finish<kForward>();
    launch_pass(map, plan_map(extent, device, chosen));
  }
};

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> forward_cuda(const Tensor& x, const OptionalTensor& residual,
                                                        const OptionalTensor& groups, const OptionalTensor& prior,
                                                        const Tensor& mean, const Tensor& var,
                                                        const OptionalTensor& weight, const OptionalTensor& bias,
                                                        bool training, bool relu, double eps) {
  check_forward(x, residual, groups, prior, mean, var, weight, bias);
  const DeviceGuard guard(x.get_device_index());
  const int64_t components = mean.size(0), channels = mean.size(1);
  Call call(x, groups, components, weight, bias);
  const Tensor used_mean = cbn::contiguous(mean), used_var = cbn::contiguous(var);
  OptionalTensor used_prior, added;
  if (prior) used_prior = cbn::contiguous(*prior);
  if (residual) added = laid_out(*residual, call.channels_last);
  const Tensor y = torch::stable::empty_like(call.x);
  const Tensor running = empty(mean, {3, components, channels}, mean.scalar_type());
  const Tensor batch = training ? torch::stable::empty_like(running) : empty(mean, {0}, mean.scalar_type());
  const int64_t bytes = relu && residual ? mask_bytes(x) : 0;
  // What fills up the last word is zero as well: the same input gives the same mask.
  const bool every_byte_is_written = call.arguments.mask_in_bytes && x.numel() % 32 == 0;
  const Tensor mask = every_byte_is_written ? empty(x, {bytes}, ScalarType::Byte)
                                            : torch::stable::new_zeros(x, {&bytes, 1}, ScalarType::Byte);
  Arguments& a = call.arguments;
  a.residual = data(added);
  a.out = y.mutable_data_ptr();
  a.mask = bytes ? reinterpret_cast<unsigned*>(mask.mutable_data_ptr()) : nullptr;
  a.prior = data(used_prior);
  a.mean = used_mean.const_data_ptr();
  a.var = used_var.const_data_ptr();
  a.running = running.mutable_data_ptr();
  a.batch = training ? batch.mutable_data_ptr() : nullptr;
  a.eps = eps;
  a.training = training;
  a.relu = relu;
  call.extent.tensors = residual ? 2 : 1;
  if (channels == 0) return {y, mask, running, batch};
  if (a.points == 0) {
    call.finish<true>();
  } else if (training) {
    call.run_both<true>(call.kernels.moments, call.kernels.normalise, call.kernels.forward);
  } else {
    call.launch_pass(call.kernels.normalise, plan_map(call.extent, call.device, tuning()));
  }
  return {y, mask, running, batch};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward_cuda(const Tensor& grad, const Tensor& x,
                                                         const OptionalTensor& mask, const OptionalTensor& groups,
                                                         const Tensor& running, const Tensor& batch,
                                                         const OptionalTensor& weight, const OptionalTensor& bias,
                                                         bool training, bool relu, bool detach_responsibility,
                                                         double eps) {
  check_backward(grad, x, mask, groups, running, batch, weight, bias, training, relu);
  const DeviceGuard guard(x.get_device_index());
  const int64_t components = running.size(1), channels = running.size(2);
  Call call(x, groups, components, weight, bias);
  const Tensor g = laid_out(grad, call.channels_last), used_running = cbn::contiguous(running);
  const Tensor used_batch = cbn::contiguous(batch);
  OptionalTensor bits;
  if (mask) bits = cbn::contiguous(*mask);
  const Tensor grad_x = torch::stable::empty_like(call.x);
  const Tensor grad_residual = mask ? torch::stable::empty_like(grad_x) : empty(x, {0}, x.scalar_type());
  const Tensor grad_weight = empty(running, {components, channels}, running.scalar_type());
  const Tensor grad_bias = torch::stable::empty_like(grad_weight);
  Arguments& a = call.arguments;
  const char* statistics = static_cast<const char*>(used_running.const_data_ptr());
  const int64_t kind = components * channels * call.extent.statistic_size;
  a.grad = g.const_data_ptr();
  a.out = grad_x.mutable_data_ptr();
  a.grad_residual = mask ? grad_residual.mutable_data_ptr() : nullptr;
  a.mask = bits ? static_cast<unsigned*>(bits->mutable_data_ptr()) : nullptr;
  a.prior = statistics;
  a.mean = statistics + kind;
  a.var = statistics + 2 * kind;
  a.batch = training ? used_batch.mutable_data_ptr() : nullptr;
  a.grad_weight = grad_weight.mutable_data_ptr();
  a.grad_bias = grad_bias.mutable_data_ptr();
  a.eps = eps;
  a.training = training;
  a.relu = relu;
  a.detach_responsibility = detach_responsibility;
  call.extent.tensors = 2;
  if (channels == 0) return {grad_x, grad_residual, grad_weight, grad_bias};
  if (a.points == 0)
    call.finish<false>();
  else
    call.run_both<false>(call.kernels.gradient_sums, call.kernels.input_gradient, call.kernels.backward);
  return {grad_x, grad_residual, grad_weight, grad_bias};
}

void update_running_cuda(OptionalTensor prior, Tensor mean, Tensor var, const Tensor& batch, int64_t points,
                         double momentum) {
  if (points == 0 || mean.numel() == 0) return;
  check_update_running(prior, mean, var, batch);
  const DeviceGuard guard(mean.get_device_index());
  const Tensor used_batch = cbn::contiguous(batch);
  const auto update = [&](auto zero) {
    using S = decltype(zero);
    const auto running = [](const OptionalTensor& t) {
      return t ? Running<S>{static_cast<S*>(t->mutable_data_ptr()), t->stride(0), t->stride(1)} : Running<S>{};
    };
    const int64_t size = mean.numel();
    launch(update_kernel<S>, {divide_up(size, kStatisticsThreads), kStatisticsThreads, 1, 0},
           current_stream(mean.get_device_index()), running(prior), running(mean), running(var),
           static_cast<const S*>(used_batch.const_data_ptr()), size, mean.size(1), static_cast<double>(points),
           momentum);
  };
  if (mean.scalar_type() == ScalarType::Double)
    update(double{});
  else
    update(float{});
}

}  // namespace cbn
