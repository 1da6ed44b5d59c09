#include "cpu/quantize.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace xdf {
namespace {

// body(sum) for each set of a row: of its positive or of its negative weights, whichever is more.
template <class T, class Body>
void for_each_set(const T* row, int K, Body&& body) {
  for (int chunk = 0; chunk < K; chunk += kInt8Chunk) {
    for (int set = 0; set < 2; ++set) {
      double positive = 0, negative = 0;
      for (int k = chunk; k < std::min(K, chunk + kInt8Chunk); ++k) {
        if (k / 2 % 2 != set) continue;
        (row[k] > 0 ? positive : negative) += std::abs(static_cast<double>(row[k]));
      }
      body(std::max(positive, negative));
    }
  }
}

}  // namespace

void quantize_rows(const float* w, int64_t N, int K, int8_t* to, float* scales) {
  for (int64_t n = 0; n < N; ++n, w += K, to += K) {
    double scale = 0;
    for (int k = 0; k < K; ++k) scale = std::max(scale, std::abs(static_cast<double>(w[k])) / 127);
    for_each_set(w, K, [&](double sum) { scale = std::max(scale, sum / kInt8SetLimit); });
    // Zeros, or so near to them that no scale has the digits for them.
    if (scale < std::numeric_limits<float>::min()) scale = 1;
    scales[n] = static_cast<float>(scale);
    for (bool fits = false; !fits;) {  // rounding may carry a set a little over its limit
      for (int k = 0; k < K; ++k) {
        const float level = std::nearbyint(w[k] / scales[n]);
        to[k] = static_cast<int8_t>(std::max(-127.0f, std::min(127.0f, level)));
      }
      fits = true;
      for_each_set(to, K, [&](double sum) { fits = fits && sum <= kInt8SetLimit; });
      if (!fits) scales[n] *= 1.005f;
    }
  }
}

bool valid_int8_rows(const int8_t* w, int64_t N, int K) {
  bool valid = true;
  for (int64_t n = 0; n < N && valid; ++n, w += K) {
    valid = std::find(w, w + K, -128) == w + K;
    for_each_set(w, K, [&](double sum) { valid = valid && sum <= kInt8SetLimit; });
  }
  return valid;
}

void PackedInt8::pack(const int8_t* w, const float* scales, int K, int columns, int lanes,
                      const std::function<int(int)>& row_of) {
  const int padded = round_up(columns, 4 * lanes);
  const ptrdiff_t block = static_cast<ptrdiff_t>(round_up(K, kInt8Chunk)) * 4 * lanes;
  const size_t size = static_cast<size_t>(block) * static_cast<size_t>(padded / (4 * lanes));
  int8_t* data = data_.reserve(size);
  float* scale = scale_.reserve(static_cast<size_t>(padded));
  int32_t* start = start_.reserve(static_cast<size_t>(padded));
  std::fill_n(data, size, int8_t{0});
  std::fill_n(scale, padded, 0.0f);
  std::fill_n(start, padded, 0);
  for (int n = 0; n < columns; ++n) {
    const int row = row_of(n);
    if (row < 0) continue;
    const int8_t* from = w + static_cast<ptrdiff_t>(row) * K;
    int8_t* to = data + n / (4 * lanes) * block;
    for (int k = 0; k < K; ++k) {
      const ptrdiff_t chunk = k / kInt8Chunk, quad = k % kInt8Chunk / 4;
      const ptrdiff_t vector = (chunk * 4 + n / lanes % 4) * 4 + quad;
      to[(vector * lanes + n % lanes) * 4 + k % 4] = from[k];
      start[n] -= kInt8HiddenZero * from[k];
    }
    scale[n] = scales[row] / kInt8HiddenLevels;
  }
}

}  // namespace xdf
