// The four loops of the CPU operators over the element functions of mixture.h, each written once for every posterior,
// for the instruction set of the including file. Everything has internal linkage: the same templates are compiled for
// several instruction sets.
#pragma once

#include <new>

#include "joint.h"

namespace cbn {
namespace {

// Vectors added in float before the sums move on to double.
constexpr int kVectorsPerFlush = 64;

// Which coefficients the components of a column bring to the element functions beside their weights.
enum class Form { kNone, kBranches, kDirect, kExpanded, kWhole };

template <class Posterior>
struct Coefficients {
  using E = typename Posterior::E;
  using V = typename Posterior::V;
  using D = Vec<double>;
  static constexpr int M = Posterior::kWeights;

  Form form;
  Branches<V, M> branches[Posterior::kMixtures];      // where an output or its sign is computed by itself
  DirectGradient<V, M> direct[Posterior::kMixtures];  // in Pass::kInputGradient, one of these three
  ExpandedGradient<V, M> expanded;
  InputGradient<V, M> whole;

  // Not inlined: this runs once per column.
  __attribute__((noinline)) Coefficients(const Block<E>& block, const Posterior& posterior)
      : form(form_of(block, posterior)) {
    const Work& work = block.work;
    for (int i = 0; i < posterior.mixtures() && form != Form::kNone; ++i) {
      with_rows(i, [](auto& rows) { rows = {}; });
      block.for_each_part([&](int part) {
        const D origin = block.get(posterior.origin[i], part);
        const auto fill = [&](auto& rows, const auto& make) {
          for (int k = 0; k < posterior.weights(); ++k) block.put(rows, k, part, make(k));
        };
        if (form == Form::kBranches) {
          Branches<D, 1> of[M];
          for (int k = 0; k < posterior.weights(); ++k) {
            const auto component = block.component(posterior.component(i, k), part);
            of[k] = component.branch(component.used(), origin);
          }
          posterior.put_in_order(of, part);
          return fill(branches[i], [&](int k) { return of[k]; });
        }
        InputGradient<D, 1> of[M];
        for (int k = 0; k < posterior.weights(); ++k) {
          const auto component = block.component(posterior.component(i, k), part);
          of[k] = component.input_gradient(component.used(), origin, component.read(work.grad_weight, 0),
                                           component.read(work.grad_bias, 0));
        }
        posterior.put_in_order(of, part);
        if (form == Form::kDirect) fill(direct[i], [&](int k) { return direct_gradient(of[k]); });
        if constexpr (!Posterior::kConstant && !Posterior::kGiven) {
          if (form == Form::kWhole) fill(whole, [&](int k) { return of[k]; });
          if (form == Form::kExpanded)
            fill(expanded, [&](int k) {
              return k == 0 ? expanded_gradient(of[0]) : expanded_gradient(of[k], of[0], posterior.parabolas[part][k]);
            });
        }
      });
    }
  }

  void take_channel(int j, int mixtures) {
    for (int i = 0; i < mixtures; ++i) with_rows(i, [j](auto& rows) { spread(rows, j); });
  }

 private:
  static Form form_of(const Block<E>& block, const Posterior& posterior) {
    const Work& work = block.work;
    if (block.pass == Pass::kInputGradient) {
      if (Posterior::kConstant || Posterior::kGiven || work.detach_responsibility) return Form::kDirect;
      if constexpr (!Posterior::kConstant && !Posterior::kGiven)
        return posterior.bounded ? Form::kExpanded : Form::kWhole;
    }
    const bool has_sign = block.pass == Pass::kGradientSums && work.relu && work.mask == nullptr;
    return block.pass == Pass::kNormalise || has_sign ? Form::kBranches : Form::kNone;
  }

  template <class F>
  void with_rows(int i, F f) {
    if (form == Form::kBranches) f(branches[i]);
    if (form == Form::kDirect) f(direct[i]);
    if (form == Form::kExpanded) f(expanded);
    if (form == Form::kWhole) f(whole);
  }
};

// A column, prepared for a pass.
template <class Posterior>
struct Column {
  Block<typename Posterior::E> block;
  Posterior posterior;
  Coefficients<Posterior> coefficients;

  explicit Column(const Block<typename Posterior::E>& of)
      : block(of), posterior(block), coefficients(block, posterior) {}
  Column(const Column& from, int j) : Column(from) {
    posterior.take_channel(j);
    coefficients.take_channel(j, posterior.mixtures());
  }
};

// The columns of a part. Where the lanes are points it has one, and a second one for its channels in turn.
template <class Posterior>
class Columns {
  using E = typename Posterior::E;

 public:
  static constexpr int kMost = 8;
  const Work& work;
  const Part& part;
  const int count = static_cast<int>((part.channels + Block<E>::kLanes - 1) / Block<E>::kLanes);

  Columns(const Work& work, const Part& part, Pass pass) : work(work), part(part) {
    for (int c = 0; c < count; ++c) {
      const int64_t first = c * Block<E>::kLanes, channels = least(part.channels - first, Block<E>::kLanes);
      new (at(c)) Column<Posterior>({work, pass, part.first_channel + first, static_cast<int>(channels)});
    }
  }

  // Calls visit(column, number, begin, end) for parts of the images, of each column in order; where the lanes are
  // points, for all images of each channel, whose number in the column it is.
  template <class Visit>
  CBN_METHOD void for_each(Visit visit) {
    const int64_t step = work.across ? most(1, kRowsAtOnce / most(1, work.spatial)) : part.end - part.begin;
    int64_t begin = part.begin;
    do {
      const int64_t end = least(begin + step, part.end);
      for (int c = 0; c < (work.across ? count : part.channels); ++c)
        visit(work.across ? *at(c) : *new (at(1)) Column<Posterior>(*at(0), c), c, begin, end);
      begin = end;
    } while (begin < part.end);
  }

 private:
  alignas(Column<Posterior>) unsigned char memory[kMost * sizeof(Column<Posterior>)];
  Column<Posterior>* at(int c) { return reinterpret_cast<Column<Posterior>*>(memory) + c; }
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

  void clear(int mixtures) {
    for (int i = 0; i < mixtures; ++i) of[i] = {};
  }

  // Not inlined: `sums` has a copy made of it here, and itself stays in registers.
  __attribute__((noinline)) void flush(int mixture, Sums<V, M> sums) {
    for (int i = 0; i < kRows; ++i)
      for (int k = 0; k < M; ++k)
        for (int l = 0; l < kLanes; ++l) of[mixture].totals[i][k][l] += static_cast<double>(sums.row(i)[k][l]);
  }

  // As ReduceTask says; where the lanes are points, of channel j.
  __attribute__((noinline)) void write(double* out, const Part& part, const Column<Posterior>& column, int j) {
    const Block<E>& block = column.block;
    const Posterior& posterior = column.posterior;
    const int64_t row_size = block.work.components * part.channels;
    for (int i = 0; i < posterior.mixtures(); ++i) {
      flush(i, of[i].sums);
      for (int row = 0; row < kRows && !block.work.across; ++row)
        for (int k = 0; k < posterior.weights(); ++k) of[i].totals[row][k][j] = sum(of[i].totals[row][k]);
      for (int l = block.work.across ? 0 : j; l < (block.work.across ? block.channels : j + 1); ++l) {
        for (int k = 0; k < posterior.weights(); ++k) {
          double* at =
              out + posterior.component(i, k, l) * part.channels + block.first_channel - part.first_channel + l;
          for (int row = 0; row < kRows; ++row, at += row_size) *at = of[i].totals[row][k][l];
          *at = static_cast<double>(posterior.origin[i][l]);
        }
      }
    }
  }

 private:
  // By halves.
  static double sum(const double (&lanes)[kLanes]) {
    double halves[kLanes];
    std::memcpy(halves, lanes, sizeof(halves));
    CBN_UNROLL
    for (int half = kLanes / 2; half >= 1; half /= 2) {
      CBN_UNROLL
      for (int l = 0; l < half; ++l) halves[l] += halves[l + half];
    }
    return halves[0];
  }
};

// Calls add(sums, column, mixture, e, factor, z, place) for all vectors of a part.
template <template <class, int> class Sums, class Posterior, class Add>
CBN_INLINE void reduce(const Work& work, const Part& part, Pass pass, double* out, Add add) {
  using E = typename Posterior::E;
  using V = typename Posterior::V;
  Columns<Posterior> columns(work, part, pass);
  LongSums<Sums, Posterior> all[Columns<Posterior>::kMost];
  columns.for_each([&](const Column<Posterior>& column, int number, int64_t begin, int64_t end) {
    auto& totals = all[work.across ? number : 0];
    if (begin == part.begin) totals.clear(column.posterior.mixtures());
    column.posterior.visit(begin, end, [&](const auto& weigh, int mixture, int64_t first, int64_t last) {
      const V origin = column.posterior.origin[mixture];
      auto& kept = totals.of[mixture];
      auto sums = kept.sums;
      int vectors = kept.vectors;
      column.block.for_each_vector(
          work.across ? 0 : number, first, last, [&](const Place& place) __attribute__((always_inline)) {
            const V z = load<E>(column.block.x() + place.offset, place.count, place.stride) - origin;
            V e[Posterior::kWeights];
            const V factor = weigh(z, place, e);
            add(sums, column, mixture, e, factor, z, place);
            if (++vectors == kVectorsPerFlush) {
              totals.flush(mixture, sums);
              sums = {};
              vectors = 0;
            }
          });
      kept.sums = sums;
      kept.vectors = vectors;
    });
    if (end == part.end) totals.write(out, part, column, work.across ? 0 : number);
  });
}

template <class Posterior>
void moments(const Work& work, const Part& part, double* sums) {
  using V = typename Posterior::V;
  reduce<Moments, Posterior>(work, part, Pass::kMoments, sums,
                             [](auto& current, const auto&, int, const auto& e, V factor, V z, const Place& place)
                                 __attribute__((always_inline)) {
                                   if (place.count < Block<typename Posterior::E>::kLanes)
                                     factor = Math<V>::where_set((1u << place.count) - 1, factor);
                                   accumulate(current, e, factor, z);
                                 });
}

template <class Posterior, bool kFused>
void gradient_sums(const Work& work, const Part& part, double* sums) {
  using E = typename Posterior::E;
  using V = typename Posterior::V;
  reduce<GradientSums, Posterior>(
      work, part, Pass::kGradientSums, sums,
      [&](auto& current, const auto& column, int mixture, const auto& e, V factor, V z, const Place& place)
          __attribute__((always_inline)) {
            // The gradient is 0 beyond `count`, and so is what is added there.
            const auto output = [&] { return combine(column.coefficients.branches[mixture], e, z); };
            accumulate(current, e, factor, z, passed_gradient<kFused, E>(work, place, output));
          });
}

// Calls finish(component, totals, origin) for the components of all channels of a part, vectors of them, totals those
// of the rows of a reduction's sums.
template <class E, int kRows, class Finish>
CBN_INLINE void finish(const Work& work, const Part& part, const double* sums, int64_t splits, Finish finish) {
  using D = Vec<double>;
  const int64_t row = work.components * part.channels;
  for (int64_t c = 0; c < part.channels; c += kLanesOf<double>) {
    const int64_t count = least(part.channels - c, kLanesOf<double>);
    for (int m = 0; m < work.components; ++m) {
      const double* const from = sums + m * part.channels + c;
      const auto at = [&](int64_t number) { return Doubles<D>::load(from + number * row, count); };
      D totals[kRows] = {}, origin{};
      if (sums) origin = at(kRows);
      for (int64_t split = 0; split < splits && sums; ++split)
        for (int i = 0; i < kRows; ++i) totals[i] += at(split * (kRows + 1) + i);
      finish(Component<typename E::Scalar, D>{work, m * work.channels + part.first_channel + c, count}, totals, origin);
    }
  }
}

template <class E>
void finish_moments(const Work& work, const Part& part, const double* sums, int64_t splits) {
  finish<E, kMomentRows>(work, part, sums, splits, [&](const auto& component, const auto& totals, const auto& origin) {
    if (sums) component.write_batch(component.finish(totals, origin));
    if (work.running) component.keep_running();
  });
}

template <class E>
void finish_gradients(const Work& work, const Part& part, const double* sums, int64_t splits) {
  if (!sums) return;
  finish<E, kGradientRows>(work, part, sums, splits, [](const auto& component, const auto& totals, const auto& origin) {
    component.write_gradients(component.finish(totals, origin, component.used()), totals[0]);
  });
}

template <class Posterior, bool kFused>
void normalise(const Work& work, const Part& part) {
  using E = typename Posterior::E;
  using V = typename Posterior::V;
  Columns<Posterior> columns(work, part, Pass::kNormalise);
  const auto* residual = static_cast<const typename E::Memory*>(work.residual);
  uint32_t* const mask = work.mask;
  const bool relu = work.relu;
  columns.for_each([&](const Column<Posterior>& column, int number, int64_t begin, int64_t end) {
    column.posterior.visit(begin, end, [&](const auto& weigh, int mixture, int64_t first, int64_t last) {
      const V origin = column.posterior.origin[mixture];
      const auto& branches = column.coefficients.branches[mixture];
      const auto& block = column.block;
      block.for_each_vector(
          work.across ? 0 : number, first, last, [&](const Place& place) __attribute__((always_inline)) {
            const V z = load<E>(block.x() + place.offset, place.count, place.stride) - origin;
            V e[Posterior::kWeights];
            const V factor = weigh(z, place, e);
            V y = combine(branches, e, z) * factor;
            if constexpr (kFused) {
              if (residual) y = y + load<E>(residual + place.offset, place.count, place.stride);
              if (mask)
                set_bits<Block<E>::kLanes>(mask, place.offset, place.count, Math<V>::above_zero(y), place.stride);
              if (relu) y = Math<V>::max(y, V{});
            }
            store<E>(block.out() + place.offset, place.count, y, place.stride);
          });
    });
  });
}

template <class Posterior, bool kFused>
void input_gradient(const Work& work, const Part& part) {
  using E = typename Posterior::E;
  using V = typename Posterior::V;
  Columns<Posterior> columns(work, part, Pass::kInputGradient);
  auto* grad_residual = static_cast<typename E::Memory*>(work.grad_residual);
  const bool detach = work.detach_responsibility;
  columns.for_each([&](const Column<Posterior>& column, int number, int64_t begin, int64_t end) {
    const auto& block = column.block;
    const auto& coefficients = column.coefficients;
    column.posterior.visit(begin, end, [&](const auto& weigh, int mixture, int64_t first, int64_t last) {
      const V origin = column.posterior.origin[mixture];
      // differentiate(z, place, gated) gives the gradient; gated(output) that of the output.
      const auto map = [&](auto differentiate) __attribute__((always_inline)) {
        block.for_each_vector(
            work.across ? 0 : number, first, last, [&](const Place& place) __attribute__((always_inline)) {
              const auto gated = [&](auto output) __attribute__((always_inline)) {
                const V g = passed_gradient<kFused, E>(work, place, output);
                if (kFused && grad_residual) store<E>(grad_residual + place.offset, place.count, g, place.stride);
                return g;
              };
              const V z = load<E>(block.x() + place.offset, place.count, place.stride) - origin;
              store<E>(block.out() + place.offset, place.count, differentiate(z, place, gated), place.stride);
            });
      };
      if (coefficients.form == Form::kDirect) {
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
  });
}

template <class Posterior, bool kFused>
Tasks make_tasks() {
  using E = typename Posterior::E;
  return {Block<E>::kLanes,
          Columns<Posterior>::kMost,
          moments<Posterior>,
          finish_moments<E>,
          normalise<Posterior, kFused>,
          gradient_sums<Posterior, kFused>,
          finish_gradients<E>,
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
