// A student as it runs: token ids to the scores of every tag.
#pragma once

#include <optional>

#include "cpu/bilstm.h"
#include "cpu/bilstm_tokens.h"

namespace xdf {

class StudentWeights {
 public:
  // [C, 2H] and [C]. kInt8 has bytes as quantize_rows makes them, with the scales of their rows.
  struct Output {
    int num_tags;
    const float* weight;        // null for kInt8
    const int8_t* weight_int8;  // for kInt8, else null
    const float* scales;
    const float* bias;
  };

  // The other arguments are TokenBiLstm's.
  StudentWeights(Precision precision, const TokenBiLstm::Sizes& sizes, const float* embedding,
                 const TokenBiLstm::Direction& forward, const TokenBiLstm::Direction& reverse,
                 const Output& output, const int32_t* table_ids, int64_t table_size, int threads);

  const TokenBiLstm& bilstm() const { return bilstm_; }
  int num_tags() const { return num_tags_; }
  // Of all packed weights, without the table.
  size_t nbytes() const;

  // scores [total, C] of ids [total], each below V.
  void forward(const int32_t* ids, const int32_t* cu_seqlens, int batch, float* scores,
               int threads) const;

 private:
  TokenBiLstm bilstm_;
  const InferenceTable& inference_;
  int num_tags_;
  std::optional<LinearWeights<float>> output_;  // unless kInt8
  PackedInt8 int8_output_;
  AlignedBuffer<float> int8_bias_;
};

}  // namespace xdf
