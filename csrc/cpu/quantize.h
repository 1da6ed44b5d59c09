// Weights as bytes (xdf/kernels.h: kInt8SetLimit, Int8Matrix).
#pragma once

#include <cstdint>
#include <functional>

#include "cpu/aligned.h"
#include "xdf/kernels.h"

namespace xdf {

// Rounds w [N, K]: row n is about scales[n] * to[n, :], with scales such that no kernel overflows.
void quantize_rows(const float* w, int64_t N, int K, int8_t* to, float* scales);

// Whether w [N, K] keeps within kInt8SetLimit and -127 .. 127.
bool valid_int8_rows(const int8_t* w, int64_t N, int K);

// Rows w [N, K] with their scales, packed as columns of an Int8Matrix.
class PackedInt8 {
 public:
  // row_of(column) is the row of w that becomes column 0 .. columns - 1, or -1 for zeros.
  void pack(const int8_t* w, const float* scales, int K, int columns, int lanes,
            const std::function<int(int)>& row_of);
  Int8Matrix view() const { return {data_.data(), scale_.data(), start_.data()}; }
  size_t nbytes() const {
    return data_.size() + scale_.size() * sizeof(float) + start_.size() * sizeof(int32_t);
  }

 private:
  AlignedBuffer<int8_t> data_;
  AlignedBuffer<float> scale_;
  AlignedBuffer<int32_t> start_;
};

}  // namespace xdf
