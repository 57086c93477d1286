// What the host hands to every kernel of one call.
#pragma once

#include "../problem.h"
#include "launch.h"

namespace cbn {

// M is the number of components; kernels are compiled for 1, 2, 4, 8 and 16 of them and pad what is between. P, points
// of a channel, is N S; N and S are below 2^32.
struct Arguments : Problem {
  int piece;  // elements, V or a power of two below, that always lie together and aligned
  // The plan of launch.h.
  int columns;
  int64_t channel_blocks;
  int64_t splits;
  int64_t points_of_split;
  int slots;  // chunks of a thread in shared memory: in the resident path all of them

  // Channels, in channels_last points, begin at a byte of the mask, where has_posterior at a word; else it starts as 0.
  bool mask_is_aligned;
  void* partials;  // [splits, 3 or 2, M, C] sums, of the streaming path
  void* origins;   // [C] what the sums are relative to

  // What joint mode's passes over all channels of a point take of each channel: [C] of ChannelRows.
  void* sums_table;
  void* map_table;
  double* heights;       // [2, M] as compiled: sums of each component's peaks, and its distance from the points
  int points_of_thread;  // in these passes
};

// Threads of a block that prepares these tables.
constexpr int kTableThreads = 256;

// The kernels of one element type, layout, number of components and posterior.
struct Kernels {
  using Kernel = void (*)(Arguments);
  struct Direction {
    Kernel reduce;
    Kernel map;
    Kernel both;  // resident
  };
  int vector;        // V
  int components;    // as compiled
  int most_threads;  // of a block
  Direction forward, backward;

  // Joint mode's, whose maps have all channels of a point too; null in the other modes.
  struct Points {
    Kernel sum_components, lay_out_weights, weigh;
    Kernel lay_out_forward, lay_out_backward;                  // for the maps
    int64_t bytes_for_weights, bytes_forward, bytes_backward;  // of a channel in the tables
    PointLimits limits;
    unsigned shared;  // bytes, without moments
  };
  Points points;
};

Kernels kernels_float(int components, bool channels_last, Mode mode);
Kernels kernels_double(int components, bool channels_last, Mode mode);
Kernels kernels_half(int components, bool channels_last, Mode mode);
Kernels kernels_bfloat16(int components, bool channels_last, Mode mode);

}  // namespace cbn
