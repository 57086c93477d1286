// Joint mode's two passes over all channels of a point: its weights, from log-odds that are sums over the channels
// (eqs 8-9), and the gradient of the log-odds, from sums of the f_m of mixture.h. All else reads what they leave.
#pragma once

#include "posterior.h"

namespace cbn {
namespace {

// Columns, channels or vectors of neighbouring channels, added in float before the sums move on to double.
constexpr int kColumnsPerFlush = 32;
// Channels ahead whose points are asked for: they lie too far away for the processor to foresee them.
constexpr int kChannelsAhead = 2;
// Vectors of a tile, whose sums stay in the nearest cache while the tile's columns go by.
constexpr int kTileVectors = 32;

// Sums over the channels of each point of the images [begin, end), a tile of points at a time.
// Rows are a channel's coefficients in work.channels_table. Calls add(sums [M], rows, z, place), then finish(totals,
// first, count, point): of `count` neighbouring points, `point` the first, whose totals are totals[m][first ...].
template <class E, int M, template <class, int> class Rows, class Add, class Finish>
CBN_INLINE void sum_channels(const Work& work, int64_t begin, int64_t end, Add add, Finish finish) {
  using S = typename E::Scalar;
  using V = Vec<S>;
  constexpr int kLanes = kLanesOf<S>;
  const bool last = work.channels_last;
  const int64_t C = work.channels, spatial = work.spatial;
  // In channels_last a vector has channels of one point, else points of one channel.
  const int64_t channels = last ? kLanes : 1, points = last ? 1 : kLanes, stride = last ? kLanes : spatial;
  // A tile is a part of an image, or some whole images.
  const int64_t inside = least(spatial, kTileVectors * points);
  const int64_t images = kTileVectors / ((inside + points - 1) / points);
  const S* const table = static_cast<const S*>(work.channels_table);
  const auto* const x = static_cast<const typename E::Memory*>(work.x);
  const auto* const grad = static_cast<const typename E::Memory*>(work.grad);
  Place places[kTileVectors];
  V sums[kTileVectors][M];
  double totals[M][kTileVectors * kLanes];

  const auto flush = [&](int vectors) {
    for (int v = 0; v < vectors; ++v) {
      for (int m = 0; m < M; ++m) {
        if (last)
          totals[m][v] += Math<V>::sum(sums[v][m]);
        else
          for (int l = 0; l < kLanes; ++l) totals[m][v * kLanes + l] += static_cast<double>(sums[v][m][l]);
        sums[v][m] = V{};
      }
    }
  };
  const auto tile = [&](int vectors) {
    for (auto& row : totals)
      for (int64_t i = 0; i < (last ? vectors + kLanes : vectors * kLanes); ++i) row[i] = 0;
    for (int v = 0; v < vectors; ++v)
      for (int m = 0; m < M; ++m) sums[v][m] = V{};
    for (int64_t c = 0, column = 0; c < C; c += channels) {
      const auto row = [&](int64_t number) {
        const S* from = table + number * work.width + c;
        return last ? load<Statistic<S>>(from, kLanes) : V{} + *from;
      };
      const V origin = row(0);
      Rows<V, M> rows{};
      CBN_UNROLL
      for (int i = 0; i < Rows<V, M>::kRows; ++i) {
        CBN_UNROLL
        for (int m = 0; m < M; ++m)
          if (m < work.components) rows.row(i)[m] = row(1 + i * work.components + m);
      }
      const int64_t left = least(channels, C - c);
      for (int v = 0; v < vectors; ++v) {
        const Place place{places[v].offset + column * stride, last ? left : places[v].count, places[v].point};
        if (!last) {
          __builtin_prefetch(x + place.offset + kChannelsAhead * stride);
          if (grad) __builtin_prefetch(grad + place.offset + kChannelsAhead * stride);
        }
        V current[M];
        CBN_UNROLL
        for (int m = 0; m < M; ++m) current[m] = sums[v][m];
        add(current, rows, load<E>(x + place.offset, place.count) - origin, place);
        CBN_UNROLL
        for (int m = 0; m < M; ++m) sums[v][m] = current[m];
      }
      if (++column % kColumnsPerFlush == 0) flush(vectors);
    }
    flush(vectors);
    for (int v = 0; v < vectors; v += last ? kLanes : 1)
      finish(totals, v * points, last ? least(kLanes, vectors - v) : places[v].count, places[v].point);
  };

  for (int64_t first = begin; first < end; first += images) {
    for (int64_t start = 0; start < spatial; start += inside) {
      const int64_t stop = least(start + inside, spatial);
      int vectors = 0;
      for (int64_t n = first; n < least(first + images, end); ++n)
        for (int64_t s = start; s < stop; s += points)
          places[vectors++] = {n * C * spatial + (last ? s * C : s), least(points, stop - s), n * spatial + s};
      tile(vectors);
    }
  }
}

template <class E>
double sampled_origin(const Work& work, int64_t channel) {
  return static_cast<double>(Block<E>{work, Pass::kMoments, channel, 1}.sampled_origin(0)[0]);
}

template <class E, int M>
void weigh_points(const Work& work, int64_t begin, int64_t end) {
  using S = typename E::Scalar;
  using V = Vec<S>;
  constexpr int kLanes = kLanesOf<S>;
  sum_channels<E, M, Distances>(
      work, begin, end,
      [](V(&sums)[M], const Distances<V, M>& rows, V z, const Place&) __attribute__((always_inline)) {
        // Beyond `count` there are channels with coefficients of 0, or points that no one reads.
        accumulate(sums, rows, z);
      },
      [&](const auto& totals, int64_t first, int64_t count, int64_t point) {
        V p[M] = {}, sum{};
        for (int l = 0; l < kLanes; ++l) {
          const auto log_density = [&](int m) { return work.height[m] + totals[m][first + l]; };
          double top = log_density(0);
          for (int m = 1; m < work.components; ++m) top = top < log_density(m) ? log_density(m) : top;
          for (int m = 0; m < work.components; ++m) p[m][l] = static_cast<S>(log_density(m) - top);
        }
        for (int m = 0; m < work.components; ++m) {
          p[m] = Math<V>::exp2(p[m]);
          sum = sum + p[m];
        }
        const V factor = Math<V>::reciprocal(sum);
        for (int m = 0; m < work.components; ++m)
          store<Statistic<S>>(static_cast<S*>(work.posterior) + m * work.points() + point, count, p[m] * factor);
      });
}

// q_m = p_m (F_m - sum_k p_k F_k)
template <class E, int M>
void differentiate_weights(const Work& work, int64_t begin, int64_t end) {
  using S = typename E::Scalar;
  using V = Vec<S>;
  const int64_t P = work.points();
  const S* const posterior = static_cast<const S*>(work.posterior);
  sum_channels<E, M, InputGradient>(
      work, begin, end,
      [&](V(&sums)[M], const InputGradient<V, M>& rows, V z, const Place& place) __attribute__((always_inline)) {
        V p[M] = {}, f[M];
        if (work.relu && work.mask == nullptr) {
          for (int m = 0; m < work.components; ++m) {
            const S* from = posterior + m * P + place.point;
            p[m] = work.channels_last ? V{} + *from : load<Statistic<S>>(from, place.count);
          }
        }
        const V g = passed_gradient<true, E>(work, place, [&] { return combine(rows, p, z); });
        direct_gradient(rows, p, z, g, f);
        CBN_UNROLL
        for (int m = 0; m < M; ++m) sums[m] = sums[m] + f[m];
      },
      [&](const auto& totals, int64_t first, int64_t count, int64_t point) {
        for (int64_t i = 0; i < count; ++i) {
          double mean = 0;
          for (int m = 0; m < work.components; ++m) mean += posterior[m * P + point + i] * totals[m][first + i];
          for (int m = 0; m < work.components; ++m) {
            const int64_t at = m * P + point + i;
            static_cast<S*>(work.posterior_gradient)[at] =
                static_cast<S>(posterior[at] * (totals[m][first + i] - mean));
          }
        }
      });
}

}  // namespace
}  // namespace cbn
