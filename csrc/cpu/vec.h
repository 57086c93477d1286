// A vector of lanes by the compilers' vector extension: arithmetic is built in; here are loads, stores and `Math`.
// Included by the kernels of each instruction set with CBN_VECTOR_BYTES set.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "../mixture.h"
#include "../problem.h"

namespace cbn {

template <class S, int kLanes>
struct VectorType {
  typedef S type __attribute__((vector_size(sizeof(S) * kLanes)));
};

template <class To, class From>
CBN_INLINE To bits(From value) {
  static_assert(sizeof(To) == sizeof(From), "bits() keeps the size");
  To result;
  std::memcpy(&result, &value, sizeof(To));
  return result;
}

// 2^f on [-1/2, 1/2]: the Chebyshev interpolant of degree 6 (float, error 3e-9) and 11 (double, error 4e-18).
constexpr float kExp2Float[] = {1.0f,           0.693147207f,   0.240226509f,   0.0555032723f,
                                0.00961805668f, 0.00134004282f, 0.000154614447f};
constexpr double kExp2Double[] = {1.0,
                                  0.693147180559945309,
                                  0.240226506959101596,
                                  0.055504108664821627,
                                  0.00961812910758725667,
                                  0.00133335581464064707,
                                  0.000154035304637243542,
                                  1.52527338415567726e-05,
                                  1.32154325359123762e-06,
                                  1.01780570877339411e-07,
                                  7.07419429728852101e-09,
                                  4.45581790833606449e-10};

template <class S>
struct Exp2 {
  using Int = std::conditional_t<std::is_same_v<S, float>, int32_t, int64_t>;
  static constexpr int kMantissa = std::numeric_limits<S>::digits - 1;
  static constexpr S kLowest = std::numeric_limits<S>::min_exponent - 1;
  // 1.5 2^kMantissa rounds to an integer; the rest biases the exponent.
  static constexpr S kRound = S(Int{3} << (kMantissa - 1)) + S(std::numeric_limits<S>::max_exponent - 1);
};

// The lanes' number is a parameter, so that each instruction set's functions have names of their own.
template <class S, int kLanes>
struct VectorMath {
  using V = typename VectorType<S, kLanes>::type;
  using LaneInts = typename VectorType<typename Exp2<S>::Int, kLanes>::type;

  CBN_INLINE V splat(double value) { return V{} + static_cast<S>(value); }
  CBN_INLINE V reciprocal(V x) { return static_cast<S>(1) / x; }
  CBN_INLINE V max(V a, V b) { return a < b ? b : a; }

  // 2^x for x below the largest exponent; below the smallest, at most the smallest normal number. NaN stays NaN.
  CBN_INLINE V exp2(V x) {
#if CBN_VECTOR_BYTES == 64
    const V f = fraction(x);
    return scale(polynomial(f), x - f);
#else
    using E = Exp2<S>;
    x = x < E::kLowest ? splat(E::kLowest) : x;
    const V rounded = x + E::kRound;
    return polynomial(x - (rounded - E::kRound)) * bits<V>(bits<LaneInts>(rounded) << E::kMantissa);
#endif
  }

  // Lane l by its bit: set where x is above 0 or NaN, which is where a ReLU lets the gradient pass.
  CBN_INLINE uint32_t above_zero(V x) {
#if CBN_VECTOR_BYTES == 64
    return not_below_or_zero(x);
#else
    const LaneInts set = x <= 0 ? LaneInts{} : lane_bits();
    uint32_t result = 0;
    CBN_UNROLL
    for (int l = 0; l < kLanes; ++l) result |= static_cast<uint32_t>(set[l]);
    return result;
#endif
  }

  // The sum of the lanes, by halves.
  CBN_INLINE S sum(V x) {
    CBN_UNROLL
    for (int half = kLanes / 2; half >= 1; half /= 2) {
      CBN_UNROLL
      for (int l = 0; l < half; ++l) x[l] += x[l + half];
    }
    return x[0];
  }

  // Lane l of x where its bit is set, else 0.
  CBN_INLINE V where_set(uint32_t bits, V x) {
    return (lane_bits() & static_cast<typename Exp2<S>::Int>(bits)) != 0 ? x : V{};
  }

  CBN_INLINE LaneInts lane_bits() {
    LaneInts result;
    CBN_UNROLL
    for (int l = 0; l < kLanes; ++l) result[l] = 1 << l;
    return result;
  }

  template <int kTerms>
  CBN_INLINE V polynomial(const S (&terms)[kTerms], V f) {
    V y = splat(terms[kTerms - 1]);
    CBN_UNROLL
    for (int k = kTerms - 2; k >= 0; --k) y = y * f + terms[k];
    return y;
  }
  CBN_INLINE V polynomial(V f) {
    if constexpr (std::is_same_v<S, float>)
      return polynomial(kExp2Float, f);
    else
      return polynomial(kExp2Double, f);
  }

#if CBN_VECTOR_BYTES == 64
  // AVX-512 has both in one instruction: x less the nearest integer, and y 2^n for an integer n.
  CBN_INLINE __m512 fraction(__m512 x) { return _mm512_maskz_reduce_ps(0xffff, x, _MM_FROUND_TO_NEAREST_INT); }
  CBN_INLINE __m512d fraction(__m512d x) { return _mm512_maskz_reduce_pd(0xff, x, _MM_FROUND_TO_NEAREST_INT); }
  CBN_INLINE uint32_t not_below_or_zero(__m512 x) { return _mm512_cmp_ps_mask(x, __m512{}, _CMP_NLE_UQ); }
  CBN_INLINE uint32_t not_below_or_zero(__m512d x) { return _mm512_cmp_pd_mask(x, __m512d{}, _CMP_NLE_UQ); }
  CBN_INLINE __m512 scale(__m512 y, __m512 n) { return _mm512_maskz_scalef_ps(0xffff, y, n); }
  CBN_INLINE __m512d scale(__m512d y, __m512d n) { return _mm512_maskz_scalef_pd(0xff, y, n); }
#endif
};

// Lanes of the scalar S in one register.
template <class S>
constexpr int kLanesOf = CBN_VECTOR_BYTES / sizeof(S);

template <class S>
using Vec = typename VectorType<S, kLanesOf<S>>::type;

template <>
struct Math<Vec<float>> : VectorMath<float, kLanesOf<float>> {};
template <>
struct Math<Vec<double>> : VectorMath<double, kLanesOf<double>> {};

template <>
struct Doubles<Vec<double>> {
  using D = Vec<double>;
  using Int = VectorType<int64_t, kLanesOf<double>>::type;
  template <class S>
  using Narrow = typename VectorType<S, kLanesOf<double>>::type;

  CBN_INLINE D sqrt(D x) {
#if CBN_VECTOR_BYTES == 64
    return _mm512_maskz_sqrt_pd(0xff, x);
#else
    CBN_UNROLL
    for (int l = 0; l < kLanesOf<double>; ++l) x[l] = std::sqrt(x[l]);
    return x;
#endif
  }

  // Of normal numbers above 0; NaN stays NaN, and infinity becomes it.
  CBN_INLINE D log2(D x) {
    // x = 2^n m with m in [sqrt(1/2), sqrt(2)), and log(m) = 2 atanh(f), f = (m - 1) / (m + 1), |f| < 0.172
    constexpr int64_t kSqrtHalf = 0x3fe6a09e667f3bcd, kMantissa = (int64_t{1} << 52) - 1;
    const Int above = bits<Int>(x) - kSqrtHalf;
    const D n = __builtin_convertvector(above >> 52, D), m = bits<D>((above & kMantissa) + kSqrtHalf);
    const D f = (m - 1) / (m + 1), square = f * f;
    D series = square * (1.0 / 21) + 1.0 / 19;
    CBN_UNROLL
    for (int k = 17; k >= 1; k -= 2) series = series * square + 1.0 / k;
    return n + 2 * kLog2E * f * series + (x - x);
  }

  template <class S>
  CBN_INLINE D load(const S* from, int64_t count) {
    Narrow<S> raw{};
    if (count >= kLanesOf<double>)
      std::memcpy(&raw, from, sizeof(raw));
    else
      for (int64_t l = 0; l < count; ++l) raw[l] = from[l];
    return __builtin_convertvector(raw, D);
  }
  template <class S>
  CBN_INLINE void store(S* to, int64_t count, D x) {
    const Narrow<S> raw = __builtin_convertvector(x, Narrow<S>);
    if (count >= kLanesOf<double>)
      std::memcpy(to, &raw, sizeof(raw));
    else
      for (int64_t l = 0; l < count; ++l) to[l] = raw[l];
  }
  template <class S>
  CBN_INLINE D rounded(D x) {
    return __builtin_convertvector(__builtin_convertvector(x, Narrow<S>), D);
  }
};

namespace {

// Element types in memory; arithmetic is in `Scalar`. The 16-bit ones convert by their bits, rounding to nearest even.
template <Element kElement>
struct Elements {
  static constexpr bool kHasHalfWidth = kElement == Element::kHalf || kElement == Element::kBFloat16;
  using Scalar = std::conditional_t<kElement == Element::kDouble, double, float>;
  using Memory = std::conditional_t<kHasHalfWidth, uint16_t, Scalar>;
};
using Float = Elements<Element::kFloat>;
using Double = Elements<Element::kDouble>;
using Half = Elements<Element::kHalf>;
using BFloat16 = Elements<Element::kBFloat16>;
template <class S>
using Statistic = std::conditional_t<std::is_same_v<S, double>, Double, Float>;

using Floats = Vec<float>;
using Ints = Vec<int32_t>;
using Halves = VectorType<uint16_t, kLanesOf<float>>::type;

CBN_INLINE Floats widen_bfloat16(Halves h) { return bits<Floats>(__builtin_convertvector(h, Ints) << 16); }

CBN_INLINE Halves narrow_bfloat16(Floats x) {
  const Ints b = bits<Ints>(x);
  const Ints rounded = (b + 0x7fff + ((b >> 16) & 1)) >> 16;
  return __builtin_convertvector(x == x ? rounded : Ints{} + 0x7fc0, Halves);
}

CBN_INLINE Floats widen_half(Halves h) {
  const Ints b = __builtin_convertvector(h, Ints);
  const Ints magnitude = (b & 0x7fff) << 13;
  // Multiplying by 2^112 moves the exponent's bias and normalises the subnormal; infinity and NaN need their exponent.
  const Ints finite = bits<Ints>(bits<Floats>(magnitude) * 0x1p112f);
  const Ints value = magnitude >= 0x0f800000 ? (magnitude | 0x7f800000) : finite;
  return bits<Floats>(value | ((b & 0x8000) << 16));
}

CBN_INLINE Halves narrow_half(Floats x) {
  const Ints b = bits<Ints>(x);
  const Ints magnitude = b & 0x7fffffff;
  // Below 2^-14, adding 1/2 leaves the subnormal half in the low bits, rounded.
  const Ints subnormal = bits<Ints>(bits<Floats>(magnitude) + 0.5f) - 0x3f000000;
  const Ints normal = (magnitude - (112 << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  Ints value = magnitude < 0x38800000 ? subnormal : normal;
  value = magnitude >= 0x477ff000 ? Ints{} + 0x7c00 : value;  // 65520 and above round to infinity
  value = magnitude > 0x7f800000 ? Ints{} + 0x7e00 : value;
  return __builtin_convertvector(value | ((b >> 16) & 0x8000), Halves);
}

template <class E>
using RawVec = typename VectorType<typename E::Memory, kLanesOf<typename E::Scalar>>::type;

template <class E>
CBN_INLINE Vec<typename E::Scalar> widen(RawVec<E> raw) {
  if constexpr (std::is_same_v<E, Half>)
    return widen_half(raw);
  else if constexpr (std::is_same_v<E, BFloat16>)
    return widen_bfloat16(raw);
  else
    return raw;
}

// `count` elements of x, `stride` apart, as lanes; the lanes beyond `count` are 0.
template <class E>
CBN_INLINE Vec<typename E::Scalar> load(const typename E::Memory* x, int64_t count, int64_t stride = 1) {
  constexpr int kLanes = kLanesOf<typename E::Scalar>;
  RawVec<E> raw{};
  if (stride == 1 && count >= kLanes) {
    std::memcpy(&raw, x, sizeof(raw));
  } else if (count >= kLanes) {
    CBN_UNROLL
    for (int i = 0; i < kLanes; ++i) raw[i] = x[i * stride];
  } else {
    for (int64_t i = 0; i < count; ++i) raw[i] = x[i * stride];
  }
  return widen<E>(raw);
}

template <class E>
CBN_INLINE void store(typename E::Memory* y, int64_t count, Vec<typename E::Scalar> value, int64_t stride = 1) {
  constexpr int kLanes = kLanesOf<typename E::Scalar>;
  RawVec<E> raw;
  if constexpr (std::is_same_v<E, Half>)
    raw = narrow_half(value);
  else if constexpr (std::is_same_v<E, BFloat16>)
    raw = narrow_bfloat16(value);
  else
    raw = value;
  if (stride == 1 && count >= kLanes) {
    std::memcpy(y, &raw, sizeof(raw));
  } else if (count >= kLanes) {
    CBN_UNROLL
    for (int i = 0; i < kLanes; ++i) y[i * stride] = raw[i];
  } else {
    for (int64_t i = 0; i < count; ++i) y[i * stride] = raw[i];
  }
}

// A vector's bits, `count` of them, `stride` apart from bit `offset` of a mask that started as zeros. Whole bytes are
// stored; else a word's other bits may be another thread's.
template <int kLanes>
CBN_INLINE void set_bits(uint32_t* mask, int64_t offset, int64_t count, uint32_t bits, int64_t stride = 1) {
  if (kLanes % 8 == 0 && stride == 1 && offset % 8 == 0 && count == kLanes) {
    std::memcpy(reinterpret_cast<char*>(mask) + offset / 8, &bits, kLanes / 8);  // the low bytes come first
    return;
  }
  if (stride != 1) {
    for (int64_t l = 0; l < count; ++l)
      if (bits >> l & 1)
        __atomic_fetch_or(mask + (offset + l * stride) / 32, 1u << (offset + l * stride) % 32, __ATOMIC_RELAXED);
    return;
  }
  const uint64_t shifted = static_cast<uint64_t>(bits & ((1u << count) - 1)) << offset % 32;
  const uint32_t low = static_cast<uint32_t>(shifted), high = static_cast<uint32_t>(shifted >> 32);
  if (low) __atomic_fetch_or(mask + offset / 32, low, __ATOMIC_RELAXED);
  if (high) __atomic_fetch_or(mask + offset / 32 + 1, high, __ATOMIC_RELAXED);
}

CBN_INLINE uint32_t get_bits(const uint32_t* mask, int64_t offset, int64_t count, int64_t stride = 1) {
  if (stride != 1) {
    uint32_t bits = 0;
    for (int64_t l = 0; l < count; ++l)
      bits |= (mask[(offset + l * stride) / 32] >> (offset + l * stride) % 32 & 1) << l;
    return bits;
  }
  const int64_t shift = offset % 32;
  uint64_t bits = mask[offset / 32];
  if (shift + count > 32) bits |= static_cast<uint64_t>(mask[offset / 32 + 1]) << 32;
  return static_cast<uint32_t>(bits >> shift);
}

}  // namespace
}  // namespace cbn
