// What the host hands to every kernel of one call.
#pragma once

#include <cstdint>

namespace cbn {

// S, the type of statistics and parameters, is double for double elements and float for all others. M is the
// number of components; kernels are compiled for 1, 2, 4, 8 and 16 of them and pad what is between.
struct Arguments {
  int64_t channels;  // C
  int64_t spatial;   // S < 2^32, points of an image's channel
  int64_t points;    // P = N S, points of a channel; N < 2^32
  int run;           // V elements, or a power of two below, that always lie together and aligned
  // The plan of launch.h.
  int lanes;
  int64_t channel_blocks;
  int64_t splits;
  int64_t points_of_split;

  int slots;  // chunks of a thread in shared memory: in the resident path all of them

  const void* x;          // [N, C, S], channels_last [N, S, C]
  const void* residual;   // like x, or null
  const void* grad;       // like x: of the output
  void* out;              // like x: the output, or the input's gradient
  void* grad_residual;    // like x, or null
  unsigned* mask;         // [C N S] bits of the ReLU, channels_last [N S C], or null
  bool mask_in_bytes;     // no byte is shared by two channels, in channels_last by two points; else mask starts as 0
  const int64_t* groups;  // [N] in split mode, else null

  int components;      // M
  const void* prior;   // [M, C], null in split mode and for M = 1
  const void* mean;    // [M, C] running
  const void* var;     // [M, C] running
  const void* weight;  // [M, C] or null for 1
  const void* bias;    // [M, C] or null for 0
  void* running;       // [3, M, C] copies of prior, mean, var; null in the backward pass
  void* batch;         // [3, M, C] mass, mean, var: written in the forward pass, read in the backward pass
  void* grad_weight;   // [M, C]
  void* grad_bias;     // [M, C]
  void* partials;      // [splits, 3 or 2, M, C] sums, of the streaming path
  void* origins;       // [C] what the sums are relative to
  double eps;
  bool training;
  bool relu;
  bool detach_responsibility;
};

// The kernels of one element type, layout and number of components.
struct Kernels {
  using Kernel = void (*)(Arguments);
  int vector;        // V
  int components;    // as compiled
  int most_threads;  // of a block
  Kernel moments;
  Kernel normalise;
  Kernel forward;  // both, resident
  Kernel gradient_sums;
  Kernel input_gradient;
  Kernel backward;  // both, resident
};

Kernels kernels_float(int components, bool channels_last);
Kernels kernels_double(int components, bool channels_last);
Kernels kernels_half(int components, bool channels_last);
Kernels kernels_bfloat16(int components, bool channels_last);

}  // namespace cbn
