// 16-bit storage of floats; arithmetic is in float.
#pragma once

#include <cstdint>

namespace xdf {

struct Half {  // IEEE binary16
  uint16_t bits;
};

struct Bf16 {  // the upper half of a float
  uint16_t bits;
};

// Two neighbours along the inner dimension of a product, k even and k + 1: what an instruction that
// multiplies bfloat16 takes for each sum. As large as a float, so that packed weights lie alike.
struct Bf16Pair {
  Bf16 of[2];
};
constexpr int pair_count(int n) {
  return (n + 1) / 2;
}

}  // namespace xdf
