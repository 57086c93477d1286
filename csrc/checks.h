// What the operators require of their arguments; every message says what was expected and what came.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <optional>
#include <sstream>
#include <string>

namespace cbn {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline std::string shape_of(const Tensor& t) {
  std::ostringstream out;
  out << "(";
  for (int64_t d = 0; d < t.dim(); ++d) out << (d ? ", " : "") << t.size(d);
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
  STD_TORCH_CHECK(x.dim() >= 2, "expected x (N, C, ...), got shape ", shape_of(x));
}

// (M, C), contiguous, on x's device and of the dtype of its statistics.
inline void check_statistic(const Tensor& t, const char* name, const Tensor& x, int64_t components) {
  STD_TORCH_CHECK(t.dim() == 2 && t.size(0) == components && t.size(1) == x.size(1), "expected ", name, " of shape (",
                  components, ", ", x.size(1), "), got ", shape_of(t));
  STD_TORCH_CHECK(t.scalar_type() == statistics_type(x.scalar_type()), "expected ", name, " of ",
                  statistics_type(x.scalar_type()), " for x of ", x.scalar_type(), ", got ", t.scalar_type());
  STD_TORCH_CHECK(t.device() == x.device(), "expected ", name, " on the device of x");
}

inline void check_components(const Tensor& mean, int64_t most) {
  STD_TORCH_CHECK(mean.dim() == 2 && mean.size(0) >= 1 && mean.size(0) <= most,
                  "expected mean of shape (M, C), M from 1 to ", most, ", got ", shape_of(mean));
}

inline void check_groups(const Tensor& groups, const Tensor& x) {
  STD_TORCH_CHECK(groups.dim() == 1 && groups.size(0) == x.size(0), "expected groups of shape (", x.size(0), "), got ",
                  shape_of(groups));
  STD_TORCH_CHECK(groups.scalar_type() == ScalarType::Long, "expected groups of int64, got ", groups.scalar_type());
  STD_TORCH_CHECK(groups.device() == x.device(), "expected groups on the device of x");
}

inline void check_same_shape(const Tensor& grad, const Tensor& x) {
  STD_TORCH_CHECK(shape_of(grad) == shape_of(x), "expected grad of shape ", shape_of(x), ", got ", shape_of(grad));
  STD_TORCH_CHECK(grad.scalar_type() == x.scalar_type(), "expected grad of ", x.scalar_type(), ", got ",
                  grad.scalar_type());
}

}  // namespace cbn
