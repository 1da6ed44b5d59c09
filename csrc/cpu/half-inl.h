// Floats to half precision, to nearest even; what is beyond its range becomes its largest number.
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

}  // namespace XDF_ISA
}  // namespace xdf
