// Row-wise softmax: two passes over a row, its exponentials kept in `out` between them.
#pragma once

#include <math.h>

#include "cpu/activations-inl.h"
#include "xdf/crf.h"

namespace xdf {
namespace XDF_ISA {

template <class T>
static void softmax(const SoftmaxArgs<T>& args) {
  using V = Vec<T>;
  constexpr int lanes = V::lanes;
  const int C = args.num_tags, whole = C / lanes * lanes, rest = C - whole;
  // Lanes beyond the row become -inf, whose exponential is 0.
  T tail[lanes];
  for (int i = 0; i < lanes; ++i) tail[i] = i < rest ? T(0) : T(-INFINITY);
  const V padding = V::load(tail);
  for (int64_t m = 0; m < args.rows; ++m) {
    const T* x = args.logits + m * C;
    T* y = args.out + m * C;
    V largest = V::set1(T(-INFINITY));
    for (int c = 0; c < whole; c += lanes) largest = V::max(largest, V::load(x + c));
    V last = padding;
    if (rest > 0) {
      last = V::load_n(x + whole, rest) + padding;
      largest = V::max(largest, last);
    }
    const V shift = V::set1(largest.reduce_max());
    V sum = V::set1(T(0));
    for (int c = 0; c < whole; c += lanes) {
      const V p = vexp(V::load(x + c) - shift);
      p.store(y + c);
      sum = sum + p;
    }
    if (rest > 0) {
      last = vexp(last - shift);
      sum = sum + last;
    }
    const V total = V::set1(sum.reduce_add());
    for (int c = 0; c < whole; c += lanes) (V::load(y + c) / total).store(y + c);
    if (rest > 0) (last / total).store_n(y + whole, rest);
  }
}

}  // namespace XDF_ISA
}  // namespace xdf
