// The choice of grid, block, cluster and shared memory. Host only, neither CUDA nor torch: tested without a GPU.
//
// A *block of channels* is one channel, or in channels_last the neighbouring channels that a block of threads
// takes side by side. Its points are split among blocks of threads. In the resident path these blocks are one
// cluster, which keeps the values on chip between the reduction and the second pass: each is read once. In the
// streaming path the values are read twice, by two kernels, each with a plan of its own.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>

#include "../mixture.h"

namespace cbn {

constexpr int kWarp = 32;
// A thread's sums are kept in the statistics' type for at most so many points, then in double, unless the sums would
// take too much memory.
constexpr int kMostPointsOfThread = 128;
constexpr int kFewestElementsOfThread = 16;
// Rows of sums of a reduction at most, and of coefficients of a map at most.
constexpr int kSumRows = Moments<float, 1>::kRows;
constexpr int kCoefficientRows = LogOdds<float, 1>::kRows + InputGradient<float, 1>::kRows;
// The streaming path's sums take at most a fortieth of the input's memory, or so many bytes.
constexpr int kInputOfSums = 40;
constexpr int64_t kFewestBytesOfSums = 16 << 10;
// Chunks that a thread of the resident path has under way while it works on one.
constexpr int kResidentChunksAhead = 8;
// Warps that add their sums at a time: 4, or 2 where a sum takes 8 bytes.
constexpr int warps_at_a_time(int statistic_size) { return 16 / statistic_size; }
constexpr int kStreamingThreads = 256;
// Bytes of neighbouring channels that a block reads at a time in channels_last; memory moves them by the sector.
constexpr int kResidentSegment = 64;
constexpr int kStreamingSegment = 256;
constexpr int kSector = 32;
// Bytes that a block takes of its multiprocessor beside its own.
constexpr int kReservedShared = 1024;
// Blocks of a cluster that every device with clusters can launch.
constexpr int kLargestCluster = 8;

struct Device {
  int multiprocessors;
  int shared_memory;  // bytes that a block may have
  int cluster;        // blocks of the largest cluster; 1: no clusters
  int cache;          // bytes that all multiprocessors share
};

// What a measurement may change (tuning.h).
struct Tuning {
  int cluster = kLargestCluster;  // blocks of the largest cluster; 1: no clusters, 0: each pass reads from memory
  int blocks = 4;                 // for each multiprocessor that the streaming path tries to have
  int threads = 512;              // of a resident block at most
};

// What a pass works on.
struct Extent {
  int64_t channels;  // C
  int64_t points;    // P of each channel: images times space
  bool channels_last;
  int element_size;    // bytes
  int statistic_size;  // bytes of a statistic: 4 or 8
  int components;      // M, as compiled
  int vector;          // V elements that a thread takes at once: points, or in channels_last channels
  int most_threads;    // of a block
  int tensors;         // read by a pass: 1 or 2
};

// Offsets in bytes of a block's shared memory; K channels of the block. Shared by host and kernels.
struct SharedMemory {
  unsigned totals;        // double [kSumRows, M, K] sums of the block
  unsigned odds;          // double [3, M, K] of the components
  unsigned origin;        // double [K]
  unsigned sums;          // statistic [warps at a time, kSumRows, M, K] sums of some of the block's warps
  unsigned coefficients;  // statistic [kCoefficientRows, M, K]
  unsigned first;         // int [K] component that is stored first
  unsigned flag;          // int
  unsigned values;        // elements, [slots, threads] chunks of each tensor that is read, of the resident path
};

constexpr SharedMemory shared_memory_of(int components, int channels, int statistic_size) {
  const unsigned items = components * channels;
  SharedMemory at{};
  at.odds = at.totals + kSumRows * 8 * items;
  at.origin = at.odds + LogOdds<double, 1>::kRows * 8 * items;
  at.sums = at.origin + 8 * channels;
  at.coefficients = at.sums + warps_at_a_time(statistic_size) * kSumRows * statistic_size * items;
  at.first = at.coefficients + kCoefficientRows * statistic_size * items;
  at.flag = at.first + 4 * channels;
  at.values = (at.flag + 4 + 15) / 16 * 16;
  return at;
}

// Threads and blocks as the kernels are launched.
struct Launch {
  int64_t blocks;
  int threads;
  int cluster;  // blocks, which divide all of them
  unsigned shared;
};

struct Plan {
  bool resident;
  int threads;            // of a block
  int columns;            // threads side by side along the channels: 1 unless channels_last
  int channels_of_block;  // K
  int64_t channel_blocks;
  int64_t splits;  // blocks that share a block of channels; in the resident path the cluster
  int64_t points_of_split;
  int slots;        // chunks of a thread in shared memory, of each tensor; none in the streaming path
  unsigned shared;  // bytes
  int64_t blocks() const { return channel_blocks * splits; }
  Launch launch() const { return {blocks(), threads, resident ? static_cast<int>(splits) : 1, shared}; }
};

constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

constexpr int64_t power_of_two_from(int64_t least) {
  int64_t power = 1;
  while (power < least) power *= 2;
  return power;
}

// Threads of a block and how they share a block of channels; splits are still to be chosen.
inline Plan block_of(const Extent& p, int segment, int most_threads) {
  Plan plan{};
  plan.columns = plan.channels_of_block = 1;
  if (p.channels_last) {
    // The packed bits of whole bytes must be side by side.
    const int fewest = std::max(1, 8 / p.vector);
    const int64_t wanted = segment / (p.vector * p.element_size);
    const int64_t useful = power_of_two_from(divide_up(p.channels, p.vector));
    plan.columns = static_cast<int>(std::clamp<int64_t>(std::min(wanted, useful), fewest, kWarp));
    // Blocks that are full have faster loops; a few sectors side by side are enough for memory.
    while (plan.columns > fewest && p.channels % (plan.columns * p.vector) != 0 &&
           plan.columns * p.vector * p.element_size > 2 * kSector)
      plan.columns /= 2;
    plan.channels_of_block = plan.columns * p.vector;
  }
  plan.channel_blocks = divide_up(p.channels, plan.channels_of_block);
  const int64_t chunks = p.channels_last ? p.points * plan.columns : divide_up(p.points, p.vector);
  plan.threads = static_cast<int>(std::clamp<int64_t>(power_of_two_from(chunks / 4), 2 * kWarp, most_threads));
  return plan;
}

// Points that a block takes at once.
inline int64_t step_of(const Plan& plan, const Extent& p) {
  return p.channels_last ? plan.threads / plan.columns : static_cast<int64_t>(plan.threads) * p.vector;
}

// Cuts the points into splits, at whole warps, so that every chunk has the same lane in each pass.
inline void split(Plan& plan, const Extent& p, int64_t splits) {
  const int64_t granule = p.channels_last ? 1 : static_cast<int64_t>(kWarp) * p.vector;
  plan.points_of_split = std::max<int64_t>(1, divide_up(divide_up(p.points, splits), granule)) * granule;
  plan.splits = splits;
}

// Shared memory for so many chunks of each thread.
inline void take_shared_memory(Plan& plan, const Extent& p, int64_t slots) {
  const int64_t bytes = slots * plan.threads * p.vector * p.element_size * p.tensors;
  constexpr int64_t kNone = 1 << 30;  // more than any device has
  plan.slots = static_cast<int>(std::min(slots, kNone));
  plan.shared = shared_memory_of(p.components, plan.channels_of_block, p.statistic_size).values +
                static_cast<unsigned>(std::min(bytes, kNone));
}

// A cluster of blocks that keeps all chunks on chip, for a pass that reduces and then maps; nothing where there is
// none. The smallest one whose shared memory holds the values, so that two blocks fit on a multiprocessor if that can
// be; a larger one where multiprocessors would be idle.
inline std::optional<Plan> plan_resident(const Extent& p, const Device& device, const Tuning& tuning) {
  const int largest = std::min({device.cluster, tuning.cluster, kLargestCluster});
  Plan plan = block_of(p, kResidentSegment, std::min(p.most_threads, tuning.threads));
  plan.resident = true;
  const auto share = [&](int cluster) {
    split(plan, p, cluster);
    take_shared_memory(plan, p, divide_up(plan.points_of_split, step_of(plan, p)));
  };
  for (const int limit : {device.shared_memory / 2 - kReservedShared, device.shared_memory}) {
    for (int cluster = 1; cluster <= largest; cluster *= 2) {
      share(cluster);
      if (plan.shared > static_cast<unsigned>(limit)) continue;
      while (cluster * 2 <= largest && plan.channel_blocks * cluster * 2 <= device.multiprocessors &&
             plan.points_of_split > 2 * step_of(plan, p)) {
        cluster *= 2;
        share(cluster);
      }
      return plan;
    }
  }
  return std::nullopt;
}

// A block of the streaming path; splits are still to be chosen.
inline Plan streaming_block(const Extent& p, int segment) {
  Plan plan = block_of(p, segment, kStreamingThreads);
  take_shared_memory(plan, p, 0);
  return plan;
}

// Splits for the blocks that the multiprocessors are to have.
inline int64_t wanted_splits(const Plan& plan, const Device& device, const Tuning& tuning) {
  return std::max<int64_t>(1, static_cast<int64_t>(tuning.blocks) * device.multiprocessors / plan.channel_blocks);
}

// Splits of which each thread has the fewest elements that are worth a thread.
inline int64_t useful_splits(const Plan& plan, const Extent& p) {
  return divide_up(p.points, std::max(1, kFewestElementsOfThread / p.vector) * step_of(plan, p));
}

// Fewer splits where the last round of blocks would leave most multiprocessors idle: a pass takes as long as its
// rounds, each as long as a split.
inline int64_t whole_rounds(int64_t splits, const Plan& plan, const Device& device) {
  const int64_t rounds = splits * plan.channel_blocks / device.multiprocessors;
  const int64_t fewer = rounds * device.multiprocessors / plan.channel_blocks;
  return rounds * splits < (rounds + 1) * fewer ? fewer : splits;
}

// Cuts the points into splits of which none is empty, also where rounding to whole warps makes them fewer.
inline void split_all(Plan& plan, const Extent& p, int64_t splits) {
  split(plan, p, std::max<int64_t>(1, splits));
  plan.splits = std::max<int64_t>(1, divide_up(p.points, plan.points_of_split));
}

// At most: the backward pass has fewer kinds.
constexpr int64_t bytes_of_sums(const Extent& p, int64_t splits) {
  return splits * kSumRows * p.components * p.channels * p.statistic_size;
}

// The reduction of the streaming path. Each split leaves its sums in memory: where they allow few splits, blocks take
// fewer channels, so that there are more of them.
inline Plan plan_reduction(const Extent& p, const Device& device, const Tuning& tuning) {
  const int64_t bytes = p.points * p.channels * p.element_size;
  const int64_t most = std::max(bytes / kInputOfSums, kFewestBytesOfSums) / bytes_of_sums(p, 1);
  for (int segment = kStreamingSegment;; segment /= 2) {
    Plan plan = streaming_block(p, segment);
    const int64_t iterations = p.channels_last ? kMostPointsOfThread : std::max(1, kMostPointsOfThread / p.vector);
    const int64_t precise = divide_up(p.points, iterations * step_of(plan, p));
    const int64_t wanted = std::min(wanted_splits(plan, device, tuning), useful_splits(plan, p));
    split_all(plan, p, whole_rounds(std::min(std::max(wanted, precise), most), plan, device));
    if (!p.channels_last || segment == kSector || plan.blocks() >= device.multiprocessors) return plan;
  }
}

// What joint mode's passes over all channels of a point are compiled for.
struct PointLimits {
  int threads;           // of a block, of which a multiprocessor has one
  int points_of_thread;  // at most
  int side;              // points of a block for each of these
  unsigned shared;       // bytes, with moments
};

// Points of a thread: fewer where multiprocessors would be idle, or where what the blocks work on would leave the cache
// before it is read again.
inline int points_of_thread(const Extent& p, const PointLimits& limits, const Device& device) {
  int points = limits.points_of_thread;
  const auto suits = [&] {
    const int64_t of_block = static_cast<int64_t>(points) * limits.side;
    const int64_t bytes = of_block * p.channels * p.element_size * p.tensors * device.multiprocessors;
    return divide_up(p.points, of_block) >= device.multiprocessors && bytes <= device.cache / 2;
  };
  while (points > 1 && !suits()) points /= 2;
  return points;
}

// Blocks that weigh points and leave sums of their moments; 0 where these would be too many for most multiprocessors to
// have one, or do not fit: then the moments are a pass of their own.
inline int64_t splits_of_moments(const Extent& p, const PointLimits& limits, const Device& device,
                                 const Tuning& tuning) {
  if (tuning.cluster == 0 || limits.shared > static_cast<unsigned>(device.shared_memory)) return 0;
  const int64_t tiles = divide_up(p.points, static_cast<int64_t>(points_of_thread(p, limits, device)) * limits.side);
  const int64_t most =
      std::max(p.points * p.channels * p.element_size / kInputOfSums, kFewestBytesOfSums) / bytes_of_sums(p, 1);
  const int64_t wanted = std::min<int64_t>(tiles, device.multiprocessors), splits = std::min(wanted, most);
  return 2 * splits >= wanted ? splits : 0;
}

// The pass of the streaming path that maps.
inline Plan plan_map(const Extent& p, const Device& device, const Tuning& tuning) {
  Plan plan = streaming_block(p, kStreamingSegment);
  split_all(plan, p, std::min(wanted_splits(plan, device, tuning), useful_splits(plan, p)));
  return plan;
}

}  // namespace cbn
