// The gradient of lstm-inl.h. With dh_t the gradient arriving at h_t from outside and from step t +
// 1:
//
//   dc_t = dh_t o (1 - tanh(c_t)^2) + dc_{t+1} f_{t+1}
//   da_i = dc_t g i (1 - i)            da_f = dc_t c_{t-1} f (1 - f)
//   da_g = dc_t i (1 - g^2)            da_o = dh_t tanh(c_t) o (1 - o)
//   dh_{t-1} = W_hh^T da_t,  dW_hh = sum_t da_t h_{t-1}^T,  dW_ih = sum_t da_t x_t^T,  db = sum_t
//   da_t
//
// The recurrent product runs step by step; the weight gradients are one product over all tokens at
// the end, where every register of the tile is busy, and dx = W_ih^T da is an ordinary gemm.
#pragma once

#include "cpu/half-inl.h"
#include "cpu/lstm-inl.h"

namespace xdf {
namespace XDF_ISA {

XDF_INLINE int lstm_token(const LstmGroup& group, int row, int step) {
  return group.reverse ? group.first[row] - step : group.first[row] + step;
}

// One row at one step: from `gates` the gradient at the pre-activations; dc_state becomes the
// gradient that flows to the previous step's cell.
template <class T>
static void lstm_cell_backward(const T* gates, T* gate_grads, const T* c, const T* c_prev,
                               const T* grad_out, const T* dh_next, T* dc_state, int H) {
  constexpr int lanes = Vec<T>::lanes;
  using V = Vec<T>;
  const V one = V::set1(T(1));
  for (int unit = 0; unit < H; unit += lanes) {
    const T* gate = gates + unit * 4;
    T* to = gate_grads + unit * 4;
    const V i = V::load(gate), f = V::load(gate + lanes);
    const V g = V::load(gate + 2 * lanes), o = V::load(gate + 3 * lanes);
    const V tanh_c = vtanh(V::load(c + unit));
    const V dh =
        (unit + lanes <= H ? V::load(grad_out + unit) : V::load_n(grad_out + unit, H - unit)) +
        V::load(dh_next + unit);
    const V dc = V::fma(dh * o, one - tanh_c * tanh_c, V::load(dc_state + unit));
    const V before = c_prev != nullptr ? V::load(c_prev + unit) : V::set1(T(0));
    (dc * g * i * (one - i)).store(to);
    (dc * before * f * (one - f)).store(to + lanes);
    (dc * i * (one - g * g)).store(to + 2 * lanes);
    (dh * tanh_c * o * (one - o)).store(to + 3 * lanes);
    (dc * f).store(dc_state + unit);
  }
}

template <class T, class W>
static void lstm_backward(const LstmBackwardArgs<T, W>& args) {
  constexpr int lanes = Vec<T>::lanes;
  const LstmGroup& group = args.group;
  const int H = args.weights.hidden_size;
  const int Hp = round_up(H, kHiddenAlign);
  const ptrdiff_t reserve_row = 5 * static_cast<ptrdiff_t>(Hp);
  const ptrdiff_t gate_row = 4 * static_cast<ptrdiff_t>(Hp);
  const ptrdiff_t row = Hp + kHiddenAlign;
  T* dh = args.workspace;
  T* dc = dh + row * kMaxGroupRows;
  // Zero for each row's last step, and for ever in the units beyond H.
  for (ptrdiff_t n = 0; n < 2 * row * kMaxGroupRows; ++n) args.workspace[n] = T(0);

  const int K = 4 * round_up(H, lanes);
  W* operands = reinterpret_cast<W*>(dc + row * kMaxGroupRows);  // of Bf16Pair
  const W* gate_rows[kMaxGroupRows];
  T* dh_rows[kMaxGroupRows];
  int active = 0;
  for (int s = group.length[0] - 1; s >= 0; --s) {
    while (active < group.rows && group.length[active] > s) ++active;
    for (int r = 0; r < active; ++r) {
      const ptrdiff_t token = lstm_token(group, r, s);
      const T* gates = args.reserve + token * reserve_row;
      T* gate_grads = args.gate_grads + token * gate_row;
      const T* c = gates + gate_row;
      const T* c_prev = s == 0 ? nullptr : (group.reverse ? c + reserve_row : c - reserve_row);
      dh_rows[r] = dh + r * row;
      lstm_cell_backward(gates, gate_grads, c, c_prev, args.grad_out + token * args.grad_stride,
                         dh_rows[r], dc + r * row, H);
      if constexpr (kPairs<W>) {
        W* to = operands + r * 2 * row;
        if (s > 0) to_pairs(gate_grads, to, K);
        gate_rows[r] = to;
      } else {
        gate_rows[r] = gate_grads;
      }
    }
    if (s == 0) break;
    gemm(GemmArgs<T, W>{gate_rows,
                        1,
                        active,
                        {args.weights.recurrent_t, inner_size<W>(K), H},
                        dh_rows,
                        nullptr,
                        false});
  }
}

// Columns [at, at + lanes) of rows k and k + 1 (of K) as one register of operands: of floats row k
// alone; rows of null pointers and beyond K are zero.
template <class W, class T>
XDF_INLINE Vec<W> grad_operand(const T* const* rows, int k, int K, int at, int N) {
  constexpr int lanes = Vec<T>::lanes;
  const auto part = [=](int n) -> Vec<T> {
    if (n >= K || rows[n] == nullptr) return Vec<T>::set1(T(0));
    return at + lanes <= N ? Vec<T>::load(rows[n] + at) : Vec<T>::load_n(rows[n] + at, N - at);
  };
  if constexpr (kPairs<W>)
    return Vec<W>::of(part(k), part(k + 1));
  else
    return part(k);
}

// K rows of N columns packed as the right side of a product that sums over the rows.
template <class W, class T>
static void pack_factor(const T* const* rows, int K, int N, W* to) {
  constexpr int lanes = Vec<T>::lanes;
  constexpr int kStep = kPairs<W> ? 2 : 1;  // rows an operand
  const int num_vecs = (N + lanes - 1) / lanes;
  int col = 0;
  for (int p = 0; p < (N > 0 ? panel_count(num_vecs) : 0); ++p) {
    const int vecs = panel_vecs(num_vecs, p);
    for (int k = 0; k < K; k += kStep)
      for (int v = 0; v < vecs; ++v, to += lanes)
        grad_operand<W>(rows, k, K, col + v * lanes, N).store(to);
    col += vecs * lanes;
  }
}

// K rows of one gate's `lanes` columns packed as the left side of such a product, one after the
// other, so that a tile's pieces of them share no sets of the cache. Returns their sum.
template <class W, class T>
XDF_INLINE Vec<T> pack_gate(const T* from, ptrdiff_t stride, int K, W* to) {
  constexpr int lanes = Vec<T>::lanes;
  Vec<T> sum = Vec<T>::set1(T(0));
  if constexpr (kPairs<W>) {
    for (int k = 0; k < K; k += 2, from += 2 * stride, to += lanes) {
      const Vec<T> first = Vec<T>::load(from);
      const Vec<T> second = k + 1 < K ? Vec<T>::load(from + stride) : Vec<T>::set1(T(0));
      sum = sum + first + second;
      Vec<W>::of(first, second).store(to);
    }
  } else {
    for (int k = 0; k < K; ++k, from += stride, to += lanes) {
      const Vec<T> value = Vec<T>::load(from);
      sum = sum + value;
      value.store(to);
    }
  }
  return sum;
}

template <class T, class W>
static void lstm_weight_grad(const LstmWeightGradArgs<T>& args) {
  constexpr int lanes = Vec<T>::lanes;
  constexpr int kGroup = 4 * lanes;  // gate columns packed together: a block of units
  constexpr int kTokens = kWeightGradTokens * (kPairs<W> ? 2 : 1);
  const int H = args.hidden_size;
  const ptrdiff_t gates_row = 4 * static_cast<ptrdiff_t>(round_up(H, kHiddenAlign));
  W* packed_rows[2];
  W* workspace = reinterpret_cast<W*>(args.workspace);
  for (int n = 0; n < 2; ++n) {
    packed_rows[n] = workspace;
    workspace += static_cast<ptrdiff_t>(kWeightGradTokens) * round_up(args.factors[n].N, lanes);
  }

  for (int64_t t0 = 0; t0 < args.total || t0 == 0; t0 += kTokens) {
    const int K = static_cast<int>(args.total - t0 < kTokens ? args.total - t0 : kTokens);
    for (int n = 0; n < 2; ++n)
      pack_factor(args.factors[n].rows + t0, K, args.factors[n].N, packed_rows[n]);
    for (int m0 = args.m_begin; m0 < args.m_end; m0 += kGroup) {
      const T* gates = args.gate_grads + t0 * gates_row + m0;
      const int unit = m0 / 4;
      const int valid = H - unit < lanes ? H - unit : lanes;
      const W* a_rows[kGroup];
      for (int gate = 0; gate < 4; ++gate) {
        W* packed = workspace + gate * kWeightGradTokens * lanes;
        Vec<T> sum = pack_gate(gates + gate * lanes, gates_row, K, packed);
        T* bias = args.grad_bias + gate * H + unit;
        if (t0 > 0) sum = sum + Vec<T>::load_n(bias, valid);
        sum.store_n(bias, valid);
        for (int lane = 0; lane < valid; ++lane) a_rows[gate * valid + lane] = packed + lane;
      }
      for (int n = 0; n < 2; ++n) {
        const int N = args.factors[n].N;
        T* c_rows[kGroup];
        for (int m = 0; m < 4 * valid; ++m)  // of torch's order
          c_rows[m] = args.factors[n].grad + (m / valid * H + unit + m % valid) * ptrdiff_t{N};
        gemm(GemmArgs<T, W>{a_rows,
                            lanes,
                            4 * valid,
                            {packed_rows[n], inner_size<W>(K), N},
                            c_rows,
                            nullptr,
                            t0 > 0});
      }
    }
  }
}

}  // namespace XDF_ISA
}  // namespace xdf
