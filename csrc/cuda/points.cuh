// How a thread walks over the elements of its block: chunks of V, points of one channel or, in channels_last, V
// channels of one point.
#pragma once

#include <cstring>
#include <type_traits>

#include "arguments.h"
#include "device.cuh"

namespace cbn {

template <>
struct Math<float> {
  static __device__ __forceinline__ float splat(double x) { return static_cast<float>(x); }
  static __device__ __forceinline__ float exp2(float x) { return fast_exp2(x); }
  static __device__ __forceinline__ float reciprocal(float x) { return fast_reciprocal(x); }
  static __device__ __forceinline__ float max(float a, float b) { return a < b ? b : a; }
};

template <>
struct Math<double> {
  static __device__ __forceinline__ double splat(double x) { return x; }
  static __device__ __forceinline__ double exp2(double x) { return ::exp2(x); }
  static __device__ __forceinline__ double reciprocal(double x) { return 1 / x; }
  static __device__ __forceinline__ double max(double a, double b) { return a < b ? b : a; }
};

// What a kernel is compiled for.
template <class E, int kComponents, bool kLast, class WhoWeighs>
struct Config {
  using Element = E;
  using Posterior = WhoWeighs;
  using S = std::conditional_t<std::is_same_v<E, double>, double, float>;
  static constexpr bool kChannelsLast = kLast;
  static constexpr int M = kComponents;
  static constexpr int kWords = sizeof(S) / sizeof(float);
  static constexpr bool kGeneralOnly = std::is_same_v<E, double>;  // float64 is for checks: no faster form is compiled
  static constexpr int least(int a, int b) { return a < b ? a : b; }
  // Elements at once: in channels_last each has coefficients of its own, in registers.
  static constexpr int kMost = kLast              ? least(4, M* kWords >= 16 ? 1 : 16 / (M * kWords))
                               : M * kWords >= 16 ? 2 / kWords
                                                  : 8;
  static constexpr int V = least(kMost, 16 / static_cast<int>(sizeof(E)));
  static constexpr int kChannels = kLast ? V : 1;  // of a thread
  static constexpr int kThreads = kChannels * M * kWords <= 4 ? 512 : 256;
};

template <class E, int V>
struct alignas(sizeof(E) * V) Pack {
  E element[V];
};

// The part of the points that a block of threads takes.
template <class C>
struct Block {
  static constexpr int V = C::V;

  const Arguments& a;
  int channels;  // K, some of them perhaps beyond C
  int column;    // of the thread along the channels
  int64_t first_channel;
  int64_t split;
  int64_t begin;    // first point
  unsigned length;  // points
  unsigned step;    // points that the block takes at once

  __device__ __forceinline__ Block(const Arguments& a, int64_t channel_block, int64_t split)
      : a(a),
        channels(C::kChannelsLast ? a.columns * V : 1),
        column(C::kChannelsLast ? threadIdx.x % a.columns : 0),
        first_channel(channel_block * channels),
        split(split),
        begin(split * a.points_of_split),
        step(C::kChannelsLast ? blockDim.x / a.columns : blockDim.x * V) {
    const int64_t left = a.points() - begin;
    length = static_cast<unsigned>(left < 0 ? 0 : left < a.points_of_split ? left : a.points_of_split);
  }

  // The first channel of the thread.
  __device__ __forceinline__ int64_t channel() const { return first_channel + column * C::kChannels; }
  __device__ __forceinline__ int iterations() const { return static_cast<int>((length + step - 1) / step); }
};

// The image of a point; exact, and without the many instructions of a division of 64-bit integers.
__device__ __forceinline__ int64_t image_of(const Arguments& a, int64_t point) {
  const int64_t image = static_cast<int64_t>(static_cast<double>(point) / static_cast<double>(a.spatial));
  const int64_t inside = point - image * a.spatial;
  return inside < 0 ? image - 1 : inside >= a.spatial ? image + 1 : image;
}

// Where a thread is: at a chunk of V elements. Moves on by the block's step.
template <class C>
struct Walk {
  static constexpr int V = C::V;
  using E = typename C::Element;
  using Chunk = Pack<E, V>;

  const Block<C>& block;
  unsigned point;   // of the chunk's first element, from the block's first one
  unsigned image;   // of this point
  unsigned inside;  // this point's number in the image
  int64_t offset;   // of the first element in memory
  unsigned images_of_step, inside_of_step;
  int64_t offset_of_step;

  __device__ __forceinline__ explicit Walk(const Block<C>& block) : block(block) {
    const Arguments& a = block.a;
    point = C::kChannelsLast ? threadIdx.x / a.columns : threadIdx.x * V;
    const int64_t in_channel = block.begin + point, n = image_of(a, in_channel), s = in_channel - n * a.spatial;
    image = static_cast<unsigned>(n);
    inside = static_cast<unsigned>(s);
    offset = C::kChannelsLast ? in_channel * a.channels + block.channel()
                              : (n * a.channels + block.channel()) * a.spatial + s;
    const int64_t images = image_of(a, block.step), rest = block.step - images * a.spatial;
    images_of_step = static_cast<unsigned>(images);
    inside_of_step = static_cast<unsigned>(rest);
    offset_of_step = C::kChannelsLast ? block.step * a.channels : images * a.channels * a.spatial + rest;
  }

  __device__ __forceinline__ void advance() {
    const unsigned before_next_image = static_cast<unsigned>(block.a.spatial) - inside_of_step;
    point += block.step;
    image += images_of_step;
    offset += offset_of_step;
    if (inside >= before_next_image) {
      inside -= before_next_image;
      ++image;
      if (!C::kChannelsLast) offset += (block.a.channels - 1) * block.a.spatial;
    } else {
      inside += inside_of_step;
    }
  }

  // Elements of the chunk that exist; the first ones. Where chunks are `whole`, all or none.
  template <bool kWhole = false>
  __device__ __forceinline__ int count() const {
    if (kWhole) return point < block.length && (!C::kChannelsLast || block.channel() < block.a.channels) ? V : 0;
    if (point >= block.length) return 0;
    const int64_t left = C::kChannelsLast ? block.a.channels - block.channel() : block.length - point;
    return left < 0 ? 0 : left < V ? static_cast<int>(left) : V;
  }

  // Calls visit(v, offset, image) for the elements v = 0, piece, 2 piece ... that exist.
  template <class F>
  __device__ __forceinline__ void for_each_piece(int piece, F visit) const {
    const int elements = count();
    int64_t at = offset;
    unsigned n = image, s = inside;
#pragma unroll 1
    for (int v = 0; v < elements; v += piece) {
      visit(v, at, n);
      at += piece;
      s += piece;
      if (!C::kChannelsLast && s == block.a.spatial) {
        s = 0;
        ++n;
        at += (block.a.channels - 1) * block.a.spatial;
      }
    }
  }

  // Starts to copy the chunk of a tensor to shared memory; elements that do not exist become 0.
  template <bool kWhole>
  __device__ __forceinline__ void fetch(Chunk* to, const void* from) const {
    const E* elements = static_cast<const E*>(from);
    const int piece = block.a.piece, bytes = piece * static_cast<int>(sizeof(E));
    if ((kWhole || piece == V) && sizeof(Chunk) >= 4) {
      copy_async(to, elements + offset, sizeof(Chunk));
      return;
    }
    if (count() < V) *to = {};
    for_each_piece(piece, [&](int v, int64_t at, unsigned) {
      if (bytes == 8)
        copy_async(to->element + v, elements + at, 8);
      else if (bytes == 4)
        copy_async(to->element + v, elements + at, 4);
      else
        to->element[v] = elements[at];
    });
  }

  // Stores the chunk; `through` is shared memory of the thread.
  template <bool kWhole>
  __device__ __forceinline__ void store(void* to, const Chunk& chunk, Chunk* through) const {
    E* elements = static_cast<E*>(to);
    const int piece = block.a.piece, bytes = piece * static_cast<int>(sizeof(E));
    if (kWhole || piece == V) {
      store_global(reinterpret_cast<Chunk*>(elements + offset), chunk);
      return;
    }
    *through = chunk;
    for_each_piece(piece, [&](int v, int64_t at, unsigned) {
      const E* from = through->element + v;
      if (bytes == 8)
        store_global(reinterpret_cast<uint64_t*>(elements + at), *reinterpret_cast<const uint64_t*>(from));
      else if (bytes == 4)
        store_global(reinterpret_cast<uint32_t*>(elements + at), *reinterpret_cast<const uint32_t*>(from));
      else
        store_global(elements + at, *from);
    });
  }

  // The first of the chunk's bits in the mask. They lie channel by channel, in channels_last point by point.
  __device__ __forceinline__ int64_t mask_bit() const {
    const int64_t in_channel = block.begin + point;
    return C::kChannelsLast ? in_channel * block.a.channels + block.channel()
                            : block.channel() * block.a.points() + in_channel;
  }

  // Bit v says whether the ReLU passed element v. All threads of the warp must call this, also without elements.
  __device__ __forceinline__ void store_mask(unsigned bits) const {
    const int64_t first = mask_bit();
    if (block.a.mask_is_aligned) {
      // Chunks that share a byte belong to neighbouring threads.
      constexpr int kChunksOfByte = 8 / V;
      int byte = static_cast<int>(bits << V * (threadIdx.x % kChunksOfByte));
      CBN_UNROLL
      for (int other = 1; other < kChunksOfByte; other *= 2) byte |= __shfl_xor_sync(0xffffffffu, byte, other);
      if (count() > 0 && threadIdx.x % kChunksOfByte == 0)
        reinterpret_cast<uint8_t*>(block.a.mask)[first / 8] = static_cast<uint8_t>(byte);
    } else if (count() > 0) {
      const uint64_t shifted = static_cast<uint64_t>(bits) << first % 32;
      const unsigned low = static_cast<unsigned>(shifted), high = static_cast<unsigned>(shifted >> 32);
      if (low) atomic_or(block.a.mask + first / 32, low);
      if (high) atomic_or(block.a.mask + first / 32 + 1, high);
    }
  }

  __device__ __forceinline__ unsigned load_mask() const {
    const int64_t first = mask_bit();
    const unsigned* word = block.a.mask + first / 32;
    const int shift = static_cast<int>(first % 32);
    uint64_t bits = word[0];
    if (shift + count() > 32) bits |= static_cast<uint64_t>(word[1]) << 32;
    return static_cast<unsigned>(bits >> shift);
  }
};

}  // namespace cbn
