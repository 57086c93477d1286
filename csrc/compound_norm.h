// The entry points that every backend provides; cbn_ext/ops.py calls them through the schemas of ops.cpp.
//
// N images, C channels, M components; x is (N, C, ...) with space behind, contiguous or channels_last (other
// layouts are copied). Statistics and parameters are float64 for a float64 x and float32 for all others.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>

namespace cbn {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Training: the output like x, and the batch's mass, mean and biased variance, [M, C] each; a component
// without mass has its running statistics there. Evaluation: the output and three empty tensors.
std::tuple<Tensor, Tensor, Tensor, Tensor> forward_cpu(const Tensor& x,
                                                       const OptionalTensor& groups,  // [N] int64: split mode
                                                       const OptionalTensor& prior,   // [M, C], unused in split mode
                                                       const Tensor& mean,            // [M, C] running
                                                       const Tensor& var,             // [M, C] running
                                                       const OptionalTensor& weight,  // [M, C] or 1
                                                       const OptionalTensor& bias,    // [M, C] or 0
                                                       bool training, double eps);

// Gradients of x, weight [M, C] and bias [M, C].
std::tuple<Tensor, Tensor, Tensor> backward_cpu(const Tensor& grad, const Tensor& x, const OptionalTensor& groups,
                                                const OptionalTensor& prior, const Tensor& mean, const Tensor& var,
                                                const Tensor& batch_mass,  // [M, C], as forward gave it
                                                const Tensor& batch_mean,  // [M, C], as forward gave it
                                                const Tensor& batch_var,   // [M, C], as forward gave it
                                                const OptionalTensor& weight, const OptionalTensor& bias, bool training,
                                                bool detach_responsibility, double eps);

// Temporal accumulation (eqs 13-15), in place.
void update_running_cpu(OptionalTensor prior, Tensor mean, Tensor var, const Tensor& batch_mass,
                        const Tensor& batch_mean, const Tensor& batch_var,
                        int64_t points,  // per channel; 0 changes nothing
                        double momentum);

}  // namespace cbn
