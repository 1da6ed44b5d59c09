// A bidirectional LSTM layer over a ragged batch: packs weights, cuts the batch into kernel calls
// and runs them on the thread pool. Arguments are checked by the bindings.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "cpu/aligned.h"
#include "xdf/kernels.h"

namespace xdf {

// Weights of both directions packed for the instruction set active at construction.
// W: what products take, see xdf/kernels.h; Bf16Pair needs bf16_kernels().
template <class T, class W = T>
class BiLstmWeights {
 public:
  // Weights of one direction in torch.nn.LSTM's layout: w_ih [4H, I], w_hh [4H, H], b_ih [4H], b_hh
  // [4H].
  struct Direction {
    const T *w_ih, *w_hh, *b_ih, *b_hh;
  };
  // training: pack for the backward pass as well.
  BiLstmWeights(const Direction& forward, const Direction& reverse, int input_size, int hidden_size,
                bool training);

  int input_size() const { return directions_[0].input_size; }
  int hidden_size() const { return directions_[0].hidden_size; }
  bool training() const { return directions_[0].input_t != nullptr; }
  size_t nbytes() const { return memory_.size() * sizeof(T); }
  const LstmWeights<T, W>& direction(int d) const { return directions_[d]; }
  const LstmTable<T, W>& table() const { return table_; }

 private:
  static_assert(sizeof(T) == sizeof(W));
  const LstmTable<T, W>& table_;
  AlignedBuffer<T> memory_;  // of W but for the biases
  LstmWeights<T, W> directions_[2];
};

// out [total, 2H] from x [total, I]. reserve: lstm_reserve_size(total, H) elements, or null.
template <class T, class W>
void bilstm_forward(const BiLstmWeights<T, W>& weights, const T* x, const int32_t* cu_seqlens,
                    int batch, T* out, T* reserve, int threads);

// Gradients of one direction, written: w_ih [4H, I], w_hh [4H, H], b [4H] (of b_ih and of b_hh
// alike).
template <class T>
struct LstmGrads {
  T *w_ih, *w_hh, *b;
};

// grad_x [total, I] may be null. reserve is what bilstm_forward filled.
template <class T, class W>
void bilstm_backward(const BiLstmWeights<T, W>& weights, const T* x, const int32_t* cu_seqlens,
                     int batch, const T* out, const T* reserve, const T* grad_out, T* grad_x,
                     const LstmGrads<T>* grads, int threads);

// A weight matrix [N, K] with bias [N] or null, packed for `linear`.
template <class T>
class LinearWeights {
 public:
  LinearWeights(const T* weight, const T* bias, int rows, int columns);
  int in_features() const { return matrix_.K; }
  int out_features() const { return matrix_.N; }
  size_t nbytes() const { return memory_.size() * sizeof(T); }

  // out [M, N] = x [M, K] weight^T + bias
  void apply(const T* x, int64_t rows, T* out, int threads) const;

 private:
  const KernelTable<T>& table_;
  AlignedBuffer<T> memory_;
  PackedMatrix<T> matrix_;
  const T* bias_;
};

// Gradients of x weight^T + bias: grad_weight [N, K] = grad_out^T x, grad_bias [N] the sum of
// grad_out's rows. x [M, K], grad_out [M, N].
template <class T>
void linear_grad(const T* x, const T* grad_out, int64_t rows, int N, int K, T* grad_weight,
                 T* grad_bias, int threads);

// out [total, E] = table[ids]
template <class T>
void embedding_gather(const T* table, int embedding_size, const int32_t* ids, int64_t total, T* out,
                      int threads);
// grad_table [V, E] = sum over positions, ascending, of grad_out rows at their ids
template <class T>
void embedding_grad(const int32_t* ids, const T* grad_out, int64_t total, int embedding_size,
                    int64_t vocab_size, T* grad_table, int threads);

}  // namespace xdf
