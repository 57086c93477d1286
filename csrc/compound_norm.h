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

// y = act(cbn(x) + residual), like x and rounded once, and what backward needs:
//   mask     [bytes] uint8, private to the backend: one bit per element, set where the ReLU lets gradients pass;
//            [0] unless both relu and residual are given
//   running  [3, M, C] prior (0 where none was given), mean and variance as they were used
//   batch    [3, M, C] mass, mean and biased variance of the batch; a component without mass has its running
//            statistics there. [0] in evaluation
using Forward = std::tuple<Tensor, Tensor, Tensor, Tensor>(const Tensor& x,
                                                           const OptionalTensor& residual,  // like x, or 0
                                                           const OptionalTensor& groups,    // [N] int64: split mode
                                                           const OptionalTensor& prior,     // [M, C], needed where
                                                                                            // M > 1 and no groups
                                                           const Tensor& mean,              // [M, C] running
                                                           const Tensor& var,               // [M, C] running
                                                           const OptionalTensor& weight,    // [M, C] or 1
                                                           const OptionalTensor& bias,      // [M, C] or 0
                                                           bool training, bool relu, double eps);

// Gradients of x, of the residual (like x where there is a mask, else [0]: it is grad itself), of weight [M, C] and of
// bias [M, C]. Where relu has no mask, the sign of the output is computed from x again.
using Backward = std::tuple<Tensor, Tensor, Tensor, Tensor>(const Tensor& grad,            // like x
                                                            const Tensor& x,               // [N, C, ...]
                                                            const OptionalTensor& mask,    // as forward gave it
                                                            const OptionalTensor& groups,  // [N] int64: split mode
                                                            const Tensor& running,         // [3, M, C], forward's
                                                            const Tensor& batch,           // [3, M, C], forward's
                                                            const OptionalTensor& weight,  // [M, C] or 1
                                                            const OptionalTensor& bias,    // [M, C] or 0
                                                            bool training, bool relu, bool detach_responsibility,
                                                            double eps);

// Temporal accumulation (eqs 13-15), in place.
using UpdateRunning = void(OptionalTensor prior,  // [M, C], left alone where none is given
                           Tensor mean,           // [M, C]
                           Tensor var,            // [M, C]
                           const Tensor& batch,   // [3, M, C], forward's
                           int64_t points,        // per channel; 0 changes nothing
                           double momentum);

Forward forward_cpu, forward_cuda;
Backward backward_cpu, backward_cuda;
UpdateRunning update_running_cpu, update_running_cuda;

}  // namespace cbn
