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

// Rows of hidden states whose scores are one task.
constexpr int64_t kRows = 256;

void pack_floats(const StudentWeights::Layer& layer, int K,
                 std::optional<LinearWeights<float>>& packed) {
  if (layer.weight != nullptr) {
    packed.emplace(layer.weight, layer.bias, layer.rows, K);
    return;
  }
  std::vector<float> weight(static_cast<size_t>(layer.rows) * static_cast<size_t>(K));
  for (size_t i = 0; i < weight.size(); ++i)
    weight[i] = layer.scales[i / static_cast<size_t>(K)] * layer.weight_int8[i];
  packed.emplace(weight.data(), layer.bias, layer.rows, K);
}

}  // namespace

StudentWeights::StudentWeights(Precision precision, const TokenBiLstm::Sizes& sizes,
                               const float* embedding, const TokenBiLstm::Direction& forward,
                               const TokenBiLstm::Direction& reverse, const Layer* projection,
                               const Layer& output, Pooling pooling, const int32_t* table_ids,
                               int64_t table_size, int threads)
    : bilstm_(precision, sizes, embedding, forward, reverse, table_ids, table_size, threads),
      inference_(inference_kernels()),
      pooling_(pooling),
      num_labels_(output.rows),
      states_layer_rows_(projection != nullptr ? projection->rows : output.rows) {
  const int K = 2 * sizes.hidden_size;
  const Layer& first = projection != nullptr ? *projection : output;
  if (projection != nullptr) pack_floats(output, projection->rows, output_);
  if (precision != Precision::kInt8 || pooling != Pooling::kNone) {
    pack_floats(first, K, states_layer_);
    return;
  }
  const int lanes = kernels<float>().lanes;
  int8_states_layer_.pack(first.weight_int8, first.scales, K, first.rows, lanes,
                          [](int n) { return n; });
  const int padded = round_up(first.rows, 4 * lanes);
  float* bias = int8_bias_.reserve(static_cast<size_t>(padded));
  std::copy_n(first.bias, first.rows, bias);
  std::fill_n(bias + first.rows, padded - first.rows, 0.0f);
}

size_t StudentWeights::nbytes() const {
  return bilstm_.weights_nbytes() +
         (states_layer_ ? states_layer_->nbytes() : int8_states_layer_.nbytes()) +
         (output_ ? output_->nbytes() : 0);
}

void StudentWeights::finish(float* projected, int64_t rows, float* scores, int threads) const {
  kernels<float>().gelu(projected, rows * states_layer_rows_);
  output_->apply(projected, rows, scores, threads);
}

void StudentWeights::forward(const int32_t* ids, const int32_t* cu_seqlens, int batch,
                             float* scores, int threads) const {
  const int64_t total = cu_seqlens[batch];
  const size_t row = bilstm_.hidden_nbytes();
  // The runs' own workspace is another type's, and so another buffer.
  unsigned char* hidden = bilstm_workspace<unsigned char>(static_cast<size_t>(total) * row);
  bilstm_.forward(ids, cu_seqlens, batch, hidden, threads);
  if (states_layer_ && !output_)
    return states_layer_->apply(reinterpret_cast<float*>(hidden), total, scores, threads);

  // A task takes its rows through all layers while they are in cache.
  const int tasks = static_cast<int>((total + kRows - 1) / kRows);
  const int K = 2 * bilstm_.sizes().hidden_size, N = states_layer_rows_;
  const size_t part = output_ ? static_cast<size_t>(kRows) * static_cast<size_t>(N) : 0;
  // The runs have ended, and with them the use of their workspace.
  float* projected =
      bilstm_workspace<float>(part * static_cast<size_t>(parallel_slots(tasks, threads)));
  parallel_for(tasks, threads, [&](int task, int slot) {
    const int64_t first = task * kRows;
    const int rows = static_cast<int>(std::min(kRows, total - first));
    unsigned char* x = hidden + static_cast<size_t>(first) * row;
    float* out = scores + first * num_labels_;
    float* y = output_ ? projected + static_cast<size_t>(slot) * part : out;
    if (states_layer_) {
      states_layer_->apply(reinterpret_cast<float*>(x), rows, y, 1);
    } else {
      for (int r = 0; r < rows; ++r)  // it meets weights of zero, but is read
        std::memset(x + static_cast<size_t>(r) * row + K, kInt8HiddenZero,
                    row - static_cast<size_t>(K));
      inference_.linear_int8({x, static_cast<ptrdiff_t>(row), rows, K, N, int8_states_layer_.view(),
                              int8_bias_.data(), y});
    }
    if (output_) finish(y, rows, out, 1);
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
  std::vector<float> pooled, projected;
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
    float* out = scores + static_cast<ptrdiff_t>(first) * num_labels_;
    if (output_) {
      projected.resize(static_cast<size_t>(text - first) * static_cast<size_t>(states_layer_rows_));
      states_layer_->apply(pooled.data(), text - first, projected.data(), threads);
      finish(projected.data(), text - first, out, threads);
    } else {
      states_layer_->apply(pooled.data(), text - first, out, threads);
    }
  } while (window < windows);
}

}  // namespace xdf
