#include "cpu/pooling.h"

#include <algorithm>
#include <cstring>
#include <type_traits>

namespace xdf {
namespace {

template <class Hidden>
const Hidden* row_at(const unsigned char* rows, int64_t row, size_t stride) {
  return reinterpret_cast<const Hidden*>(rows + static_cast<size_t>(row) * stride);
}

// In the units of PooledState.
double value_of(float h) {
  return static_cast<double>(h);
}
double value_of(uint8_t h) {
  return static_cast<double>(h - kInt8HiddenZero);
}

// Rows whose bytes are summed in 16 bits, which a compiler makes of bytes in one step.
constexpr int64_t kSumRows = 65535 / (2 * kInt8HiddenZero - 1);

}  // namespace

PooledState::PooledState(Pooling pooling, int hidden_size, bool bytes)
    : pooling_(pooling),
      width_(2 * hidden_size),
      bytes_(bytes),
      state_(static_cast<size_t>(width_)),
      sums_(pooling == Pooling::kMean && bytes ? static_cast<size_t>(width_) : 0),
      highest_(pooling == Pooling::kMax
                   ? static_cast<size_t>(width_) * (bytes ? sizeof(uint8_t) : sizeof(float))
                   : 0) {}

void PooledState::clear() {
  count_ = 0;
  std::fill(state_.begin(), state_.end(), 0.0);
}

void PooledState::add(const unsigned char* rows, int64_t count, size_t stride) {
  if (count == 0) return;
  if (bytes_)
    add_rows<uint8_t>(rows, count, stride);
  else
    add_rows<float>(rows, count, stride);
  count_ += count;
}

template <class Hidden>
void PooledState::add_rows(const unsigned char* rows, int64_t count, size_t stride) {
  const int width = width_, half = width / 2;  // bytes may alias members, so these are copies
  double* state = state_.data();
  if (pooling_ == Pooling::kLast) {
    const Hidden* last = row_at<Hidden>(rows, count - 1, stride);
    for (int k = 0; k < half; ++k) state[k] = value_of(last[k]);
    const Hidden* first = row_at<Hidden>(rows, 0, stride);
    for (int k = half; k < width && count_ == 0; ++k) state[k] = value_of(first[k]);
  } else if (pooling_ == Pooling::kMax) {
    Hidden* highest = reinterpret_cast<Hidden*>(highest_.data());
    std::memcpy(highest, rows, highest_.size());
    for (int64_t r = 1; r < count; ++r) {
      const Hidden* row = row_at<Hidden>(rows, r, stride);
      for (int k = 0; k < width; ++k) highest[k] = highest[k] < row[k] ? row[k] : highest[k];
    }
    for (int k = 0; k < width; ++k) {
      const double value = value_of(highest[k]);
      state[k] = count_ == 0 ? value : std::max(state[k], value);
    }
  } else if constexpr (std::is_same_v<Hidden, float>) {
    for (int64_t r = 0; r < count; ++r) {
      const float* row = row_at<float>(rows, r, stride);
      for (int k = 0; k < width; ++k) state[k] += static_cast<double>(row[k]);
    }
  } else {
    uint16_t* sums = sums_.data();
    for (int64_t begin = 0; begin < count; begin += kSumRows) {
      const int64_t end = std::min(count, begin + kSumRows);
      std::fill_n(sums, width, static_cast<uint16_t>(0));
      for (int64_t r = begin; r < end; ++r) {
        const uint8_t* row = row_at<uint8_t>(rows, r, stride);
        for (int k = 0; k < width; ++k) sums[k] = static_cast<uint16_t>(sums[k] + row[k]);
      }
      const int zeros = kInt8HiddenZero * static_cast<int>(end - begin);
      for (int k = 0; k < width; ++k) state[k] += sums[k] - zeros;
    }
  }
}

void PooledState::finish(float* out) const {
  double parts = bytes_ ? kInt8HiddenLevels : 1;
  if (pooling_ == Pooling::kMean && count_ > 0) parts *= static_cast<double>(count_);
  for (int k = 0; k < width_; ++k)
    out[k] = static_cast<float>(state_[static_cast<size_t>(k)] / parts);
}

}  // namespace xdf
