// What the operators require of their arguments; every message says what was expected and what came.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/HeaderOnlyArrayRef.h>

#include <cstdint>
#include <optional>
#include <sstream>
#include <string>

#include "mixture.h"

namespace cbn {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Shape = torch::headeronly::IntHeaderOnlyArrayRef;

// For messages alone, which are built only where a check fails; shapes are compared as they are.
inline std::string to_text(Shape shape) {
  std::ostringstream out;
  out << "(";
  for (size_t d = 0; d < shape.size(); ++d) out << (d ? ", " : "") << shape[d];
  out << ")";
  return out.str();
}

inline ScalarType statistics_type(ScalarType input) {
  return input == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline void check_input(const Tensor& x) {
  const ScalarType type = x.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double || type == ScalarType::Half ||
                      type == ScalarType::BFloat16,
                  "expected x of float32, float64, float16 or bfloat16, got ", type);
  STD_TORCH_CHECK(x.dim() >= 2, "expected x (N, C, ...), got shape ", to_text(x.sizes()));
}

// (M, C), contiguous, on x's device and of the dtype of its statistics.
inline void check_statistic(const Tensor& t, const char* name, const Tensor& x, int64_t components) {
  STD_TORCH_CHECK(t.dim() == 2 && t.size(0) == components && t.size(1) == x.size(1), "expected ", name, " of shape (",
                  components, ", ", x.size(1), "), got ", to_text(t.sizes()));
  STD_TORCH_CHECK(t.scalar_type() == statistics_type(x.scalar_type()), "expected ", name, " of ",
                  statistics_type(x.scalar_type()), " for x of ", x.scalar_type(), ", got ", t.scalar_type());
  STD_TORCH_CHECK(t.device() == x.device(), "expected ", name, " on the device of x");
}

inline void check_groups(const Tensor& groups, const Tensor& x) {
  STD_TORCH_CHECK(groups.dim() == 1 && groups.size(0) == x.size(0), "expected groups of shape (", x.size(0), "), got ",
                  to_text(groups.sizes()));
  STD_TORCH_CHECK(groups.scalar_type() == ScalarType::Long, "expected groups of int64, got ", groups.scalar_type());
  STD_TORCH_CHECK(groups.device() == x.device(), "expected groups on the device of x");
}

// The gradient, the residual: of x's shape and dtype, on its device.
inline void check_like(const Tensor& t, const char* name, const Tensor& x) {
  STD_TORCH_CHECK(t.sizes().equals(x.sizes()), "expected ", name, " of shape ", to_text(x.sizes()), ", got ",
                  to_text(t.sizes()));
  STD_TORCH_CHECK(t.scalar_type() == x.scalar_type(), "expected ", name, " of ", x.scalar_type(), ", got ",
                  t.scalar_type());
  STD_TORCH_CHECK(t.device() == x.device(), "expected ", name, " on the device of x");
}

// (3, M, C), as forward gave it.
inline void check_stacked(const Tensor& t, const char* name, const Tensor& x, int64_t components) {
  STD_TORCH_CHECK(t.dim() == 3 && t.size(0) == 3 && t.size(1) == components && t.size(2) == x.size(1), "expected ",
                  name, " of shape (3, ", components, ", ", x.size(1), "), got ", to_text(t.sizes()));
  STD_TORCH_CHECK(t.scalar_type() == statistics_type(x.scalar_type()), "expected ", name, " of ",
                  statistics_type(x.scalar_type()), " for x of ", x.scalar_type(), ", got ", t.scalar_type());
  STD_TORCH_CHECK(t.device() == x.device(), "expected ", name, " on the device of x");
}

// Bytes of a mask of one bit per element, whole words of 32 bits.
inline int64_t mask_bytes(const Tensor& x) { return (x.numel() + 31) / 32 * 4; }

// What forward requires of its arguments.
inline void check_forward(const Tensor& x, const OptionalTensor& residual, const OptionalTensor& groups,
                          const OptionalTensor& prior, const Tensor& mean, const Tensor& var,
                          const OptionalTensor& weight, const OptionalTensor& bias) {
  check_input(x);
  STD_TORCH_CHECK(mean.dim() == 2 && mean.size(0) >= 1 && mean.size(0) <= kMaxComponents,
                  "expected mean of shape (M, C), M from 1 to ", kMaxComponents, ", got ", to_text(mean.sizes()));
  const int64_t components = mean.size(0);
  check_statistic(mean, "mean", x, components);
  check_statistic(var, "var", x, components);
  if (weight) check_statistic(*weight, "weight", x, components);
  if (bias) check_statistic(*bias, "bias", x, components);
  if (residual) check_like(*residual, "residual", x);
  if (groups) check_groups(*groups, x);
  STD_TORCH_CHECK(groups || prior || components == 1, "expected prior or groups for ", components,
                  " components, got neither");
  if (prior) check_statistic(*prior, "prior", x, components);
}

// What backward requires of its arguments.
inline void check_backward(const Tensor& grad, const Tensor& x, const OptionalTensor& mask,
                           const OptionalTensor& groups, const Tensor& running, const Tensor& batch,
                           const OptionalTensor& weight, const OptionalTensor& bias, bool training, bool relu) {
  check_input(x);
  check_like(grad, "grad", x);
  STD_TORCH_CHECK(running.dim() == 3 && running.size(1) >= 1 && running.size(1) <= kMaxComponents,
                  "expected running of shape (3, M, C), M from 1 to ", kMaxComponents, ", got ",
                  to_text(running.sizes()));
  const int64_t components = running.size(1);
  check_stacked(running, "running", x, components);
  if (training) check_stacked(batch, "batch", x, components);
  if (weight) check_statistic(*weight, "weight", x, components);
  if (bias) check_statistic(*bias, "bias", x, components);
  if (groups) check_groups(*groups, x);
  if (!mask) return;
  STD_TORCH_CHECK(relu, "expected no mask without relu, got one of shape ", to_text(mask->sizes()));
  STD_TORCH_CHECK(mask->dim() == 1 && mask->size(0) == mask_bytes(x) && mask->scalar_type() == ScalarType::Byte,
                  "expected mask of ", mask_bytes(x), " bytes, as forward gave it, got shape ", to_text(mask->sizes()),
                  " of ", mask->scalar_type());
  STD_TORCH_CHECK(mask->device() == x.device(), "expected mask on the device of x");
}

// What update_running requires of its arguments.
inline void check_update_running(const OptionalTensor& prior, const Tensor& mean, const Tensor& var,
                                 const Tensor& batch) {
  const ScalarType type = mean.scalar_type();
  STD_TORCH_CHECK(mean.dim() == 2, "expected mean of shape (M, C), got ", to_text(mean.sizes()));
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double,
                  "expected running statistics of float32 or float64, got ", type);
  const auto check = [&](const Tensor& t, const char* name, Shape shape) {
    STD_TORCH_CHECK(t.sizes().equals(shape) && t.scalar_type() == type, "expected ", name, " of shape ", to_text(shape),
                    " and ", type, ", got ", to_text(t.sizes()), " and ", t.scalar_type());
    STD_TORCH_CHECK(t.device() == mean.device(), "expected ", name, " on the device of mean");
  };
  check(var, "var", mean.sizes());
  if (prior) check(*prior, "prior", mean.sizes());
  check(batch, "batch", {3, mean.size(0), mean.size(1)});
}

}  // namespace cbn
