// The LSTM recurrence of one direction over one group of ragged sequences (Hochreiter & Schmidhuber
// 1997; gate order and equations as torch.nn.LSTM):
//
//   a_t = W_ih x_t + b + W_hh h_{t-1}            [4H] as gates i, f, g, o
//   c_t = sigmoid(a_f) c_{t-1} + sigmoid(a_i) tanh(a_g)
//   h_t = sigmoid(a_o) tanh(c_t)
//
// Work per token: 4H (I + H) multiply-adds and 5 transcendental functions a unit. Weights are
// packed so that a tile's four registers are the four gates of the same hidden units: the gates
// never leave registers before h and c are done. The input half is a plain product over a chunk of
// steps at a time, so that W_ih is fetched once a chunk; the recurrent half runs step by step, all
// rows of the group passing over one block of units while its weights lie in L1.
//
// Each step starts with the unit block the previous one ended with: where W_hh is larger than a
// cache level, what that level still holds is used before it is evicted.
#pragma once

#include "cpu/activations-inl.h"
#include "cpu/gemm-inl.h"

namespace xdf {
namespace XDF_ISA {

XDF_INLINE int lstm_token(const LstmGroup& group, int row, int step) {
  return group.reverse ? group.first[row] - step : group.first[row] + step;
}

// Rows of the group that are longer than `step`.
XDF_INLINE int lstm_active_rows(const LstmGroup& group, int step, int rows) {
  while (rows > 0 && group.length[rows - 1] <= step) --rows;
  return rows;
}

// What a tile of rows reads and writes at one step besides the weights. [r] = row of the tile.
template <class T>
struct LstmTileRows {
  const T* h_prev[kTileRows];
  T* gates[kTileRows];  // in: pre-activations; out, when training: activated gates
  T* c_prev[kTileRows];
  T* c[kTileRows];
  T* h[kTileRows];
  T* out[kTileRows];
};

template <class T, int MR, bool kTraining>
static void lstm_tile(const LstmTileRows<T>& rows, int k0, int K, const T* panel, int unit, int H,
                      bool last_block, bool first_step) {
  constexpr int lanes = Vec<T>::lanes;
  Vec<T> acc[MR][4];
  const T* a[MR];
  XDF_UNROLL
  for (int r = 0; r < MR; ++r) {
    a[r] = rows.h_prev[r] + k0;
    XDF_UNROLL
    for (int v = 0; v < 4; ++v) acc[r][v] = Vec<T>::load(rows.gates[r] + unit * 4 + v * lanes);
  }
  if (!first_step) tile_multiply<T, MR, 4>(a, 1, panel, K, acc);
  if (!last_block) {
    XDF_UNROLL
    for (int r = 0; r < MR; ++r) {
      XDF_UNROLL
      for (int v = 0; v < 4; ++v) acc[r][v].store(rows.gates[r] + unit * 4 + v * lanes);
    }
    return;
  }
  XDF_UNROLL
  for (int r = 0; r < MR; ++r) {
    // Over common denominators: two divisions in place of five.
    const Ratio<T> i = sigmoid_ratio(acc[r][0]);
    const Ratio<T> f = sigmoid_ratio(acc[r][1]);
    const Ratio<T> g = tanh_ratio(acc[r][2]);
    const Ratio<T> o = sigmoid_ratio(acc[r][3]);
    const Vec<T> c_prev = first_step ? Vec<T>::set1(T(0)) : Vec<T>::load(rows.c_prev[r] + unit);
    const Vec<T> ig = i.den * g.den;
    const Vec<T> c = Vec<T>::fma(f.num * c_prev, ig, i.num * g.num * f.den) / (f.den * ig);
    const Ratio<T> tanh_c = tanh_ratio(c);
    const Vec<T> h = (o.num * tanh_c.num) / (o.den * tanh_c.den);
    c.store(rows.c[r] + unit);
    h.store(rows.h[r] + unit);
    if (unit + lanes <= H)
      h.store(rows.out[r] + unit);
    else
      h.store_n(rows.out[r] + unit, H - unit);
    if constexpr (kTraining) {
      (i.num / i.den).store(rows.gates[r] + unit * 4);
      (f.num / f.den).store(rows.gates[r] + unit * 4 + lanes);
      (g.num / g.den).store(rows.gates[r] + unit * 4 + 2 * lanes);
      (o.num / o.den).store(rows.gates[r] + unit * 4 + 3 * lanes);
    }
  }
}

template <class T, bool kTraining>
static void lstm_forward_impl(const LstmForwardArgs<T>& args) {
  constexpr int lanes = Vec<T>::lanes;
  const LstmGroup& group = args.group;
  const int H = args.weights.hidden_size;
  const int I = args.weights.input_size;
  const int Hp = round_up(H, kHiddenAlign);
  const int blocks = (H + lanes - 1) / lanes;
  const ptrdiff_t gate_row = 4 * static_cast<ptrdiff_t>(Hp);
  const ptrdiff_t reserve_row = 5 * static_cast<ptrdiff_t>(Hp);
  // An odd number of cache lines, so that rows do not crowd into the same sets.
  const ptrdiff_t h_row = Hp + kHiddenAlign;
  const int steps = group.length[0];
  const int chunk = lstm_chunk_steps(group.rows);
  const int depth = k_block<T>(H, 4 * lanes);

  T* pre = args.workspace;
  T* h[2];
  h[0] = pre + gate_row * (kInputChunkRows + kMaxGroupRows);
  h[1] = h[0] + h_row * kMaxGroupRows;
  T* c_state = h[1] + h_row * kMaxGroupRows;

  const T* x_rows[kInputChunkRows + kMaxGroupRows];
  T* gate_rows[kInputChunkRows + kMaxGroupRows];
  int rows = group.rows;
  for (int chunk_start = 0; chunk_start < steps; chunk_start += chunk) {
    // Input half of the chunk's steps: rows of `gate_rows`, step after step.
    const int chunk_end = chunk_start + chunk < steps ? chunk_start + chunk : steps;
    int count = 0;
    for (int s = chunk_start, active = rows; s < chunk_end; ++s) {
      active = lstm_active_rows(group, s, active);
      for (int r = 0; r < active; ++r, ++count) {
        const ptrdiff_t token = lstm_token(group, r, s);
        x_rows[count] = args.x + token * I;
        gate_rows[count] = kTraining ? args.reserve + token * reserve_row : pre + count * gate_row;
      }
    }
    GemmArgs<T> input{
        x_rows, 1, count, {args.weights.input, I, blocks * 4 * lanes}, gate_rows, args.weights.bias,
        false};
    gemm<T>(input);

    int offset = 0;
    for (int s = chunk_start; s < chunk_end; ++s) {
      rows = lstm_active_rows(group, s, rows);
      const T* h_prev = h[(s + 1) & 1];
      T* h_next = h[s & 1];
      for (int n = 0; n < blocks; ++n) {
        const int block = s & 1 ? blocks - 1 - n : n;
        const T* panel = args.weights.recurrent + static_cast<ptrdiff_t>(block) * H * 4 * lanes;
        for (int k0 = 0; k0 < H; k0 += depth) {
          const int k = H - k0 < depth ? H - k0 : depth;
          const bool last = k0 + k == H;
          if (s == 0 && !last) continue;  // h_{-1} = 0: nothing to add
          for (int m = 0; m < rows;) {
            const int tile = next_tile_rows(rows - m);
            LstmTileRows<T> at;
            for (int r = 0; r < tile; ++r) {
              const ptrdiff_t token = lstm_token(group, m + r, s);
              at.h_prev[r] = h_prev + (m + r) * h_row;
              at.gates[r] = gate_rows[offset + m + r];
              if (kTraining) {
                at.c[r] = args.reserve + token * reserve_row + gate_row;
                at.c_prev[r] = group.reverse ? at.c[r] + reserve_row : at.c[r] - reserve_row;
              } else {
                at.c[r] = at.c_prev[r] = c_state + (m + r) * h_row;
              }
              at.h[r] = h_next + (m + r) * h_row;
              at.out[r] = args.out + token * args.out_stride;
            }
            const T* weights = panel + static_cast<ptrdiff_t>(k0) * 4 * lanes;
            const int unit = block * lanes;
            switch (tile) {
              case 1:
                lstm_tile<T, 1, kTraining>(at, k0, k, weights, unit, H, last, s == 0);
                break;
              case 2:
                lstm_tile<T, 2, kTraining>(at, k0, k, weights, unit, H, last, s == 0);
                break;
              case 3:
                lstm_tile<T, 3, kTraining>(at, k0, k, weights, unit, H, last, s == 0);
                break;
              default:
                lstm_tile<T, kTileRows, kTraining>(at, k0, k, weights, unit, H, last, s == 0);
            }
            m += tile;
          }
        }
      }
      offset += rows;
    }
  }
}

template <class T>
static void lstm_forward(const LstmForwardArgs<T>& args) {
  if (args.reserve != nullptr)
    lstm_forward_impl<T, true>(args);
  else
    lstm_forward_impl<T, false>(args);
}

}  // namespace XDF_ISA
}  // namespace xdf
