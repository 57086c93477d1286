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
  // float64 is for checks, and many components are rare: for those no faster form of the element loops is compiled.
  static constexpr bool kHasFastForms = WhoWeighs::kHasFastForms && !std::is_same_v<E, double> && kComponents <= 8;
  static constexpr int least(int a, int b) { return a < b ? a : b; }
  static constexpr int most(int a, int b) { return a < b ? b : a; }
  // Elements of a chunk: 16 bytes, in channels_last fewer, because each has coefficients of its own, in registers.
  static constexpr int kMost = kLast              ? (M * kWords <= 2   ? 4
                                                     : M * kWords <= 8 ? 2
                                                                       : 1)
                               : M * kWords >= 16 ? 2 / kWords
                                                  : 8;
  static constexpr int V = least(kMost, 16 / sizeof(E));
  static constexpr int kTogether = most(1, (kWords > 1 ? 4 : 8) / V);  // chunks of a thread that are loaded together
  static constexpr int kChannels = kLast ? V : 1;                      // of a thread
  static constexpr int kThreads = kChannels * M * kWords <= 4 ? 512 : 256;  // of a resident block
};

template <class E, int V>
struct alignas(sizeof(E) * V) Pack {
  E element[V];
};

// The part of the points that a block of threads takes.
template <class C>
struct Block {
  static constexpr int V = C::V;
  using Chunk = Pack<typename C::Element, V>;

  const Arguments& a;
  unsigned channel_block, split;

  __device__ __forceinline__ Block(const Arguments& a, unsigned channel_block, unsigned split)
      : a(a), channel_block(channel_block), split(split) {}

  // All is computed where it is needed: registers are dearer.
  __device__ __forceinline__ int channels() const { return C::kChannelsLast ? a.columns * V : 1; }  // K, or beyond C
  // Threads that lie side by side along the channels are a power of two: this one's number among them, and their rows'.
  __device__ __forceinline__ int column() const { return C::kChannelsLast ? threadIdx.x & (a.columns - 1) : 0; }
  __device__ __forceinline__ unsigned row_of(unsigned thread) const { return thread >> (__ffs(a.columns) - 1); }
  // Points that the block takes at once.
  __device__ __forceinline__ unsigned step() const { return C::kChannelsLast ? row_of(blockDim.x) : blockDim.x * V; }
  __device__ __forceinline__ int64_t begin() const { return split * a.points_of_split; }  // the first point
  __device__ __forceinline__ unsigned length() const {                                    // points
    const int64_t left = a.points() - begin();
    return static_cast<unsigned>(left < 0 ? 0 : left < a.points_of_split ? left : a.points_of_split);
  }
  __device__ __forceinline__ int64_t first_channel() const { return static_cast<int64_t>(channel_block) * channels(); }
  // The first channel of the thread.
  __device__ __forceinline__ int64_t channel() const { return first_channel() + column() * C::kChannels; }
  // The thread's first point, from the block's.
  __device__ __forceinline__ unsigned point() const { return C::kChannelsLast ? row_of(threadIdx.x) : threadIdx.x * V; }
  // Chunks of the thread that have points; of any thread; and of all threads.
  __device__ __forceinline__ int chunks() const {
    return point() < length() ? static_cast<int>((length() - 1 - point()) / step()) + 1 : 0;
  }
  __device__ __forceinline__ int iterations() const { return static_cast<int>((length() + step() - 1) / step()); }
  __device__ __forceinline__ int whole_iterations() const { return static_cast<int>(length() / step()); }
};

// The image of a point; exact, and without the many instructions of a division of 64-bit integers.
__device__ __forceinline__ int64_t image_of(const Arguments& a, int64_t point) {
  const int64_t image = static_cast<int64_t>(static_cast<double>(point) / static_cast<double>(a.spatial));
  const int64_t inside = point - image * a.spatial;
  return inside < 0 ? image - 1 : inside >= a.spatial ? image + 1 : image;
}

// Where a chunk of V elements is.
template <class Offset>
struct Place {
  unsigned point;   // of the chunk's first element, from the block's first one
  unsigned image;   // of this point
  unsigned inside;  // this point's number in the image
  Offset offset;    // of the first element in memory
};

// A thread's way over its chunks: it moves on by the block's step. Offsets of 32 bits are faster.
template <class C, class OffsetType>
struct Walk : Place<OffsetType> {
  using Offset = OffsetType;
  static constexpr int V = C::V;
  using E = typename C::Element;
  using Chunk = Pack<E, V>;
  using Place<Offset>::point, Place<Offset>::image, Place<Offset>::inside, Place<Offset>::offset;

  const Block<C>& block;
  unsigned images_of_step, inside_of_step;
  Offset offset_of_step, offset_of_wrap;  // the latter more where a step ends in another image

  __device__ __forceinline__ explicit Walk(const Block<C>& block) : block(block) {
    const Arguments& a = block.a;
    point = block.point();
    const unsigned spatial = static_cast<unsigned>(a.spatial);
    const Offset in_channel = static_cast<Offset>(block.begin() + point);
    image = sizeof(Offset) == 4 ? static_cast<unsigned>(in_channel) / spatial
                                : static_cast<unsigned>(image_of(a, static_cast<int64_t>(in_channel)));
    inside = static_cast<unsigned>(in_channel - static_cast<Offset>(image) * spatial);
    images_of_step = block.step() / spatial;
    inside_of_step = block.step() % spatial;
    const Offset channels = static_cast<Offset>(a.channels), channel = static_cast<Offset>(block.channel());
    if (C::kChannelsLast) {
      offset = in_channel * channels + channel;
      offset_of_step = offset_of_wrap = block.step() * channels;
    } else {
      offset = (image * channels + channel) * spatial + inside;
      offset_of_step = images_of_step * channels * spatial + inside_of_step;
      offset_of_wrap = offset_of_step + (channels - 1) * spatial;
    }
  }

  // The walk when it is at a place.
  __device__ __forceinline__ Walk at(const Place<Offset>& place) const {
    Walk walk = *this;
    static_cast<Place<Offset>&>(walk) = place;
    return walk;
  }

  // Without a branch.
  __device__ __forceinline__ void advance() {
    const unsigned spatial = static_cast<unsigned>(block.a.spatial);
    const bool wraps = inside >= spatial - inside_of_step;
    point += block.step();
    image += images_of_step + wraps;
    inside += wraps ? inside_of_step - spatial : inside_of_step;
    offset += wraps ? offset_of_wrap : offset_of_step;
  }

  // Elements of the chunk that exist; the first ones. Of a whole chunk that exists, all.
  template <bool kWhole>
  __device__ __forceinline__ int count() const {
    if (kWhole) return V;
    if (point >= block.length()) return 0;
    const int64_t left = C::kChannelsLast ? block.a.channels - block.channel() : block.length() - point;
    return left < 0 ? 0 : left < V ? static_cast<int>(left) : V;
  }

  // Calls visit(v, offset, image) for the elements v = 0, piece, 2 piece ... that exist.
  template <class F>
  __device__ __forceinline__ void for_each_piece(int piece, F visit) const {
    const int elements = count<false>();
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
    if (!kWhole && count<false>() < V) *to = {};
    for_each_piece(piece, [&](int v, int64_t at, unsigned) {
      if (bytes == 8)
        copy_async(to->element + v, elements + at, 8);
      else if (bytes == 4)
        copy_async(to->element + v, elements + at, 4);
      else
        to->element[v] = elements[at];
    });
  }

  // The chunk of a tensor, `count` elements of it; the others are 0.
  template <bool kWhole>
  __device__ __forceinline__ Chunk load(const void* from, int count) const {
    const E* elements = static_cast<const E*>(from);
    Chunk chunk{};
    if (kWhole || block.a.piece == V) {
      if (count > 0) chunk = load_at_once(reinterpret_cast<const Chunk*>(elements + offset));
    } else {
      visit_elements(count, [&](int v, int64_t at) { chunk.element[v] = elements[at]; });
    }
    return chunk;
  }

  template <bool kWhole, bool kIsReadAgain>
  __device__ __forceinline__ void store(void* to, const Chunk& chunk, int count) const {
    E* elements = static_cast<E*>(to);
    if (kWhole || block.a.piece == V) {
      if (count > 0) store_at_once<kIsReadAgain>(reinterpret_cast<Chunk*>(elements + offset), chunk);
    } else {
      visit_elements(count, [&](int v, int64_t at) { elements[at] = chunk.element[v]; });
    }
  }

  // Calls visit(v, offset) for the first `count` elements, v known to the compiler.
  template <class F>
  __device__ __forceinline__ void visit_elements(int count, F visit) const {
    int64_t at = offset;
    unsigned s = inside;
    CBN_UNROLL
    for (int v = 0; v < V; ++v) {
      if (v < count) visit(v, at);
      ++at;
      if (!C::kChannelsLast && ++s == block.a.spatial) {
        s = 0;
        at += (block.a.channels - 1) * block.a.spatial;
      }
    }
  }

  // The first of the chunk's bits in the mask. They lie channel by channel, in channels_last point by point.
  __device__ __forceinline__ Offset mask_bit() const {
    const Arguments& a = block.a;
    const Offset in_channel = static_cast<Offset>(block.begin()) + point,
                 channel = static_cast<Offset>(block.channel());
    return C::kChannelsLast ? in_channel * static_cast<Offset>(a.channels) + channel
                            : channel * static_cast<Offset>(a.points()) + in_channel;
  }

  // Bit v says whether the ReLU passed element v; 0 for those that do not exist. All threads of the warp must call
  // this, also without elements. kAligned: a.mask_is_aligned, known to the compiler.
  template <bool kAligned>
  __device__ __forceinline__ void store_mask(unsigned bits, int count) const {
    const Offset first = mask_bit();
    if (kAligned || block.a.mask_is_aligned) {
      // Chunks that share a byte belong to neighbouring threads.
      constexpr int kChunksOfByte = 8 / V;
      int byte = static_cast<int>(bits << V * (threadIdx.x % kChunksOfByte));
      CBN_UNROLL
      for (int other = 1; other < kChunksOfByte; other *= 2) byte |= __shfl_xor_sync(0xffffffffu, byte, other);
      if (count > 0 && threadIdx.x % kChunksOfByte == 0)
        reinterpret_cast<uint8_t*>(block.a.mask)[first / 8] = static_cast<uint8_t>(byte);
    } else if (count > 0) {
      const uint64_t shifted = static_cast<uint64_t>(bits) << first % 32;
      const unsigned low = static_cast<unsigned>(shifted), high = static_cast<unsigned>(shifted >> 32);
      if (low) atomic_or(block.a.mask + first / 32, low);
      if (high) atomic_or(block.a.mask + first / 32 + 1, high);
    }
  }

  // The bits of a whole chunk lie in one byte.
  template <bool kWhole>
  __device__ __forceinline__ unsigned load_mask(int count) const {
    const Offset first = mask_bit();
    if (count == 0) return 0;
    if (kWhole) return reinterpret_cast<const uint8_t*>(block.a.mask)[first / 8] >> first % 8;
    const unsigned* word = block.a.mask + first / 32;
    const int shift = static_cast<int>(first % 32);
    uint64_t bits = word[0];
    if (shift + count > 32) bits |= static_cast<uint64_t>(word[1]) << 32;
    return static_cast<unsigned>(bits >> shift);
  }
};

}  // namespace cbn
