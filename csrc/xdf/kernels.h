// The contract between the kernels and everything that calls them.
//
// A KernelTable<T> holds one instruction set's kernels as plain function pointers. The table of the
// best set the machine has is chosen once, at run time (cpu/dispatch.h). float tables exist for
// every set; double, the reference precision, exists in the generic set alone.
//
// Rules for every kernel:
//  - It never allocates, locks, prints or throws. The caller checks arguments and owns all memory.
//  - Pointers may have any alignment; no output overlaps an input or another output.
//  - Batches are ragged: `values[total, ...]` rows, sequence b owning rows [cu_seqlens[b],
//    cu_seqlens[b + 1]). Nothing is padded.
//  - The sums of a row are taken in one order, whatever the batch, tile or thread, so a sequence's
//    results do not depend, to the bit, on its company.
//  - A call runs on the calling thread. Threading is the caller's: bilstm.cpp and crf.cpp cut a
//  batch
//    into calls whose outputs are disjoint.
#pragma once

#include <cstddef>
#include <cstdint>

#include "xdf/crf.h"
#include "xdf/half.h"

namespace xdf {

// Hidden sizes are rounded up to this in packed weights and in `reserve`, for every instruction set
// alike, so that the size of `reserve` does not depend on the machine.
constexpr int kHiddenAlign = 16;

constexpr int round_up(int n, int multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

// Kernels are named by T, in which sums, gates and cell states are kept, and W, what products take.
// W = T but for W = Bf16Pair with T = float: there operands are rounded to bfloat16, sums are not,
// and every inner dimension is counted in pairs, an odd one filled up with a zero.
template <class W>
constexpr int inner_size(int n) {
  return n;
}
template <>
constexpr int inner_size<Bf16Pair>(int n) {
  return pair_count(n);
}

// A matrix B[K, N] packed for the kernel `gemm`: cut into panels of 1 or 2 registers of columns,
// each panel stored as [K][its columns]; columns beyond N are zero.
template <class T>
struct PackedMatrix {
  const T* data;  // [K * num_vecs * lanes]
  int K;
  int N;
};

constexpr int kMaxPanelVecs = 2;
inline int panel_count(int num_vecs) {
  return (num_vecs + kMaxPanelVecs - 1) / kMaxPanelVecs;
}
// Registers in panel p: the wider panels first.
inline int panel_vecs(int num_vecs, int p) {
  const int panels = panel_count(num_vecs);
  return num_vecs / panels + (p < num_vecs % panels ? 1 : 0);
}

// C[m, :] = init[m, :] + sum_k A[m, k] B[k, :], k ascending.
template <class T, class W = T>
struct GemmArgs {
  const W* const* a_rows;  // [M] row pointers; element k of row m is a_rows[m][k * a_stride]
  ptrdiff_t a_stride;      // elements between consecutive k
  int M;
  PackedMatrix<W> b;
  T* const* c_rows;  // [M] row pointers to N elements
  const T* bias;     // [num_vecs * lanes] start value of every row, or null for zero
  bool accumulate;   // start from what C holds; bias must be null
};

// Packed weights of one direction of an LSTM. Hp = round_up(H, kHiddenAlign).
// "Interleaved" order of the 4 * Hp gate columns: blocks of `lanes` hidden units; in a block the
// gates i, f, g, o (torch.nn.LSTM's order), each of `lanes` units. Units beyond H have zero
// weights.
template <class T, class W = T>
struct LstmWeights {
  int input_size;
  int hidden_size;
  const W* input;  // PackedMatrix of W_ih^T: K = I, N = 4 * round_up(H, lanes) interleaved columns
  const W* recurrent;  // PackedMatrix of W_hh^T: K = H, the same N
  const T* bias;       // [4 * Hp] interleaved, b_ih + b_hh
  // For the backward pass only, else null:
  const W* input_t;      // PackedMatrix of W_ih: K = 4 * round_up(H, lanes) interleaved rows, N = I
  const W* recurrent_t;  // PackedMatrix of W_hh: the same K, N = H
};

// One group of sequences run in one direction. Sequences are given in order of descending length,
// so that the rows still running at step s are always the first ones.
struct LstmGroup {
  const int32_t* first;   // [rows] token index where sequence r starts (in running order: its last
                          //        token if reverse)
  const int32_t* length;  // [rows] > 0, descending
  int rows;               // 1 .. kMaxGroupRows
  bool reverse;           // token of row r at step s: first[r] - s instead of first[r] + s
};
constexpr int kMaxGroupRows = 64;

// Per token and direction `reserve` keeps the four activated gates, interleaved, [4 * Hp], then the
// cell state [Hp]: what the backward pass needs. What no unit owns is zero.
inline size_t lstm_reserve_size(int64_t total, int hidden_size) {
  return static_cast<size_t>(total) * 2 * 5 *
         static_cast<size_t>(round_up(hidden_size, kHiddenAlign));
}

// What recurrent weights of type W are multiplied with: T, but for Bf16Pair.
template <class T, class W>
struct LstmOperand {
  using type = T;
};
template <>
struct LstmOperand<float, Bf16Pair> {
  using type = Bf16Pair;
};

// One step of a group: h_t = o * tanh(c_t), c_t = f * c_{t-1} + i * g, for a range of hidden units.
// Ranges of the same step do not depend on one another. W: type of the recurrent weights, In: of
// the input half.
template <class T, class W = T, class In = T>
struct LstmStepArgs {
  using Operand = typename LstmOperand<T, W>::type;
  const W* recurrent;  // as in LstmWeights
  int hidden_size;
  int rows;               // those still running, 1 .. kMaxGroupRows
  bool first;             // h_{t-1} = c_{t-1} = 0, neither is read
  bool keep_gates;        // for the backward pass
  const Operand* h_prev;  // [inner_size(H)] of row r at h_prev + r * h_stride
  T* h_next;              // [round_up(H, lanes)] of row r at h_next + r * h_stride
  Operand* h_next_pairs;  // Operand = Bf16Pair: likewise, rounded, for the next step; else not read
  ptrdiff_t h_stride;
  const In* const* input;       // [rows] to [4 * Hp], interleaved: W_ih x + b; may be `gates`
  const In* const* next_input;  // [rows] likewise at the next step, to be fetched ahead
  T* const* gates;              // [rows] to [4 * Hp], written: the activated gates, interleaved, if
                                // keep_gates, else nothing of use
  T* const* c;                  // [rows] to [Hp], written
  ptrdiff_t c_prev;             // c_{t-1} lies that many elements from c_t; 0: in place
  T* const* out;                // [rows] to H elements, written
  int unit_begin;               // a multiple of lanes
  int unit_end;                 // the same, or H
  bool descending;              // order in which the units are taken; no result depends on it
};

// The recurrence in integers. The hidden state, in (-1, 1), is kept as a byte round(63 h) + 64:
// seven bits, so that it is a signed byte and an unsigned one alike and every instruction set's dot
// product takes it. Weights are bytes with a scale for each gate column. Sums are exact integers,
// and so the same for all.
constexpr int kInt8HiddenLevels = 63;
constexpr int kInt8HiddenZero = 64;
// Products are summed in 16 bits by sets of 8 before they are widened (vpmaddubsw and additions; a
// widening for each instruction would cost a fifth of the speed): columns k of a chunk of 16 with
// the same k / 2 % 2. Nothing overflows while neither the positive nor the negative weights of a
// set sum to more than this.
constexpr int kInt8Chunk = 16;
constexpr int kInt8SetLimit = 32767 / (2 * kInt8HiddenZero - 1);

// A matrix B[K, N] of bytes in blocks of 4 * lanes columns: [block][chunk of k][4][quad of k]
// [lanes][4], zero beyond K and N. Of an LSTM the columns are the interleaved gates.
struct Int8Matrix {
  const int8_t* data;
  const float* scale;    // of each column, for hidden states as inputs
  const int32_t* start;  // of each column, -kInt8HiddenZero * its sum
};

struct LstmInt8StepArgs {
  Int8Matrix recurrent;
  int hidden_size;
  int rows;               // those still running, 1 .. kMaxGroupRows
  bool first;             // h_{t-1} = c_{t-1} = 0, neither is read
  const uint8_t* h_prev;  // [round_up(H, kInt8Chunk)] of row r at h_prev + r * h_stride; what lies
                          // beyond H counts for nothing
  uint8_t* h_next;        // likewise, written for the units of this call, rounded up to lanes
  ptrdiff_t h_stride;
  const Half* const* input;       // [rows] to [4 * Hp], interleaved: W_ih x + b
  const Half* const* next_input;  // [rows] likewise at the next step, to be fetched ahead
  float* const* c;                // [rows] to [Hp], in place
  uint8_t* const* out;            // [rows] to H bytes, written: h
  int unit_begin;                 // a multiple of lanes
  int unit_end;                   // the same, or H
  bool descending;                // order in which the units are taken; no result depends on it
};

// out[m, :] = bias + (x[m, :] as hidden states) B
struct Int8LinearArgs {
  const uint8_t* x;  // [round_up(K, kInt8Chunk)] of row m at x + m * x_stride
  ptrdiff_t x_stride;
  int rows, K, N;
  Int8Matrix weights;
  const float* bias;  // [round_up(N, 4 * lanes)]
  float* out;         // [rows, N]
};

// Rows of the input half computed at once, about: enough of them that W_ih is worth fetching.
constexpr int kInputChunkRows = 192;
inline int lstm_chunk_steps(int rows) {
  return (kInputChunkRows + rows - 1) / rows;
}

// From grad_out (dL/dh as seen from outside) to the gradient at the pre-activations.
template <class T, class W = T>
struct LstmBackwardArgs {
  LstmWeights<T, W> weights;
  LstmGroup group;
  const T* grad_out;  // row t at grad_out + t * grad_stride, H elements
  ptrdiff_t grad_stride;
  const T* reserve;  // [total, 5 * Hp] of this direction
  T* gate_grads;     // [total, 4 * Hp], interleaved; written for units below round_up(H, lanes)
  T* workspace;      // lstm_backward_workspace(H) elements
};
inline size_t lstm_backward_workspace(int hidden_size) {
  // gradients at h and c; the gates' gradients as pairs
  return 4 * static_cast<size_t>(round_up(hidden_size, kHiddenAlign) + kHiddenAlign) *
         kMaxGroupRows;
}

// dW[m, :] = sum_t dgates[t, m] * row[t, :] over all tokens t, ascending, for the interleaved gate
// columns [m_begin, m_end), of W_ih and W_hh at once; rows of null pointers count as zero (the
// state before the first step).
template <class T>
struct LstmWeightGradArgs {
  const T* gate_grads;  // [total, 4 * Hp] of one direction
  int64_t total;
  int hidden_size;
  int m_begin, m_end;  // multiples of 4 * lanes, at most 4 * round_up(H, lanes)
  struct Factor {
    const T* const* rows;  // [total] pointers to N inputs each; null counts as zeros
    int N;
    T* grad;  // [4H, N] in torch's order, written
  };
  Factor factors[2];
  T* grad_bias;  // [4H] in torch's order, written
  T* workspace;  // lstm_weight_grad_workspace(I, H) elements
};
constexpr int kWeightGradTokens = 128;
inline size_t lstm_weight_grad_workspace(int input_size, int hidden_size) {
  // packed blocks of both factors and of gates
  const int columns = round_up(input_size, 16) + round_up(hidden_size, 16) + 64;
  return static_cast<size_t>(kWeightGradTokens) * static_cast<size_t>(columns);
}

// What a BiLSTM needs in training. Of Bf16Pair there is one where the instruction set multiplies
// bfloat16.
template <class T, class W = T>
struct LstmTable {
  int lanes;
  void (*gemm)(const GemmArgs<T, W>&);
  void (*lstm_step)(const LstmStepArgs<T, W>&);
  void (*lstm_backward)(const LstmBackwardArgs<T, W>&);
  void (*lstm_weight_grad)(const LstmWeightGradArgs<T>&);
  // to[inner_size(n)], to nearest even; null where W = T.
  void (*to_operand)(const T* from, W* to, int n);
};

template <class T>
struct KernelTable : LstmTable<T> {
  const char* name;
  void (*crf_prepare)(const CrfModel<T>&, CrfTables<T>&);
  void (*crf_log_likelihood)(const CrfLikelihoodArgs<T>&);
  void (*crf_grad)(const CrfGradArgs<T>&);
  void (*viterbi_prepare)(const CrfModel<T>&, CrfTables<T>&);
  void (*viterbi)(const ViterbiArgs<T>&);
  void (*softmax)(const SoftmaxArgs<T>&);
  void (*gelu)(T* values, int64_t size);  // in place
};

// What inference in fewer bits needs besides; of the same instruction sets.
struct InferenceTable {
  // Weights in bfloat16, of which the set has one kernel and null for the other: widened to float
  // as they are read, or multiplied as they are with hidden states of the same kind.
  void (*lstm_step_bf16)(const LstmStepArgs<float, Bf16, Half>&);
  void (*lstm_step_bf16_pairs)(const LstmStepArgs<float, Bf16Pair, Half>&);
  void (*lstm_step_int8)(const LstmInt8StepArgs&);
  void (*linear_int8)(const Int8LinearArgs&);
  void (*to_half)(const float* from, Half* to, int64_t size);  // to nearest even
};

}  // namespace xdf
