// The two layouts that kernels read, and how a tensor comes into one of them.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>

namespace cbn {

using torch::stable::Tensor;

// t itself where it is contiguous: torch's function costs a call of its dispatcher even then.
inline Tensor contiguous(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

// True where channels vary fastest, in any number of dimensions; for (N, C) that is the contiguous layout.
inline bool is_channels_last(const Tensor& x) {
  int64_t stride = x.size(1);
  if (x.size(1) > 1 && x.stride(1) != 1) return false;
  for (int64_t d = x.dim() - 1; d >= 2; --d) {
    if (x.size(d) > 1 && x.stride(d) != stride) return false;
    stride *= x.size(d);
  }
  return x.size(0) <= 1 || x.stride(0) == stride;
}

// t in x's layout, copied only where it is in another one.
inline Tensor laid_out(const Tensor& t, bool channels_last) {
  if (!channels_last) return cbn::contiguous(t);
  if (is_channels_last(t)) return t;
  Tensor moved = t;
  for (int64_t d = 1; d + 1 < t.dim(); ++d) moved = torch::stable::transpose(moved, d, d + 1);
  moved = torch::stable::contiguous(moved);
  for (int64_t d = t.dim() - 2; d >= 1; --d) moved = torch::stable::transpose(moved, d, d + 1);
  return moved;
}

// True where x (N, C, ...) is read as channels_last; with one point per image, (N, C) too: both are the same then, and
// channels are what a thread finds side by side.
inline bool reads_channels_last(const Tensor& x) {
  const bool one_point = x.numel() == x.size(0) * x.size(1);
  return is_channels_last(x) && (one_point || !x.is_contiguous());
}

}  // namespace cbn
