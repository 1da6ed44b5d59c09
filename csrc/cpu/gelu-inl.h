// GELU in its tanh form (Hendrycks and Gimpel, 2016), lane by lane:
//
//   gelu(x) = x (1 + tanh(u)) / 2 = x / (1 + exp(-2 u)),  u = sqrt(2 / pi) (x + 0.044715 x^3)
//
// By the exponential, since near -1 and 1 a tanh is good to some last places of 1 only, which x
// makes larger. Below -10 it is less than the smallest number away from 0 and taken for 0: there
// the exponential ends.
#pragma once

#include "cpu/activations-inl.h"

namespace xdf {
namespace XDF_ISA {

template <class T>
XDF_INLINE Vec<T> vgelu(Vec<T> x) {
  using V = Vec<T>;
  const V cubic = V::set1(T(-0.07135481627260025)), linear = V::set1(T(-1.5957691216057308));
  const V y = x / (V::set1(T(1)) + vexp(x * V::fma(cubic, x * x, linear)));
  return V::select_gt(V::set1(T(-10)), x, V::set1(T(0)), y);
}

template <class T>
static void gelu(T* values, int64_t size) {
  using V = Vec<T>;
  constexpr int lanes = V::lanes;
  const int64_t whole = size / lanes * lanes;
  for (int64_t i = 0; i < whole; i += lanes) vgelu(V::load(values + i)).store(values + i);
  if (const int rest = static_cast<int>(size - whole); rest > 0)
    vgelu(V::load_n(values + whole, rest)).store_n(values + whole, rest);
}

}  // namespace XDF_ISA
}  // namespace xdf
