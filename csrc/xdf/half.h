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

}  // namespace xdf
