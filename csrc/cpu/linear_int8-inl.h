// out = bias + s (u W - 64 1 W) for rows of hidden states as bytes (xdf/kernels.h: Int8LinearArgs).
#pragma once

#include "cpu/int8-inl.h"

namespace xdf {
namespace XDF_ISA {

static void linear_int8(const Int8LinearArgs& args) {
  constexpr int lanes = Vec<float>::lanes;
  constexpr int kRows = 16;
  int32_t sums[kRows * 4 * lanes];
  for (int m = 0; m < args.rows; m += kRows) {
    const int rows = args.rows - m < kRows ? args.rows - m : kRows;
    const int8_t* weights = args.weights.data;
    for (int n = 0; n < args.N; n += 4 * lanes, weights += int8_block_size(args.K)) {
      int8_rows(args.x + m * args.x_stride, args.x_stride, rows, args.K, weights,
                args.weights.start + n, {reinterpret_cast<const char*>(weights), 0}, sums);
      for (int r = 0; r < rows; ++r) {
        float* out = args.out + static_cast<ptrdiff_t>(m + r) * args.N;
        for (int at = n; at < args.N && at < n + 4 * lanes; at += lanes) {
          const Vec<float> sum = Int32s::load(sums + r * 4 * lanes + at - n).to_float();
          const Vec<float> y = Vec<float>::fma(sum, Vec<float>::load(args.weights.scale + at),
                                               Vec<float>::load(args.bias + at));
          if (at + lanes <= args.N)
            y.store(out + at);
          else
            y.store_n(out + at, args.N - at);
        }
      }
    }
  }
}

}  // namespace XDF_ISA
}  // namespace xdf
