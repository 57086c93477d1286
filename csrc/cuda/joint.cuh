// Joint mode's passes over all channels of a point: its weights (eqs 8-9), and the maps, forward and backward. A block
// works again on its points soon after it has summed over their channels: what it reads is then still in the cache.
#pragma once

#include "joint_tables.cuh"
#include "reduce.cuh"

namespace cbn {

// Channels whose terms a thread adds up in the statistics' type before the sums move on to double.
constexpr int kChannelsPerFlush = 32;

// How the threads of a block share points and channels. Contiguous: lanes take neighbouring points, warps take turns at
// the channels. channels_last: lanes take neighbouring channels of the warp's points.
template <class C>
struct PointBlock {
  using S = typename C::S;
  static constexpr bool kLast = C::kChannelsLast;
  static constexpr int M = C::M;
  static constexpr int kThreads = M * C::kWords > 8 ? 256 : 512, kWarps = kThreads / kWarp;
  static constexpr int kPoints = (kLast ? kWarp : kWarp / 2) / M;  // of a thread at most
  static constexpr int kTogether = kWarp / 2 / M;                  // of whose elements are on their way together
  static constexpr int kSide = kLast ? kWarps : kWarp;             // points of the block for each of these
  static constexpr int kMostPoints = kPoints * kSide;              // of the block
  static constexpr int kChannelsOfTurn = kLast ? kWarp : kWarps;   // that the block's threads take at once
  // Shared memory: weights and gradients of the log-odds, [points, M] of S; then a room that the passes use in turn.
  static constexpr int kNumbers = kMostPoints * M;
  static constexpr unsigned kRoom = 2 * kNumbers * sizeof(S);
  static constexpr unsigned kShared = kRoom + kNumbers * (kLast ? 1 : kWarps) * sizeof(double);

  const Arguments& a;
  int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  int count;       // points of the thread
  int points;      // of the block, some of them perhaps beyond P
  int64_t first;   // of them
  int64_t stride;  // between channels
  S* weights = reinterpret_cast<S*>(shared_memory());
  S* gradients = weights + kNumbers;
  unsigned char* room = shared_memory() + kRoom;

  __device__ __forceinline__ PointBlock(const Arguments& a, int64_t tile)
      : a(a), count(a.points_of_thread), points(count * kSide), first(tile * points), stride(kLast ? 1 : a.spatial) {}

  // The number of the thread's point k in the block.
  __device__ __forceinline__ int number(int k) const { return kLast ? warp * count + k : k * kWarp + lane; }
  __device__ __forceinline__ bool exists(int number) const { return first + number < a.points(); }
  // A point that does not exist is read as the last one, and not written.
  __device__ __forceinline__ int64_t point(int number) const {
    const int64_t point = first + number, last = a.points() - 1;
    return point < last ? point : last;
  }
  // Where channel 0 of a point lies.
  __device__ __forceinline__ int64_t offset(int64_t point) const {
    if (kLast) return point * a.channels;
    const int64_t n = image_of(a, point);
    return n * a.channels * a.spatial + point - n * a.spatial;
  }
  // The thread's channel of a turn that begins with channel `begin` of the block.
  __device__ __forceinline__ int64_t channel(int64_t begin) const { return begin + (kLast ? lane : warp); }
  __device__ __forceinline__ double& total(int number, int m, int part) const {
    return reinterpret_cast<double*>(room)[((kLast ? 0 : part) * M + m) * kMostPoints + number];
  }
  __device__ __forceinline__ void load(const S* numbers, int number, S (&to)[M]) const {
    CBN_UNROLL
    for (int m = 0; m < M; ++m) to[m] = numbers[number * M + m];
  }

  // The bit of an element in the mask. They lie channel by channel, in channels_last point by point.
  __device__ __forceinline__ int64_t mask_bit(int64_t point, int64_t channel) const {
    return kLast ? point * a.channels + channel : channel * a.points() + point;
  }
  // Each lane says whether its element exists and the ReLU passed it: `bit` and those of the lanes after lane 0.
  __device__ __forceinline__ void store_mask(int64_t bit, bool exists, bool passed) const {
    const unsigned bits = __ballot_sync(0xffffffffu, exists && passed);
    if (lane != 0 || !exists) return;
    unsigned* const word = a.mask + bit / 32;
    const int shift = static_cast<int>(bit % 32);
    if (a.mask_is_aligned) {
      *word = bits;
    } else {
      if (bits << shift) atomic_or(word, bits << shift);
      if (shift && bits >> (32 - shift)) atomic_or(word + 1, bits >> (32 - shift));
    }
  }
};

// Calls visit(k, x, g) for the thread's points k and one channel, g the element of another tensor if there is one. A
// few points' elements are on their way together.
template <bool kOther, class C, class Visit>
__device__ __forceinline__ void for_each_point(const PointBlock<C>& block,
                                               const int64_t (&offset)[PointBlock<C>::kPoints], int64_t channel,
                                               const void* other, Visit visit) {
  using S = typename C::S;
  using E = typename C::Element;
  constexpr int kPoints = PointBlock<C>::kPoints, kTogether = PointBlock<C>::kTogether;
  CBN_UNROLL
  for (int first = 0; first < kPoints; first += kTogether) {
    S x[kTogether], g[kTogether];
    CBN_UNROLL
    for (int k = 0; k < kTogether; ++k) {
      const int64_t at = offset[first + k] + channel * block.stride;
      if (first + k >= block.count) continue;
      x[k] = static_cast<S>(static_cast<const E*>(block.a.x)[at]);
      if (kOther) g[k] = static_cast<S>(static_cast<const E*>(other)[at]);
    }
    CBN_UNROLL
    for (int k = 0; k < kTogether; ++k)
      if (first + k < block.count) visit(first + k, x[k], kOther ? g[k] : S(0));
  }
}

// Sums over the channels of each point: add(sums [M], rows, z, g, channel, number) for each channel and each of
// the thread's points, g the element of another tensor if there is one; then finish(totals [M], number), one thread for
// each point of the block.
template <template <class, int> class Rows, bool kOther, class C, class Add, class Finish>
__device__ __forceinline__ void sum_channels(const PointBlock<C>& block, const void* other, Add add, Finish finish) {
  using S = typename C::S;
  using B = PointBlock<C>;
  constexpr int M = C::M;
  const Arguments& a = block.a;
  const auto* table = static_cast<const ChannelRows<S, Rows, M>*>(a.sums_table);
  int64_t offset[B::kPoints] = {};
  CBN_UNROLL
  for (int k = 0; k < B::kPoints; ++k) {
    if (k >= block.count) break;
    const int number = block.number(k);
    offset[k] = block.offset(block.point(number));
    CBN_UNROLL
    for (int m = 0; m < M; ++m) block.total(number, m, block.warp) = 0;
  }
  // All threads of a warp take as many turns: they add up together.
  for (int64_t begin = 0; begin < a.channels; begin += B::kChannelsOfTurn * kChannelsPerFlush) {
    S sums[B::kPoints][M] = {};
    for (int turn = 0; turn < kChannelsPerFlush; ++turn) {
      const int64_t channel = block.channel(begin + turn * B::kChannelsOfTurn);
      if (channel >= a.channels) break;
      ChannelRows<S, Rows, M> of_channel = table[channel];
      const Rows<S, M> rows = of_channel.rows();
      for_each_point<kOther>(block, offset, channel, other, [&](int k, S x, S g) {
        add(sums[k], rows, x - of_channel.origin(), g, channel, block.number(k));
      });
    }
    CBN_UNROLL
    for (int k = 0; k < B::kPoints; ++k) {
      if (k >= block.count) break;
      CBN_UNROLL
      for (int m = 0; m < M; ++m) {
        const S sum = B::kLast ? warp_sum(sums[k][m], 1) : sums[k][m];
        if (!B::kLast || block.lane == 0) block.total(block.number(k), m, block.warp) += static_cast<double>(sum);
      }
    }
  }
  __syncthreads();
  for (int number = threadIdx.x; number < block.points; number += B::kThreads) {
    double totals[M];
    CBN_UNROLL
    for (int m = 0; m < M; ++m) {
      totals[m] = 0;
      for (int part = 0; part < (B::kLast ? 1 : B::kWarps); ++part) totals[m] += block.total(number, m, part);
    }
    finish(totals, number);
  }
  __syncthreads();
}

// The weights of the block's points in shared memory and in the posterior [M, P]: each log-density is its height and a
// sum over the channels.
template <class C>
__device__ __forceinline__ void weigh(const PointBlock<C>& block) {
  using S = typename C::S;
  constexpr int M = C::M;
  const Arguments& a = block.a;
  sum_channels<Distances, false>(
      block, nullptr, [](S(&sums)[M], const Distances<S, M>& rows, S z, S, int64_t, int) { accumulate(sums, rows, z); },
      [&](double (&totals)[M], int number) {
        S p[M], sum = 0;
        double top = -1e300;
        CBN_UNROLL
        for (int m = 0; m < M; ++m) {
          totals[m] = m < a.components ? a.heights[m] + totals[m] : kNoComponent;
          top = top < totals[m] ? totals[m] : top;
        }
        CBN_UNROLL
        for (int m = 0; m < M; ++m) sum += p[m] = Math<S>::exp2(static_cast<S>(totals[m] - top));
        const S factor = Math<S>::reciprocal(sum);
        CBN_UNROLL
        for (int m = 0; m < M; ++m) {
          p[m] *= factor;
          // A point that does not exist adds nothing to the moments.
          block.weights[number * M + m] = block.exists(number) ? p[m] : S(0);
          if (m < a.components && block.exists(number))
            static_cast<S*>(a.posterior)[m * a.points() + block.first + number] = p[m];
        }
      });
}

// The moments of the block's points, weighed, for its split's part of the sums: lanes take neighbouring channels, warps
// take turns at them, and where there are few, parts of the points. Contiguous elements change their places among the
// lanes through shared memory.
template <class C>
struct PointMoments {
  using S = typename C::S;
  using B = PointBlock<C>;
  static constexpr int M = C::M;
  static constexpr int kPitch = kWarp + 1;                       // between channels in shared memory
  static constexpr int kSquare = B::kLast ? 0 : kWarp * kPitch;  // of each warp
  static constexpr int kSums = kMomentRows * M;
  static constexpr unsigned kSquares = B::kWarps * kSquare * sizeof(S), kStaged = B::kWarps * kSums * kWarp * sizeof(S);
  static constexpr unsigned kShared = B::kRoom + (kSquares < kStaged ? kStaged : kSquares);

  const B& block;

  // `first`: the split has no sums yet.
  __device__ __forceinline__ void add(bool first) const {
    const Arguments& a = block.a;
    const int groups = static_cast<int>(divide_up(a.channels, kWarp));
    int parts = 1;
    while (2 * parts * groups <= B::kWarps && 2 * parts <= (B::kLast ? B::kWarps : block.count)) parts *= 2;
    const int part = block.warp % parts, points = block.points / parts, step = B::kWarps / parts;
    // Where there are parts, all groups are taken in one turn.
    for (int first_group = 0; first_group < groups; first_group += step) {
      const int group = first_group + block.warp / parts;
      Moments<S, M> sums{};
      if (group < groups) sums = sums_of(group, part * points, points);
      if (parts > 1) __syncthreads();
      if (group >= groups) continue;
      CBN_UNROLL
      for (int i = 0; i < kSums; ++i) {
        const S sum = sums.row(i / M)[i % M];
        if (parts > 1)
          staged(part * groups + group, i)[block.lane] = sum;
        else
          add_to(first, i, channel_of(group), sum);
      }
    }
    __syncthreads();
    for (int item = threadIdx.x; parts > 1 && item < kSums * a.channels; item += B::kThreads) {
      const int i = item / static_cast<int>(a.channels), channel = item % static_cast<int>(a.channels);
      S sum = 0;
      for (int of = 0; of < parts; ++of) sum += staged(of * groups + channel / kWarp, i)[channel % kWarp];
      add_to(first, i, channel, sum);
    }
    __syncthreads();
  }

 private:
  __device__ __forceinline__ int64_t channel_of(int group) const { return group * kWarp + block.lane; }
  __device__ __forceinline__ S* staged(int of, int i) const {
    return reinterpret_cast<S*>(block.room) + (of * kSums + i) * kWarp;
  }
  __device__ __forceinline__ void add_to(bool first, int i, int64_t channel, S value) const {
    const Arguments& a = block.a;
    const int row = i / M, m = i % M;
    if (m >= a.components || channel >= a.channels) return;
    S& sum = static_cast<S*>(a.partials)[((blockIdx.x * kMomentRows + row) * a.components + m) * a.channels + channel];
    sum = first ? value : sum + value;
  }

  // Of the lane's channel of a group and so many points.
  __device__ __forceinline__ Moments<S, M> sums_of(int group, int begin, int points) const {
    const Arguments& a = block.a;
    const auto* x = static_cast<const typename C::Element*>(a.x);
    const int64_t channel = channel_of(group), read = channel < a.channels ? channel : a.channels - 1;
    const S origin = static_cast<const S*>(a.origins)[read];
    Moments<S, M> sums{};
    const auto accumulate_point = [&](int number, S value) {
      S p[M];
      block.load(block.weights, number, p);
      accumulate(sums, p, S(1), value - origin);
    };
    if constexpr (B::kLast) {
      const int64_t left = a.points() - block.first - begin;
      const int existing = left < points ? static_cast<int>(left) : points;
      const auto* value = x + (block.first + begin) * a.channels + read;
#pragma unroll 4
      for (int i = 0; i < existing; ++i, value += a.channels) accumulate_point(begin + i, static_cast<S>(*value));
    } else {
      S* const square = reinterpret_cast<S*>(block.room) + block.warp * kSquare;
      const int64_t left = a.channels - group * kWarp;
      const int channels = left < kWarp ? static_cast<int>(left) : kWarp;
      for (int chunk = begin; chunk < begin + points; chunk += kWarp) {
        const auto* column = x + block.offset(block.point(chunk + block.lane)) + group * kWarp * block.stride;
#pragma unroll 8
        for (int i = 0; i < channels; ++i) square[i * kPitch + block.lane] = static_cast<S>(column[i * block.stride]);
        __syncwarp();
#pragma unroll 4
        for (int j = 0; j < kWarp; ++j) accumulate_point(chunk + j, square[block.lane * kPitch + j]);
        __syncwarp();
      }
    }
    return sums;
  }
};

// The posterior, and where partial sums are wanted, those of the moments: a block takes every gridDim-th tile.
template <class C>
__global__ void __launch_bounds__(PointBlock<C>::kThreads, 1) weigh_kernel(const __grid_constant__ Arguments a) {
  for (int64_t tile = blockIdx.x;; tile += gridDim.x) {
    const PointBlock<C> block(a, tile);
    if (block.first >= a.points()) return;
    weigh(block);
    if (a.partials) PointMoments<C>{block}.add(tile == blockIdx.x);
  }
}

// The weights that were kept, into shared memory.
template <class C>
__device__ __forceinline__ void load_weights(const PointBlock<C>& block) {
  using S = typename C::S;
  const Arguments& a = block.a;
  for (int i = threadIdx.x; i < C::M * block.points; i += PointBlock<C>::kThreads) {
    const int m = i / block.points, number = i % block.points;
    block.weights[number * C::M + m] =
        m < a.components ? static_cast<const S*>(a.posterior)[m * a.points() + block.point(number)] : S(0);
  }
  __syncthreads();
}

// The output's gradient g, 0 where the ReLU did not pass the element. `rows` can be combined to the output.
template <bool kPlain, class C, class Rows, class S = typename C::S>
__device__ __forceinline__ S passed_gradient(const PointBlock<C>& block, const Rows& rows, const S (&p)[C::M], S z, S g,
                                             int64_t channel, int number) {
  const Arguments& a = block.a;
  if (kPlain || !a.relu) return g;
  if (!a.mask) return passes_relu(combine(rows, p, z)) ? g : S(0);
  const int64_t bit = block.mask_bit(block.point(number), channel);
  return a.mask[bit / 32] >> bit % 32 & 1 ? g : S(0);
}

// The gradient of the log-odds of the block's points, in shared memory: q_m = p_m (F_m - sum_k p_k F_k).
template <bool kPlain, class C>
__device__ __forceinline__ void differentiate_weights(const PointBlock<C>& block) {
  using S = typename C::S;
  constexpr int M = C::M;
  sum_channels<InputGradient, true>(
      block, block.a.grad,
      [&](S(&sums)[M], const InputGradient<S, M>& rows, S z, S grad, int64_t channel, int number) {
        S p[M], f[M];
        block.load(block.weights, number, p);
        const S g = passed_gradient<kPlain>(block, rows, p, z, grad, channel, number);
        direct_gradient(rows, p, z, g, f);
        CBN_UNROLL
        for (int m = 0; m < M; ++m) sums[m] += f[m];
      },
      [&](const double (&totals)[M], int number) {
        S p[M];
        block.load(block.weights, number, p);
        double mean = 0;
        CBN_UNROLL
        for (int m = 0; m < M; ++m) mean += static_cast<double>(p[m]) * totals[m];
        CBN_UNROLL
        for (int m = 0; m < M; ++m)
          block.gradients[number * M + m] = static_cast<S>(static_cast<double>(p[m]) * (totals[m] - mean));
      });
}

// Calls visit(rows, z, g, offset, channel, number) for the elements of the block, g the element of another tensor if
// there is one; the last channels first, which were read last. All lanes of a warp take part in each call, also where
// they have no element.
template <template <class, int> class Rows, bool kOther, class C, class Visit>
__device__ __forceinline__ void for_each_element(const PointBlock<C>& block, const void* other, Visit visit) {
  using S = typename C::S;
  using B = PointBlock<C>;
  const Arguments& a = block.a;
  const auto* table = static_cast<const ChannelRows<S, Rows, C::M>*>(a.map_table);
  int64_t offset[B::kPoints] = {};
  CBN_UNROLL
  for (int k = 0; k < B::kPoints; ++k)
    if (k < block.count) offset[k] = block.offset(block.point(block.number(k)));
  const int64_t turns = divide_up(a.channels, B::kChannelsOfTurn);
  for (int64_t turn = turns; turn-- > 0;) {
    const int64_t channel = block.channel(turn * B::kChannelsOfTurn);
    if (!B::kLast && channel >= a.channels) continue;
    const int64_t read = channel < a.channels ? channel : a.channels - 1;
    ChannelRows<S, Rows, C::M> of_channel = table[read];
    const Rows<S, C::M> rows = of_channel.rows();
    for_each_point<kOther>(block, offset, read, other, [&](int k, S x, S g) {
      visit(rows, x - of_channel.origin(), g, offset[k] + read * block.stride, channel, block.number(k));
    });
  }
}

template <bool kPlain, class C>
__device__ __forceinline__ void normalise(const PointBlock<C>& block) {
  using S = typename C::S;
  using E = typename C::Element;
  constexpr int M = C::M;
  const Arguments& a = block.a;
  const auto map = [&](const Branches<S, M>& branches, S z, S, int64_t at, int64_t channel, int number) {
    S p[M];
    block.load(block.weights, number, p);
    S y = combine(branches, p, z);
    if (!kPlain && a.residual) y += static_cast<S>(static_cast<const E*>(a.residual)[at]);
    const bool exists = block.exists(number) && channel < a.channels;
    if (!kPlain && a.relu) {
      const bool passed = passes_relu(y);
      y = passed ? y : S(0);
      if (a.mask) block.store_mask(block.mask_bit(block.first + number, channel), exists, passed);
    }
    if (exists) store_at_once<false>(static_cast<E*>(a.out) + at, static_cast<E>(y));
  };
  for_each_element<Branches, false>(block, nullptr, map);
}

// `constant`: the weights are taken for constants.
template <bool kPlain, class C>
__device__ __forceinline__ void differentiate(const PointBlock<C>& block, bool constant) {
  using S = typename C::S;
  using E = typename C::Element;
  constexpr int M = C::M;
  const Arguments& a = block.a;
  for_each_element<PointGradient, true>(
      block, a.grad, [&](const PointGradient<S, M>& rows, S z, S grad, int64_t at, int64_t channel, int number) {
        S p[M];
        block.load(block.weights, number, p);
        const bool exists = block.exists(number) && channel < a.channels;
        const S g = passed_gradient<kPlain>(block, rows.direct.branches, p, z, grad, exists ? channel : 0, number);
        S grad_x = direct_gradient(rows.direct, p, z, g);
        if (!constant) {
          S q[M];
          block.load(block.gradients, number, q);
          grad_x += joint_covariance(rows.scores, q, z);
        }
        if (!exists) return;
        store_at_once<false>(static_cast<E*>(a.out) + at, static_cast<E>(grad_x));
        if (!kPlain && a.grad_residual) store_at_once<false>(static_cast<E*>(a.grad_residual) + at, static_cast<E>(g));
      });
}

// The output, in evaluation with weights of its own; or the input's gradient.
template <class C, Pass pass>
__global__ void __launch_bounds__(PointBlock<C>::kThreads, 1) map_points_kernel(const __grid_constant__ Arguments a) {
  const PointBlock<C> block(a, blockIdx.x);
  const bool plain = C::kHasFastForms && !a.relu && !a.residual;
  if (pass == Pass::kNormalise && a.weighs)
    weigh(block);
  else
    load_weights(block);
  if constexpr (pass == Pass::kNormalise) {
    plain ? normalise<true>(block) : normalise<false>(block);
  } else if (a.detach_responsibility) {
    plain ? differentiate<true>(block, true) : differentiate<false>(block, true);
  } else {
    plain ? differentiate_weights<true>(block) : differentiate_weights<false>(block);
    plain ? differentiate<true>(block, false) : differentiate<false>(block, false);
  }
}

}  // namespace cbn
