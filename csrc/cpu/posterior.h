// Who weighs the components at a point: the template parameter of the loops in kernels.h.
//
// A posterior has mixtures of components; all points of an image are weighed by one of its mixtures. It gives
//   kMixtures, mixtures()        how many of them are compiled, and how many there are
//   kWeights, weights()          how many components each of them has, likewise
//   origin                       [kMixtures] of z = x - origin
//   component(mixture, k, j)     which of the M components weight k is of, in channel j of the block
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
    for (int j = 0; j < block.channels; ++j) block.put(origin[0], j, block.origin(j));
    if constexpr (M > 1) {
      // Where one channel is not bounded, its neighbours in the vector take the other form too.
      for (int j = 0; j < block.channels; ++j) bounded &= set_odds(block, j);
      for (int j = 0; j < block.channels && !bounded; ++j) set_odds(block, j);
    }
  }

  int mixtures() const { return 1; }
  int weights() const { return components; }
  int component(int, int k, int j) const { return stored_at(k, widest[j]); }

  template <class F>
  CBN_METHOD void visit(int64_t begin, int64_t end, F f) const {
    if constexpr (M > 1) {
      if (kGeneralOnly || !bounded) return f(Weigh<false>{odds}, 0, begin, end);
    }
    if constexpr (M == 1 || !kGeneralOnly) f(Weigh<true>{odds}, 0, begin, end);
  }

  // Whether all odds are bounded, in Pass::kInputGradient also near the widest component.
  bool bounded = !kGeneralOnly;

  LogDensity density(const Block<E>& block, int k, int j) const {
    return block.component(component(0, k, j), j).density();
  }

 private:
  template <bool kBounded>
  struct Weigh {
    static constexpr bool kIsBounded = kBounded;
    const LogOdds<V, M>& odds;
    CBN_METHOD V operator()(V z, const Place&, V (&e)[M]) const { return responsibilities<kBounded>(odds, z, e); }
    CBN_METHOD V covariance(const V (&p)[M], V z, const V (&f)[M]) const { return cbn::covariance(odds, p, z, f); }
  };

  const int components;
  int widest[Block<E>::kLanes] = {};  // of each channel
  LogOdds<V, M> odds{};

  // Sets the odds of channel j, or, where some are not bounded, its log-densities; returns whether its odds are.
  bool set_odds(const Block<E>& block, int j) {
    const auto var = [&](int m) { return block.component(m, j).read(block.work.var, 0); };
    for (int m = 1; m < components; ++m)
      if (var(m) > var(widest[j])) widest[j] = m;
    const double at = static_cast<double>(origin[0][j]);
    const LogDensity first = density(block, 0, j);
    bool all_bounded = true;
    for (int k = 0; k < M; ++k) {
      Parabola of{{0}, {0}, {kNoComponent}};  // of those that pad the components to M
      if (k < components && !bounded) {
        of = parabola(k == 0 ? first : density(block, k, j), at);
      } else if (k > 0 && k < components) {
        of = odds_parabola(density(block, k, j), first, at);
        all_bounded &= is_bounded(of) && (block.pass != Pass::kInputGradient || is_near(of, first, at));
      }
      block.put(odds, k, j, of);
    }
    return all_bounded;
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
      : components(block.work.components), channels_last(block.work.channels_last) {
    const auto rows_of = [&](const void* of, const S*(&rows)[M]) {
      // Those that pad the components to M have no coefficients: any weight does.
      for (int m = 0; m < M && of; ++m)
        rows[m] = static_cast<const S*>(of) + (m < components ? m : 0) * block.work.points();
    };
    rows_of(block.work.posterior, weights_of);
    rows_of(block.work.posterior_gradient, gradient_of);
    for (int j = 0; j < block.channels; ++j) {
      block.put(origin[0], j, block.origin(j));
      const double at = static_cast<double>(origin[0][j]);
      for (int m = 0; m < components && block.pass == Pass::kInputGradient; ++m)
        block.put(scores_of, m, j, scores(block.component(m, j).density(1), at));
    }
  }

  int mixtures() const { return 1; }
  int weights() const { return components; }
  int component(int, int k, int) const { return k; }

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
  const int components;
  const bool channels_last;
  const S* weights_of[M];   // [N S] each
  const S* gradient_of[M];  // likewise
  Scores<V, M> scores_of{};

  // Numbers of a vector's points; in channels_last of its one point.
  CBN_METHOD V at(const S* row, const Place& place) const {
    if (channels_last) return V{} + row[place.point];
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
      origin[m] = V{};
      for (int j = 0; j < block.channels; ++j) {
        const bool sampled = block.pass == Pass::kMoments;
        block.put(origin[m], j, sampled ? block.sampled_origin(m, j) : block.component(m, j).used().mean);
      }
    }
  }

  int mixtures() const { return components; }
  int weights() const { return 1; }
  int component(int mixture, int, int) const { return mixture; }

  template <class F>
  CBN_METHOD void visit(int64_t begin, int64_t end, F f) const {
    for (int64_t n = begin; n < end; ++n) f(*this, static_cast<int>(groups[n]), n, n + 1);
  }

  CBN_METHOD V operator()(V, const Place&, V (&e)[1]) const { return e[0] = Math<V>::splat(1); }

 private:
  const int components;
  const int64_t* groups;  // [N]
};

}  // namespace
}  // namespace cbn
