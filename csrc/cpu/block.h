// A column of a problem: as many neighbouring channels as a vector has lanes, or the last few. What belongs to the
// channels is prepared with a channel per lane. Their points come as vectors of the channels at one point, or, where
// the lanes are points, of one channel at neighbouring points.
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
CBN_INLINE int64_t most(int64_t a, int64_t b) { return a < b ? b : a; }

// Rows of channels that a column goes through before the next one does, so that memory is read in whole rows, and how
// many rows ahead memory is asked for.
constexpr int64_t kRowsAtOnce = 16;

// Where a vector lies: `count` elements, `stride` apart, from `offset` on; the first of them is of `point` among the N
// S points.
struct Place {
  int64_t offset, count, point;
  int64_t stride = 1;
};

// What channel j has in its lane, in all lanes.
template <class V>
CBN_INLINE void spread(V& value, int j) {
  value = V{} + value[j];
}
template <template <class, int> class Rows, class V, int M>
CBN_INLINE void spread(Rows<V, M>& rows, int j) {
  for (int i = 0; i < Rows<V, M>::kRows; ++i)
    for (int m = 0; m < M; ++m) spread(rows.row(i)[m], j);
}

template <class E>
struct Block {
  using Memory = typename E::Memory;
  using S = typename E::Scalar;
  using V = Vec<S>;
  using D = Vec<double>;
  static constexpr int kLanes = kLanesOf<S>, kDoubles = kLanesOf<double>;
  static constexpr int kParts =
      kLanes / kDoubles;  // of a vector, in each of which the channels fit a vector of doubles

  const Work& work;
  const Pass pass;
  const int64_t first_channel;
  const int channels;

  const Memory* x() const { return static_cast<const Memory*>(work.x); }
  Memory* out() const { return static_cast<Memory*>(work.out); }

  // Calls visit(place) for all points of the images [begin, end), a vector at a time; where the lanes are points, those
  // of channel j.
  template <class F>
  CBN_METHOD void for_each_vector(int j, int64_t begin, int64_t end, F visit) const {
    const int64_t C = work.channels, S = work.spatial;
    const bool last = work.channels_last, across = work.across;
    // Rows of channels follow each other from image to image.
    const int64_t together = last ? end - begin : 1;
    const int64_t points = across ? 1 : kLanes, steps = (together * S + points - 1) / points;
    const int64_t step = last ? C : points, stride = across && !last ? S : 1;
    const int64_t full = across ? channels : kLanes, tail = across ? channels : S - (steps - 1) * kLanes;
    const bool small = !across && S * static_cast<int64_t>(sizeof(Memory)) <= kSmallMap;
    const int64_t ahead = last && C > kLanes ? kRowsAtOnce * C : 0;
    for (int64_t i = begin; i < end; i += together) {
      const int64_t base = i * C * S + (first_channel + j) * (last ? 1 : S);
      if (small && i + kImagesAhead < work.images) {
        for (int64_t at = 0; at < S; at += kLine) prefetch(base + kImagesAhead * C * S + at);
      }
      for (int64_t k = 0; k < steps; ++k) {
        if (ahead) prefetch(base + k * step + ahead);
        visit(Place{base + k * step, k + 1 < steps ? full : tail, i * S + k * points, stride});
      }
    }
  }

  // Asks for a line of the cache, which lies too far from the one before for the processor to foresee it.
  static constexpr int64_t kLine = 64 / sizeof(Memory);
  CBN_METHOD void prefetch(int64_t offset) const {
    __builtin_prefetch(x() + offset);
    if (work.grad) __builtin_prefetch(static_cast<const Memory*>(work.grad) + offset);
    if (maps(pass)) __builtin_prefetch(out() + offset, 1);
  }

  // Calls f(part) for the parts of a vector that have channels.
  template <class F>
  CBN_METHOD void for_each_part(F f) const {
    for (int part = 0; part * kDoubles < channels; ++part) f(part);
  }
  int channels_of(int part) const { return static_cast<int>(least(channels - part * kDoubles, kDoubles)); }
  Component<S, D> component(int m, int part) const {
    return {work, m * work.channels + first_channel + part * kDoubles, channels_of(part)};
  }

  // Median of the sampled values in a row of Work::sampled.
  __attribute__((noinline)) V sampled_origin(int row) const {
    const int64_t (&sampled)[kOriginSamples] = work.sampled[row];
    if (sampled[0] < 0) return V{};
    const int64_t stride = work.channels_last ? 1 : work.spatial;
    V values[kOriginSamples];
    for (int k = 0; k < kOriginSamples; ++k)
      values[k] = load<E>(x() + first_channel * stride + sampled[k], channels, stride);
    return median(values);
  }

  // What z = x - origin is relative to in each channel, where all components share it; the median before there are
  // statistics of the batch. A value of S: x - origin is then what the coefficients are made for.
  V origin() const {
    if (pass == Pass::kMoments) return sampled_origin(0);
    V origin{};
    for_each_part([&](int part) {
      put(origin, part, used_origin<S, D>(work, first_channel + part * kDoubles, channels_of(part)));
    });
    return origin;
  }

  // What the channels of a part bring, into their lanes, and from there.
  CBN_METHOD void put(V& to, int part, D value) const {
    Doubles<D>::store(reinterpret_cast<S*>(&to) + part * kDoubles, kDoubles, value);
  }
  template <template <class, int> class Rows, int M>
  CBN_METHOD void put(Rows<V, M>& to, int k, int part, Rows<D, 1> from) const {
    CBN_UNROLL
    for (int i = 0; i < Rows<V, M>::kRows; ++i) put(to.row(i)[k], part, *from.row(i));
  }
  CBN_METHOD D get(const V& from, int part) const {
    return Doubles<D>::load(reinterpret_cast<const S*>(&from) + part * kDoubles, kDoubles);
  }
};

// The gradient that the ReLU lets pass: by the mask, or, where there was no residual, by the sign of output(), the
// output again but for a positive factor.
template <bool kFused, class E, class Output>
CBN_INLINE Vec<typename E::Scalar> passed_gradient(const Work& work, const Place& place, Output output) {
  using V = Vec<typename E::Scalar>;
  const V g = load<E>(static_cast<const typename E::Memory*>(work.grad) + place.offset, place.count, place.stride);
  if (!kFused || !work.relu) return g;
  if (work.mask) return Math<V>::where_set(get_bits(work.mask, place.offset, place.count, place.stride), g);
  return output() <= 0 ? V{} : g;
}

}  // namespace
}  // namespace cbn
