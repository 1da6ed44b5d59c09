// exp, tanh and the logistic function, lane by lane.
//
// float: tanh(x) = x P(x^2) / Q(x^2) with P of degree 5 and Q of degree 4, a minimax fit of the
// relative error on |x| <= 9 (fit error 4e-9, below half a unit in the last place); beyond 9 tanh
// is 1 in float. sigmoid(x) = (1 + tanh(x / 2)) / 2. exp(x) = 2^n exp(r), |r| <= ln(2)/2, with ln 2
// split in two for an exact reduction and a Taylor polynomial of degree 7 (remainder 5e-9). double:
// the C library's, because double is the reference precision and not a fast path.
#pragma once

#include <math.h>

#include "cpu/vec.h"

namespace xdf {
namespace XDF_ISA {

// tanh as numerator and denominator: where several are multiplied, one division serves them all.
template <class T>
struct Ratio {
  Vec<T> num, den;
};

XDF_INLINE Ratio<float> tanh_ratio(Vec<float> x) {
  using V = Vec<float>;
  x = V::max(V::set1(-9.0f), V::min(V::set1(9.0f), x));
  const V u = x * x;
  V p = V::set1(-1.31012796283e-11f);
  p = V::fma(p, u, V::set1(3.18579956629e-08f));
  p = V::fma(p, u, V::set1(2.85567743945e-05f));
  p = V::fma(p, u, V::set1(0.00389610156312f));
  p = V::fma(p, u, V::set1(0.137022138961f));
  p = V::fma(p, u, V::set1(1.0f));
  V q = V::set1(1.32511942676e-06f);
  q = V::fma(q, u, V::set1(0.000398721495231f));
  q = V::fma(q, u, V::set1(0.0273479259663f));
  q = V::fma(q, u, V::set1(0.470355474235f));
  q = V::fma(q, u, V::set1(1.0f));
  return {x * p, q};
}

// sigmoid(x) = (den + num) / (2 den) with tanh(x / 2) = num / den
XDF_INLINE Ratio<float> sigmoid_ratio(Vec<float> x) {
  const Ratio<float> t = tanh_ratio(Vec<float>::set1(0.5f) * x);
  return {t.den + t.num, t.den + t.den};
}

// The same in fewer digits, for results that are kept in seven bits: P and Q of degree 2, a minimax
// fit of the error on |x| <= 5 (4.3e-5); with what lies beyond, at most 1.4e-4.
XDF_INLINE Ratio<float> tanh_ratio_short(Vec<float> x) {
  using V = Vec<float>;
  x = V::max(V::set1(-5.0f), V::min(V::set1(5.0f), x));
  const V u = x * x;
  V p = V::set1(0.000654943339465f);
  p = V::fma(p, u, V::set1(0.101723118261f));
  p = V::fma(p, u, V::set1(0.999810139874f));
  V q = V::set1(0.0126391748787f);
  q = V::fma(q, u, V::set1(0.434504036625f));
  q = V::fma(q, u, V::set1(1.0f));
  return {x * p, q};
}

XDF_INLINE Ratio<float> sigmoid_ratio_short(Vec<float> x) {
  using V = Vec<float>;
#if defined(XDF_ISA_avx512) || defined(XDF_ISA_neondot)
  // (q + x p / 2) / (2 q) with tanh(x / 2) = (x / 2) p / q, the powers of two in the coefficients:
  // a product less, where there are registers for both sets of coefficients.
  x = V::max(V::set1(-10.0f), V::min(V::set1(10.0f), x));
  const V u = x * x;
  V p = V::set1(0.000654943339465f / 32);
  p = V::fma(p, u, V::set1(0.101723118261f / 8));
  p = V::fma(p, u, V::set1(0.999810139874f / 2));
  V q = V::set1(0.0126391748787f / 16);
  q = V::fma(q, u, V::set1(0.434504036625f / 4));
  q = V::fma(q, u, V::set1(1.0f));
  return {V::fma(x, p, q), q + q};
#else
  const Ratio<float> t = tanh_ratio_short(V::set1(0.5f) * x);
  return {t.den + t.num, t.den + t.den};
#endif
}

XDF_INLINE Ratio<double> tanh_ratio(Vec<double> x) {
  for (int i = 0; i < Vec<double>::lanes; ++i) x.v[i] = ::tanh(x.v[i]);
  return {x, Vec<double>::set1(1.0)};
}

XDF_INLINE Ratio<double> sigmoid_ratio(Vec<double> x) {
  for (int i = 0; i < Vec<double>::lanes; ++i) x.v[i] = 1.0 / (1.0 + ::exp(-x.v[i]));
  return {x, Vec<double>::set1(1.0)};
}

template <class T>
XDF_INLINE Vec<T> vtanh(Vec<T> x) {
  const Ratio<T> t = tanh_ratio(x);
  return t.num / t.den;
}

// Results below the smallest normal number are 0; x = -inf gives 0; x > 88 saturates at exp(88).
XDF_INLINE Vec<float> vexp(Vec<float> x) {
  using V = Vec<float>;
  const V lowest = V::set1(-87.0f);
  const V clamped = V::max(lowest, V::min(V::set1(88.0f), x));
  const V n = V::round(clamped * V::set1(1.44269504089f));
  V r = V::fma(n, V::set1(-0.693359375f), clamped);
  r = V::fma(n, V::set1(2.12194440e-4f), r);
  V p = V::set1(1.0f / 5040.0f);
  p = V::fma(p, r, V::set1(1.0f / 720.0f));
  p = V::fma(p, r, V::set1(1.0f / 120.0f));
  p = V::fma(p, r, V::set1(1.0f / 24.0f));
  p = V::fma(p, r, V::set1(1.0f / 6.0f));
  p = V::fma(p, r, V::set1(0.5f));
  p = V::fma(p, r, V::set1(1.0f));
  p = V::fma(p, r, V::set1(1.0f));
  return V::select_gt(lowest, x, V::set1(0.0f), p * V::pow2(n));
}

XDF_INLINE Vec<double> vexp(Vec<double> x) {
  for (int i = 0; i < Vec<double>::lanes; ++i) x.v[i] = ::exp(x.v[i]);
  return x;
}

}  // namespace XDF_ISA
}  // namespace xdf
