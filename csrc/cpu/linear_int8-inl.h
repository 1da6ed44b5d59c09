// out = bias + s (u W - 64 1 W) for rows of hidden states as bytes (xdf/kernels.h: Int8LinearArgs).
#pragma once

#include "cpu/int8-inl.h"

namespace xdf {
namespace XDF_ISA {

constexpr int kInt8LinearRows = 16;  // whose sums are taken before they are scaled

// Rows [m, m + rows) and the columns from n that lie in the first NV registers of a block: a tagger
// has few labels, and the rest of a block would be zeros.
template <int NV>
static void linear_int8_columns(const Int8LinearArgs& args, int m, int rows, int n) {
  constexpr int lanes = Vec<float>::lanes;
  int32_t sums[kInt8LinearRows * NV * lanes];
  const int8_t* weights = args.weights.data + n / (4 * lanes) * int8_block_size(args.K);
  int8_rows<NV>(args.x + m * args.x_stride, args.x_stride, rows, args.K, weights,
                args.weights.start + n, {reinterpret_cast<const char*>(weights), 0}, sums);
  for (int r = 0; r < rows; ++r) {
    float* out = args.out + static_cast<ptrdiff_t>(m + r) * args.N;
    for (int at = n; at < args.N && at < n + NV * lanes; at += lanes) {
      const Vec<float> sum = Int32s::load(sums + r * NV * lanes + at - n).to_float();
      const Vec<float> y = Vec<float>::fma(sum, Vec<float>::load(args.weights.scale + at),
                                           Vec<float>::load(args.bias + at));
      if (at + lanes <= args.N)
        y.store(out + at);
      else
        y.store_n(out + at, args.N - at);
    }
  }
}

static void linear_int8(const Int8LinearArgs& args) {
  constexpr int lanes = Vec<float>::lanes;
  for (int m = 0; m < args.rows; m += kInt8LinearRows) {
    const int rows = args.rows - m < kInt8LinearRows ? args.rows - m : kInt8LinearRows;
    for (int n = 0; n < args.N; n += 4 * lanes) {
      if (args.N - n <= lanes)
        linear_int8_columns<1>(args, m, rows, n);
      else if (args.N - n <= 2 * lanes)
        linear_int8_columns<2>(args, m, rows, n);
      else
        linear_int8_columns<4>(args, m, rows, n);
    }
  }
}

}  // namespace XDF_ISA
}  // namespace xdf
