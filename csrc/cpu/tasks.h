// What the orchestration (compound_norm.cpp) and the kernels of each instruction set (kernels.h) agree on.
#pragma once

#include "../mixture.h"
#include "../problem.h"

namespace cbn {

// A problem as the kernels see it. Where every point may be taken for an image, it is: `spatial` is 1 then.
struct Work : Problem {
  // Elements of channel 0 whose median is the origin of the moments: those of all points in the first row, or in
  // Mode::kGroups those of each group in its row. A row without points begins with -1.
  int64_t sampled[kMaxComponents][kOriginSamples];
  // What the passes over all channels of a point take of them, of S: [1 + rows of coefficients * M, width], `width` at
  // least C, zeros beyond; the first row has the origins.
  const void* channels_table;
  int64_t width;
  double height[kMaxComponents];  // of each component's log-density, its prior's and its channels'
  void* posterior_gradient;       // [M, N S] of the log-odds, by differentiate_weights for the backward map
};

// Work on the images [begin, end) for one block of channels: one channel, or, in channels_last, one per lane. `sums`
// takes the rows of Moments or GradientSums and the origin they are relative to, [kRows + 1, M, channels of the block].
using ReduceTask = void (*)(const Work&, int64_t block, int64_t begin, int64_t end, double* sums);
using MapTask = void (*)(const Work&, int64_t block, int64_t begin, int64_t end);
// Work on all channels of the points of the images [begin, end).
using PointTask = void (*)(const Work&, int64_t begin, int64_t end);

// Median of the sampled values of a channel.
using OriginOf = double (*)(const Work&, int64_t channel);

struct Tasks {
  int lanes;  // channels of a block in channels_last
  ReduceTask moments;
  MapTask normalise;
  ReduceTask gradient_sums;
  MapTask input_gradient;
  // In Mode::kJoint with M > 1, else null.
  OriginOf sampled_origin;
  PointTask weigh_points, differentiate_weights;
};

Tasks tasks_baseline(const Problem& p);
Tasks tasks_avx2(const Problem& p);
Tasks tasks_avx512(const Problem& p);

}  // namespace cbn
