// The kernels: each walks over points, calls mixture.h and stores. A pass that reduces is followed by one that
// maps: two kernels that both read the values (streaming), or one that keeps them on chip (resident).
#pragma once

#include "reduce.cuh"
#include "statistics.cuh"

namespace cbn {

// The chunks of a block's threads in shared memory, [slots, threads] of each tensor that a pass reads: x, and the
// output's gradient or the residual.
template <class C>
struct Slots {
  using Chunk = typename Walk<C>::Chunk;
  Chunk* first;
  int slots;

  __device__ __forceinline__ Slots(const Block<C>& block, const Shared<C>& shared)
      : first(reinterpret_cast<Chunk*>(shared.values)), slots(block.a.slots) {}

  __device__ __forceinline__ Chunk* operator()(int tensor, int slot) const {
    return first + (tensor * slots + slot) * blockDim.x + threadIdx.x;
  }
};

enum class Source { kStream, kFetchAndKeep, kKept };

// Calls visit(walk, x, second, slot) for the thread's chunks, those without elements included: every thread of the
// block takes part in each. They stream through a ring of slots, or each has a slot of its own, in which it is
// kept for another pass. A thread reads its own chunks only, and is done with x's slot when visit is called.
template <class C, Pass pass, Source source, class Visit>
__device__ __forceinline__ void for_each_chunk(const Block<C>& block, const Shared<C>& shared, Visit visit) {
  const Arguments& a = block.a;
  const Slots<C> slots(block, shared);
  const int iterations = block.iterations();
  const auto slot_of = [](int i) { return source == Source::kStream ? i % (kChunksAhead + 1) : i; };
  Walk<C> walk(block), ahead = walk;
  // What is kept is for the second pass too.
  const bool needs_residual = pass == Pass::kNormalise || source == Source::kFetchAndKeep;
  const void* second = reads_gradient(pass) ? a.grad : needs_residual ? a.residual : nullptr;
  const auto fetch = [&](int i) {
    if (source != Source::kKept && i < iterations && ahead.count() > 0) {
      ahead.fetch(slots(0, slot_of(i)), a.x);
      if (second) ahead.fetch(slots(1, slot_of(i)), second);
      ahead.advance();
    }
    commit_copies();
  };
  if (source != Source::kKept)
    for (int i = 0; i < kChunksAhead; ++i) fetch(i);
  for (int i = 0; i < iterations; ++i) {
    if (source != Source::kKept) {
      fetch(i + kChunksAhead);
      wait_for_copies<kChunksAhead>();
    }
    typename Walk<C>::Chunk x = *slots(0, slot_of(i)), other;
    if (reads_gradient(pass) || second) other = *slots(1, slot_of(i));
    visit(walk, x, other, slots(0, slot_of(i)));
    walk.advance();
  }
}

// The coefficients of a thread's channels for one pass, in registers.
template <class C, bool kBounded>
struct EStep {
  using S = typename C::S;
  static constexpr int M = C::M;
  const Arguments& a;
  LogOdds<S, M> odds[C::kChannels];
  S origin[C::kChannels];

  __device__ __forceinline__ EStep(const Block<C>& block, const Shared<C>& shared) : a(block.a) {
    load_coefficients(block, shared, 0, odds);
    CBN_UNROLL
    for (int channel = 0; channel < C::kChannels; ++channel)
      origin[channel] = static_cast<S>(shared.origin[block.lane * C::kChannels + channel]);
  }

  // Responsibilities of z (eqs 8-9, 17-18) up to a factor, whose inverse is returned.
  __device__ __forceinline__ S unnormalised(int channel, S z, int group, S (&e)[M]) const {
    if (kBounded || !a.groups) return unnormalised_responsibilities<kBounded>(odds[channel], z, e);
    assign(group, e);
    return S(1);
  }

  __device__ __forceinline__ void responsibilities(int channel, S z, int group, S (&p)[M]) const {
    const S sum = unnormalised(channel, z, group, p);
    if (M == 1) return;
    const S inverse = Math<S>::reciprocal(sum);
    CBN_UNROLL
    for (int m = 0; m < M; ++m) p[m] *= inverse;
  }
};

template <class C>
struct Groups {
  int of[C::V] = {};

  __device__ __forceinline__ Groups(const Walk<C>& walk, bool assigned) {
    if (assigned && walk.count() > 0) walk.load_groups(of);
  }
};

// Sums of the thread's elements: Moments or GradientSums of each of its channels.
template <class C, Pass pass, Source source, bool kBounded, class Sums>
__device__ __forceinline__ void reduce(const Block<C>& block, const Shared<C>& shared, Sums (&sums)[C::kChannels]) {
  using Chunk = typename Walk<C>::Chunk;
  using S = typename C::S;
  const Arguments& a = block.a;
  const EStep<C, kBounded> e_step(block, shared);
  Branches<S, C::M> branches[C::kChannels];
  if (pass == Pass::kGradientSums) load_coefficients(block, shared, 3, branches);
  for_each_chunk<C, pass, source>(block, shared, [&](const Walk<C>& walk, const Chunk& x, const Chunk& grad, Chunk*) {
    const int count = walk.count();
    if (count == 0) return;
    const Groups<C> groups(walk, !kBounded && a.groups);
    const unsigned bits = pass == Pass::kGradientSums && a.mask ? walk.load_mask() : 0;
    CBN_UNROLL
    for (int v = 0; v < C::V; ++v) {
      const int channel = C::kChannelsLast ? v : 0;
      const S z = static_cast<S>(x.element[v]) - e_step.origin[channel];
      S e[C::M];
      const S sum = e_step.unnormalised(channel, z, groups.of[v], e);
      // A point that does not exist has no responsibilities.
      const S inverse = v >= count ? S(0) : C::M == 1 ? S(1) : Math<S>::reciprocal(sum);
      if constexpr (pass == Pass::kMoments) {
        accumulate(sums[channel], e, inverse, z);
      } else {
        S g = static_cast<S>(grad.element[v]);
        if (a.relu) {
          const bool passed = a.mask ? bits >> v & 1 : passes_relu(combine(branches[channel], e, z));
          g = passed ? g : S(0);
        }
        accumulate(sums[channel], e, inverse, z, g);
      }
    }
  });
}

template <class C, Source source, bool kBounded>
__device__ __forceinline__ void normalise(const Block<C>& block, const Shared<C>& shared) {
  using Chunk = typename Walk<C>::Chunk;
  using S = typename C::S;
  using E = typename C::Element;
  const Arguments& a = block.a;
  const EStep<C, kBounded> e_step(block, shared);
  Branches<S, C::M> branches[C::kChannels];
  load_coefficients(block, shared, 3, branches);
  for_each_chunk<C, Pass::kNormalise, source>(
      block, shared, [&](const Walk<C>& walk, const Chunk& x, const Chunk& residual, Chunk* slot) {
        const int count = walk.count();
        const Groups<C> groups(walk, !kBounded && a.groups);
        Chunk out;
        unsigned bits = 0;
        CBN_UNROLL
        for (int v = 0; v < C::V; ++v) {
          const int channel = C::kChannelsLast ? v : 0;
          const S z = static_cast<S>(x.element[v]) - e_step.origin[channel];
          S e[C::M];
          const S sum = e_step.unnormalised(channel, z, groups.of[v], e);
          S y = combine(branches[channel], e, z);
          if (C::M > 1) y *= Math<S>::reciprocal(sum);
          if (a.residual) y += static_cast<S>(residual.element[v]);
          if (a.relu) {
            const bool passed = passes_relu(y);
            y = passed ? y : S(0);
            bits |= (v < count && passed) << v;
          }
          out.element[v] = static_cast<E>(y);
        }
        if (count > 0) walk.store(a.out, out, slot);
        if (a.mask) walk.store_mask(bits);
      });
}

template <class C, Source source, bool kBounded>
__device__ __forceinline__ void differentiate(const Block<C>& block, const Shared<C>& shared) {
  using Chunk = typename Walk<C>::Chunk;
  using S = typename C::S;
  using E = typename C::Element;
  const Arguments& a = block.a;
  const EStep<C, kBounded> e_step(block, shared);
  InputGradient<S, C::M> coefficients[C::kChannels];
  load_coefficients(block, shared, 3, coefficients);
  // Assigned responsibilities do not depend on x.
  const bool constant = a.detach_responsibility || a.groups;
  for_each_chunk<C, Pass::kInputGradient, source>(
      block, shared, [&](const Walk<C>& walk, const Chunk& x, const Chunk& grad, Chunk* slot) {
        if (walk.count() == 0) return;
        const Groups<C> groups(walk, !kBounded && a.groups);
        const unsigned bits = a.mask ? walk.load_mask() : 0;
        Chunk out, gated;
        CBN_UNROLL
        for (int v = 0; v < C::V; ++v) {
          const int channel = C::kChannelsLast ? v : 0;
          const S z = static_cast<S>(x.element[v]) - e_step.origin[channel];
          S p[C::M];
          e_step.responsibilities(channel, z, groups.of[v], p);
          S g = static_cast<S>(grad.element[v]);
          if (a.relu) {
            const bool passed = a.mask ? bits >> v & 1 : passes_relu(combine(coefficients[channel], p, z));
            g = passed ? g : S(0);
          }
          gated.element[v] = static_cast<E>(g);
          out.element[v] =
              static_cast<E>(input_gradient<kBounded>(e_step.odds[channel], coefficients[channel], p, z, g, constant));
        }
        walk.store(a.out, out, slot);
        if (a.grad_residual) walk.store(a.grad_residual, gated, slot);
      });
}

// ---------------------------------------------------------------------------------------------------------------------
// Whole passes of a block
// ---------------------------------------------------------------------------------------------------------------------

// Sums of the block's points in shared.totals.
template <class C, Pass pass, Source source>
__device__ __forceinline__ bool reduce_block(const Block<C>& block, const Shared<C>& shared) {
  using S = typename C::S;
  const Global<C> global{block.a, block.first_channel};
  const bool bounded = prepare<C, pass>(block, shared, global.used(), global.gradients());
  std::conditional_t<pass == Pass::kMoments, Moments<S, C::M>, GradientSums<S, C::M>> sums[C::kChannels] = {};
  if (bounded)
    reduce<C, pass, source, true>(block, shared, sums);
  else
    reduce<C, pass, source, false>(block, shared, sums);
  block_sum(block, shared, sums);
  return bounded;
}

template <class C, Pass pass, Source source>
__device__ __forceinline__ void map_block(const Block<C>& block, const Shared<C>& shared,
                                          const Statistics<typename C::S>& used,
                                          const Statistics<typename C::S>& gradients) {
  const bool bounded = prepare<C, pass>(block, shared, used, gradients);
  if constexpr (pass == Pass::kNormalise) {
    if (bounded)
      normalise<C, source, true>(block, shared);
    else
      normalise<C, source, false>(block, shared);
  } else {
    if (bounded)
      differentiate<C, source, true>(block, shared);
    else
      differentiate<C, source, false>(block, shared);
  }
}

// Calls visit(m, j, i) for the components of the block's channels; i indexes [M, C].
template <class C, class Visit>
__device__ __forceinline__ void for_each_component(const Block<C>& block, const Shared<C>& shared, Visit visit) {
  for (int item = threadIdx.x; item < block.a.components * shared.K; item += blockDim.x) {
    const int m = item / shared.K, j = item % shared.K;
    const int64_t channel = block.first_channel + j;
    if (channel < block.a.channels) visit(m, j, m * block.a.channels + channel);
  }
}

// The streaming reductions: the sums of each split, and what they are relative to, for the kernel that finishes
// them. Neighbouring blocks take neighbouring channels: together they read connected memory.
template <class C, Pass pass>
__global__ void __launch_bounds__(C::kThreads, 1) reduce_kernel(const __grid_constant__ Arguments a) {
  const Block<C> block(a, blockIdx.x % a.channel_blocks, blockIdx.x / a.channel_blocks);
  const Shared<C> shared(block.channels);
  reduce_block<C, pass, Source::kStream>(block, shared);
  constexpr int kKinds = pass == Pass::kMoments ? kMomentSums : kGradientSums;
  for_each_component(block, shared, [&](int m, int j, int64_t i) {
    const int64_t size = a.components * a.channels;
    for (int kind = 0; kind < kKinds; ++kind)
      a.partials[(block.split * kKinds + kind) * size + i] = shared.totals[(kind * C::M + m) * shared.K + j];
    if (m == 0 && block.split == 0) a.origins[block.first_channel + j] = shared.origin[j];
  });
}

// The second passes: in the reverse order, because what the first pass read last is still in the cache.
template <class C, Pass pass>
__global__ void __launch_bounds__(C::kThreads, 1) map_kernel(const __grid_constant__ Arguments a) {
  const unsigned number = gridDim.x - 1 - blockIdx.x;
  const Block<C> block(a, number % a.channel_blocks, number / a.channel_blocks);
  const Shared<C> shared(block.channels);
  const Global<C> global{a, block.first_channel};
  map_block<C, pass, Source::kStream>(block, shared, global.used(), global.gradients());
  if (pass == Pass::kNormalise && !a.training && block.split == 0)
    for_each_component(block, shared, [&](int, int, int64_t i) { Component<typename C::S>{a, i}.keep_running(); });
}

// Both passes of a direction in one cluster for each block of channels: forward with kNormalise, backward with
// kInputGradient.
template <class C, Pass pass>
__global__ void __launch_bounds__(C::kThreads, 1) resident_kernel(const __grid_constant__ Arguments a) {
  using S = typename C::S;
  constexpr bool kForward = pass == Pass::kNormalise;
  constexpr int kKinds = kForward ? kMomentSums : kGradientSums;
  const Block<C> block(a, blockIdx.x / a.splits, cluster_rank());
  const Shared<C> shared(block.channels);
  reduce_block<C, kForward ? Pass::kMoments : Pass::kGradientSums, Source::kFetchAndKeep>(block, shared);
  cluster_sum(shared, kKinds);
  for_each_component(block, shared, [&](int m, int j, int64_t i) {
    const Component<S> component{a, i};
    double sums[kKinds], result[kKinds];
    for (int kind = 0; kind < kKinds; ++kind) sums[kind] = shared.merged[(kind * C::M + m) * shared.K + j];
    if constexpr (kForward)
      component.finish_moments(sums, shared.origin[j], result);
    else
      component.finish_gradients(sums, shared.origin[j], result);
    for (int kind = 0; kind < kKinds; ++kind)
      shared.results[(kind * C::M + m) * shared.K + j] = static_cast<S>(result[kind]);
    if (block.split > 0) return;
    if constexpr (kForward) {
      for (int kind = 0; kind < kKinds; ++kind) component.write(a.batch, kind, result[kind]);
      component.keep_running();
    } else {
      component.write(a.grad_weight, 0, result[0]);
      component.write(a.grad_bias, 0, result[1]);
    }
  });
  const Global<C> global{a, block.first_channel};
  map_block<C, pass, Source::kKept>(block, shared, kForward ? shared.statistics() : global.used(),
                                    kForward ? global.gradients() : shared.statistics());
}

template <class E, int M, bool kChannelsLast>
Kernels kernels_of() {
  using C = Config<E, M, kChannelsLast>;
  return {C::V,
          M,
          C::kThreads,
          reduce_kernel<C, Pass::kMoments>,
          map_kernel<C, Pass::kNormalise>,
          resident_kernel<C, Pass::kNormalise>,
          reduce_kernel<C, Pass::kGradientSums>,
          map_kernel<C, Pass::kInputGradient>,
          resident_kernel<C, Pass::kInputGradient>};
}

template <class E, bool kChannelsLast>
Kernels kernels_of(int components) {
  if (components == 1) return kernels_of<E, 1, kChannelsLast>();
  if (components == 2) return kernels_of<E, 2, kChannelsLast>();
  if (components <= 4) return kernels_of<E, 4, kChannelsLast>();
  if (components <= 8) return kernels_of<E, 8, kChannelsLast>();
  return kernels_of<E, kMaxComponents, kChannelsLast>();
}

template <class E>
Kernels kernels_of(int components, bool channels_last) {
  return channels_last ? kernels_of<E, true>(components) : kernels_of<E, false>(components);
}

}  // namespace cbn
