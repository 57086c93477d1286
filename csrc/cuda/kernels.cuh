// The kernels: each walks over points, calls mixture.h and stores. A pass that reduces is followed by one that
// maps: two kernels that both read the values (streaming), or one that keeps them on chip (resident).
#pragma once

#include "joint.cuh"

namespace cbn {

enum class Source { kStream, kFetchAndKeep, kKept };

// The thread's chunks, which stream through a ring of slots, or each have a slot of their own, in which they are kept
// for another pass. The first ones are on their way from the start, while the coefficients are prepared. A thread reads
// its own chunks only: shared memory has [slots, threads] of each tensor, x, and the output's gradient or the residual.
template <class C, Pass pass, Source source>
struct Chunks {
  using Chunk = typename Walk<C>::Chunk;

  const Block<C>& block;
  Chunk* own;  // the thread's first chunk of x
  Walk<C> walk, ahead;
  int iterations;
  const void* second;

  __device__ __forceinline__ Chunks(const Block<C>& block, const Shared<C>& shared, const Walk<C>& start)
      : block(block),
        own(reinterpret_cast<Chunk*>(shared.values) + threadIdx.x),
        walk(start),
        ahead(start),
        iterations(block.iterations()) {
    // What is kept is for the second pass too.
    const bool needs_residual = pass == Pass::kNormalise || source == Source::kFetchAndKeep;
    second = reads_gradient(pass) ? block.a.grad : needs_residual ? block.a.residual : nullptr;
    if constexpr (source != Source::kKept) {
#pragma unroll 1
      for (int i = 0; i < chunks_ahead(); ++i) fetch<false>(i);
    }
  }

  // Chunk i of a tensor. A ring has a power of two of slots: one for the chunk that is worked on.
  __device__ __forceinline__ Chunk* slot(int tensor, int i) const {
    const int slots = block.a.slots, number = source == Source::kStream ? i & (slots - 1) : i;
    return own + (tensor * slots + number) * blockDim.x;
  }
  __device__ __forceinline__ int chunks_ahead() const {
    return source == Source::kStream ? block.a.slots - 1 : kResidentChunksAhead;
  }

  // Waits for the chunk that was fetched `chunks_ahead` before the last one.
  __device__ __forceinline__ void wait() const {
    if (source == Source::kFetchAndKeep)
      wait_for_copies<kResidentChunksAhead>();
    else
      wait_for_copies<kChunksAhead, kMoreChunksAhead>(block.a.slots > kChunksAhead + 1);
  }

  template <bool kPlain>
  __device__ __forceinline__ void fetch(int i) {
    if (i < iterations && ahead.template count<kPlain>() > 0) {
      ahead.template fetch<kPlain>(slot(0, i), block.a.x);
      if (reads_gradient(pass) || (!kPlain && second)) ahead.template fetch<kPlain>(slot(1, i), second);
      ahead.advance();
    }
    commit_copies();
  }

  // Calls visit(walk, x, second, slot) for all chunks, those without elements included: every thread of the block
  // takes part in each. x's slot is free then.
  template <bool kPlain, class Visit>
  __device__ __forceinline__ void for_each(Visit visit) {
    for (int i = 0; i < iterations; ++i) {
      if (source != Source::kKept) {
        fetch<kPlain>(i + chunks_ahead());
        wait();
      }
      Chunk x = *slot(0, i), other;
      if (reads_gradient(pass) || (!kPlain && second)) other = *slot(1, i);
      visit(walk, x, other, slot(0, i));
      walk.advance();
    }
  }
};

// The element loops have three forms. Most layers take the plain one: bounded odds, whole chunks, nothing fused. The
// others decide at run time what else is to be done, with bounded odds or without. Given weights have no odds.
struct Form {
  bool bounded, plain;

  template <class C>
  __device__ __forceinline__ Form(const Block<C>& block, bool bounded)
      : bounded(bounded),
        plain((bounded || C::Posterior::kGiven) && block.a.piece == C::V && !block.a.relu && !block.a.residual) {}

  // Calls run(bool_constant<bounded>, bool_constant<plain>).
  template <class C, class Run>
  __device__ __forceinline__ void choose(Run run) const {
    using P = typename C::Posterior;
    if constexpr (P::kHasPlainForm && !C::kGeneralOnly)
      if (plain) return run(std::bool_constant<!P::kGiven>{}, std::true_type{});
    if constexpr (!P::kGiven && (C::M == 1 || !C::kGeneralOnly))
      if (C::M == 1 || bounded) return run(std::true_type{}, std::false_type{});
    if constexpr (P::kGiven || C::M > 1) run(std::false_type{}, std::false_type{});
  }
};

// What a thread knows of its channels beside the coefficients of its pass.
template <class C, bool kBounded>
struct EStep {
  using S = typename C::S;
  typename C::Posterior::template Weights<C, kBounded> weights;
  S origin[C::kChannels];

  __device__ __forceinline__ EStep(const Block<C>& block, const Shared<C>& shared) : weights(block, shared) {
    CBN_UNROLL
    for (int channel = 0; channel < C::kChannels; ++channel)
      origin[channel] = static_cast<S>(shared.origin[block.column * C::kChannels + channel]);
  }
};

// Sums of the thread's elements: Moments or GradientSums of each of its channels.
template <class C, Pass pass, bool kBounded, bool kPlain, class Work, class Sums>
__device__ __forceinline__ void reduce(const Block<C>& block, const Shared<C>& shared, Work& chunks,
                                       Sums (&sums)[C::kChannels]) {
  using S = typename C::S;
  using Chunk = typename Walk<C>::Chunk;
  const Arguments& a = block.a;
  EStep<C, kBounded> e_step(block, shared);
  Branches<S, C::M> branches[C::kChannels];
  if (pass == Pass::kGradientSums && !kPlain) load_coefficients(block, shared, kRowsOfPosterior, branches);
  chunks.template for_each<kPlain>([&](const Walk<C>& walk, const Chunk& x, const Chunk& grad, Chunk*) {
    const int count = walk.template count<kPlain>();
    if (count == 0) return;
    e_step.weights.template move_to<kPlain>(walk);
    const unsigned bits = !kPlain && pass == Pass::kGradientSums && a.mask ? walk.load_mask() : 0;
    CBN_UNROLL
    for (int v = 0; v < C::V; ++v) {
      const int channel = C::kChannelsLast ? v : 0;
      const S z = static_cast<S>(x.element[v]) - e_step.origin[channel];
      S e[C::M];
      S factor = e_step.weights(v, z, e);
      // A point that does not exist has no responsibilities.
      if (!kPlain && v >= count) factor = 0;
      if constexpr (pass == Pass::kMoments) {
        accumulate(sums[channel], e, factor, z);
      } else {
        S g = static_cast<S>(grad.element[v]);
        if (!kPlain && a.relu) {
          const bool passed = a.mask ? bits >> v & 1 : passes_relu(combine(branches[channel], e, z));
          g = passed ? g : S(0);
        }
        accumulate(sums[channel], e, factor, z, g);
      }
    }
  });
}

template <class C, bool kBounded, bool kPlain, class Work>
__device__ __forceinline__ void normalise(const Block<C>& block, const Shared<C>& shared, Work& chunks) {
  using S = typename C::S;
  using E = typename C::Element;
  using Chunk = typename Walk<C>::Chunk;
  const Arguments& a = block.a;
  EStep<C, kBounded> e_step(block, shared);
  Branches<S, C::M> branches[C::kChannels];
  load_coefficients(block, shared, kRowsOfPosterior, branches);
  chunks.template for_each<kPlain>([&](const Walk<C>& walk, const Chunk& x, const Chunk& residual, Chunk* slot) {
    const int count = walk.template count<kPlain>();
    e_step.weights.template move_to<kPlain>(walk);
    Chunk out;
    unsigned bits = 0;
    CBN_UNROLL
    for (int v = 0; v < C::V; ++v) {
      const int channel = C::kChannelsLast ? v : 0;
      const S z = static_cast<S>(x.element[v]) - e_step.origin[channel];
      S e[C::M];
      const S factor = e_step.weights(v, z, e);
      S y = combine(branches[channel], e, z) * factor;
      if (!kPlain && a.residual) y += static_cast<S>(residual.element[v]);
      if (!kPlain && a.relu) {
        const bool passed = passes_relu(y);
        y = passed ? y : S(0);
        bits |= (v < count && passed) << v;
      }
      out.element[v] = static_cast<E>(y);
    }
    if (count > 0) walk.template store<kPlain>(a.out, out, slot);
    if (!kPlain && a.mask) walk.store_mask(bits);
  });
}

// `constant`: the responsibilities are taken for constants.
template <class C, bool kBounded, bool kPlain, class Work>
__device__ __forceinline__ void differentiate(const Block<C>& block, const Shared<C>& shared, Work& chunks,
                                              bool constant) {
  using S = typename C::S;
  using E = typename C::Element;
  using Chunk = typename Walk<C>::Chunk;
  const Arguments& a = block.a;
  EStep<C, kBounded> e_step(block, shared);
  InputGradient<S, C::M> coefficients[C::kChannels];
  load_coefficients(block, shared, kRowsOfPosterior, coefficients);
  chunks.template for_each<kPlain>([&](const Walk<C>& walk, const Chunk& x, const Chunk& grad, Chunk* slot) {
    if (walk.template count<kPlain>() == 0) return;
    e_step.weights.template move_to<kPlain>(walk);
    const unsigned bits = !kPlain && a.mask ? walk.load_mask() : 0;
    Chunk out, gated;
    CBN_UNROLL
    for (int v = 0; v < C::V; ++v) {
      const int channel = C::kChannelsLast ? v : 0;
      const S z = static_cast<S>(x.element[v]) - e_step.origin[channel];
      S p[C::M], f[C::M];
      const S factor = e_step.weights(v, z, p);
      CBN_UNROLL
      for (int m = 0; m < C::M; ++m) p[m] *= factor;
      S g = static_cast<S>(grad.element[v]);
      if (!kPlain && a.relu) {
        const bool passed = a.mask ? bits >> v & 1 : passes_relu(combine(coefficients[channel], p, z));
        g = passed ? g : S(0);
      }
      gated.element[v] = static_cast<E>(g);
      S grad_x = direct_gradient(coefficients[channel], p, z, g, f);
      if (!constant) grad_x += e_step.weights.template covariance<kPlain>(v, p, z, f);
      out.element[v] = static_cast<E>(grad_x);
    }
    walk.template store<kPlain>(a.out, out, slot);
    if (!kPlain && a.grad_residual) walk.template store<kPlain>(a.grad_residual, gated, slot);
  });
}

// ---------------------------------------------------------------------------------------------------------------------
// Whole passes of a block
// ---------------------------------------------------------------------------------------------------------------------

// The sums of the block's points in shared.totals, and the form of the loops.
template <class C, Pass pass, Source source>
__device__ __forceinline__ Form reduce_block(const Block<C>& block, const Shared<C>& shared, const Walk<C>& start) {
  using S = typename C::S;
  Chunks<C, pass, source> chunks(block, shared, start);
  const Form form(block, C::Posterior::template prepare<pass>(block, shared));
  if (pass == Pass::kGradientSums && block.a.relu && !block.a.mask) {
    for_each_component(block, shared, [&](int m, int j, const Component<S>& component) {
      const int k = C::Posterior::place(shared, m, j);
      shared.store(kRowsOfPosterior, k, j, component.branch(component.used(), shared.origin[j]));
    });
    __syncthreads();
  }
  std::conditional_t<pass == Pass::kMoments, Moments<S, C::M>, GradientSums<S, C::M>> sums[C::kChannels] = {};
  form.choose<C>(
      [&](auto bounded, auto plain) { reduce<C, pass, bounded.value, plain.value>(block, shared, chunks, sums); });
  block_sum(block, shared, sums);
  return form;
}

// The output or the input's gradient of the block's points, when the coefficients are there.
template <class C, Pass pass, class Work>
__device__ __forceinline__ void map_block(const Block<C>& block, const Shared<C>& shared, Work& chunks, Form form) {
  const bool constant = C::M == 1 || C::Posterior::kConstant || block.a.detach_responsibility;
  form.choose<C>([&](auto bounded, auto plain) {
    if constexpr (pass == Pass::kNormalise)
      normalise<C, bounded.value, plain.value>(block, shared, chunks);
    else if (plain.value && constant)
      differentiate<C, bounded.value, plain.value>(block, shared, chunks, true);
    else
      differentiate<C, bounded.value, plain.value>(block, shared, chunks, !plain.value && constant);
  });
}

// The streaming reductions: the sums of each split, and what they are relative to, for the kernel that finishes them.
// Neighbouring blocks take neighbouring channels: together they read connected memory.
template <class C, Pass pass>
__global__ void __launch_bounds__(C::kThreads, 1) reduce_kernel(const __grid_constant__ Arguments a) {
  using S = typename C::S;
  const Block<C> block(a, blockIdx.x % a.channel_blocks, blockIdx.x / a.channel_blocks);
  const Shared<C> shared(block.channels);
  reduce_block<C, pass, Source::kStream>(block, shared, Walk<C>(block));
  for_each_component(block, shared, [&](int m, int j, const Component<S>& component) {
    const int64_t size = a.components * a.channels;
    constexpr int kRows = pass == Pass::kMoments ? kMomentRows : kGradientRows;
    for (int row = 0; row < kRows; ++row)
      static_cast<S*>(a.partials)[(block.split * kRows + row) * size + component.i] =
          static_cast<S>(shared.totals[(row * C::M + m) * shared.K + j]);
    if (m == 0 && block.split == 0)
      static_cast<S*>(a.origins)[block.first_channel + j] = static_cast<S>(shared.origin[j]);
  });
}

// The second passes: in the reverse order, because what the first pass read last is still in the cache.
template <class C, Pass pass>
__global__ void __launch_bounds__(C::kThreads, 1) map_kernel(const __grid_constant__ Arguments a) {
  using S = typename C::S;
  const unsigned number = gridDim.x - 1 - blockIdx.x;
  const Block<C> block(a, number % a.channel_blocks, number / a.channel_blocks);
  const Shared<C> shared(block.channels);
  Chunks<C, pass, Source::kStream> chunks(block, shared, Walk<C>(block));
  const Form form(block, C::Posterior::template prepare<pass>(block, shared));
  for_each_component(block, shared, [&](int m, int j, const Component<S>& component) {
    const int k = C::Posterior::place(shared, m, j);
    if constexpr (pass == Pass::kNormalise) {
      shared.store(kRowsOfPosterior, k, j, component.branch(component.used(), shared.origin[j]));
      if (block.split == 0) component.keep_running();
    } else {
      shared.store(kRowsOfPosterior, k, j,
                   component.input_gradient(component.used(), shared.origin[j], component.read(a.grad_weight, 0),
                                            component.read(a.grad_bias, 0)));
    }
  });
  __syncthreads();
  map_block<C, pass>(block, shared, chunks, form);
}

// Both passes of a direction in one cluster for each block of channels: forward with kNormalise, backward with
// kInputGradient.
template <class C, Pass pass>
__global__ void __launch_bounds__(C::kThreads, 1) resident_kernel(const __grid_constant__ Arguments a) {
  using S = typename C::S;
  constexpr bool kForward = pass == Pass::kNormalise;
  constexpr int kRows = kForward ? kMomentRows : kGradientRows;
  const Block<C> block(a, blockIdx.x / a.splits, cluster_rank());
  const Shared<C> shared(block.channels);
  const Walk<C> start(block);
  const Form form =
      reduce_block<C, kForward ? Pass::kMoments : Pass::kGradientSums, Source::kFetchAndKeep>(block, shared, start);
  if (a.splits > 1) cluster_sync();
  for_each_component(block, shared, [&](int m, int j, const Component<S>& component) {
    double sums[kRows];
    for (int row = 0; row < kRows; ++row) sums[row] = cluster_total(shared, (row * C::M + m) * shared.K + j);
    const int k = C::Posterior::place(shared, m, j);
    const double origin = shared.origin[j];
    const bool writes = block.split == 0;
    if constexpr (kForward) {
      const Statistics batch = component.finish(sums, origin);
      shared.store(kRowsOfPosterior, k, j, component.branch(batch, origin));
      if (writes) component.write_batch(batch);
      if (writes) component.keep_running();
    } else {
      const Statistics used = component.used();
      const double grad_weight = component.finish(sums, origin, used);
      shared.store(kRowsOfPosterior, k, j, component.input_gradient(used, origin, grad_weight, sums[0]));
      if (writes) component.write_gradients(grad_weight, sums[0]);
    }
  });
  __syncthreads();
  // No block ends while others read its totals; this one has read theirs.
  if (a.splits > 1) cluster_arrive();
  Chunks<C, pass, Source::kKept> chunks(block, shared, start);
  map_block<C, pass>(block, shared, chunks, form);
  if (a.splits > 1) cluster_wait();
}

template <class C>
Kernels kernels_for() {
  return {C::V,
          C::M,
          C::kThreads,
          {reduce_kernel<C, Pass::kMoments>, map_kernel<C, Pass::kNormalise>, resident_kernel<C, Pass::kNormalise>},
          {reduce_kernel<C, Pass::kGradientSums>, map_kernel<C, Pass::kInputGradient>,
           resident_kernel<C, Pass::kInputGradient>}};
}

// Joint mode streams: its maps have all channels of a point.
template <class C>
Kernels kernels_for_joint() {
  using B = PointBlock<C>;
  using S = typename C::S;
  return {C::V,
          C::M,
          C::kThreads,
          {reduce_kernel<C, Pass::kMoments>, map_points_kernel<C, Pass::kNormalise>, nullptr},
          {reduce_kernel<C, Pass::kGradientSums>, map_points_kernel<C, Pass::kInputGradient>, nullptr},
          {sum_components_kernel<C>,
           lay_out_kernel<C, Pass::kMoments>,
           weigh_kernel<C>,
           lay_out_kernel<C, Pass::kNormalise>,
           lay_out_kernel<C, Pass::kInputGradient>,
           sizeof(ChannelRows<S, Distances, C::M>),
           sizeof(ChannelRows<S, Branches, C::M>),
           sizeof(ChannelRows<S, PointGradient, C::M>),
           {B::kThreads, B::kPoints, B::kSide, std::max(B::kShared, PointMoments<C>::kShared)},
           B::kShared}};
}

template <class E, bool kLast>
Kernels kernels_of_channels(int components) {
  if (components == 1) return kernels_for<Config<E, 1, kLast, ChannelPosterior>>();
  if (components == 2) return kernels_for<Config<E, 2, kLast, ChannelPosterior>>();
  if (components <= 4) return kernels_for<Config<E, 4, kLast, ChannelPosterior>>();
  if (components <= 8) return kernels_for<Config<E, 8, kLast, ChannelPosterior>>();
  return kernels_for<Config<E, kMaxComponents, kLast, ChannelPosterior>>();
}

// A component costs little without a mixture, so that fewer numbers of them are compiled; float64 is for checks.
template <class E, bool kLast>
Kernels kernels_of_joint(int components) {
  if constexpr (!std::is_same_v<E, double>) {
    if (components <= 4) return kernels_for_joint<Config<E, 4, kLast, JointPosterior>>();
    if (components <= 8) return kernels_for_joint<Config<E, 8, kLast, JointPosterior>>();
  }
  return kernels_for_joint<Config<E, kMaxComponents, kLast, JointPosterior>>();
}

template <class E, bool kLast>
Kernels kernels_of_groups(int components) {
  if constexpr (!std::is_same_v<E, double>) {
    if (components <= 4) return kernels_for<Config<E, 4, kLast, GroupPosterior>>();
    if (components <= 8) return kernels_for<Config<E, 8, kLast, GroupPosterior>>();
  }
  return kernels_for<Config<E, kMaxComponents, kLast, GroupPosterior>>();
}

template <class E>
Kernels kernels_of(int components, bool channels_last, Mode mode) {
  if (has_posterior(mode, components))
    return channels_last ? kernels_of_joint<E, true>(components) : kernels_of_joint<E, false>(components);
  if (mode == Mode::kGroups)
    return channels_last ? kernels_of_groups<E, true>(components) : kernels_of_groups<E, false>(components);
  return channels_last ? kernels_of_channels<E, true>(components) : kernels_of_channels<E, false>(components);
}

}  // namespace cbn
