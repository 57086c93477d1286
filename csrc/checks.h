// What the operators require of their arguments; every message says what was expected and what came.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/HeaderOnlyArrayRef.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <string>
#include <utility>

#include "mixture.h"
#include "problem.h"

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

// Bytes of a mask of one bit per element, whole words of 32 bits.
inline int64_t mask_bytes(const Tensor& x) { return (x.numel() + 31) / 32 * 4; }

// A tensor, if there is one, beside another one, x or the mean.
inline void check_tensor(const OptionalTensor& t, const char* name, Shape shape, ScalarType type,
                         const Tensor& beside) {
  if (!t) return;
  STD_TORCH_CHECK(t->sizes().equals(shape), "expected ", name, " of shape ", to_text(shape), ", got ",
                  to_text(t->sizes()));
  STD_TORCH_CHECK(t->scalar_type() == type, "expected ", name, " of ", type, " beside a tensor of ",
                  beside.scalar_type(), ", got ", t->scalar_type());
  STD_TORCH_CHECK(t->device() == beside.device(), "expected ", name, " on the device of the other tensors");
}

// What every operator requires of x, (N, C, ...), and of who weighs `components`.
inline void check_input(const Tensor& x, int64_t mode, const OptionalTensor& groups, int64_t components) {
  const ScalarType type = x.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double || type == ScalarType::Half ||
                      type == ScalarType::BFloat16,
                  "expected x of float32, float64, float16 or bfloat16, got ", type);
  STD_TORCH_CHECK(x.dim() >= 2, "expected x (N, C, ...), got shape ", to_text(x.sizes()));
  STD_TORCH_CHECK(components >= 1 && components <= kMaxComponents, "expected statistics of M components, M from 1 to ",
                  kMaxComponents, ", got ", components);
  check_tensor(groups, "groups", {x.size(0)}, ScalarType::Long, x);
  STD_TORCH_CHECK(mode >= static_cast<int64_t>(Mode::kChannel) && mode <= static_cast<int64_t>(Mode::kJoint),
                  "expected mode 0 (channel), 1 (groups) or 2 (joint), got ", mode);
  STD_TORCH_CHECK(groups.has_value() == (mode == static_cast<int64_t>(Mode::kGroups)),
                  "expected groups in mode 1 (groups) and in no other, got ", groups ? "groups" : "none", " in mode ",
                  mode);
}

inline void check_posterior(const OptionalTensor& posterior, int64_t mode, int64_t components, const Tensor& x) {
  const int64_t spatial = x.numel() == 0 ? 0 : x.numel() / x.size(0) / x.size(1);
  const int64_t shape[] = {components, x.size(0), spatial}, none[] = {0};
  const Shape expected = has_posterior(static_cast<Mode>(mode), components) ? Shape(shape) : Shape(none);
  check_tensor(posterior, "posterior, as forward gave it,", expected, statistics_type(x.scalar_type()), x);
}

using Named = std::pair<const char*, const OptionalTensor&>;

// Statistics and parameters of components, (M, C) each.
inline void check_components(std::initializer_list<Named> tensors, int64_t components, const Tensor& x) {
  for (const auto& [name, t] : tensors)
    check_tensor(t, name, {components, x.size(1)}, statistics_type(x.scalar_type()), x);
}

// What the forward passes require.
inline void check_forward(const Tensor& x, const OptionalTensor& residual, const OptionalTensor& groups,
                          const OptionalTensor& prior, const OptionalTensor& mean, const OptionalTensor& var,
                          const OptionalTensor& posterior, const OptionalTensor& batch, const OptionalTensor& weight,
                          const OptionalTensor& bias, int64_t mode) {
  STD_TORCH_CHECK(mean->dim() == 2, "expected mean of shape (M, C), got ", to_text(mean->sizes()));
  const int64_t components = mean->size(0);
  check_input(x, mode, groups, components);
  check_tensor(residual, "residual", x.sizes(), x.scalar_type(), x);
  check_tensor(batch, "batch", {3, components, x.size(1)}, statistics_type(x.scalar_type()), x);
  check_components({{"mean", mean}, {"var", var}, {"weight", weight}, {"bias", bias}}, components, x);
  if (mode == static_cast<int64_t>(Mode::kJoint))
    check_tensor(prior, "prior", {components}, statistics_type(x.scalar_type()), x);
  else
    check_components({{"prior", prior}}, components, x);
  check_posterior(posterior, mode, components, x);
  STD_TORCH_CHECK(groups || prior || components == 1, "expected prior or groups for ", components,
                  " components, got neither");
}

// What the backward passes require; `batch` where statistics of the batch normalised.
inline void check_backward(const Tensor& grad, const Tensor& x, const OptionalTensor& mask,
                           const OptionalTensor& groups, const Tensor& posterior, const Tensor& running,
                           const OptionalTensor& batch, const OptionalTensor& weight, const OptionalTensor& bias,
                           const OptionalTensor& grad_weight, const OptionalTensor& grad_bias, int64_t mode,
                           bool relu) {
  STD_TORCH_CHECK(running.dim() == 3, "expected running of shape (3, M, C), got ", to_text(running.sizes()));
  const int64_t components = running.size(1);
  check_input(x, mode, groups, components);
  const int64_t statistics[] = {3, components, x.size(1)};
  check_tensor(grad, "grad", x.sizes(), x.scalar_type(), x);
  check_tensor(running, "running", statistics, statistics_type(x.scalar_type()), x);
  check_tensor(batch, "batch", statistics, statistics_type(x.scalar_type()), x);
  check_components({{"weight", weight}, {"bias", bias}, {"grad_weight", grad_weight}, {"grad_bias", grad_bias}},
                   components, x);
  check_posterior(posterior, mode, components, x);
  STD_TORCH_CHECK(!mask || relu, "expected no mask without relu, got one of shape ", to_text(mask->sizes()));
  check_tensor(mask, "mask, as forward gave it,", {mask_bytes(x)}, ScalarType::Byte, x);
}

// What update_running requires.
inline void check_update_running(const OptionalTensor& prior, const Tensor& mean, const Tensor& var,
                                 const Tensor& batch) {
  const ScalarType type = mean.scalar_type();
  STD_TORCH_CHECK(mean.dim() == 2, "expected mean of shape (M, C), got ", to_text(mean.sizes()));
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double,
                  "expected running statistics of float32 or float64, got ", type);
  check_tensor(var, "var", mean.sizes(), type, mean);
  check_tensor(prior, "prior", prior && prior->dim() == 1 ? Shape(mean.sizes().data(), 1) : mean.sizes(), type, mean);
  check_tensor(batch, "batch", {3, mean.size(0), mean.size(1)}, type, mean);
}

// What merge_moments requires.
inline void check_parts(const Tensor& parts) {
  const ScalarType type = parts.scalar_type();
  STD_TORCH_CHECK(parts.dim() == 4 && parts.size(0) >= 1 && parts.size(1) == 3,
                  "expected parts of shape (R, 3, M, C), R at least 1, got ", to_text(parts.sizes()));
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double, "expected parts of float32 or float64, got ",
                  type);
}

}  // namespace cbn
