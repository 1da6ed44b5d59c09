// Floats in 16 bits, to nearest even. Half precision: what is beyond its range becomes its largest
// number.
#pragma once

#include "cpu/vec.h"

namespace xdf {
namespace XDF_ISA {

static void to_half(const float* from, Half* to, int64_t size) {
  using V = Vec<float>;
  const V largest = V::set1(65504.0f), lowest = V::set1(-65504.0f);
  int64_t i = 0;
  for (; i + V::lanes <= size; i += V::lanes)
    V::max(lowest, V::min(largest, V::load(from + i))).store(to + i);
  if (i < size) {
    Half rest[V::lanes];
    V::max(lowest, V::min(largest, V::load_n(from + i, static_cast<int>(size - i)))).store(rest);
    for (int n = 0; i + n < size; ++n) to[i + n] = rest[n];
  }
}

#ifdef XDF_ISA_avx512bf16
// The n values of a row as pairs; an odd one is filled up with a zero.
static void to_pairs(const float* from, Bf16Pair* to, int n) {
  using V = Vec<float>;
  Bf16* values = reinterpret_cast<Bf16*>(to);
  int i = 0;
  for (; i + V::lanes <= n; i += V::lanes) V::load(from + i).store(values + i);
  if (i < n) {
    Bf16 rest[V::lanes];
    V::load_n(from + i, n - i).store(rest);
    __builtin_memcpy(values + i, rest, sizeof(Bf16Pair) * static_cast<size_t>(pair_count(n - i)));
  }
}
#endif

}  // namespace XDF_ISA
}  // namespace xdf
