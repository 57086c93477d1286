// What the orchestration (compound_norm.cpp) and the kernels of each instruction set (kernels.h) agree on.
#pragma once

#include "../mixture.h"
#include "../problem.h"

namespace cbn {

// A problem as the kernels see it. Where every point may be taken for an image, it is: `spatial` is 1 then.
struct Work : Problem {
  bool across;  // a vector's lanes are channels, else points of one channel
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

// Some channels of the images [begin, end).
struct Part {
  int64_t first_channel, channels, begin, end;
};

// Work on a part. `sums` takes the rows of Moments or GradientSums and the origin that they are relative to,
// [kRows + 1, M, channels].
using ReduceTask = void (*)(const Work&, const Part&, double* sums);
using MapTask = void (*)(const Work&, const Part&);
// What is done once with a part's channels between the two: [splits] of such sums become the batch's statistics or the
// parameters' gradients; null where nothing was reduced.
using FinishTask = void (*)(const Work&, const Part&, const double* sums, int64_t splits);
// Work on all channels of the points of the images [begin, end).
using PointTask = void (*)(const Work&, int64_t begin, int64_t end);

// Median of the sampled values of a channel.
using OriginOf = double (*)(const Work&, int64_t channel);

struct Tasks {
  int lanes;
  int columns;  // of `lanes` channels that a part may have where the lanes are channels; else one
  ReduceTask moments;
  FinishTask finish_moments;
  MapTask normalise;
  ReduceTask gradient_sums;
  FinishTask finish_gradients;
  MapTask input_gradient;
  // In Mode::kJoint with M > 1, else null.
  OriginOf sampled_origin;
  PointTask weigh_points, differentiate_weights;
};

Tasks tasks_baseline(const Problem& p);
Tasks tasks_avx2(const Problem& p);
Tasks tasks_avx512(const Problem& p);

}  // namespace cbn
