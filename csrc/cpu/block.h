// One block of channels of a problem, as vectors: one channel, whose neighbouring points are the lanes, or in
// channels_last neighbouring channels of one point. What belongs to a channel is a vector too, with equal lanes in the
// first case.
#pragma once

#include "../statistics.h"
#include "tasks.h"
#include "vec.h"

namespace cbn {
namespace {

enum class Pass { kMoments, kNormalise, kGradientSums, kInputGradient };

constexpr bool maps(Pass pass) { return pass == Pass::kNormalise || pass == Pass::kInputGradient; }

// Bytes of a channel in an image up to which memory is asked for ahead, and how many images ahead.
constexpr int64_t kSmallMap = 1024;
constexpr int64_t kImagesAhead = 4;

CBN_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// Where a vector lies: `count` elements from `offset` on; the first of them is of `point` among the N S points.
struct Place {
  int64_t offset, count, point;
};

template <class E>
struct Block {
  using Memory = typename E::Memory;
  using S = typename E::Scalar;
  using V = Vec<S>;
  static constexpr int kLanes = kLanesOf<S>;

  const Work& work;
  const Pass pass;
  const int64_t first_channel;
  int channels;  // of this block

  Block(const Work& work, int64_t block, Pass pass)
      : work(work), pass(pass), first_channel(work.channels_last ? block * kLanes : block) {
    channels = work.channels_last ? static_cast<int>(least(work.channels - first_channel, kLanes)) : 1;
  }

  const Memory* x() const { return static_cast<const Memory*>(work.x); }
  Memory* out() const { return static_cast<Memory*>(work.out); }

  // Calls visit(place) for all elements of the images [begin, end), a vector at a time.
  template <class F>
  CBN_METHOD void for_each_vector(int64_t begin, int64_t end, F visit) const {
    const int64_t C = work.channels, S = work.spatial;
    const bool last = work.channels_last;
    // Rows of channels follow each other from image to image.
    const int64_t together = last ? end - begin : 1;
    const int64_t steps = last ? together * S : (S + kLanes - 1) / kLanes, stride = last ? C : kLanes;
    const int64_t full = last ? channels : kLanes, tail = last ? channels : S - (steps - 1) * kLanes;
    const bool small = !last && S * static_cast<int64_t>(sizeof(Memory)) <= kSmallMap;
    for (int64_t i = begin; i < end; i += together) {
      const int64_t base = i * C * S + first_channel * (last ? 1 : S);
      if (small && i + kImagesAhead < work.images) prefetch(base + kImagesAhead * C * S);
      for (int64_t k = 0; k < steps; ++k)
        visit(Place{base + k * stride, k + 1 < steps ? full : tail, i * S + k * (last ? 1 : kLanes)});
    }
  }

  // Asks for a channel's points of one image: a few lines of the cache, which lie too far from those of the image
  // before for the processor to foresee them.
  CBN_METHOD void prefetch(int64_t offset) const {
    constexpr int64_t kLine = 64 / sizeof(Memory);
    for (int64_t at = offset; at < offset + work.spatial; at += kLine) {
      __builtin_prefetch(x() + at);
      if (work.grad) __builtin_prefetch(static_cast<const Memory*>(work.grad) + at);
      if (maps(pass)) __builtin_prefetch(out() + at, 1);
    }
  }

  Component<S> component(int m, int j) const { return {work, m * work.channels + first_channel + j}; }

  // Median of the sampled values of channel j in a row of Work::sampled.
  __attribute__((noinline)) double sampled_origin(int row, int j) const {
    const int64_t (&sampled)[kOriginSamples] = work.sampled[row];
    if (sampled[0] < 0) return 0;
    const Memory* channel = x() + (first_channel + j) * (work.channels_last ? 1 : work.spatial);
    double values[kOriginSamples];
    for (int k = 0; k < kOriginSamples; ++k) values[k] = static_cast<double>(load<E>(channel + sampled[k], 1)[0]);
    return median(values);
  }

  // What z = x - origin is relative to in channel j, where all components share it; the median before there are
  // statistics of the batch. A value of S: x - origin is then what the coefficients are made for.
  double origin(int j) const {
    return pass == Pass::kMoments ? sampled_origin(0, j) : used_origin<S>(work, first_channel + j);
  }

  // What channel j brings: into its lane, or, where it is the whole block, into all lanes.
  CBN_METHOD void put(V& to, int j, double value) const {
    if (work.channels_last)
      to[j] = static_cast<S>(value);
    else
      to = Math<V>::splat(value);
  }
  template <template <class, int> class Rows, int M>
  CBN_METHOD void put(Rows<V, M>& to, int k, int j, Rows<double, 1> from) const {
    CBN_UNROLL
    for (int i = 0; i < Rows<V, M>::kRows; ++i) put(to.row(i)[k], j, *from.row(i));
  }
};

// The gradient that the ReLU lets pass: by the mask, or, where there was no residual, by the sign of output(), the
// output again but for a positive factor.
template <bool kFused, class E, class Output>
CBN_INLINE Vec<typename E::Scalar> passed_gradient(const Work& work, const Place& place, Output output) {
  using V = Vec<typename E::Scalar>;
  const V g = load<E>(static_cast<const typename E::Memory*>(work.grad) + place.offset, place.count);
  if (!kFused || !work.relu) return g;
  if (work.mask) return Math<V>::where_set(get_bits(work.mask, place.offset, place.count), g);
  return output() <= 0 ? V{} : g;
}

}  // namespace
}  // namespace cbn
