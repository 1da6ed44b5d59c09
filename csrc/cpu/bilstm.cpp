#include "cpu/bilstm.h"

#include <algorithm>
#include <type_traits>

#include "cpu/bilstm_pack.h"
#include "cpu/bilstm_plan.h"
#include "cpu/dispatch.h"
#include "cpu/parallel.h"

namespace xdf {
namespace {

constexpr int kRows =
    96;  // of a product over all tokens, a task: weights are fetched once for them

template <class T, class W>
const LstmTable<T, W>& lstm_kernels() {
  if constexpr (std::is_same_v<T, W>)
    return kernels<T>();
  else
    return *bf16_kernels();
}

template <class T>
T* pack(const LstmTable<T, T>& table, T* to, const T* w, int K, int H) {
  return pack_gates(to, w, K, H, table.lanes);
}
Bf16Pair* pack(const LstmTable<float, Bf16Pair>& table, Bf16Pair* to, const float* w, int K,
               int H) {
  return pack_gate_pairs(table, to, w, K, H);
}

template <class T>
T* pack_transposed(const LstmTable<T, T>& table, T* to, const T* w, int N, int H) {
  return pack_gate_rows(to, w, N, H, table.lanes);
}
Bf16Pair* pack_transposed(const LstmTable<float, Bf16Pair>& table, Bf16Pair* to, const float* w,
                          int N, int H) {
  return pack_gate_row_pairs(table, to, w, N, H);
}

}  // namespace

template <class T, class W>
BiLstmWeights<T, W>::BiLstmWeights(const Direction& forward, const Direction& reverse, int I, int H,
                                   bool training)
    : table_(lstm_kernels<T, W>()) {
  const int lanes = table_.lanes;
  const int Hp = round_up(H, kHiddenAlign);
  const int m = 4 * round_up(H, lanes);  // interleaved gate columns
  size_t each = static_cast<size_t>(m) * static_cast<size_t>(inner_size<W>(I) + inner_size<W>(H)) +
                4 * static_cast<size_t>(Hp);
  if (training)
    each += packed_size(inner_size<W>(m), I, lanes) + packed_size(inner_size<W>(m), H, lanes);
  T* to = memory_.reserve(2 * each);
  for (int d = 0; d < 2; ++d) {
    const Direction& from = d == 0 ? forward : reverse;
    LstmWeights<T, W>& packed = directions_[d];
    packed.input_size = I;
    packed.hidden_size = H;
    packed.bias = to;
    for (int k = 0; k < 4 * Hp; ++k) {
      const int row = gate_row_of(k, H, lanes);
      to[k] = row >= 0 ? from.b_ih[row] + from.b_hh[row] : T(0);
    }
    W* weights = reinterpret_cast<W*>(to + 4 * Hp);
    packed.input = weights;
    weights = pack(table_, weights, from.w_ih, I, H);
    packed.recurrent = weights;
    weights = pack(table_, weights, from.w_hh, H, H);
    packed.input_t = packed.recurrent_t = nullptr;
    if (training) {
      packed.input_t = weights;
      weights = pack_transposed(table_, weights, from.w_ih, I, H);
      packed.recurrent_t = weights;
      weights = pack_transposed(table_, weights, from.w_hh, H, H);
    }
    to = reinterpret_cast<T*>(weights);
  }
}

template <class T, class W>
void bilstm_backward(const BiLstmWeights<T, W>& weights, const T* x, const int32_t* cu_seqlens,
                     int batch, const T* out, const T* reserve, const T* grad_out, T* grad_x,
                     const LstmGrads<T>* grads, int threads) {
  if (threads <= 0) threads = default_threads();
  const LstmTable<T, W>& table = weights.table();
  const int H = weights.hidden_size();
  const int I = weights.input_size();
  const int64_t total = cu_seqlens[batch];
  const size_t reserve_direction = lstm_reserve_size(total, H) / 2;
  const ptrdiff_t gate_row = 4 * static_cast<ptrdiff_t>(round_up(H, kHiddenAlign));
  const int m_total = 4 * round_up(H, table.lanes);
  const Plan plan(cu_seqlens, batch, threads);
  const int block = 4 * table.lanes;
  const int blocks = m_total / block;
  const int parts = std::max(1, std::min(blocks, (threads + 1) / 2));  // of the gate columns
  const size_t backward_size = lstm_backward_workspace(H);
  const size_t weight_grad_size = lstm_weight_grad_workspace(I, H);
  const size_t grads_size = static_cast<size_t>(total * gate_row);
  const int input_tasks = grad_x == nullptr ? 0 : static_cast<int>((total + kRows - 1) / kRows);
  // Rows of gradients as the product takes them, where that is not as they are.
  const size_t operands = std::is_same_v<T, W> ? 0 : static_cast<size_t>(inner_size<W>(m_total));
  T* gate_grads[2];
  gate_grads[0] = bilstm_workspace<T>(
      2 * grads_size +
      std::max({backward_size * static_cast<size_t>(parallel_slots(plan.tasks(), threads)),
                weight_grad_size * static_cast<size_t>(parallel_slots(2 * parts, threads)),
                kRows * operands * static_cast<size_t>(parallel_slots(input_tasks, threads))}));
  gate_grads[1] = gate_grads[0] + grads_size;
  T* workspace = gate_grads[1] + grads_size;

  {
    parallel_for(plan.tasks(), threads, [&](int task, int slot) {
      const int d = Plan::direction(task);
      table.lstm_backward({weights.direction(d), plan.group(task), grad_out + d * H, 2 * H,
                           reserve + static_cast<size_t>(d) * reserve_direction, gate_grads[d],
                           workspace + static_cast<size_t>(slot) * backward_size});
    });
  }

  parallel_for(input_tasks, threads, [&](int task, int slot) {
    const W* a_rows[kRows];
    T* c_rows[kRows];
    W* rounded = reinterpret_cast<W*>(workspace) + static_cast<size_t>(slot) * kRows * operands;
    const int64_t start = static_cast<int64_t>(task) * kRows;
    const int rows = static_cast<int>(std::min<int64_t>(kRows, total - start));
    for (int d = 0; d < 2; ++d) {
      for (int r = 0; r < rows; ++r) {
        const T* grads_row = gate_grads[d] + (start + r) * gate_row;
        if constexpr (std::is_same_v<T, W>) {
          a_rows[r] = grads_row;
        } else {
          W* to = rounded + static_cast<size_t>(r) * operands;
          table.to_operand(grads_row, to, m_total);
          a_rows[r] = to;
        }
        c_rows[r] = grad_x + (start + r) * I;
      }
      const PackedMatrix<W> input_t{weights.direction(d).input_t, inner_size<W>(m_total), I};
      table.gemm({a_rows, 1, rows, input_t, c_rows, nullptr, d == 1});
    }
  });

  // Inputs of each token's gates: x, and h of the step before (none at a sequence's first step).
  std::vector<const T*> x_rows(static_cast<size_t>(total)), h_rows[2];
  for (int64_t t = 0; t < total; ++t) x_rows[static_cast<size_t>(t)] = x + t * I;
  for (auto& rows : h_rows) rows.assign(static_cast<size_t>(total), nullptr);
  for (int b = 0; b < batch; ++b) {
    for (int64_t t = cu_seqlens[b]; t + 1 < cu_seqlens[b + 1]; ++t) {
      h_rows[0][static_cast<size_t>(t + 1)] = out + t * 2 * H;
      h_rows[1][static_cast<size_t>(t)] = out + (t + 1) * 2 * H + H;
    }
  }
  parallel_for(2 * parts, threads, [&](int task, int slot) {
    const int d = task & 1, part = task / 2;
    table.lstm_weight_grad(
        {gate_grads[d],
         total,
         H,
         block * (blocks * part / parts),
         block * (blocks * (part + 1) / parts),
         {{x_rows.data(), I, grads[d].w_ih}, {h_rows[d].data(), H, grads[d].w_hh}},
         grads[d].b,
         workspace + static_cast<size_t>(slot) * weight_grad_size});
  });
}

template <class T>
LinearWeights<T>::LinearWeights(const T* weight, const T* bias, int N, int K)
    : table_(kernels<T>()) {
  const int lanes = table_.lanes;
  const int padded = round_up(N, lanes);
  T* to = memory_.reserve(packed_size(K, N, lanes) + static_cast<size_t>(padded));
  matrix_ = {to, K, N};
  std::vector<T> transposed(static_cast<size_t>(K) * static_cast<size_t>(N));
  for (ptrdiff_t n = 0; n < N; ++n)
    for (ptrdiff_t k = 0; k < K; ++k)
      transposed[static_cast<size_t>(k * N + n)] = weight[n * K + k];
  T* packed_bias = pack_panels(
      to, K, N, lanes, [&](int k) { return transposed.data() + static_cast<ptrdiff_t>(k) * N; });
  for (int n = 0; n < padded; ++n) packed_bias[n] = bias != nullptr && n < N ? bias[n] : T(0);
  bias_ = packed_bias;
}

template <class T>
void LinearWeights<T>::apply(const T* x, int64_t rows, T* out, int threads) const {
  const int tasks = static_cast<int>((rows + kRows - 1) / kRows);
  parallel_for(tasks, threads, [&](int task, int) {
    const T* a_rows[kRows];
    T* c_rows[kRows];
    const int64_t start = static_cast<int64_t>(task) * kRows;
    const int count = static_cast<int>(std::min<int64_t>(kRows, rows - start));
    for (int r = 0; r < count; ++r) {
      a_rows[r] = x + (start + r) * matrix_.K;
      c_rows[r] = out + (start + r) * matrix_.N;
    }
    table_.gemm({a_rows, 1, count, matrix_, c_rows, bias_, false});
  });
}

template <class T>
void linear_grad(const T* x, const T* grad_out, int64_t rows, int N, int K, T* grad_weight,
                 T* grad_bias, int threads) {
  constexpr int kDepth = 128;      // rows of x packed at a time: the depth of one product
  constexpr int kMaxOutputs = 64;  // rows of a product
  const KernelTable<T>& table = kernels<T>();
  // Each task owns a range of x's columns, so every sum is one task's, in the order of rows.
  const int vecs = (K + table.lanes - 1) / table.lanes;
  const int tasks = parallel_slots(std::max(vecs / 8, 1), threads);
  const size_t size = packed_size(kDepth, K, table.lanes);
  T* workspace = bilstm_workspace<T>(size * static_cast<size_t>(tasks));
  parallel_for(tasks, threads, [&](int task, int slot) {
    const int begin = std::min(K, vecs * task / tasks * table.lanes);
    const int end = std::min(K, vecs * (task + 1) / tasks * table.lanes);
    T* packed = workspace + static_cast<size_t>(slot) * size;
    for (int64_t start = 0; start == 0 || start < rows; start += kDepth) {
      const int depth = static_cast<int>(std::min<int64_t>(kDepth, rows - start));
      pack_panels(packed, depth, end - begin, table.lanes,
                  [&](int k) { return x + (start + k) * K + begin; });
      for (int n0 = 0; n0 < N; n0 += kMaxOutputs) {
        const int outputs = std::min(kMaxOutputs, N - n0);
        const T* a_rows[kMaxOutputs];
        T* c_rows[kMaxOutputs];
        for (int n = 0; n < outputs; ++n) {
          a_rows[n] = grad_out + start * N + n0 + n;
          c_rows[n] = grad_weight + static_cast<ptrdiff_t>(n0 + n) * K + begin;
        }
        table.gemm({a_rows, N, outputs, {packed, depth, end - begin}, c_rows, nullptr, start > 0});
      }
    }
  });
  std::fill_n(grad_bias, N, T(0));
  for (int64_t m = 0; m < rows; ++m)
    for (int n = 0; n < N; ++n) grad_bias[n] += grad_out[m * N + n];
}

template <class T>
void embedding_gather(const T* table, int embedding_size, const int32_t* ids, int64_t total, T* out,
                      int threads) {
  constexpr int64_t kTokens = 512;
  const ptrdiff_t E = embedding_size;
  parallel_for(static_cast<int>((total + kTokens - 1) / kTokens), threads, [&](int task, int) {
    const int64_t start = task * kTokens;
    for (int64_t t = start; t < std::min(total, start + kTokens); ++t)
      std::copy_n(table + ids[t] * E, E, out + t * E);
  });
}

template <class T>
void embedding_grad(const int32_t* ids, const T* grad_out, int64_t total, int embedding_size,
                    int64_t vocab_size, T* grad_table, int threads) {
  // Each task owns a range of ids and passes over all positions: no two tasks touch the same row,
  // and a row's sum is in the order of positions.
  const ptrdiff_t E = embedding_size;
  const int parts = static_cast<int>(
      std::min<int64_t>(std::max<int64_t>(vocab_size, 1), parallel_slots(64, threads)));
  parallel_for(parts, threads, [&](int part, int) {
    const int64_t begin = vocab_size * part / parts, end = vocab_size * (part + 1) / parts;
    std::fill(grad_table + begin * E, grad_table + end * E, T(0));
    for (int64_t t = 0; t < total; ++t) {
      if (ids[t] < begin || ids[t] >= end) continue;
      T* to = grad_table + ids[t] * E;
      const T* from = grad_out + t * E;
      for (ptrdiff_t e = 0; e < E; ++e) to[e] += from[e];
    }
  });
}

#define XDF_INSTANTIATE_BILSTM(T, W)                                                       \
  template class BiLstmWeights<T, W>;                                                      \
  template void bilstm_backward(const BiLstmWeights<T, W>&, const T*, const int32_t*, int, \
                                const T*, const T*, const T*, T*, const LstmGrads<T>*, int);
XDF_INSTANTIATE_BILSTM(float, float)
XDF_INSTANTIATE_BILSTM(double, double)
XDF_INSTANTIATE_BILSTM(float, Bf16Pair)
#undef XDF_INSTANTIATE_BILSTM

#define XDF_INSTANTIATE(T)                                                         \
  template class LinearWeights<T>;                                                 \
  template void linear_grad(const T*, const T*, int64_t, int, int, T*, T*, int);   \
  template void embedding_gather(const T*, int, const int32_t*, int64_t, T*, int); \
  template void embedding_grad(const int32_t*, const T*, int64_t, int, int64_t, T*, int);
XDF_INSTANTIATE(float)
XDF_INSTANTIATE(double)
#undef XDF_INSTANTIATE

}  // namespace xdf
