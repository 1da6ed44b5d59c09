// A BiLSTM that reads token ids, for inference. What a token adds to the gates, W_ih embedding + b,
// depends on its id alone, so it is a row of a table made beforehand, and only the recurrent half
// is left to compute.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/aligned.h"
#include "cpu/quantize.h"
#include "xdf/kernels.h"

namespace xdf {

// kFloat32: everything in float. kBf16: table rows in half precision (at the same size three bits
// better than bfloat16), recurrent weights in bfloat16; where the instruction set multiplies
// bfloat16 the hidden states are rounded to it on their way into the recurrence, else they are not;
// all other arithmetic in float. kInt8: table rows in half precision, the recurrence as
// LstmInt8StepArgs says.
enum class Precision { kFloat32, kBf16, kInt8 };

class TokenBiLstm {
 public:
  // torch's layout.
  struct Direction {
    const float* w_ih;         // [4H, E]
    const float* bias;         // [4H], b_ih + b_hh
    const float* w_hh;         // [4H, H]; null for kInt8
    const int8_t* w_hh_int8;   // [4H, H], as quantize_rows makes it; for kInt8, else null
    const float* w_hh_scales;  // [4H], of its rows
  };
  struct Sizes {
    int vocab_size, embedding_size, hidden_size;
  };

  // embedding [V, E] must outlive this object unless every id is in the table. table_ids [n],
  // distinct ids below V: those whose rows are kept; rows of others are computed in each call, to
  // the same bits.
  TokenBiLstm(Precision precision, const Sizes& sizes, const float* embedding,
              const Direction& forward, const Direction& reverse, const int32_t* table_ids,
              int64_t table_size, int threads);

  const Sizes& sizes() const { return sizes_; }
  Precision precision() const { return precision_; }
  size_t weights_nbytes() const;
  size_t table_nbytes() const { return table_.size(); }
  static size_t row_nbytes(Precision precision, int hidden_size);

  // A row of hidden states: 2H floats, or for kInt8 bytes, rounded up to kInt8Chunk.
  size_t hidden_nbytes() const {
    const int H = sizes_.hidden_size;
    return precision_ == Precision::kInt8 ? static_cast<size_t>(round_up(2 * H, kInt8Chunk))
                                          : static_cast<size_t>(2 * H) * sizeof(float);
  }
  // out [total] rows of hidden_nbytes() for ids [total], each below V.
  void forward(const int32_t* ids, const int32_t* cu_seqlens, int batch, void* out,
               int threads) const;

 private:
  template <class W, class In>
  friend class TokenRun;

  void pack(int d, const Direction& from);
  // Rows of `count` ids, one after the other, at `to`.
  void make_rows(const int32_t* ids, int64_t count, char* to, int threads) const;
  template <class W, class In>
  void run(const int32_t* slots, const char* rows, const char* further, const int32_t* cu_seqlens,
           int batch, void* out, int threads) const;

  Precision precision_;
  Sizes sizes_;
  const KernelTable<float>& kernels_;
  const InferenceTable& inference_;
  const LstmTable<float, Bf16Pair>* bf16_;  // null where bfloat16 is only how weights are kept
  const float* embedding_;
  size_t row_nbytes_;
  AlignedBuffer<float> input_;  // of both directions: panels of W_ih, then the bias
  AlignedBuffer<char> recurrent_[2];
  PackedInt8 int8_recurrent_[2];
  AlignedBuffer<char> table_;
  std::vector<int32_t> slots_;  // [V] row of the table, -1 if it has none; empty if all have theirs
};

}  // namespace xdf
