// The kernels: each walks over points, calls mixture.h and stores. A pass that reduces is followed by one that
// maps: two kernels that both read the values (streaming), or one that keeps them on chip (resident).
#pragma once

#include "joint.cuh"

namespace cbn {

// The forms that the element loops are compiled in. Most layers take those for whole chunks, bounded odds, and nothing
// beside the plain pass or one of two fused ones. Given weights have no odds.
template <bool kIsBounded, bool kAreWhole, Fused kIsFused>
struct Form {
  static constexpr bool kBounded = kIsBounded, kWhole = kAreWhole;
  static constexpr Fused kFused = kIsFused;
};

// Which of them a kernel has: those for whole chunks, the one for any, or all.
enum class Forms { kWhole, kAny, kAll };

// Calls run(Form) with the fastest one that fits.
template <class C, Pass pass, Forms forms, class Run>
__device__ __forceinline__ void choose_form(const Arguments& a, bool bounded, Run run) {
  using P = typename C::Posterior;
  constexpr bool kHasOdds = !P::kGiven && C::M > 1;
  if constexpr (forms != Forms::kAny && C::kHasFastForms) {
    if (forms == Forms::kWhole || a.chunks_are_whole) {
      const Fused fused = pass == Pass::kMoments ? Fused::kNothing : a.fused;
      if (!kHasOdds || bounded) {
        if (fused == Fused::kNothing) return run(Form<!P::kGiven, true, Fused::kNothing>{});
        if constexpr (!P::kGiven && pass != Pass::kMoments) {
          if (fused == Fused::kRelu) return run(Form<true, true, Fused::kRelu>{});
          if (fused == Fused::kSum) return run(Form<true, true, Fused::kSum>{});
        }
      }
      if constexpr (kHasOdds)
        if (fused == Fused::kNothing) return run(Form<false, true, Fused::kNothing>{});
      if constexpr (pass != Pass::kMoments) return run(Form < !P::kGiven && !kHasOdds, true, Fused::kAny > {});
    }
  }
  if constexpr (forms != Forms::kWhole || !C::kHasFastForms)
    run(Form < !P::kGiven && !kHasOdds, false, Fused::kAny > {});
}

template <class C, class F>
using WalkOf = Walk<C, std::conditional_t<F::kWhole, uint32_t, int64_t>>;

// Chunks of a thread that are loaded together: fewer where registers are needed for other things.
template <class C, class F>
constexpr int chunks_together() {
  if (F::kFused == Fused::kAny) return 1;
  const bool lean = F::kBounded && (F::kFused == Fused::kNothing || (F::kFused == Fused::kRelu && !C::kChannelsLast));
  return lean ? C::kTogether : C::most(1, C::kTogether / 2);
}

// Whether another tensor like x is read beside it.
template <class F>
constexpr bool reads_second(Pass pass) {
  return reads_gradient(pass) || F::kFused == Fused::kSum || F::kFused == Fused::kAny;
}

__device__ __forceinline__ const void* second_tensor(const Arguments& a, Pass pass) {
  return reads_gradient(pass) ? a.grad : a.residual;
}

// The thread's chunks straight from memory: several are loaded before the first is worked on, and the other warps of
// the multiprocessor work in the meantime.
template <class C, Pass pass>
struct Stream {
  static constexpr bool kIsStream = true;
  using Chunk = typename Block<C>::Chunk;

  const Block<C>& block;

  // Calls visit(walk, x, second, count) for all chunks, `count` of whose elements exist: every thread of the block
  // takes part in each.
  template <class F, class Visit>
  __device__ __forceinline__ void for_each(Visit visit) {
    const void* const second = second_tensor(block.a, pass);
    const auto load_second = [&](const auto& walk, int count) {
      if (!reads_second<F>(pass) || (F::kFused == Fused::kAny && !second)) return Chunk{};
      return walk.template load<F::kWhole>(second, count);
    };
    WalkOf<C, F> walk(block);
    int done = 0;
    if constexpr (F::kWhole) {
      constexpr int kTogether = chunks_together<C, F>();
      const int whole = block.whole_iterations() / kTogether * kTogether;
#pragma unroll 1
      for (; done < whole; done += kTogether) {
        Chunk x[kTogether], other[kTogether];
        Place<typename WalkOf<C, F>::Offset> places[kTogether];
        CBN_UNROLL
        for (int i = 0; i < kTogether; ++i) {
          places[i] = walk;
          x[i] = walk.template load<true>(block.a.x, C::V);
          other[i] = load_second(walk, C::V);
          walk.advance();
        }
        CBN_UNROLL
        for (int i = 0; i < kTogether; ++i) visit(walk.at(places[i]), x[i], other[i], C::V);
      }
    }
#pragma unroll 1
    for (; done < block.iterations(); ++done, walk.advance()) {
      const int count = done < block.chunks() ? walk.template count<F::kWhole>() : 0;
      const Chunk x = walk.template load<F::kWhole>(block.a.x, count);
      visit(walk, x, load_second(walk, count), count);
    }
  }
};

// The thread's chunks on chip: each has a slot of its own in shared memory, [slots, threads] of each tensor, x, and the
// output's gradient or the residual. The first ones are on their way from the start, while the coefficients are
// prepared. A thread reads its own chunks only. `kFirst`: the pass that fetches, for another pass that does not.
template <class C, Pass pass, bool kFirst>
struct Kept {
  static constexpr bool kIsStream = false;
  using Chunk = typename Block<C>::Chunk;

  const Block<C>& block;
  Chunk* own;  // the thread's first chunk of x
  Walk<C, int64_t> ahead;
  const void* second;

  __device__ __forceinline__ Kept(const Block<C>& block, const Shared<C>& shared)
      : block(block),
        own(reinterpret_cast<Chunk*>(shared.values) + threadIdx.x),
        ahead(block),
        second(second_tensor(block.a, pass)) {
    if constexpr (kFirst) {
#pragma unroll 1
      for (int i = 0; i < kResidentChunksAhead; ++i) fetch<false>(i);
    }
  }

  // Calls visit(walk, x, second, count) as Stream does.
  template <class F, class Visit>
  __device__ __forceinline__ void for_each(Visit visit) {
    WalkOf<C, F> walk(block);
    const int chunks = block.chunks();
    Chunk* slot = own;
    Chunk* const others = own + block.a.slots * blockDim.x;
#pragma unroll 1
    for (int i = 0; i < block.iterations(); ++i, slot += blockDim.x, walk.advance()) {
      if constexpr (kFirst) {
        fetch<F::kWhole>(i + kResidentChunksAhead);
        wait_for_copies<kResidentChunksAhead>();
      }
      Chunk other{};
      if (reads_second<F>(pass) && (F::kFused != Fused::kAny || second)) other = load_at_once(others + (slot - own));
      visit(walk, load_at_once(slot), other, i < chunks ? walk.template count<F::kWhole>() : 0);
    }
  }

 private:
  template <bool kWhole>
  __device__ __forceinline__ void fetch(int i) {
    if (i < block.iterations() && ahead.point < block.length() && ahead.template count<kWhole>() > 0) {
      Chunk* const slot = own + i * blockDim.x;
      ahead.template fetch<kWhole>(slot, block.a.x);
      // What is kept is for the second pass too.
      if (second) ahead.template fetch<kWhole>(slot + block.a.slots * blockDim.x, second);
      ahead.advance();
    }
    commit_copies();
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
      origin[channel] = static_cast<S>(shared.origin[block.column() * C::kChannels + channel]);
  }
};

// The output's gradient, 0 where the ReLU did not pass element v: by the mask's bits, or by the sign of output(), the
// output but for a positive factor.
template <class F, class S, class Output>
__device__ __forceinline__ S passed_gradient(const Arguments& a, S g, unsigned bits, int v, Output output) {
  if (F::kFused == Fused::kNothing || (F::kFused == Fused::kAny && !a.relu)) return g;
  const bool by_mask = F::kFused == Fused::kSum || (F::kFused == Fused::kAny && a.mask);
  const bool passed = by_mask ? bits >> v & 1 : passes_relu(output());
  return passed ? g : S(0);
}

template <class F, class W>
__device__ __forceinline__ unsigned load_mask(const W& walk, int count) {
  const bool has_mask = F::kFused == Fused::kSum || (F::kFused == Fused::kAny && walk.block.a.mask);
  return has_mask ? walk.template load_mask<F::kWhole>(count) : 0;
}

// Sums of the thread's elements: Moments or GradientSums of each of its channels.
template <class F, Pass pass, class C, class Chunks, class Sums>
__device__ __forceinline__ void reduce(const Block<C>& block, const Shared<C>& shared, Chunks& chunks,
                                       Sums (&sums)[C::kChannels]) {
  using S = typename C::S;
  using Chunk = typename Block<C>::Chunk;
  EStep<C, F::kBounded> e_step(block, shared);
  Branches<S, C::M> branches[C::kChannels];
  if (pass == Pass::kGradientSums && F::kFused != Fused::kNothing)
    load_coefficients(block, shared, kRowsOfPosterior, branches);
  chunks.template for_each<F>([&](const auto& walk, const Chunk& x, const Chunk& grad, int count) {
    if (count == 0) return;
    e_step.weights.template move_to<F::kWhole>(walk, count);
    const unsigned bits = pass == Pass::kGradientSums ? load_mask<F>(walk, count) : 0;
    CBN_UNROLL
    for (int v = 0; v < C::V; ++v) {
      const int channel = C::kChannelsLast ? v : 0;
      const S z = static_cast<S>(x.element[v]) - e_step.origin[channel];
      S e[C::M];
      S factor = e_step.weights(v, z, e);
      // A point that does not exist has no responsibilities.
      if (v >= count) factor = 0;
      if constexpr (pass == Pass::kMoments) {
        accumulate(sums[channel], e, factor, z);
      } else {
        const S g = passed_gradient<F>(block.a, static_cast<S>(grad.element[v]), bits, v,
                                       [&] { return combine(branches[channel], e, z); });
        accumulate(sums[channel], e, factor, z, g);
      }
    }
  });
}

template <class F, class C, class Chunks>
__device__ __forceinline__ void normalise(const Block<C>& block, const Shared<C>& shared, Chunks& chunks) {
  using S = typename C::S;
  using E = typename C::Element;
  using Chunk = typename Block<C>::Chunk;
  const Arguments& a = block.a;
  EStep<C, F::kBounded> e_step(block, shared);
  Branches<S, C::M> branches[C::kChannels];
  load_coefficients(block, shared, kRowsOfPosterior, branches);
  const bool relu = F::kFused == Fused::kAny ? a.relu : F::kFused != Fused::kNothing;
  chunks.template for_each<F>([&](const auto& walk, const Chunk& x, const Chunk& residual, int count) {
    e_step.weights.template move_to<F::kWhole>(walk, count);
    Chunk out;
    unsigned bits = 0;
    CBN_UNROLL
    for (int v = 0; v < C::V; ++v) {
      const int channel = C::kChannelsLast ? v : 0;
      const S z = static_cast<S>(x.element[v]) - e_step.origin[channel];
      S e[C::M];
      const S factor = e_step.weights(v, z, e);
      S y = combine(branches[channel], e, z) * factor;
      if (reads_second<F>(Pass::kNormalise)) y += static_cast<S>(residual.element[v]);
      if (relu) {
        const bool passed = passes_relu(y);
        y = passed ? y : S(0);
        bits |= static_cast<unsigned>(v < count && passed) << v;
      }
      out.element[v] = static_cast<E>(y);
    }
    walk.template store<F::kWhole, !Chunks::kIsStream>(a.out, out, count);
    if (F::kFused == Fused::kSum || (F::kFused == Fused::kAny && a.mask))
      walk.template store_mask<F::kFused == Fused::kSum>(bits, count);
  });
}

// Calls differentiate(v, z, gated) for the elements of all chunks; gated(output) is the output's gradient.
template <class F, class C, class Chunks, class Differentiate>
__device__ __forceinline__ void map_gradient(const Block<C>& block, const Shared<C>& shared, Chunks& chunks,
                                             Differentiate differentiate) {
  using S = typename C::S;
  using E = typename C::Element;
  using Chunk = typename Block<C>::Chunk;
  const Arguments& a = block.a;
  EStep<C, F::kBounded> e_step(block, shared);
  chunks.template for_each<F>([&](const auto& walk, const Chunk& x, const Chunk& grad, int count) {
    if (count == 0) return;
    e_step.weights.template move_to<F::kWhole>(walk, count);
    const unsigned bits = load_mask<F>(walk, count);
    Chunk out, passed;
    CBN_UNROLL
    for (int v = 0; v < C::V; ++v) {
      const S z = static_cast<S>(x.element[v]) - e_step.origin[C::kChannelsLast ? v : 0];
      const auto gated = [&](auto output) {
        const S g = passed_gradient<F>(a, static_cast<S>(grad.element[v]), bits, v, output);
        passed.element[v] = static_cast<E>(g);
        return g;
      };
      out.element[v] = static_cast<E>(differentiate(e_step.weights, v, z, gated));
    }
    walk.template store<F::kWhole, !Chunks::kIsStream>(a.out, out, count);
    if (F::kFused == Fused::kSum || (F::kFused == Fused::kAny && a.grad_residual))
      walk.template store<F::kWhole, !Chunks::kIsStream>(a.grad_residual, passed, count);
  });
}

template <class F, Pass pass, class C, class Chunks>
__device__ __forceinline__ void differentiate(const Block<C>& block, const Shared<C>& shared, Chunks& chunks) {
  using S = typename C::S;
  constexpr int M = C::M;
  if constexpr (pass == Pass::kDirectGradient) {
    DirectGradient<S, M> coefficients[C::kChannels];
    load_coefficients(block, shared, kRowsOfPosterior, coefficients);
    map_gradient<F>(block, shared, chunks, [&](const auto& weights, int v, S z, auto gated) {
      const auto& in = coefficients[C::kChannelsLast ? v : 0];
      S e[M];
      const S factor = weights(v, z, e);
      const S g = gated([&] { return combine(in.branches, e, z); });
      return direct_gradient(in, e, z, g) * factor;
    });
  } else if constexpr (F::kBounded) {
    ExpandedGradient<S, M> coefficients[C::kChannels];
    load_coefficients(block, shared, 0, coefficients);
    map_gradient<F>(block, shared, chunks, [&](const auto&, int v, S z, auto gated) {
      const auto& in = coefficients[C::kChannelsLast ? v : 0];
      const ExpandedWeights<S, M> weights(in, z);
      return weights.gradient(in, z, gated([&] { return weights.combine(in, z); }));
    });
  } else {
    InputGradient<S, M> coefficients[C::kChannels];
    load_coefficients(block, shared, kRowsOfPosterior, coefficients);
    map_gradient<F>(block, shared, chunks, [&](const auto& weights, int v, S z, auto gated) {
      const auto& in = coefficients[C::kChannelsLast ? v : 0];
      S p[M], f[M];
      const S factor = weights(v, z, p);
      CBN_UNROLL
      for (int m = 0; m < M; ++m) p[m] *= factor;
      const S g = gated([&] { return combine(in, p, z); });
      return direct_gradient(in, p, z, g, f) + covariance(weights.odds[C::kChannelsLast ? v : 0], p, z, f);
    });
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Whole passes of a block
// ---------------------------------------------------------------------------------------------------------------------

// Puts what a component brings to the output into shared memory; one that does not exist brings nothing.
template <class C>
__device__ __forceinline__ void store_branch(const Shared<C>& shared, const Item<C>& item, const Statistics& used) {
  if (!item.in_block) return;
  const int k = C::Posterior::place(shared, item.m, item.j);
  Branches<double, 1> branch{};
  if (item.exists) branch = item.component.branch(used, shared.origin[item.j]);
  shared.store(kRowsOfPosterior, k, item.j, branch);
}

// Likewise to the input's gradient. All lanes of a channel take part.
template <Pass pass, class C>
__device__ __forceinline__ void store_gradient(const Shared<C>& shared, const Item<C>& item,
                                               const InputGradient<double, 1>& own, bool bounded) {
  const int j = item.in_block ? item.j : 0, k = C::Posterior::place(shared, item.m, j);
  InputGradient<double, 1> of = own;
  if constexpr (pass == Pass::kDirectGradient) {
    if (item.in_block) shared.store(kRowsOfPosterior, k, j, direct_gradient(own));
  } else if (!bounded) {
    if (item.in_block) shared.store(kRowsOfPosterior, k, j, own);
  } else {
    InputGradient<double, 1> widest;
    CBN_UNROLL
    for (int i = 0; i < InputGradient<double, 1>::kRows; ++i)
      *widest.row(i) = of_component<C>(*of.row(i), C::Posterior::place(shared, 0, j));
    ExpandedGradient<double, 1> expanded{};
    if (item.exists)
      expanded = k == 0 ? expanded_gradient(own) : expanded_gradient(own, widest, shared.load_odds(k, j));
    if (item.in_block) shared.store(0, k, j, expanded);
  }
}

// The sums of the block's points in shared.totals; `bounded` says in which form the odds are.
template <Pass pass, Forms forms, class C, class Chunks>
__device__ __forceinline__ void reduce_block(const Block<C>& block, const Shared<C>& shared, Chunks& chunks,
                                             bool bounded) {
  using S = typename C::S;
  if (pass == Pass::kGradientSums && block.a.relu && !block.a.mask) {
    for_each_component(block, shared, [&](const Item<C>& item) {
      store_branch(shared, item, item.exists ? item.component.used() : Statistics{});
    });
    __syncthreads();
  }
  std::conditional_t<pass == Pass::kMoments, Moments<S, C::M>, GradientSums<S, C::M>> sums[C::kChannels] = {};
  choose_form<C, pass, forms>(block.a, bounded,
                              [&](auto form) { reduce<decltype(form), pass>(block, shared, chunks, sums); });
  block_sum(block, shared, sums);
}

// The output or the input's gradient of the block's points, when the coefficients are there.
template <Pass pass, Forms forms, class C, class Chunks>
__device__ __forceinline__ void map_block(const Block<C>& block, const Shared<C>& shared, Chunks& chunks,
                                          bool bounded) {
  choose_form<C, pass, forms>(block.a, bounded, [&](auto form) {
    if constexpr (pass == Pass::kNormalise)
      normalise<decltype(form)>(block, shared, chunks);
    else
      differentiate<decltype(form), pass>(block, shared, chunks);
  });
}

// Blocks of the streaming path that a multiprocessor is to have: the more, the more loads are under way; the passes'
// coefficients and sums want the rest of its registers.
template <class C, Pass pass, Forms forms>
constexpr int streaming_blocks() {
  constexpr int kCoefficients = C::kChannels * C::M * C::kWords;
  constexpr bool kGradient = pass == Pass::kInputGradient;
  if (C::Posterior::kGiven || C::kWords > 1 || kCoefficients > 16) return 1;
  if (forms == Forms::kAny) return kCoefficients > 8 ? 1 : 2;
  if (kCoefficients > 8) return pass == Pass::kNormalise ? 2 : 1;
  if (kCoefficients > 4) return reads_gradient(pass) || C::M > 4 ? 2 : 3;
  return kGradient ? 3 : 4;
}

// No more than blocks of threads: a division of 32 bits is a fraction of one of 64.
__device__ __forceinline__ unsigned channel_blocks(const Arguments& a) {
  return static_cast<unsigned>(a.channel_blocks);
}

// The streaming reductions: the sums of each split, and what they are relative to, for the kernel that finishes them.
// Neighbouring blocks take neighbouring channels: together they read connected memory.
template <class C, Pass pass, Forms forms>
__global__ void __launch_bounds__(kStreamingThreads, (streaming_blocks<C, pass, forms>()))
    reduce_kernel(const __grid_constant__ Arguments a) {
  using S = typename C::S;
  const Block<C> block(a, blockIdx.x % channel_blocks(a), blockIdx.x / channel_blocks(a));
  const Shared<C> shared(block.channels());
  Stream<C, pass> chunks{block};
  const bool bounded = C::Posterior::template prepare<pass>(block, shared, forms == Forms::kWhole);
  reduce_block<pass, forms>(block, shared, chunks, bounded);
  for_each_component(block, shared, [&](const Item<C>& item) {
    if (!item.exists) return;
    const int64_t size = a.components * a.channels;
    constexpr int kRows = pass == Pass::kMoments ? kMomentRows : kGradientRows;
    for (int row = 0; row < kRows; ++row)
      static_cast<S*>(a.partials)[(static_cast<int64_t>(block.split) * kRows + row) * size + item.component.i] =
          static_cast<S>(shared.totals[(row * C::M + item.m) * shared.K + item.j]);
    if (item.m == 0 && block.split == 0)
      static_cast<S*>(a.origins)[block.first_channel() + item.j] = static_cast<S>(shared.origin[item.j]);
  });
}

// The second passes: in the reverse order, because what the first pass read last is still in the cache.
template <class C, Pass pass, Forms forms>
__global__ void __launch_bounds__(kStreamingThreads, (streaming_blocks<C, pass, forms>()))
    map_kernel(const __grid_constant__ Arguments a) {
  const unsigned number = gridDim.x - 1 - blockIdx.x;
  const Block<C> block(a, number % channel_blocks(a), number / channel_blocks(a));
  const Shared<C> shared(block.channels());
  Stream<C, pass> chunks{block};
  const bool bounded = C::Posterior::template prepare<pass>(block, shared, forms == Forms::kWhole);
  for_each_component(block, shared, [&](const Item<C>& item) {
    const Statistics used = item.exists ? item.component.used() : Statistics{};
    if constexpr (pass == Pass::kNormalise) {
      store_branch(shared, item, used);
      if (item.exists && block.split == 0) item.component.keep_running();
    } else {
      InputGradient<double, 1> own{};
      if (item.exists)
        own = item.component.input_gradient(used, shared.origin[item.j], item.component.read(a.grad_weight, 0),
                                            item.component.read(a.grad_bias, 0));
      store_gradient<pass>(shared, item, own, bounded);
    }
  });
  __syncthreads();
  map_block<pass, forms>(block, shared, chunks, bounded);
}

// Both passes of a direction in one cluster for each block of channels: forward with kNormalise, backward with one of
// the gradients.
template <class C, Pass pass>
__global__ void __launch_bounds__(C::kThreads, 1) resident_kernel(const __grid_constant__ Arguments a) {
  constexpr bool kForward = pass == Pass::kNormalise;
  constexpr Pass kFirst = kForward ? Pass::kMoments : Pass::kGradientSums;
  constexpr int kRows = kForward ? kMomentRows : kGradientRows;
  const Block<C> block(a, blockIdx.x / static_cast<unsigned>(a.splits), cluster_rank());
  const Shared<C> shared(block.channels());
  Kept<C, pass, true> fetched(block, shared);
  const bool bounded = C::Posterior::template prepare<kFirst>(block, shared, C::kHasFastForms && a.chunks_are_whole);
  reduce_block<kFirst, Forms::kAll>(block, shared, fetched, bounded);
  if (a.splits > 1) cluster_sync();
  for_each_component(block, shared, [&](const Item<C>& item) {
    const bool writes = item.exists && block.split == 0;
    double sums[kRows] = {};
    for (int row = 0; row < kRows && item.exists; ++row)
      sums[row] = cluster_total(shared, (row * C::M + item.m) * shared.K + item.j);
    const double origin = item.exists ? shared.origin[item.j] : 0;
    if constexpr (kForward) {
      const Statistics batch = item.exists ? item.component.finish(sums, origin) : Statistics{};
      store_branch(shared, item, batch);
      if (writes) item.component.write_batch(batch);
      if (writes) item.component.keep_running();
    } else {
      InputGradient<double, 1> own{};
      if (item.exists) {
        const Statistics used = item.component.used();
        const double grad_weight = item.component.finish(sums, origin, used);
        own = item.component.input_gradient(used, origin, grad_weight, sums[0]);
        if (writes) item.component.write_gradients(grad_weight, sums[0]);
      }
      store_gradient<pass>(shared, item, own, bounded);
    }
  });
  __syncthreads();
  // No block ends while others read its totals; this one has read theirs.
  if (a.splits > 1) cluster_arrive();
  Kept<C, pass, false> kept(block, shared);
  map_block<pass, Forms::kAll>(block, shared, kept, bounded);
  if (a.splits > 1) cluster_wait();
}

// A streaming kernel in its forms.
template <class C, Pass pass>
Kernels::Pass reductions() {
  constexpr Forms kFastest = C::kHasFastForms ? Forms::kWhole : Forms::kAny;
  return {reduce_kernel<C, pass, kFastest>, reduce_kernel<C, pass, Forms::kAny>};
}
template <class C, Pass pass>
Kernels::Pass maps() {
  constexpr Forms kFastest = C::kHasFastForms ? Forms::kWhole : Forms::kAny;
  return {map_kernel<C, pass, kFastest>, map_kernel<C, pass, Forms::kAny>};
}

template <class C>
Kernels kernels_for() {
  constexpr bool kConstant = C::M == 1 || C::Posterior::kConstant;
  constexpr Pass kGradient = kConstant ? Pass::kDirectGradient : Pass::kInputGradient;
  const Kernels::Pass gradient_sums = reductions<C, Pass::kGradientSums>();
  return {C::V,
          C::M,
          C::kThreads,
          {reductions<C, Pass::kMoments>(), maps<C, Pass::kNormalise>(), resident_kernel<C, Pass::kNormalise>},
          {gradient_sums, maps<C, kGradient>(), resident_kernel<C, kGradient>},
          {gradient_sums, maps<C, Pass::kDirectGradient>(), resident_kernel<C, Pass::kDirectGradient>}};
}

// Joint mode streams: its maps have all channels of a point.
template <class C>
Kernels kernels_for_joint() {
  using B = PointBlock<C>;
  using S = typename C::S;
  const auto map = [](Kernels::Kernel kernel) { return Kernels::Pass{kernel, kernel}; };
  const Kernels::Direction backward{reductions<C, Pass::kGradientSums>(),
                                    map(map_points_kernel<C, Pass::kInputGradient>), nullptr};
  return {C::V,
          C::M,
          C::kThreads,
          {reductions<C, Pass::kMoments>(), map(map_points_kernel<C, Pass::kNormalise>), nullptr},
          backward,
          backward,
          {sum_components_kernel<C>,
           weigh_kernel<C>,
           {lay_out_kernel<C, Distances>, sizeof(ChannelRows<S, Distances, C::M>)},
           {lay_out_kernel<C, InputGradient>, sizeof(ChannelRows<S, InputGradient, C::M>)},
           {lay_out_kernel<C, Branches>, sizeof(ChannelRows<S, Branches, C::M>)},
           {lay_out_kernel<C, PointGradient>, sizeof(ChannelRows<S, PointGradient, C::M>)},
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
