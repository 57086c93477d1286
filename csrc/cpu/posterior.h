// Who weighs the components at a point: the template parameter of the loops in kernels.h.
//
// A posterior has mixtures of components; all points of an image are weighed by one of its mixtures. It gives
//   kMixtures, mixtures()        how many of them are compiled, and how many there are
//   kWeights, weights()          how many components each of them has, likewise
//   origin                       [kMixtures] of z = x - origin
//   component(mixture, k)        which of the M components row k is of, before put_in_order(rows, part)
//   component(mixture, k, j)     which of them weight k is of, in channel j of the column
//   take_channel(j)              leaves channel j, in all lanes
//   visit(begin, end, f)         f(weigh, mixture, first, last) for parts [first, last) of the images [begin, end)
// where
//   weigh(z, place, e)           gives the weights as e times the factor that it returns
// The input's gradient has a part of the weights' own but where kConstant. Weights that are read bring it along,
// weigh.covariance(z, place); where the channel weighs, it is
//   kIsBounded                   ExpandedGradient's
//   else                         weigh.covariance(p, z, f)
#pragma once

#include "block.h"

namespace cbn {
namespace {

// Each channel's mixture of M components: the responsibilities of the E-step, from the odds against the widest
// component, which is stored first.
template <class Elements, int M>
class ChannelPosterior {
 public:
  using E = Elements;
  using V = Vec<typename E::Scalar>;
  static constexpr int kMixtures = 1, kWeights = M;
  static constexpr bool kConstant = M == 1, kGiven = false;
  static constexpr bool kGeneralOnly = std::is_same_v<E, Double>;  // which is for checks: no faster form is compiled

  V origin[1] = {};

  __attribute__((noinline)) explicit ChannelPosterior(const Block<E>& block) : components(block.work.components) {
    origin[0] = block.origin();
    if constexpr (M > 1) {
      BasicLogDensity<D> densities[Block<E>::kParts][M];
      block.for_each_part([&](int part) {
        find_widest(block, part, densities[part]);
        bounded = bounded && set_odds(block, part, densities[part]);
      });
      // Where one channel is not bounded, its neighbours in the vector take the other form too.
      if (!bounded) block.for_each_part([&](int part) { set_densities(block, part, densities[part]); });
    }
  }

  int mixtures() const { return 1; }
  int weights() const { return components; }
  int component(int, int k) const { return k; }
  int component(int, int k, int j) const {
    return M == 1 ? 0 : stored_at(k, static_cast<int>(widest[j / kDoubles][j % kDoubles]));
  }
  // The widest component's rows become the first.
  template <class Rows>
  void put_in_order(Rows (&of)[M], int part) const {
    for (int k = 1; k < components; ++k) {
      const auto here = widest[part] == k;
      for (int i = 0; i < Rows::kRows; ++i) {
        const D first = *of[0].row(i), other = *of[k].row(i);
        *of[0].row(i) = here ? other : first;
        *of[k].row(i) = here ? first : other;
      }
    }
  }
  void take_channel(int j) {
    spread(origin[0], j);
    spread(odds, j);
  }

  template <class F>
  CBN_METHOD void visit(int64_t begin, int64_t end, F f) const {
    if constexpr (M > 1) {
      if (kGeneralOnly || !bounded) return f(Weigh<false>{odds}, 0, begin, end);
    }
    if constexpr (M == 1 || !kGeneralOnly) f(Weigh<true>{odds}, 0, begin, end);
  }

  // Whether all odds are bounded, in Pass::kInputGradient also near the widest component.
  bool bounded = !kGeneralOnly;
  BasicParabola<Vec<double>> parabolas[Block<E>::kParts][M];  // the odds as they were computed

 private:
  template <bool kBounded>
  struct Weigh {
    static constexpr bool kIsBounded = kBounded;
    const LogOdds<V, M>& odds;
    CBN_METHOD V operator()(V z, const Place&, V (&e)[M]) const { return responsibilities<kBounded>(odds, z, e); }
    CBN_METHOD V covariance(const V (&p)[M], V z, const V (&f)[M]) const { return cbn::covariance(odds, p, z, f); }
  };

  using D = Vec<double>;
  static constexpr int kDoubles = Block<E>::kDoubles;
  int components;
  D widest[Block<E>::kParts] = {};  // component of each channel
  LogOdds<V, M> odds;
  // Of those that pad the components to M.
  static constexpr auto padding() { return BasicParabola<D>{{}, {}, {D{} + kNoComponent}}; }

  // Sets `widest` in a part's channels; their log-densities, in order.
  void find_widest(const Block<E>& block, int part, BasicLogDensity<D> (&densities)[M]) {
    D least{};
    for (int m = 0; m < components; ++m) {
      densities[m] = block.component(m, part).density();
      const D precision = densities[m].precision;
      if (m == 0) least = precision;
      const auto wider = precision < least;
      widest[part] = wider ? D{} + m : widest[part];
      least = wider ? precision : least;
    }
    put_in_order(densities, part);
  }

  // Sets the odds of a part's channels; returns whether all are bounded.
  bool set_odds(const Block<E>& block, int part, const BasicLogDensity<D> (&densities)[M]) {
    const D at = block.get(origin[0], part);
    block.put(odds, 0, part, BasicParabola<D>{});
    auto all_bounded = is_bounded(BasicParabola<D>{});
    for (int k = 1; k < M; ++k) {
      BasicParabola<D>& of = parabolas[part][k];
      of = k < components ? odds_parabola(densities[k], densities[0], at) : padding();
      all_bounded &= is_bounded(of);
      if (block.pass == Pass::kInputGradient && k < components)
        all_bounded &= is_near(of, densities[0], at, block.work.points());
      block.put(odds, k, part, of);
    }
    bool result = true;
    for (int l = 0; l < block.channels_of(part); ++l) result &= all_bounded[l] != 0;
    return result;
  }

  // Sets the log-densities themselves.
  void set_densities(const Block<E>& block, int part, const BasicLogDensity<D> (&densities)[M]) {
    const D at = block.get(origin[0], part);
    for (int k = 0; k < M; ++k) block.put(odds, k, part, k < components ? parabola(densities[k], at) : padding());
  }
};

// Joint mode: the points' weights are read, [M, N S], and so is the gradient of their log-odds.
template <class Elements, int M>
class GivenPosterior {
 public:
  using E = Elements;
  using V = Vec<typename E::Scalar>;
  static constexpr int kMixtures = 1, kWeights = M;
  static constexpr bool kConstant = false, kGiven = true;

  V origin[1] = {};

  __attribute__((noinline)) explicit GivenPosterior(const Block<E>& block)
      : components(block.work.components), across(block.work.across) {
    const auto rows_of = [&](const void* of, const S*(&rows)[M]) {
      // Those that pad the components to M have no coefficients: any weight does.
      for (int m = 0; m < M && of; ++m)
        rows[m] = static_cast<const S*>(of) + (m < components ? m : 0) * block.work.points();
    };
    rows_of(block.work.posterior, weights_of);
    rows_of(block.work.posterior_gradient, gradient_of);
    origin[0] = block.origin();
    block.for_each_part([&](int part) {
      const D at = block.get(origin[0], part);
      for (int m = 0; m < components && block.pass == Pass::kInputGradient; ++m)
        block.put(scores_of, m, part, scores(block.component(m, part).density(D{} + 1), at));
    });
  }

  int mixtures() const { return 1; }
  int weights() const { return components; }
  int component(int, int k, int = 0) const { return k; }
  template <class Rows>
  void put_in_order(Rows&, int) const {}
  void take_channel(int j) {
    spread(origin[0], j);
    spread(scores_of, j);
  }

  template <class F>
  CBN_METHOD void visit(int64_t begin, int64_t end, F f) const {
    f(*this, 0, begin, end);
  }

  CBN_METHOD V operator()(V, const Place& place, V (&e)[M]) const {
    CBN_UNROLL
    for (int m = 0; m < M; ++m) e[m] = at(weights_of[m], place);
    return Math<V>::splat(1);
  }
  CBN_METHOD V covariance(V z, const Place& place) const {
    V q[M];
    CBN_UNROLL
    for (int m = 0; m < M; ++m) q[m] = at(gradient_of[m], place);
    return joint_covariance(scores_of, q, z);
  }

 private:
  using S = typename E::Scalar;
  using D = Vec<double>;
  int components;
  bool across;
  const S* weights_of[M];   // [N S] each
  const S* gradient_of[M];  // likewise
  Scores<V, M> scores_of{};

  // Numbers of a vector's points, or of its one point.
  CBN_METHOD V at(const S* row, const Place& place) const {
    if (across) return V{} + row[place.point];
    return load<Statistic<S>>(row + place.point, place.count);
  }
};

// Split mode (eqs 17-18): an image's group is its component, with weight 1.
template <class Elements>
class GroupPosterior {
 public:
  using E = Elements;
  using V = Vec<typename E::Scalar>;
  static constexpr int kMixtures = kMaxComponents, kWeights = 1;
  static constexpr bool kConstant = true, kGiven = false;

  V origin[kMixtures];

  __attribute__((noinline)) explicit GroupPosterior(const Block<E>& block)
      : components(block.work.components), groups(block.work.groups) {
    for (int m = 0; m < components; ++m) {
      if (block.pass == Pass::kMoments)
        origin[m] = block.sampled_origin(m);
      else
        block.for_each_part([&](int part) { block.put(origin[m], part, block.component(m, part).used().mean); });
    }
  }

  int mixtures() const { return components; }
  int weights() const { return 1; }
  int component(int mixture, int, int = 0) const { return mixture; }
  template <class Rows>
  void put_in_order(Rows&, int) const {}
  void take_channel(int j) {
    for (int m = 0; m < components; ++m) spread(origin[m], j);
  }

  template <class F>
  CBN_METHOD void visit(int64_t begin, int64_t end, F f) const {
    for (int64_t n = begin; n < end; ++n) f(*this, static_cast<int>(groups[n]), n, n + 1);
  }

  CBN_METHOD V operator()(V, const Place&, V (&e)[1]) const { return e[0] = Math<V>::splat(1); }

 private:
  int components;
  const int64_t* groups;  // [N]
};

}  // namespace
}  // namespace cbn
