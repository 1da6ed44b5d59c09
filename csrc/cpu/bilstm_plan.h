// How a ragged batch is cut into groups of sequences that run through an LSTM together.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "cpu/aligned.h"
#include "xdf/kernels.h"

namespace xdf {

// Sequences by descending length (ties in order), empty ones left out.
inline std::vector<int32_t> by_length(const int32_t* cu_seqlens, int batch) {
  std::vector<int32_t> order;
  order.reserve(static_cast<size_t>(batch));
  for (int b = 0; b < batch; ++b)
    if (cu_seqlens[b + 1] > cu_seqlens[b]) order.push_back(b);
  std::stable_sort(order.begin(), order.end(), [=](int32_t a, int32_t b) {
    return cu_seqlens[a + 1] - cu_seqlens[a] > cu_seqlens[b + 1] - cu_seqlens[b];
  });
  return order;
}

// The batch cut into groups of sequences of like length, each to be run once in each direction.
class Plan {
 public:
  Plan(const int32_t* cu_seqlens, int batch, int threads) {
    const std::vector<int32_t> order = by_length(cu_seqlens, batch);
    const int n = static_cast<int>(order.size());
    first_[0].resize(order.size());
    first_[1].resize(order.size());
    length_.resize(order.size());
    for (size_t r = 0; r < order.size(); ++r) {
      first_[0][r] = cu_seqlens[order[r]];
      first_[1][r] = cu_seqlens[order[r] + 1] - 1;
      length_[r] = cu_seqlens[order[r] + 1] - cu_seqlens[order[r]];
    }
    const int per_direction = (std::max(threads, 1) + 1) / 2;
    int groups = std::max((n + kMaxGroupRows - 1) / kMaxGroupRows, std::min(n, per_direction));
    for (int start = 0; groups > 0; --groups) {
      const int rows = (n - start + groups - 1) / groups;
      starts_.push_back({start, rows});
      start += rows;
    }
  }

  int tasks() const { return 2 * static_cast<int>(starts_.size()); }
  static int direction(int task) { return task & 1; }
  LstmGroup group(int task) const {
    const auto [start, rows] = starts_[static_cast<size_t>(task / 2)];
    const int d = direction(task);
    return {first_[d].data() + start, length_.data() + start, rows, d == 1};
  }

 private:
  std::vector<int32_t> first_[2], length_;
  std::vector<std::pair<int, int>> starts_;
};

// Workspace of the calling thread, which hands it out to those that work for it.
template <class T>
T* bilstm_workspace(size_t size) {
  static thread_local AlignedBuffer<T> buffer;
  return buffer.reserve(size);
}

}  // namespace xdf
