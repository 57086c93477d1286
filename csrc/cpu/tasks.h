// What the orchestration (compound_norm.cpp) and the kernels of each instruction set (kernels.h) agree on.
#pragma once

#include <cstdint>

namespace cbn {

enum class Element { kFloat, kDouble, kHalf, kBFloat16 };

// One normalization over some images, by `components` Gaussians. S, the type of statistics and parameters, is
// double for double inputs and float for all others.
struct Problem {
  Element element;
  bool channels_last;
  int64_t channels;       // C
  int64_t spatial;        // S, points per image and channel
  const int64_t* images;  // [count] which images, or null for 0 ... count - 1
  int64_t count;

  const void* x;     // [N, C, S], channels_last [N, S, C]
  const void* grad;  // like x
  void* out;         // like x: the output, or the input's gradient

  bool relu;
  const void* residual;  // like x, or null for 0
  void* grad_residual;   // like x, where there is a mask
  uint32_t* mask;        // bit i, where not null: gradients pass the ReLU at x[i] in memory; starts as zeros

  int components;      // M
  const void* prior;   // [M, C], unused for M = 1
  const void* mean;    // [M, C] running
  const void* var;     // [M, C] running
  const void* weight;  // [M, C] or null for 1
  const void* bias;    // [M, C] or null for 0
  void* batch_mass;    // [M, C] written by the forward pass in training, read by the backward pass
  void* batch_mean;    // [M, C] likewise
  void* batch_var;     // [M, C] likewise
  void* grad_weight;   // [M, C]
  void* grad_bias;     // [M, C]
  double eps;
  bool training;
  bool detach_responsibility;
};

// Work on the images [begin, end) of `count`, for one block of channels: one channel, or, in channels_last,
// one per lane. `sums` takes the Moments or GradientSums of mixture.h, [3 or 2, M in stored order, channels
// of the block], and the origin they are relative to, [channels of the block].
using ReduceTask = void (*)(const Problem&, int64_t block, int64_t begin, int64_t end, double* sums);
using MapTask = void (*)(const Problem&, int64_t block, int64_t begin, int64_t end);

struct Tasks {
  int lanes;  // channels of a block in channels_last
  ReduceTask moments;
  MapTask normalise;
  ReduceTask gradient_sums;
  MapTask input_gradient;
};

// `fused`: with a residual or a ReLU.
Tasks tasks_baseline(Element element, int components, bool fused);
Tasks tasks_avx2(Element element, int components, bool fused);
Tasks tasks_avx512(Element element, int components, bool fused);

}  // namespace cbn
