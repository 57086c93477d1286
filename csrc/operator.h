// The operators, once for every backend: arguments checked and laid out, results allocated, the backend called.
//
// A backend is a struct with
//   Guard                                    made from x, while the operator runs
//   forward(problem, passes, x)              x is what its memory is allocated like
//   backward(problem, passes, x)
//   writes_all_of_mask(problem)              or else the mask is to start as zeros
//   for_each(count, f, like)                 f(i) for i < count
//
// N images, C channels, M components; x is (N, C, ...) with space behind, contiguous or channels_last (other layouts
// are copied). Statistics and parameters are float64 for a float64 x and float32 for all others.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <tuple>
#include <vector>

#include "checks.h"
#include "layout.h"
#include "statistics.h"

namespace cbn {
namespace {

// A contiguous tensor on the device of another one. Not by torch::stable::new_empty, which looks the operator up by its
// name in every call.
inline Tensor empty(const Tensor& like, Shape shape, ScalarType type) {
  int64_t strides[4], stride = 1;
  STD_TORCH_CHECK(shape.size() <= 4, "expected at most 4 dimensions, got ", shape.size());
  for (size_t d = shape.size(); d-- > 0; stride *= shape[d]) strides[d] = stride;
  const auto dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
  const torch::stable::Device device = like.device();
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(shape.size(), shape.data(), strides, dtype,
                                                  static_cast<int32_t>(device.type()), device.index(), &handle));
  return Tensor(handle);
}

// A problem, and the tensors that it points to, some of them copies.
struct Call {
  Problem problem{};
  Tensor x;

  Call(const Tensor& input, const OptionalTensor& groups, int64_t components, const OptionalTensor& weight,
       const OptionalTensor& bias, int64_t mode, bool training, bool relu, double eps)
      : x(laid_out(input, problem.channels_last = reads_channels_last(input))) {
    Problem& p = problem;
    p.mode = static_cast<Mode>(mode);
    p.element = element(x.scalar_type());
    p.training = training;
    p.relu = relu;
    p.eps = eps;
    p.components = static_cast<int>(components);
    p.images = x.size(0);
    p.channels = x.size(1);
    p.spatial = x.numel() == 0 ? 0 : x.numel() / p.channels / p.images;
    p.x = x.const_data_ptr();
    p.groups = static_cast<const int64_t*>(dense(groups));
    p.weight = dense(weight);
    p.bias = dense(bias);
  }

  static Element element(ScalarType type) {
    if (type == ScalarType::Float) return Element::kFloat;
    if (type == ScalarType::Double) return Element::kDouble;
    return type == ScalarType::Half ? Element::kHalf : Element::kBFloat16;
  }

  // Where the contiguous tensor lies; null without one.
  void* dense(const OptionalTensor& t) { return t ? keep(cbn::contiguous(*t)) : nullptr; }
  // Where the tensor lies in the layout of x; null without one.
  void* like_x(const OptionalTensor& t) { return t ? keep(laid_out(*t, problem.channels_last)) : nullptr; }

 private:
  std::vector<Tensor> kept;

  void* keep(Tensor t) {
    kept.push_back(std::move(t));
    return const_cast<void*>(kept.back().const_data_ptr());
  }
};

// y = act(cbn(x) + residual), like x and rounded once, and what backward needs:
//   mask       [bytes] uint8, private to the backend: one bit per element, set where the ReLU lets gradients pass;
//              [0] unless both relu and residual are given
//   running    [3, M, C] prior (0 where none was given), mean and variance as they were used
//   batch      [3, M, C] mass, mean and biased variance of the batch; a component without mass has its running
//              statistics there. [0] in evaluation
//   posterior  [M, N, S] weights of the points in Mode::kJoint; [0] in the others and where M = 1
using Forward = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

template <class Backend>
Forward run_forward(
    Passes passes, const Tensor& x,
    const OptionalTensor& residual,         // like x, or 0
    const OptionalTensor& groups,           // [N] int64, Mode::kGroups alone
    const OptionalTensor& prior,            // [M, C], in Mode::kJoint [M]; needed where M > 1 there and in kChannel
    const Tensor& mean,                     // [M, C] running
    const Tensor& var,                      // [M, C] running
    const OptionalTensor& given_posterior,  // where only the map is wanted
    const OptionalTensor& given_batch,      // likewise
    const OptionalTensor& weight,           // [M, C] or 1
    const OptionalTensor& bias,             // [M, C] or 0
    int64_t mode, bool training, bool relu, double eps) {
  check_forward(x, residual, groups, prior, mean, var, given_posterior, given_batch, weight, bias, mode);
  const typename Backend::Guard guard(x);
  Call call(x, groups, mean.size(0), weight, bias, mode, training, relu, eps);
  Problem& p = call.problem;
  p.residual = call.like_x(residual);
  p.prior = call.dense(prior);
  p.mean = call.dense(mean);
  p.var = call.dense(var);
  Tensor y, mask, running, batch, posterior;
  if (p.has_posterior()) {
    p.weighs = !given_posterior;
    posterior = p.weighs ? empty(mean, {p.components, p.images, p.spatial}, mean.scalar_type()) : *given_posterior;
    p.posterior = call.dense(posterior);
  } else {
    posterior = empty(mean, {0}, mean.scalar_type());
  }
  if (given_batch)
    p.batch = call.dense(given_batch);
  else if (training)
    p.batch = (batch = empty(mean, {3, mean.size(0), mean.size(1)}, mean.scalar_type())).mutable_data_ptr();
  else
    batch = empty(mean, {0}, mean.scalar_type());
  if (passes != Passes::kReduce) {
    y = torch::stable::empty_like(call.x);
    running = empty(mean, {3, mean.size(0), mean.size(1)}, mean.scalar_type());
    p.out = y.mutable_data_ptr();
    p.running = running.mutable_data_ptr();
    const bool has_mask = relu && residual;
    const int64_t bytes = has_mask ? mask_bytes(x) : 0;
    mask = has_mask && !Backend::writes_all_of_mask(p) ? torch::stable::new_zeros(x, {&bytes, 1}, ScalarType::Byte)
                                                       : empty(x, {bytes}, ScalarType::Byte);
    if (has_mask) p.mask = static_cast<uint32_t*>(mask.mutable_data_ptr());
  }
  if (p.channels > 0) Backend::forward(p, passes, call.x);
  return {y, mask, running, batch, posterior};
}

// Gradients of x, of the residual (like x where there is a mask, else [0]: it is grad itself), of weight [M, C] and of
// bias [M, C]. Where relu has no mask, the sign of the output is computed from x again.
using Backward = std::tuple<Tensor, Tensor, Tensor, Tensor>;

template <class Backend>
Backward run_backward(Passes passes,
                      const Tensor& grad,                 // like x
                      const Tensor& x,                    // [N, C, ...]
                      const OptionalTensor& mask,         // as forward gave it
                      const OptionalTensor& groups,       // [N] int64, Mode::kGroups alone
                      const Tensor& posterior,            // as forward gave it
                      const Tensor& running,              // [3, M, C], forward's
                      const OptionalTensor& batch,        // [3, M, C], forward's, in training
                      const OptionalTensor& weight,       // [M, C] or 1
                      const OptionalTensor& bias,         // [M, C] or 0
                      const OptionalTensor& grad_weight,  // [M, C], where only the map is wanted
                      const OptionalTensor& grad_bias,    // [M, C] likewise
                      int64_t mode, bool relu, bool detach_responsibility, double eps) {
  check_backward(grad, x, mask, groups, posterior, running, batch, weight, bias, grad_weight, grad_bias, mode, relu);
  const typename Backend::Guard guard(x);
  const int64_t components = running.size(1), channels = running.size(2);
  Call call(x, groups, components, weight, bias, mode, batch.has_value(), relu, eps);
  Problem& p = call.problem;
  p.detach_responsibility = detach_responsibility;
  p.grad = call.like_x(grad);
  p.mask = static_cast<uint32_t*>(call.dense(mask));
  const char* statistics = static_cast<const char*>(call.dense(running));
  const int64_t bytes = components * channels * static_cast<int64_t>(p.is_wide() ? sizeof(double) : sizeof(float));
  // Each channel has the prior here; where the points' weights are given, no one asks for it.
  p.prior = p.mode == Mode::kJoint ? nullptr : statistics;
  p.mean = statistics + bytes;
  p.var = statistics + 2 * bytes;
  p.batch = call.dense(batch);
  Tensor grad_x, grad_residual, weight_sums, bias_sums;
  if (passes == Passes::kMap) {
    p.grad_weight = call.dense(grad_weight);
    p.grad_bias = call.dense(grad_bias);
  } else {
    weight_sums = empty(running, {components, channels}, running.scalar_type());
    bias_sums = empty(running, {components, channels}, running.scalar_type());
    p.grad_weight = weight_sums.mutable_data_ptr();
    p.grad_bias = bias_sums.mutable_data_ptr();
  }
  if (passes != Passes::kReduce) {
    grad_x = torch::stable::empty_like(call.x);
    grad_residual = mask ? torch::stable::empty_like(grad_x) : empty(x, {0}, x.scalar_type());
    p.out = grad_x.mutable_data_ptr();
    if (mask) p.grad_residual = grad_residual.mutable_data_ptr();
  }
  if (p.has_posterior()) p.posterior = call.dense(posterior);
  if (p.channels > 0) Backend::backward(p, passes, call.x);
  return {grad_x, grad_residual, weight_sums, bias_sums};
}

// The entry points; cbn_ext/ops.py calls them through the schemas of ops.cpp.
template <class Backend>
struct Operators {
  static Forward forward(const Tensor& x, const OptionalTensor& residual, const OptionalTensor& groups,
                         const OptionalTensor& prior, const Tensor& mean, const Tensor& var,
                         const OptionalTensor& weight, const OptionalTensor& bias, int64_t mode, bool training,
                         bool relu, double eps) {
    return run_forward<Backend>(training ? Passes::kBoth : Passes::kMap, x, residual, groups, prior, mean, var, {}, {},
                                weight, bias, mode, training, relu, eps);
  }

  static Backward backward(const Tensor& grad, const Tensor& x, const OptionalTensor& mask,
                           const OptionalTensor& groups, const Tensor& posterior, const Tensor& running,
                           const Tensor& batch, const OptionalTensor& weight, const OptionalTensor& bias, int64_t mode,
                           bool training, bool relu, bool detach_responsibility, double eps) {
    return run_backward<Backend>(Passes::kBoth, grad, x, mask, groups, posterior, running,
                                 training ? OptionalTensor(batch) : OptionalTensor(), weight, bias, {}, {}, mode, relu,
                                 detach_responsibility, eps);
  }

  // The four passes of training by themselves, for who merges what they reduce: statistics by merge_moments, gradients
  // by their sum.
  static std::tuple<Tensor, Tensor> moments(const Tensor& x, const OptionalTensor& groups, const OptionalTensor& prior,
                                            const Tensor& mean, const Tensor& var, int64_t mode, double eps) {
    const auto [_, none, running, batch, posterior] =
        run_forward<Backend>(Passes::kReduce, x, {}, groups, prior, mean, var, {}, {}, {}, {}, mode, true, false, eps);
    return {batch, posterior};
  }

  static std::tuple<Tensor, Tensor, Tensor> normalise(const Tensor& x, const OptionalTensor& residual,
                                                      const OptionalTensor& groups, const OptionalTensor& prior,
                                                      const Tensor& mean, const Tensor& var, const Tensor& posterior,
                                                      const Tensor& batch, const OptionalTensor& weight,
                                                      const OptionalTensor& bias, int64_t mode, bool relu, double eps) {
    const auto [y, mask, running, _, none] = run_forward<Backend>(
        Passes::kMap, x, residual, groups, prior, mean, var, posterior, batch, weight, bias, mode, true, relu, eps);
    return {y, mask, running};
  }

  static std::tuple<Tensor, Tensor> gradient_sums(const Tensor& grad, const Tensor& x, const OptionalTensor& mask,
                                                  const OptionalTensor& groups, const Tensor& posterior,
                                                  const Tensor& running, const Tensor& batch,
                                                  const OptionalTensor& weight, const OptionalTensor& bias,
                                                  int64_t mode, bool relu, double eps) {
    const auto [_, none, grad_weight, grad_bias] =
        run_backward<Backend>(Passes::kReduce, grad, x, mask, groups, posterior, running, batch, weight, bias, {}, {},
                              mode, relu, false, eps);
    return {grad_weight, grad_bias};
  }

  static std::tuple<Tensor, Tensor> input_gradient(const Tensor& grad, const Tensor& x, const OptionalTensor& mask,
                                                   const OptionalTensor& groups, const Tensor& posterior,
                                                   const Tensor& running, const Tensor& batch,
                                                   const OptionalTensor& weight, const OptionalTensor& bias,
                                                   const Tensor& grad_weight, const Tensor& grad_bias, int64_t mode,
                                                   bool relu, bool detach_responsibility, double eps) {
    const auto [grad_x, grad_residual, _, none] =
        run_backward<Backend>(Passes::kMap, grad, x, mask, groups, posterior, running, batch, weight, bias, grad_weight,
                              grad_bias, mode, relu, detach_responsibility, eps);
    return {grad_x, grad_residual};
  }

  // Statistics of the batch [3, M, C] from those of its parts [R, 3, M, C].
  static Tensor merge_moments(const Tensor& parts) {
    check_parts(parts);
    const typename Backend::Guard guard(parts);
    const Tensor dense = cbn::contiguous(parts);
    const Tensor batch = empty(parts, {3, parts.size(2), parts.size(3)}, parts.scalar_type());
    const auto merge = [&](auto zero) {
      using S = decltype(zero);
      const int64_t size = parts.size(2) * parts.size(3);
      const MergeParts<S> merge{static_cast<const S*>(dense.const_data_ptr()),
                                static_cast<S*>(batch.mutable_data_ptr()), parts.size(0), size};
      Backend::for_each(size, merge, parts);
    };
    parts.scalar_type() == ScalarType::Double ? merge(double{}) : merge(float{});
    return batch;
  }

  // Temporal accumulation (eqs 13-15), in place, for `points` of each channel; 0 of them change nothing.
  static void update_running(OptionalTensor prior,  // [M, C], in joint mode [M]; left alone where none is given
                             Tensor mean,           // [M, C]
                             Tensor var,            // [M, C]
                             const Tensor& batch,   // [3, M, C], forward's
                             int64_t points, double momentum) {
    if (points == 0) return;
    check_update_running(prior, mean, var, batch);
    const typename Backend::Guard guard(mean);
    const Tensor dense = cbn::contiguous(batch);
    const auto update = [&](auto zero) {
      using S = decltype(zero);
      const auto strided = [](const OptionalTensor& t) {
        return t ? Strided<S>{static_cast<S*>(t->mutable_data_ptr()), t->stride(0), t->dim() == 1 ? 0 : t->stride(1)}
                 : Strided<S>{};
      };
      const MoveRunning<S> move{strided(prior),
                                strided(mean),
                                strided(var),
                                static_cast<const S*>(dense.const_data_ptr()),
                                mean.numel(),
                                mean.size(1),
                                static_cast<double>(points),
                                momentum};
      Backend::for_each(mean.numel(), move, mean);
    };
    mean.scalar_type() == ScalarType::Double ? update(double{}) : update(float{});
  }
};

}  // namespace
}  // namespace cbn

// Makes a backend the implementation of the operators for a dispatch key, such as CPU.
#define CBN_REGISTER(key, Backend)                                                 \
  STABLE_TORCH_LIBRARY_IMPL(cbn_ext, key, m) {                                     \
    m.impl("forward", TORCH_BOX(&cbn::Operators<Backend>::forward));               \
    m.impl("backward", TORCH_BOX(&cbn::Operators<Backend>::backward));             \
    m.impl("moments", TORCH_BOX(&cbn::Operators<Backend>::moments));               \
    m.impl("normalise", TORCH_BOX(&cbn::Operators<Backend>::normalise));           \
    m.impl("gradient_sums", TORCH_BOX(&cbn::Operators<Backend>::gradient_sums));   \
    m.impl("input_gradient", TORCH_BOX(&cbn::Operators<Backend>::input_gradient)); \
    m.impl("merge_moments", TORCH_BOX(&cbn::Operators<Backend>::merge_moments));   \
    m.impl("update_running", TORCH_BOX(&cbn::Operators<Backend>::update_running)); \
  }
