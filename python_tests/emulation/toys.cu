// Small kernels that show what the emulation does and what it catches; called by name.
#include "cuda/device.cuh"
#include "cuda/runtime.h"

#include <algorithm>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

namespace toys {

using namespace cbn;

constexpr unsigned kAll = 0xffffffff;
double* shared_doubles() { return reinterpret_cast<double*>(shared_memory()); }

// --- correct ones; every thread of the grid writes its result

// Sum of the thread indices of a block, through shared memory, with the first so many of the barriers it needs.
__global__ void block_sum(double* out, int barriers) {
  double* values = shared_doubles();
  double sum = 0;
  for (int round = 0; round < 2; ++round) {
    values[threadIdx.x] = threadIdx.x;
    if (barriers > 0) __syncthreads();
    sum = 0;
    for (unsigned i = 0; i < blockDim.x; ++i) sum += values[i];
    if (barriers > 1) __syncthreads();
    values[threadIdx.x] = -1;
  }
  out[blockIdx.x * blockDim.x + threadIdx.x] = sum;
}

// Sum of 1 + rank over the blocks of the cluster.
__global__ void cluster_sum(double* out, bool first_barrier, bool last_barrier) {
  double* own = shared_doubles();
  if (threadIdx.x == 0) *own = 1.0 + cluster_rank();
  if (first_barrier) cluster_sync();
  double sum = 0;
  for (unsigned rank = 0; rank < cluster_size(); ++rank) sum += *cluster_shared(own, rank);
  if (last_barrier) cluster_sync();
  out[blockIdx.x * blockDim.x + threadIdx.x] = sum;
}

// The same; the last barrier in halves, or one of them, or the sum between them.
__global__ void cluster_sum_in_halves(double* out, bool arrives, bool waits, bool reads_between) {
  double* own = shared_doubles();
  if (threadIdx.x == 0) *own = 1.0 + cluster_rank();
  cluster_sync();
  double sum = 0;
  if (arrives && reads_between) cluster_arrive();
  for (unsigned rank = 0; rank < cluster_size(); ++rank) sum += *cluster_shared(own, rank);
  if (arrives && !reads_between) cluster_arrive();
  sum += 0 * __shfl_xor_sync(kAll, sum, 1);  // other barriers may lie between the halves
  if (waits) cluster_wait();
  out[blockIdx.x * blockDim.x + threadIdx.x] = sum;
}

__global__ void warp_sum(double* out) {
  int i = static_cast<int>(threadIdx.x) % 32;
  float f = static_cast<float>(i);
  double d = i;
  for (int lanes = 1; lanes < 32; lanes *= 2) {
    i += __shfl_xor_sync(kAll, i, lanes);
    f += __shfl_xor_sync(kAll, f, lanes);
    d += __shfl_xor_sync(kAll, d, lanes);
  }
  out[blockIdx.x * blockDim.x + threadIdx.x] = i + f + d;
}

// Of the third of eight neighbours: its number in the warp, less that of the first.
__global__ void neighbour(double* out) {
  const double lane = threadIdx.x % 32;
  out[blockIdx.x * blockDim.x + threadIdx.x] = __shfl_sync(kAll, lane, 3, 8) - (threadIdx.x % 32 / 8) * 8;
}

__global__ void no_such_neighbour(double* out) { *out = __shfl_sync(kAll, 1.0, 8, 8); }

// The bits of the lanes whose index 3 divides.
__global__ void ballot(double* out) {
  out[blockIdx.x * blockDim.x + threadIdx.x] = __ballot_sync(kAll, threadIdx.x % 32 % 3 == 0);
}

// The index of the thread, by way of shared memory, in two groups of copies of which so many may be under way.
template <int kPending>
__global__ void copies(double* out, const double* indices, bool wait) {
  double* values = shared_doubles() + 2 * threadIdx.x;
  for (int group = 0; group < 2; ++group) {
    copy_async(values + group, indices + threadIdx.x, 8);
    commit_copies();
  }
  if (wait) wait_for_copies<kPending>();
  out[blockIdx.x * blockDim.x + threadIdx.x] = values[0];
  wait_for_copies<0>();
}

__global__ void copies_without_end(double* out) {
  copy_async(shared_doubles() + threadIdx.x, out + threadIdx.x, 8);
  commit_copies();
}

__global__ void copies_out_of_bounds(double* out) {
  copy_async(shared_doubles(), out + gridDim.x * blockDim.x, 8);
  wait_for_copies<0>();
}

__global__ void copies_elsewhere(double* out) { copy_async(out, out, 8); }

// The order in which the threads ran.
__global__ void order(double* out, double* count) { out[blockIdx.x * blockDim.x + threadIdx.x] = (*count)++; }

// --- wrong ones

__global__ void divergent_barrier(double*) {
  if (threadIdx.x < 40) __syncthreads();
}

__global__ void two_barriers(double*) {
  if (threadIdx.x < 40)
    __syncthreads();
  else
    __syncthreads();
}

__global__ void two_kinds_of_barrier(double*) {
  if (blockIdx.x % 2 == 0) cluster_sync();
  __syncthreads();
  if (blockIdx.x % 2 == 1) cluster_sync();
}

__global__ void missing_lane(double* out) {
  if (threadIdx.x != 17) *out = __shfl_xor_sync(kAll, 1.0, 1);
}

__global__ void lane_at_another_shuffle(double* out) {
  if (threadIdx.x == 17)
    *out = __shfl_xor_sync(kAll, 1.0, 1);
  else
    *out = __shfl_xor_sync(kAll, 2.0, 1);
}

__global__ void lane_at_barrier(double* out) {
  if (threadIdx.x == 17) __syncthreads();
  *out = __shfl_xor_sync(kAll, 1.0, 1);
}

__global__ void part_of_warp(double* out) { *out = __shfl_xor_sync(0xff, 1.0, 1); }

__global__ void read_without_barrier(double* out) {
  if (cluster_rank() == 0) *out = *cluster_shared(shared_doubles(), 1);
}

__global__ void shared_out_of_bounds(double*) { shared_doubles()[threadIdx.x + 1] = 0; }

__global__ void global_out_of_bounds(double* out) { out[blockIdx.x * blockDim.x + threadIdx.x + 1] = 0; }

__global__ void cluster_out_of_bounds(double* out) { *out = cluster_shared(shared_doubles(), 0)[blockDim.x]; }

__global__ void no_such_block(double* out) { *out = *cluster_shared(shared_doubles(), cluster_size()); }

__global__ void not_shared(double* out) { *out = *cluster_shared(out, 0); }

struct Pair {
  double values[2];
};

__global__ void misaligned_pack(double* out) {
  store_at_once<true>(out, 0.0);
  store_at_once<false>(reinterpret_cast<Pair*>(out + 1), Pair{});
}

__global__ void misaligned_load(double* out) { *out = load_at_once(reinterpret_cast<const Pair*>(out + 1)).values[0]; }

__global__ void misaligned_copy(double* out) { copy_async(shared_doubles() + 1, out, 16); }

struct alignas(16) AlignedPair {
  double values[2];
};

__global__ void misaligned_shared(double* out) {
  *out = reinterpret_cast<AlignedPair*>(shared_memory() + 8)->values[0];
}

__global__ void failed_check(double*) { device_check(threadIdx.x != 17, "expected another thread"); }

void run(const std::string& name, double* out, const Launch& shape) {
  const auto start = [&](auto kernel, auto... more) { launch(kernel, shape, current_stream(0), out, more...); };
  double count = 0;
  std::vector<double> indices(shape.threads);
  std::iota(indices.begin(), indices.end(), 0.0);
  if (name == "block_sum") return start(block_sum, 2);
  if (name == "block_sum_without_second_barrier") return start(block_sum, 1);
  if (name == "block_sum_without_barriers") return start(block_sum, 0);
  if (name == "cluster_sum") return start(cluster_sum, true, true);
  if (name == "cluster_sum_without_barrier") return start(cluster_sum, false, true);
  if (name == "cluster_sum_without_last_barrier") return start(cluster_sum, true, false);
  if (name == "cluster_sum_in_halves") return start(cluster_sum_in_halves, true, true, false);
  if (name == "cluster_sum_in_halves_without_wait") return start(cluster_sum_in_halves, true, false, false);
  if (name == "cluster_sum_in_halves_without_arrival") return start(cluster_sum_in_halves, false, true, false);
  if (name == "cluster_sum_in_halves_without_order") return start(cluster_sum_in_halves, true, true, true);
  if (name == "warp_sum") return start(warp_sum);
  if (name == "ballot") return start(ballot);
  if (name == "copies_all") return start(copies<0>, indices.data(), true);
  if (name == "copies_one_pending") return start(copies<1>, indices.data(), true);
  if (name == "copies_two_pending") return start(copies<2>, indices.data(), true);
  if (name == "copies_without_wait") return start(copies<0>, indices.data(), false);
  if (name == "copies_without_end") return start(copies_without_end);
  if (name == "copies_out_of_bounds") return start(copies_out_of_bounds);
  if (name == "copies_elsewhere") return start(copies_elsewhere);
  if (name == "order") return start(order, &count);
  if (name == "divergent_barrier") return start(divergent_barrier);
  if (name == "two_barriers") return start(two_barriers);
  if (name == "two_kinds_of_barrier") return start(two_kinds_of_barrier);
  if (name == "missing_lane") return start(missing_lane);
  if (name == "lane_at_another_shuffle") return start(lane_at_another_shuffle);
  if (name == "lane_at_barrier") return start(lane_at_barrier);
  if (name == "neighbour") return start(neighbour);
  if (name == "no_such_neighbour") return start(no_such_neighbour);
  if (name == "part_of_warp") return start(part_of_warp);
  if (name == "read_without_barrier") return start(read_without_barrier);
  if (name == "shared_out_of_bounds") return start(shared_out_of_bounds);
  if (name == "global_out_of_bounds") return start(global_out_of_bounds);
  if (name == "cluster_out_of_bounds") return start(cluster_out_of_bounds);
  if (name == "no_such_block") return start(no_such_block);
  if (name == "not_shared") return start(not_shared);
  if (name == "misaligned_pack") return start(misaligned_pack);
  if (name == "misaligned_load") return start(misaligned_load);
  if (name == "misaligned_copy") return start(misaligned_copy);
  if (name == "misaligned_shared") return start(misaligned_shared);
  if (name == "failed_check") return start(failed_check);
  if (name == "mistake_and_block_sum") {
    try {
      start(two_barriers);
    } catch (const std::runtime_error&) {
      return start(block_sum, 2);
    }
  }
  throw std::invalid_argument("there is no toy " + name);
}

}  // namespace toys

// Fills out [blocks * threads]; what went wrong, or an empty string.
extern "C" const char* run_toy(const char* name, double* out, int blocks, int threads, int cluster, unsigned shared) {
  static std::string error;
  error.clear();
  std::vector<double> results(blocks * threads);  // known to AddressSanitizer by its exact size
  try {
    toys::run(name, results.data(), {blocks, threads, cluster, shared});
  } catch (const std::exception& failure) {
    error = failure.what();
  }
  std::copy(results.begin(), results.end(), out);
  return error.c_str();
}
