// The LSTM recurrence of one direction over one group of ragged sequences (Hochreiter & Schmidhuber
// 1997; gate order and equations as torch.nn.LSTM):
//
//   a_t = W_ih x_t + b + W_hh h_{t-1}            [4H] as gates i, f, g, o
//   c_t = sigmoid(a_f) c_{t-1} + sigmoid(a_i) tanh(a_g)
//   h_t = sigmoid(a_o) tanh(c_t)
//
// Work per token: 4H (I + H) multiply-adds and 5 transcendental functions a unit. The input half is
// an ordinary gemm over a chunk of steps (cpu/bilstm_forward.cpp), so that W_ih is fetched once a
// chunk. The recurrent half runs step by step, here: all rows of the group pass over one block of
// units while its weights lie in L1, first for the gates i and f, then for g and o, whose tile ends
// with c and h. Few rows take all gates in one pass.
//
// A step that begins with the unit block the previous one ended with (LstmStepArgs::descending)
// still finds there, where W_hh is larger than a cache level, what that level holds. And where W_hh
// is larger than the second level, each tile fetches a share of the piece of the weights that comes
// next: all rows pass over a piece before the next is read, and no hardware sees that coming. So
// are the gates and cells that a tile's rows need next.
#pragma once

#include "cpu/activations-inl.h"
#include "cpu/gemm-inl.h"

namespace xdf {
namespace XDF_ISA {

constexpr int kL2Bytes = 768 * 1024;  // weights that stay in it from step to step, about

template <class W>
constexpr bool kPairs = false;
template <>
constexpr bool kPairs<Bf16Pair> = true;

// From the pre-activations of `lanes` units of one row to c and h.
template <class T, class W, class In>
XDF_INLINE void lstm_cell(const LstmStepArgs<T, W, In>& args, int row, int unit, Vec<T> a_i,
                          Vec<T> a_f, Vec<T> a_g, Vec<T> a_o) {
  constexpr int lanes = Vec<T>::lanes;
  // Over common denominators: two divisions in place of five.
  const Ratio<T> i = sigmoid_ratio(a_i);
  const Ratio<T> f = sigmoid_ratio(a_f);
  const Ratio<T> g = tanh_ratio(a_g);
  const Ratio<T> o = sigmoid_ratio(a_o);
  T* c_at = args.c[row] + unit;
  const Vec<T> c_prev = args.first ? Vec<T>::set1(T(0)) : Vec<T>::load(c_at + args.c_prev);
  const Vec<T> ig = i.den * g.den;
  const Vec<T> c = Vec<T>::fma(f.num * c_prev, ig, i.num * g.num * f.den) / (f.den * ig);
  const Ratio<T> tanh_c = tanh_ratio(c);
  const Vec<T> h = (o.num * tanh_c.num) / (o.den * tanh_c.den);
  c.store(c_at);
  h.store(args.h_next + row * args.h_stride + unit);
  if constexpr (kPairs<W>)
    h.store(reinterpret_cast<Bf16*>(args.h_next_pairs + row * args.h_stride) + unit);
  if (args.keep_gates) {
    T* gates = args.gates[row] + 4 * unit;
    (i.num / i.den).store(gates);
    (f.num / f.den).store(gates + lanes);
    (g.num / g.den).store(gates + 2 * lanes);
    (o.num / o.den).store(gates + 3 * lanes);
  }
}

// Rows [m, m + MR), the pair of gates i and f or (kLastPair) g and o of the `lanes` units from
// `unit`, k in [k0, k0 + K).
template <int MR, bool kPrefetch, bool kLastPair, class T, class W, class In>
static void lstm_tile(const LstmStepArgs<T, W, In>& args, int m, const W* panel, int k0, int K,
                      int unit, Prefetch ahead) {
  constexpr int lanes = Vec<T>::lanes;
  const In* input[MR];
  T* gates[MR];
  Vec<T> acc[MR][1][2];
  const bool begins = args.first || k0 == 0;
  XDF_UNROLL
  for (int r = 0; r < MR; ++r) {
    input[r] = args.input[m + r] + 4 * unit;
    gates[r] = args.gates[m + r] + 4 * unit;
    XDF_UNROLL
    for (int v = 0; v < 2; ++v) {
      const int at = (v + 2 * kLastPair) * lanes;
      acc[r][0][v] = begins ? Vec<T>::load(input[r] + at) : Vec<T>::load(gates[r] + at);
    }
  }
  if (!args.first) {
    const typename LstmStepArgs<T, W, In>::Operand* h_prev[MR];
    if (k0 == 0) {
      // What the same rows need next: long out of the first two levels, or never in them.
      XDF_UNROLL
      for (int r = 0; r < MR; ++r) {
        constexpr int nbytes = 2 * lanes * static_cast<int>(sizeof(In));
        prefetch_lines<nbytes>(args.next_input[m + r] + 4 * unit + 2 * kLastPair * lanes);
        if (kLastPair) {
          prefetch_lines<nbytes>(input[r] + (args.descending ? -4 : 4) * lanes);
        } else {
          prefetch_lines<nbytes>(input[r] + 2 * lanes);
          XDF_PREFETCH(args.c[m + r] + unit + args.c_prev);
        }
      }
    }
    XDF_UNROLL
    for (int r = 0; r < MR; ++r) h_prev[r] = args.h_prev + (m + r) * args.h_stride + k0;
    tile_multiply<kPrefetch>(h_prev, 1, panel, 0, K, ahead, acc);
  }
  const bool complete = kLastPair && k0 + K == inner_size<W>(args.hidden_size);
  XDF_UNROLL
  for (int r = 0; r < MR; ++r) {
    if (complete) {
      const Vec<T> i = args.first ? Vec<T>::load(input[r]) : Vec<T>::load(gates[r]);
      const Vec<T> f = args.first ? Vec<T>::load(input[r] + lanes) : Vec<T>::load(gates[r] + lanes);
      lstm_cell(args, m + r, unit, i, f, acc[r][0][0], acc[r][0][1]);
    } else {
      XDF_UNROLL
      for (int v = 0; v < 2; ++v) acc[r][0][v].store(gates[r] + (v + 2 * kLastPair) * lanes);
    }
  }
}

template <bool kPrefetch, bool kLastPair, int MR = kTileRows, class T, class W, class In>
XDF_INLINE void lstm_tile_of(int rows, const LstmStepArgs<T, W, In>& args, int m, const W* panel,
                             int k0, int K, int unit, Prefetch ahead) {
  if constexpr (MR > 1) {
    if (rows < MR)
      return lstm_tile_of<kPrefetch, kLastPair, MR - 1>(rows, args, m, panel, k0, K, unit, ahead);
  }
  lstm_tile<MR, kPrefetch, kLastPair>(args, m, panel, k0, K, unit, ahead);
}

// All rows and one pair of gates of one block of units; next_panel is what will be read next.
template <bool kPrefetch, bool kLastPair, class T, class W, class In>
XDF_INLINE void lstm_panel(const LstmStepArgs<T, W, In>& args, const W* panel, int unit,
                           const W* next_panel) {
  constexpr int columns = 2 * Vec<T>::lanes;
  const int whole = inner_size<W>(args.hidden_size);
  const int depth = k_block<T>(whole, columns);
  const int tiles = (args.rows + kTileRows - 1) / kTileRows;
  const int share = (columns * static_cast<int>(sizeof(W)) + tiles - 1) / tiles;
  if (args.first && !kLastPair) return;  // no product to add
  for (int k0 = args.first ? (whole - 1) / depth * depth : 0; k0 < whole; k0 += depth) {
    const int k = whole - k0 < depth ? whole - k0 : depth;
    const W* piece = panel + static_cast<ptrdiff_t>(k0) * columns;
    const W* next = k0 + k < whole ? piece + static_cast<ptrdiff_t>(k) * columns : next_panel;
    Prefetch ahead{reinterpret_cast<const char*>(next), share};
    for (int m = 0; m < args.rows;) {
      const int rows = next_tile_rows(args.rows - m);
      lstm_tile_of<kPrefetch, kLastPair>(rows, args, m, piece, k0, k, unit, ahead);
      ahead.at += static_cast<ptrdiff_t>(k) * share;
      m += rows;
    }
  }
}

template <bool kPrefetch, class T, class W, class In>
static void lstm_units(const LstmStepArgs<T, W, In>& args, int begin, int end) {
  constexpr int lanes = Vec<T>::lanes;
  const ptrdiff_t panel_size = static_cast<ptrdiff_t>(inner_size<W>(args.hidden_size)) * 2 * lanes;
  for (int n = begin; n < end; ++n) {
    const int block = args.descending ? begin + end - 1 - n : n;
    const W* panel = args.recurrent + 2 * block * panel_size;
    lstm_panel<kPrefetch, false>(args, panel, block * lanes, panel + panel_size);
    const W* next = args.descending ? panel - 2 * panel_size : panel + 2 * panel_size;
    lstm_panel<kPrefetch, true>(args, panel + panel_size, block * lanes, next);
  }
}

// All MR rows of a group of few, U blocks of units from `block`: all gates at once, to have enough
// sums in flight. In one pass over k: no other rows wait for the weights.
template <int MR, int U, class T, class W, class In>
static void lstm_few_rows(const LstmStepArgs<T, W, In>& args, int block) {
  constexpr int lanes = Vec<T>::lanes;
  const int K = inner_size<W>(args.hidden_size);
  const ptrdiff_t panel_size = static_cast<ptrdiff_t>(K) * 2 * lanes;
  Vec<T> acc[MR][2 * U][2];
  const typename LstmStepArgs<T, W, In>::Operand* h_prev[MR];
  XDF_UNROLL
  for (int r = 0; r < MR; ++r) {
    h_prev[r] = args.h_prev + r * args.h_stride;
    prefetch_lines<4 * U * lanes* static_cast<int>(sizeof(In))>(args.next_input[r] +
                                                                block * 4 * lanes);
    XDF_UNROLL
    for (int v = 0; v < 4 * U; ++v)
      acc[r][v / 2][v % 2] = Vec<T>::load(args.input[r] + (block * 4 + v) * lanes);
  }
  if (!args.first)
    tile_multiply<false>(h_prev, 1, args.recurrent + 2 * block * panel_size, panel_size, K, {},
                         acc);
  XDF_UNROLL
  for (int r = 0; r < MR; ++r) {
    XDF_UNROLL
    for (int u = 0; u < U; ++u)
      lstm_cell(args, r, (block + u) * lanes, acc[r][2 * u][0], acc[r][2 * u][1],
                acc[r][2 * u + 1][0], acc[r][2 * u + 1][1]);
  }
}

template <int MR, int U, class T, class W, class In>
static void lstm_units_few_rows(const LstmStepArgs<T, W, In>& args, int begin, int end) {
  const int whole = (end - begin) / U * U;
  if (!args.descending)
    for (int n = 0; n < whole; n += U) lstm_few_rows<MR, U>(args, begin + n);
  for (int n = whole; n < end - begin; ++n) lstm_few_rows<MR, 1>(args, begin + n);
  if (args.descending)
    for (int n = whole; n > 0; n -= U) lstm_few_rows<MR, U>(args, begin + n - U);
}

// Rows of `out` lie far apart, often at the same place in their pages and so in the same sets of
// the cache: a row at a time, and not a register from each row in turn.
template <class T, class W, class In>
static void lstm_write_out(const LstmStepArgs<T, W, In>& args) {
  constexpr int lanes = Vec<T>::lanes;
  for (int r = 0; r < args.rows; ++r) {
    const T* h = args.h_next + r * args.h_stride;
    int unit = args.unit_begin;
    for (; unit + lanes <= args.unit_end; unit += lanes)
      Vec<T>::load(h + unit).store(args.out[r] + unit);
    if (unit < args.unit_end)
      Vec<T>::load(h + unit).store_n(args.out[r] + unit, args.unit_end - unit);
  }
}

template <class T, class W, class In>
static void lstm_step(const LstmStepArgs<T, W, In>& args) {
  constexpr int lanes = Vec<T>::lanes;
  const ptrdiff_t H = args.hidden_size, K = inner_size<W>(args.hidden_size);
  const int begin = args.unit_begin / lanes, end = (args.unit_end + lanes - 1) / lanes;
  if (args.rows == 1)
    lstm_units_few_rows<1, 2>(args, begin, end);
  else if (args.rows == 2)
    lstm_units_few_rows<2, 1>(args, begin, end);
  else if (args.rows == 3 && sizeof(W) == sizeof(T))  // else widening takes too many registers
    lstm_units_few_rows<3, 1>(args, begin, end);
  else if (4 * H * K * static_cast<ptrdiff_t>(sizeof(W)) > kL2Bytes)
    lstm_units<true>(args, begin, end);
  else
    lstm_units<false>(args, begin, end);
  lstm_write_out(args);
}

}  // namespace XDF_ISA
}  // namespace xdf
