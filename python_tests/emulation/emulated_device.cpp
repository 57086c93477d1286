// The threads of a cluster as fibers of one thread of the host. Compiled without AddressSanitizer's instrumentation,
// which could not follow the jumps from fiber to fiber; it is told of every change of stack instead.
#include "emulated_device.h"

#include <sys/mman.h>
#include <ucontext.h>

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/launch.h"

extern "C" {
__attribute__((weak)) void __sanitizer_start_switch_fiber(void** fake_stack, const void* bottom, std::size_t size);
__attribute__((weak)) void __sanitizer_finish_switch_fiber(void* fake_stack, const void** bottom, std::size_t* size);
__attribute__((weak)) void __asan_unpoison_memory_region(const volatile void* address, std::size_t size);
}

cbn::emulation::Index threadIdx, blockIdx, blockDim, gridDim;

namespace cbn {
namespace emulation {
namespace {

constexpr std::size_t kGuard = 4096, kStack = 128 * 1024;  // only pages that are touched take memory

// ---------------------------------------------------------------------------------------------------------------------
// Fibers
// ---------------------------------------------------------------------------------------------------------------------

// What runs on a stack of its own.
struct Context {
  bool started = true;
  ucontext_t start;  // before its first run
  void* jump[5];     // later: swapcontext would make two system calls, and take 100 times as long
  const void* stack = nullptr;
  std::size_t size = 0;
};

Context host;
Context *running = &host, *left = nullptr;

__attribute__((noinline)) void jump_to(Context& to) {
  if (to.started) __builtin_longjmp(to.jump, 1);
  to.started = true;
  setcontext(&to.start);
}

void arrive() {
  if (__sanitizer_finish_switch_fiber) __sanitizer_finish_switch_fiber(nullptr, &left->stack, &left->size);
}

void switch_to(Context& to) {
  if (&to == running) return;
  if (__sanitizer_start_switch_fiber) __sanitizer_start_switch_fiber(nullptr, to.stack, to.size);
  left = running;
  running = &to;
  if (__builtin_setjmp(left->jump) == 0) jump_to(to);
  arrive();
}

void run_threads();

struct Fiber : Context {
  Fiber() {
    memory = mmap(nullptr, kGuard + kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::runtime_error("no memory for the stacks of the emulated threads");
    mprotect(memory, kGuard, PROT_NONE);
    started = false;
    getcontext(&start);
    stack = start.uc_stack.ss_sp = static_cast<char*>(memory) + kGuard;
    size = start.uc_stack.ss_size = kStack;
    makecontext(&start, run_threads, 0);
  }

  ~Fiber() {
    // The frames of a thread that was abandoned.
    if (__asan_unpoison_memory_region) __asan_unpoison_memory_region(stack, size);
    munmap(memory, kGuard + kStack);
  }

  Fiber(const Fiber&) = delete;

  void* memory;
};

// ---------------------------------------------------------------------------------------------------------------------
// The cluster that runs
// ---------------------------------------------------------------------------------------------------------------------

// Threads that wait for each other: `count` of the cluster's, from `first` on.
struct Group {
  int first, count;
  int arrived = 0, first_arrived = 0;
  Site site = {};                  // where they arrive
  std::uint64_t bits[kWarp] = {};  // of a warp: what its threads gave to the last exchange
};

struct Block {
  unsigned index;
  int threads;            // that have not ended
  unsigned char* shared;  // null after the block's end
};

struct Copy {
  void* to;
  unsigned char bytes[16];
  int size;
  int group;
};

struct Thread {
  int index;  // in its block
  int rank;   // of its block in the cluster
  Group* waits_in = nullptr;
  Site site = {};  // where it waits
  std::uint64_t bits = 0;
  bool ended = false;
  bool arrived_in_cluster = false;  // where others have not
  bool owes_wait = false;           // for the cluster in which it arrived
  bool reads_other_block = false;   // since it last arrived in the cluster
  std::vector<Copy> copies;         // under way
  int groups_of_copies = 0;         // that are complete
};

struct Cluster {
  Launch launch;
  std::function<void()> thread;
  std::mt19937 random;
  std::vector<Block> blocks;
  std::vector<Thread> threads;
  std::vector<int> ready;  // threads that do not wait
  std::vector<Group> threads_of_warp, threads_of_block;
  Group threads_of_cluster;
  int current;  // thread
  std::string failure;
};

Cluster cluster;
std::vector<std::unique_ptr<Fiber>> fibers;  // of the cluster's threads, kept from launch to launch
Thread& self() { return cluster.threads[cluster.current]; }

std::string described(const Thread& thread) {
  return "thread " + std::to_string(thread.index) + " of block " + std::to_string(cluster.blocks[thread.rank].index);
}

std::string described(const Site& site) {
  return std::string(site.function) + " (" + site.file + ":" + std::to_string(site.line) + ")";
}

bool same(const Site& a, const Site& b) {
  return a.line == b.line && std::strcmp(a.file, b.file) == 0 && std::strcmp(a.function, b.function) == 0;
}

// Continues with a random thread of those that do not wait, with the host where there is none.
void schedule() {
  if (cluster.ready.empty()) return switch_to(host);
  std::swap(cluster.ready[cluster.random() % cluster.ready.size()], cluster.ready.back());
  cluster.current = cluster.ready.back();
  cluster.ready.pop_back();
  threadIdx.x = self().index;
  blockIdx.x = cluster.blocks[self().rank].index;
  switch_to(*fibers[cluster.current]);
}

// Counts the thread. The last one of a group lets go those that wait.
void arrive(Group& group, const Site& site) {
  if (group.arrived == 0) {
    group.first_arrived = cluster.current;
    group.site = site;
  }
  if (!same(site, group.site))
    fail("waits at %s, but %s at %s", described(site).c_str(), described(cluster.threads[group.first_arrived]).c_str(),
         described(group.site).c_str());
  if (++group.arrived < group.count) return;
  group.arrived = 0;
  for (int i = 0; i < group.count; ++i) {
    Thread& thread = cluster.threads[group.first + i];
    if (group.count == kWarp) group.bits[i] = thread.bits;
    if (&group == &cluster.threads_of_cluster) thread.arrived_in_cluster = false;
    if (thread.waits_in != &group) continue;
    thread.waits_in = nullptr;
    cluster.ready.push_back(group.first + i);
  }
}

void arrive_and_wait(Group& group, const Site& site) {
  self().waits_in = &group;
  self().site = site;
  arrive(group, site);
  schedule();
}

// What every fiber does, for one cluster after the other.
void run_threads() {
  arrive();
  for (;;) {
    cluster.thread();
    if (self().reads_other_block)
      fail("ends without cluster_sync after it read another block's shared memory, which may have ended before");
    if (self().owes_wait) fail("ends without cluster_wait after cluster_arrive");
    if (!self().copies.empty()) fail("ends before its copies to shared memory");
    self().ended = true;
    Block& block = cluster.blocks[self().rank];
    if (--block.threads == 0) {
      std::free(block.shared);
      block.shared = nullptr;
    }
    schedule();
  }
}

// Says where a thread still waits although none is left to run.
std::string deadlock() {
  for (const Thread& thread : cluster.threads) {
    if (thread.waits_in == nullptr) continue;
    for (int i = 0; i < thread.waits_in->count; ++i) {
      const Thread& missing = cluster.threads[thread.waits_in->first + i];
      if (missing.waits_in == thread.waits_in) continue;
      if (missing.arrived_in_cluster && thread.waits_in == &cluster.threads_of_cluster) continue;
      return described(thread) + " waits at " + described(thread.site) + ", which " + described(missing) +
             " does not reach: it " + (missing.ended ? "has ended" : "waits at " + described(missing.site));
    }
  }
  return "";
}

// Runs the cluster that starts at this block; what failed, or nothing.
std::string run_cluster(unsigned first_block) {
  const Launch& launch = cluster.launch;
  for (int rank = 0; rank < launch.cluster; ++rank) {
    auto* shared = static_cast<unsigned char*>(std::malloc(launch.shared));
    std::memset(shared, 0xff, launch.shared);  // NaN in every floating type
    cluster.blocks[rank] = {first_block + rank, launch.threads, shared};
  }
  for (int i = 0; i < launch.cluster * launch.threads; ++i) {
    cluster.threads[i] = {i % launch.threads, i / launch.threads};
    cluster.ready.push_back(i);
  }
  schedule();
  return cluster.failure.empty() ? deadlock() : cluster.failure;
}

void prepare(const Launch& launch, const std::function<void()>& thread, unsigned seed) {
  cluster = {};
  cluster.launch = launch;
  cluster.thread = thread;
  cluster.random.seed(seed);
  cluster.blocks.resize(launch.cluster);
  cluster.threads.resize(launch.cluster * launch.threads);
  for (int rank = 0; rank < launch.cluster; ++rank) {
    const int begin = rank * launch.threads, end = begin + launch.threads;
    cluster.threads_of_block.push_back({begin, launch.threads});
    for (int first = begin; first < end; first += kWarp)
      cluster.threads_of_warp.push_back({first, std::min(kWarp, end - first)});
  }
  cluster.threads_of_cluster = {0, launch.cluster * launch.threads};
  while (fibers.size() < cluster.threads.size()) fibers.push_back(std::make_unique<Fiber>());
  blockDim.x = launch.threads;
  gridDim.x = static_cast<unsigned>(launch.blocks);
}

}  // namespace

void wait_for_block(const Site& site) { arrive_and_wait(cluster.threads_of_block[self().rank], site); }

void arrive_in_cluster(const Site& site) {
  self().reads_other_block = false;
  self().arrived_in_cluster = self().owes_wait = true;
  arrive(cluster.threads_of_cluster, site);
}

void wait_for_cluster(const Site& site) {
  if (!self().owes_wait) fail("waits at %s without cluster_arrive before", described(site).c_str());
  self().owes_wait = false;
  if (self().arrived_in_cluster) {
    self().waits_in = &cluster.threads_of_cluster;
    self().site = site;
  } else {
    cluster.ready.push_back(cluster.current);
  }
  schedule();
}

const std::uint64_t* exchange_in_warp(unsigned mask, std::uint64_t bits, const Site& site) {
  const int warps = (cluster.launch.threads + kWarp - 1) / kWarp;
  Group& warp = cluster.threads_of_warp[self().rank * warps + self().index / kWarp];
  if (mask != 0xffffffff || warp.count != kWarp)
    fail("is at %s with mask %x in a warp of %d threads", described(site).c_str(), mask, warp.count);
  self().bits = bits;
  arrive_and_wait(warp, site);
  return warp.bits;
}

unsigned lane() { return self().index % kWarp; }

// Where an address lies in the block's own shared memory.
std::ptrdiff_t offset_in_shared_memory(const void* address) {
  const std::ptrdiff_t offset = static_cast<const unsigned char*>(address) - shared_memory();
  if (offset < 0 || offset >= static_cast<std::ptrdiff_t>(cluster.launch.shared))
    fail("takes %p for an address in the block's shared memory", address);
  return offset;
}

const void* in_other_block(const void* own, unsigned rank) {
  const std::ptrdiff_t offset = offset_in_shared_memory(own);
  if (rank >= cluster.blocks.size())
    fail("calls cluster_shared of block %u in a cluster of %zu", rank, cluster.blocks.size());
  if (cluster.blocks[rank].shared == nullptr) fail("reads the shared memory of a block that has ended");
  if (rank != cluster_rank()) self().reads_other_block = true;
  return cluster.blocks[rank].shared + offset;
}

void check_aligned(const void* address, std::size_t bytes) {
  if (reinterpret_cast<std::uintptr_t>(address) % bytes != 0)
    fail("makes a misaligned access of %zu bytes at %p", bytes, address);
}

void wait_for_copies(int pending) {
  std::vector<Copy>& copies = self().copies;
  const auto waited_for = [&](const Copy& copy) { return copy.group < self().groups_of_copies - pending; };
  for (const Copy& copy : copies)
    if (waited_for(copy)) std::memcpy(copy.to, copy.bytes, copy.size);
  copies.erase(std::remove_if(copies.begin(), copies.end(), waited_for), copies.end());
}

void fail(const char* format, ...) {
  char message[1024];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(message, sizeof(message), format, arguments);
  va_end(arguments);
  cluster.failure = described(self()) + " " + message;
  switch_to(host);
  std::abort();  // nothing comes back to a launch that failed
}

std::string run(const Launch& launch, const std::function<void()>& thread, unsigned seed) {
  prepare(launch, thread, seed);
  std::vector<unsigned> order(launch.blocks / launch.cluster);
  std::iota(order.begin(), order.end(), 0);
  std::shuffle(order.begin(), order.end(), cluster.random);
  std::string failure;
  for (std::size_t i = 0; i < order.size() && failure.empty(); ++i) failure = run_cluster(order[i] * launch.cluster);
  if (!failure.empty()) {
    for (Block& block : cluster.blocks) std::free(block.shared);
    cluster = {};
    fibers.clear();  // those that have not ended are abandoned
  }
  return failure;
}

}  // namespace emulation

void copy_async(void* shared, const void* global, int bytes) {
  if (bytes != 4 && bytes != 8 && bytes != 16) emulation::fail("copies %d bytes: expected 4, 8 or 16", bytes);
  emulation::check_aligned(shared, bytes);
  emulation::check_aligned(global, bytes);
  emulation::offset_in_shared_memory(shared);
  emulation::Copy copy{shared, {}, bytes, emulation::self().groups_of_copies};
  std::memcpy(copy.bytes, global, bytes);
  if (emulation::cluster.random() % 2 == 0)
    std::memcpy(shared, copy.bytes, bytes);
  else
    emulation::self().copies.push_back(copy);
}

void commit_copies() { ++emulation::self().groups_of_copies; }

unsigned char* shared_memory() { return emulation::cluster.blocks[emulation::self().rank].shared; }
unsigned cluster_size() { return static_cast<unsigned>(emulation::cluster.launch.cluster); }
unsigned cluster_rank() { return static_cast<unsigned>(emulation::self().rank); }

}  // namespace cbn
