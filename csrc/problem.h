// A call of an operator as every backend sees it: what is computed, and where its tensors lie.
#pragma once

#include <cstdint>

namespace cbn {

// Who weighs the components at a point: its channel's mixture, the group of its image, or one mixture over the channels
// of the point. The numbers are those of the operators' schemas and of cbn_ext.Mode.
enum class Mode { kChannel, kGroups, kJoint };

// Whether the points' weights are a tensor, [M, N, S]: a single component's are 1.
constexpr bool has_posterior(Mode mode, int64_t components) { return mode == Mode::kJoint && components > 1; }

enum class Element { kFloat, kDouble, kHalf, kBFloat16 };

// Each direction reduces, to the batch's statistics or to the parameters' gradients, and then maps, to the output or
// the input's gradient.
enum class Passes { kReduce, kMap, kBoth };

// Statistics and parameters are double for double elements and float for all others.
struct Problem {
  Mode mode;
  Element element;
  bool channels_last;
  bool training;
  bool relu;
  bool detach_responsibility;
  double eps;
  int components;    // M
  int64_t images;    // N
  int64_t channels;  // C
  int64_t spatial;   // S, points of an image's channel

  const void* x;          // [N, C, S], channels_last [N, S, C]
  const void* residual;   // like x, or null for 0
  const void* grad;       // like x: of the output
  void* out;              // like x: the output, or the input's gradient
  void* grad_residual;    // like x, or null where there is no mask
  uint32_t* mask;         // [C N S] bits, channels_last [N S C], of where the ReLU lets gradients pass; or null
  const int64_t* groups;  // [N], Mode::kGroups alone

  void* posterior;  // [M, N S] the points' weights, where has_posterior
  bool weighs;      // the posterior is still to be filled, before all else

  const void* prior;   // [M, C] running, in Mode::kJoint [M]; or null for 1
  const void* mean;    // [M, C] running
  const void* var;     // [M, C] running
  const void* weight;  // [M, C] or null for 1
  const void* bias;    // [M, C] or null for 0
  void* running;       // [3, M, C] copies of prior (0 for null), mean and variance, by the forward map
  void* batch;         // [3, M, C] mass, mean and variance: by the forward reduction, for all other passes of training
  void* grad_weight;   // [M, C] by the backward reduction, for the backward map
  void* grad_bias;     // [M, C] likewise

  constexpr bool has_posterior() const { return cbn::has_posterior(mode, components); }
  constexpr int64_t points() const { return images * spatial; }  // P
  constexpr bool is_wide() const { return element == Element::kDouble; }
};

}  // namespace cbn
