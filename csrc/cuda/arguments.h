// What the host hands to every kernel of one call.
#pragma once

#include "../problem.h"
#include "launch.h"

namespace cbn {

// What the element loops do beside the plain pass: nothing; a ReLU whose sign the backward pass computes again; the
// residual's sum and a ReLU with a mask of whole bytes; or else whatever the problem asks for, found out at every
// chunk.
enum class Fused { kNothing, kRelu, kSum, kAny };

// M is the number of components; kernels are compiled for 1, 2, 4, 8 and 16 of them and pad what is between. P, points
// of a channel, is N S; N and S are below 2^32.
struct Arguments : Problem {
  int piece;              // elements, V or a power of two below, that always lie together and aligned
  bool chunks_are_whole;  // the elements of each chunk lie together, aligned, and exist or not together
  Fused fused;
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
  // Where chunks are whole, and where not.
  struct Pass {
    Kernel whole, any;
  };
  struct Direction {
    Pass reduce, map;
    Kernel both;  // resident
  };
  int vector;                             // V
  int components;                         // as compiled
  int most_threads;                       // of a block
  Direction forward, backward, detached;  // detached: backward where the responsibilities are constants

  // Joint mode's, whose maps have all channels of a point too; null in the other modes.
  struct Points {
    struct Table {
      Kernel lay_out;
      int64_t bytes;  // of a channel
    };
    Kernel sum_components, weigh;
    Table weights, their_gradient;  // for sums over the channels
    Table forward, backward;        // for the maps
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
