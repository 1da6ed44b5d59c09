#include "cpu/student.h"

#include <algorithm>
#include <cstring>

#include "cpu/bilstm_plan.h"
#include "cpu/dispatch.h"
#include "cpu/parallel.h"

namespace xdf {

StudentWeights::StudentWeights(Precision precision, const TokenBiLstm::Sizes& sizes,
                               const float* embedding, const TokenBiLstm::Direction& forward,
                               const TokenBiLstm::Direction& reverse, const Output& output,
                               const int32_t* table_ids, int64_t table_size, int threads)
    : bilstm_(precision, sizes, embedding, forward, reverse, table_ids, table_size, threads),
      inference_(inference_kernels()),
      num_tags_(output.num_tags) {
  const int K = 2 * sizes.hidden_size;
  if (precision != Precision::kInt8) {
    output_.emplace(output.weight, output.bias, num_tags_, K);
    return;
  }
  const int lanes = kernels<float>().lanes;
  int8_output_.pack(output.weight_int8, output.scales, K, num_tags_, lanes,
                    [](int n) { return n; });
  const int padded = round_up(num_tags_, 4 * lanes);
  float* bias = int8_bias_.reserve(static_cast<size_t>(padded));
  std::copy_n(output.bias, num_tags_, bias);
  std::fill_n(bias + num_tags_, padded - num_tags_, 0.0f);
}

size_t StudentWeights::nbytes() const {
  return bilstm_.weights_nbytes() + (output_ ? output_->nbytes() : int8_output_.nbytes());
}

void StudentWeights::forward(const int32_t* ids, const int32_t* cu_seqlens, int batch,
                             float* scores, int threads) const {
  const int64_t total = cu_seqlens[batch];
  const size_t row = bilstm_.hidden_nbytes();
  // The runs' own workspace is another type's, and so another buffer.
  unsigned char* hidden = bilstm_workspace<unsigned char>(static_cast<size_t>(total) * row);
  bilstm_.forward(ids, cu_seqlens, batch, hidden, threads);
  if (output_) return output_->apply(reinterpret_cast<float*>(hidden), total, scores, threads);

  constexpr int64_t kRows = 256;
  const int K = 2 * bilstm_.sizes().hidden_size;
  parallel_for(static_cast<int>((total + kRows - 1) / kRows), threads, [&](int task, int) {
    const int64_t first = task * kRows;
    const int rows = static_cast<int>(std::min(kRows, total - first));
    unsigned char* x = hidden + static_cast<size_t>(first) * row;
    for (int r = 0; r < rows; ++r)  // it meets weights of zero, but is read
      std::memset(x + static_cast<size_t>(r) * row + K, kInt8HiddenZero,
                  row - static_cast<size_t>(K));
    inference_.linear_int8({x, static_cast<ptrdiff_t>(row), rows, K, num_tags_, int8_output_.view(),
                            int8_bias_.data(), scores + first * num_tags_});
  });
}

}  // namespace xdf
