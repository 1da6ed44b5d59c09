// A student as it runs: token ids to the scores of every tag for each token, or of every class for
// each text.
#pragma once

#include <optional>

#include "cpu/bilstm.h"
#include "cpu/bilstm_tokens.h"
#include "cpu/pooling.h"

namespace xdf {

class StudentWeights {
 public:
  // [N, K] and [N]. kInt8 has bytes as quantize_rows makes them, with the scales of their rows.
  struct Layer {
    int rows;                   // N
    const float* weight;        // null for kInt8
    const int8_t* weight_int8;  // for kInt8, else null
    const float* scales;
    const float* bias;
  };

  // Texts cut into windows, which are the sequences that the BiLSTM reads.
  struct Texts {
    const int32_t* cu_windows;  // [count + 1] where each text's windows start; a text may have none
    const int32_t* cores;       // [windows, 2] first and one past the last of the pieces pooled
    int count;
  };

  // projection: [R, 2H], or null: the output layer, [C, R], reads its GELU; without one it reads
  // the hidden states, [C, 2H]. The other arguments are TokenBiLstm's.
  StudentWeights(Precision precision, const TokenBiLstm::Sizes& sizes, const float* embedding,
                 const TokenBiLstm::Direction& forward, const TokenBiLstm::Direction& reverse,
                 const Layer* projection, const Layer& output, Pooling pooling,
                 const int32_t* table_ids, int64_t table_size, int threads);

  const TokenBiLstm& bilstm() const { return bilstm_; }
  int num_labels() const { return num_labels_; }
  Pooling pooling() const { return pooling_; }
  // Of all packed weights, without the table.
  size_t nbytes() const;

  // scores [total, C] of ids [total], each below V; of a student without pooling.
  void forward(const int32_t* ids, const int32_t* cu_seqlens, int batch, float* scores,
               int threads) const;
  // scores [texts, C] of a student with pooling. That of a text without pieces is the bias.
  void classify(const int32_t* ids, const int32_t* cu_seqlens, const Texts& texts, float* scores,
                int threads) const;

 private:
  // GELU of projected [rows, R], in place, then scores [rows, C].
  void finish(float* projected, int64_t rows, float* scores, int threads) const;

  TokenBiLstm bilstm_;
  const InferenceTable& inference_;
  Pooling pooling_;
  int num_labels_;
  // The layer over hidden states: the projection, or else the output layer. As floats unless kInt8
  // without pooling: of a pooled state there is one a text, nothing to gain in bytes.
  int states_layer_rows_;
  std::optional<LinearWeights<float>> states_layer_;
  PackedInt8 int8_states_layer_;
  AlignedBuffer<float> int8_bias_;
  std::optional<LinearWeights<float>> output_;  // over a projection
};

}  // namespace xdf
