// The four loops of the CPU operators over the element functions of mixture.h, each written once for every posterior,
// for the instruction set of the including file. Everything has internal linkage: the same templates are compiled for
// several instruction sets.
#pragma once

#include "joint.h"

namespace cbn {
namespace {

// Vectors added in float before the sums move on to double.
constexpr int kVectorsPerFlush = 64;

// What the components of a block bring to the element functions beside their weights.
template <class Posterior>
struct Coefficients {
  using E = typename Posterior::E;
  using V = typename Posterior::V;
  static constexpr int M = Posterior::kWeights;

  Branches<V, M> branches[Posterior::kMixtures];      // where an output or its sign is computed by itself
  DirectGradient<V, M> direct[Posterior::kMixtures];  // in Pass::kInputGradient, one of these three
  ExpandedGradient<V, M> expanded;
  InputGradient<V, M> whole;

  // Not inlined: this runs once per task.
  __attribute__((noinline)) Coefficients(const Block<E>& block, const Posterior& posterior) {
    const Work& work = block.work;
    for (int i = 0; i < posterior.mixtures(); ++i) {
      const auto gradient = [&](int k, int j) {
        const auto component = block.component(posterior.component(i, k, j), j);
        return component.input_gradient(component.used(), static_cast<double>(posterior.origin[i][j]),
                                        component.read(work.grad_weight, 0), component.read(work.grad_bias, 0));
      };
      const auto fill = [&](auto& rows, auto make) {
        rows = {};
        for (int k = 0; k < posterior.weights(); ++k)
          for (int j = 0; j < block.channels; ++j) block.put(rows, k, j, make(k, j));
      };
      const bool output = block.pass == Pass::kNormalise || (work.relu && work.mask == nullptr);
      if (block.pass != Pass::kInputGradient) {
        if (output)
          fill(branches[i], [&](int k, int j) {
            const auto component = block.component(posterior.component(i, k, j), j);
            return component.branch(component.used(), static_cast<double>(posterior.origin[i][j]));
          });
      } else if (Posterior::kConstant || Posterior::kGiven || work.detach_responsibility) {
        fill(direct[i], [&](int k, int j) { return direct_gradient(gradient(k, j)); });
      } else if constexpr (!Posterior::kConstant && !Posterior::kGiven) {
        if (!posterior.bounded)
          fill(whole, gradient);
        else
          fill(expanded, [&](int k, int j) {
            if (k == 0) return expanded_gradient(gradient(0, j));
            const LogDensity widest = posterior.density(block, 0, j);
            const double origin = static_cast<double>(posterior.origin[0][j]);
            return expanded_gradient(gradient(k, j), gradient(0, j),
                                     odds_parabola(posterior.density(block, k, j), widest, origin));
          });
      }
    }
  }
};

// Sums over vectors: in float for a while, then in double.
template <template <class, int> class Sums, class Posterior>
class LongSums {
  using E = typename Posterior::E;
  using V = typename Posterior::V;
  static constexpr int M = Posterior::kWeights, kLanes = Block<E>::kLanes, kRows = Sums<V, M>::kRows;

 public:
  struct Mixture {
    Sums<V, M> sums;
    int vectors;  // how many were added to `sums`
    double totals[kRows][M][kLanes];
  };
  Mixture of[Posterior::kMixtures];

  explicit LongSums(int mixtures) {
    for (int i = 0; i < mixtures; ++i) of[i] = {};
  }

  // Not inlined: `sums` has a copy made of it here, and itself stays in registers.
  __attribute__((noinline)) void flush(int mixture, Sums<V, M> sums) {
    for (int i = 0; i < kRows; ++i)
      for (int k = 0; k < M; ++k)
        for (int l = 0; l < kLanes; ++l) of[mixture].totals[i][k][l] += static_cast<double>(sums.row(i)[k][l]);
  }

  // As ReduceTask says.
  __attribute__((noinline)) void write(double* out, const Block<E>& block, const Posterior& posterior) {
    for (int i = 0; i < posterior.mixtures(); ++i) {
      flush(i, of[i].sums);
      for (int k = 0; k < posterior.weights(); ++k) {
        for (int j = 0; j < block.channels; ++j) {
          double* sum = out + posterior.component(i, k, j) * block.channels + j;
          for (int row = 0; row < kRows; ++row, sum += block.work.components * block.channels) {
            const double (&lanes)[kLanes] = of[i].totals[row][k];
            *sum = block.work.channels_last ? lanes[j] : 0;
            for (int l = 0; l < kLanes && !block.work.channels_last; ++l) *sum += lanes[l];
          }
          *sum = static_cast<double>(posterior.origin[i][j]);
        }
      }
    }
  }
};

// Calls add(sums, mixture, e, factor, z, place) for all vectors of a block's images [begin, end).
template <template <class, int> class Sums, class Posterior, class E, class Add>
CBN_INLINE void reduce(const Block<E>& block, const Posterior& posterior, int64_t begin, int64_t end, double* out,
                       Add add) {
  using V = typename Posterior::V;
  LongSums<Sums, Posterior> totals(posterior.mixtures());
  posterior.visit(begin, end, [&](const auto& weigh, int mixture, int64_t first, int64_t last) {
    const V origin = posterior.origin[mixture];
    auto& kept = totals.of[mixture];
    auto sums = kept.sums;
    int vectors = kept.vectors;
    block.for_each_vector(first, last, [&](const Place& place) __attribute__((always_inline)) {
      const V z = load<E>(block.x() + place.offset, place.count) - origin;
      V e[Posterior::kWeights];
      const V factor = weigh(z, place, e);
      add(sums, mixture, e, factor, z, place);
      if (++vectors == kVectorsPerFlush) {
        totals.flush(mixture, sums);
        sums = {};
        vectors = 0;
      }
    });
    kept.sums = sums;
    kept.vectors = vectors;
  });
  totals.write(out, block, posterior);
}

template <class Posterior>
void moments(const Work& work, int64_t index, int64_t begin, int64_t end, double* sums) {
  using V = typename Posterior::V;
  using B = Block<typename Posterior::E>;
  const B block(work, index, Pass::kMoments);
  const Posterior posterior(block);
  reduce<Moments>(block, posterior, begin, end, sums,
                  [](auto& current, int, const auto& e, V factor, V z, const Place& place)
                      __attribute__((always_inline)) {
                        if (place.count < B::kLanes) factor = Math<V>::where_set((1u << place.count) - 1, factor);
                        accumulate(current, e, factor, z);
                      });
}

template <class Posterior, bool kFused>
void gradient_sums(const Work& work, int64_t index, int64_t begin, int64_t end, double* sums) {
  using E = typename Posterior::E;
  using V = typename Posterior::V;
  const Block<E> block(work, index, Pass::kGradientSums);
  const Posterior posterior(block);
  const Coefficients<Posterior> coefficients(block, posterior);
  reduce<GradientSums>(block, posterior, begin, end, sums,
                       [&](auto& current, int mixture, const auto& e, V factor, V z, const Place& place)
                           __attribute__((always_inline)) {
                             // The gradient is 0 beyond `count`, and so is what is added there.
                             const auto output = [&] { return combine(coefficients.branches[mixture], e, z); };
                             accumulate(current, e, factor, z, passed_gradient<kFused, E>(work, place, output));
                           });
}

template <class Posterior, bool kFused>
void normalise(const Work& work, int64_t index, int64_t begin, int64_t end) {
  using E = typename Posterior::E;
  using V = typename Posterior::V;
  const Block<E> block(work, index, Pass::kNormalise);
  const Posterior posterior(block);
  const Coefficients<Posterior> coefficients(block, posterior);
  const auto* residual = static_cast<const typename E::Memory*>(work.residual);
  uint32_t* const mask = work.mask;
  const bool relu = work.relu;
  posterior.visit(begin, end, [&](const auto& weigh, int mixture, int64_t first, int64_t last) {
    const V origin = posterior.origin[mixture];
    const auto& branches = coefficients.branches[mixture];
    block.for_each_vector(first, last, [&](const Place& place) __attribute__((always_inline)) {
      const V z = load<E>(block.x() + place.offset, place.count) - origin;
      V e[Posterior::kWeights];
      const V factor = weigh(z, place, e);
      V y = combine(branches, e, z) * factor;
      if constexpr (kFused) {
        if (residual) y = y + load<E>(residual + place.offset, place.count);
        if (mask) set_bits<Block<E>::kLanes>(mask, place.offset, place.count, Math<V>::above_zero(y));
        if (relu) y = Math<V>::max(y, V{});
      }
      store<E>(block.out() + place.offset, place.count, y);
    });
  });
}

template <class Posterior, bool kFused>
void input_gradient(const Work& work, int64_t index, int64_t begin, int64_t end) {
  using E = typename Posterior::E;
  using V = typename Posterior::V;
  const Block<E> block(work, index, Pass::kInputGradient);
  const Posterior posterior(block);
  const Coefficients<Posterior> coefficients(block, posterior);
  auto* grad_residual = static_cast<typename E::Memory*>(work.grad_residual);
  const bool detach = work.detach_responsibility;
  posterior.visit(begin, end, [&](const auto& weigh, int mixture, int64_t first, int64_t last) {
    const V origin = posterior.origin[mixture];
    // differentiate(z, place, gated) gives the gradient; gated(output) that of the output.
    const auto map = [&](auto differentiate) __attribute__((always_inline)) {
      block.for_each_vector(first, last, [&](const Place& place) __attribute__((always_inline)) {
        const auto gated = [&](auto output) __attribute__((always_inline)) {
          const V g = passed_gradient<kFused, E>(work, place, output);
          if (kFused && grad_residual) store<E>(grad_residual + place.offset, place.count, g);
          return g;
        };
        const V z = load<E>(block.x() + place.offset, place.count) - origin;
        store<E>(block.out() + place.offset, place.count, differentiate(z, place, gated));
      });
    };
    if (Posterior::kConstant || Posterior::kGiven || detach) {
      const auto& in = coefficients.direct[mixture];
      map([&](V z, const Place& place, auto gated) __attribute__((always_inline)) {
        V e[Posterior::kWeights];
        const V factor = weigh(z, place, e);
        const V g = gated([&] { return combine(in.branches, e, z); });
        V dx = direct_gradient(in, e, z, g) * factor;
        if constexpr (Posterior::kGiven) {
          if (!detach) dx = dx + weigh.covariance(z, place);
        }
        return dx;
      });
    } else if constexpr (!Posterior::kConstant && !Posterior::kGiven) {
      if constexpr (std::decay_t<decltype(weigh)>::kIsBounded)
        map([&, &in = coefficients.expanded](V z, const Place&, auto gated) __attribute__((always_inline)) {
          const ExpandedWeights<V, Posterior::kWeights> weights(in, z);
          return weights.gradient(in, z, gated([&] { return weights.combine(in, z); }));
        });
      else
        map([&, &in = coefficients.whole](V z, const Place& place, auto gated) __attribute__((always_inline)) {
          V p[Posterior::kWeights], f[Posterior::kWeights];
          const V factor = weigh(z, place, p);
          CBN_UNROLL
          for (V& weight : p) weight = weight * factor;
          const V g = gated([&] { return combine(in, p, z); });
          return direct_gradient(in, p, z, g, f) + weigh.covariance(p, z, f);
        });
    }
  });
}

template <class Posterior, bool kFused>
Tasks make_tasks() {
  return {Block<typename Posterior::E>::kLanes,
          moments<Posterior>,
          normalise<Posterior, kFused>,
          gradient_sums<Posterior, kFused>,
          input_gradient<Posterior, kFused>,
          nullptr,
          nullptr,
          nullptr};
}

// One form, which asks at every vector what is fused: M loads of weights a vector hide that.
template <class E, int M>
Tasks make_joint_tasks() {
  Tasks tasks = make_tasks<GivenPosterior<E, M>, true>();
  tasks.sampled_origin = sampled_origin<E>;
  tasks.weigh_points = weigh_points<E, M>;
  tasks.differentiate_weights = differentiate_weights<E, M>;
  return tasks;
}

// M is compiled for these; the components in between are padded by ones without responsibility.
template <class E, bool kFused>
Tasks tasks_of(const Problem& p) {
  if (p.mode == Mode::kGroups) return make_tasks<GroupPosterior<E>, kFused>();
  if (p.components == 1) return make_tasks<ChannelPosterior<E, 1>, kFused>();
  if (p.components == 2) return make_tasks<ChannelPosterior<E, 2>, kFused>();
  if (p.components <= 4) return make_tasks<ChannelPosterior<E, 4>, kFused>();
  if (p.components <= 8) return make_tasks<ChannelPosterior<E, 8>, kFused>();
  return make_tasks<ChannelPosterior<E, kMaxComponents>, kFused>();
}

template <class E>
Tasks joint_tasks_of(const Problem& p) {
  if constexpr (!std::is_same_v<E, Double>) {  // which is for checks
    if (p.components <= 4) return make_joint_tasks<E, 4>();
    if (p.components <= 8) return make_joint_tasks<E, 8>();
  }
  return make_joint_tasks<E, kMaxComponents>();
}

inline Tasks tasks(const Problem& p) {
  // The plain kernels pay nothing for what the fused ones ask at every vector.
  const auto of = [&p](auto element) {
    using E = decltype(element);
    if (p.has_posterior()) return joint_tasks_of<E>(p);
    return p.relu || p.residual ? tasks_of<E, true>(p) : tasks_of<E, false>(p);
  };
  if (p.element == Element::kFloat) return of(Float{});
  if (p.element == Element::kDouble) return of(Double{});
  return p.element == Element::kHalf ? of(Half{}) : of(BFloat16{});
}

}  // namespace
}  // namespace cbn
