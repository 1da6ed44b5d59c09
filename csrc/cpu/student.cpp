#include "cpu/student.h"

#include <algorithm>
#include <cstring>
#include <utility>
#include <vector>

#include "cpu/bilstm_plan.h"
#include "cpu/dispatch.h"
#include "cpu/parallel.h"

namespace xdf {
namespace {

// Pieces whose hidden states a call that classifies holds at a time.
constexpr int kPartPieces = 16 * 1024;

}  // namespace

StudentWeights::StudentWeights(Precision precision, const TokenBiLstm::Sizes& sizes,
                               const float* embedding, const TokenBiLstm::Direction& forward,
                               const TokenBiLstm::Direction& reverse, const Output& output,
                               Pooling pooling, const int32_t* table_ids, int64_t table_size,
                               int threads)
    : bilstm_(precision, sizes, embedding, forward, reverse, table_ids, table_size, threads),
      inference_(inference_kernels()),
      pooling_(pooling),
      num_labels_(output.num_labels) {
  const int K = 2 * sizes.hidden_size;
  if (precision != Precision::kInt8) {
    output_.emplace(output.weight, output.bias, num_labels_, K);
    return;
  }
  if (pooling != Pooling::kNone) {
    std::vector<float> weight(static_cast<size_t>(num_labels_) * static_cast<size_t>(K));
    for (size_t i = 0; i < weight.size(); ++i)
      weight[i] = output.scales[i / static_cast<size_t>(K)] * output.weight_int8[i];
    output_.emplace(weight.data(), output.bias, num_labels_, K);
    return;
  }
  const int lanes = kernels<float>().lanes;
  int8_output_.pack(output.weight_int8, output.scales, K, num_labels_, lanes,
                    [](int n) { return n; });
  const int padded = round_up(num_labels_, 4 * lanes);
  float* bias = int8_bias_.reserve(static_cast<size_t>(padded));
  std::copy_n(output.bias, num_labels_, bias);
  std::fill_n(bias + num_labels_, padded - num_labels_, 0.0f);
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
    inference_.linear_int8({x, static_cast<ptrdiff_t>(row), rows, K, num_labels_,
                            int8_output_.view(), int8_bias_.data(), scores + first * num_labels_});
  });
}

void StudentWeights::classify(const int32_t* ids, const int32_t* cu_seqlens, const Texts& texts,
                              float* scores, int threads) const {
  const int H = bilstm_.sizes().hidden_size;
  const size_t row = bilstm_.hidden_nbytes();
  const int windows = texts.cu_windows[texts.count];
  const PooledState empty(pooling_, H, bilstm_.precision() == Precision::kInt8);
  // Of the text that the part before ended in, and of the one that this part ends in.
  PooledState carried = empty, unfinished = empty;
  std::vector<PooledState> states(static_cast<size_t>(parallel_slots(texts.count, threads)), empty);
  std::vector<float> pooled;
  std::vector<int32_t> part;
  int text = 0, window = 0;
  do {
    const int begin = window;
    const int32_t base = cu_seqlens[begin];
    part.assign(1, 0);
    for (; window < windows && (window == begin || cu_seqlens[window + 1] - base <= kPartPieces);
         ++window)
      part.push_back(cu_seqlens[window + 1] - base);
    unsigned char* hidden = bilstm_workspace<unsigned char>(static_cast<size_t>(part.back()) * row);
    bilstm_.forward(ids + base, part.data(), window - begin, hidden, threads);

    const int first = text;
    while (text < texts.count && texts.cu_windows[text + 1] <= window) ++text;
    const bool cut = text < texts.count && texts.cu_windows[text] < window;
    pooled.resize(static_cast<size_t>(text - first) * static_cast<size_t>(2 * H));
    parallel_for(text - first + (cut ? 1 : 0), threads, [&](int task, int slot) {
      const int t = first + task;
      PooledState& state = t == text ? unfinished : states[static_cast<size_t>(slot)];
      if (texts.cu_windows[t] < begin)
        state = carried;
      else
        state.clear();
      const int end = std::min(texts.cu_windows[t + 1], window);
      for (int w = std::max(texts.cu_windows[t], begin); w < end; ++w) {
        const int32_t* core = texts.cores + 2 * static_cast<ptrdiff_t>(w);
        state.add(hidden + static_cast<size_t>(core[0] - base) * row, core[1] - core[0], row);
      }
      if (t < text) state.finish(pooled.data() + static_cast<ptrdiff_t>(task) * 2 * H);
    });
    std::swap(carried, unfinished);
    output_->apply(pooled.data(), text - first,
                   scores + static_cast<ptrdiff_t>(first) * num_labels_, threads);
  } while (window < windows);
}

}  // namespace xdf
