// Linear-chain CRF: gradient of the log-likelihood, and marginals, by forward-backward.
//
//   marginal of tag j at t     = alpha_t[j] beta_t[j] / z_t,   z_t = sum_j alpha_t[j] beta_t[j]
//   expected moves from i to j = P[i, j] sum_t alpha_{t-1}[i] u_t[j],  u_t = p_t beta_t f_t / z_t
//
// (f_t: the power of two alpha_t was scaled by), the gradient being what the tags have less what is
// expected. The moves are a product of matrices over t, in tiles that stay in registers. Work per
// token: C^2 multiply-adds each for alpha, beta and moves. z_t is the same Z for all t up to
// scaling, but taken anew at each token it keeps the rounding errors of the chains out of the
// marginals. Notation and scaling: crf-inl.h.
#pragma once

#include "cpu/crf-inl.h"

namespace xdf {
namespace XDF_ISA {

// counts[r, v] -= g P[r, v] sum_t alpha[t - 1, r] u[t, v] for MR rows, NV registers, t in [begin,
// end)
template <class T, int MR, int NV>
static void crf_moves_tile(const T* alpha, const T* u, ptrdiff_t begin, ptrdiff_t end,
                           ptrdiff_t padded, const T* table, double g, double* counts) {
  using V = Vec<T>;
  constexpr int lanes = V::lanes;
  V acc[MR][NV];
  XDF_UNROLL
  for (int r = 0; r < MR; ++r) {
    XDF_UNROLL
    for (int v = 0; v < NV; ++v) acc[r][v] = V::set1(T(0));
  }
  for (ptrdiff_t t = begin; t < end; ++t) {
    V row[NV];
    XDF_UNROLL
    for (int v = 0; v < NV; ++v) row[v] = V::load(u + t * padded + v * lanes);
    XDF_UNROLL
    for (int r = 0; r < MR; ++r) {
      const V from = V::set1(alpha[(t - 1) * padded + r]);
      XDF_UNROLL
      for (int v = 0; v < NV; ++v) acc[r][v] = V::fma(from, row[v], acc[r][v]);
    }
  }
  const V zero = V::set1(T(0));
  for (int r = 0; r < MR; ++r) {
    T moves[NV * lanes];
    XDF_UNROLL
    for (int v = 0; v < NV; ++v) {
      const V weight = V::load(table + r * padded + v * lanes);
      // Where a move is forbidden the sum has no meaning and may have overflowed.
      V::select_gt(weight, zero, weight * acc[r][v], zero).store(moves + v * lanes);
    }
    double* to = counts + r * padded;
    for (int k = 0; k < NV * lanes; ++k) to[k] -= g * static_cast<double>(moves[k]);
  }
}

template <class T, int NV>
XDF_INLINE void crf_moves_columns(const T* alpha, const T* u, ptrdiff_t begin, ptrdiff_t end, int C,
                                  const T* table, double g, double* counts) {
  const ptrdiff_t padded = padded_tags(C);
  int i = 0;
  for (; C - i >= 4; i += 4)
    crf_moves_tile<T, 4, NV>(alpha + i, u, begin, end, padded, table + i * padded, g,
                             counts + i * padded);
  for (; i < C; ++i)
    crf_moves_tile<T, 1, NV>(alpha + i, u, begin, end, padded, table + i * padded, g,
                             counts + i * padded);
}

// Tokens summed up at once: their rows stay in cache, and float sums stay short.
constexpr ptrdiff_t kMovesBlock = 128;

template <class T>
static void crf_add_moves(const T* alpha, const T* u, ptrdiff_t length, int C, const T* table,
                          double g, double* counts) {
  constexpr int lanes = Vec<T>::lanes;
  for (ptrdiff_t begin = 1; begin < length; begin += kMovesBlock) {
    const ptrdiff_t end = begin + kMovesBlock < length ? begin + kMovesBlock : length;
    int c = 0;
    for (; C - c > lanes; c += 2 * lanes)
      crf_moves_columns<T, 2>(alpha, u + c, begin, end, C, table + c, g, counts + c);
    if (c < C) crf_moves_columns<T, 1>(alpha, u + c, begin, end, C, table + c, g, counts + c);
  }
}

// Writes the sequence's rows and adds its moves to args.counts. False: to be done in log space;
// then nothing has been added, and what the rows hold is of no use.
template <class T, int NV>
static bool crf_gradient(const CrfGradArgs<T>& args, ptrdiff_t first, ptrdiff_t length, T g) {
  using V = Vec<T>;
  constexpr int lanes = V::lanes;
  const int C = args.in.model.num_tags;
  const ptrdiff_t padded = padded_tags(C);
  const CrfTables<T>& tables = args.in.tables;
  const T* e = args.in.emissions + first * C;
  T* p = static_cast<T*>(args.in.workspace);  // [length, padded], in the end u
  T* alpha = p + length * padded;             // [length, padded]
  T* beta = alpha + length * padded;          // [length, padded]
  T* scratch = beta + length * padded;        // [padded]
  T* scales = scratch + padded;               // [length], of alpha

  CrfEmissions<T, NV> emissions;
  emissions.begin();
  emissions.exp_first(tables, e, C, p);
  for (ptrdiff_t t = 1; t < length; ++t) emissions.exp(tables, e + t * C, C, p + t * padded);

  CrfChain<T> forward, backward;
  T* last = beta + (length - 1) * padded;
  crf_alpha_begin<T, NV>(p, C, tables.floor, alpha, forward);
  crf_beta_begin<T, NV>(tables.end(padded), C, tables.floor, last, backward);
  for (ptrdiff_t n = 1; n < length; ++n) {
    scales[n] = forward.scale;
    crf_alpha_step<T, NV>(tables, C, alpha + (n - 1) * padded, p + n * padded, alpha + n * padded,
                          forward);
    const ptrdiff_t t = length - n;
    crf_beta_step<T, NV>(tables, C, beta + t * padded, p + t * padded, beta + (t - 1) * padded,
                         scratch, backward);
  }
  double log_z = 0.0;
  if (!emissions.possible || !forward.sound() || !backward.sound() ||
      !crf_log_z(tables, e, length, C, alpha + (length - 1) * padded, last,
                 forward.exponent - CrfRange<T>::top, emissions, &log_z))
    return false;

  // A proper u is at most 1 / (alpha P) <= 2^-floor; the ceiling is for tags no move leads to.
  const V ceiling = V::set1(crf_pow2<T>(CrfRange<T>::ceiling)), weight = V::set1(-g);
  T* rows = args.rows + first * C;
  T* const rows_end = rows + length * C;
  bool in_range = true;
  scales[0] = T(1);
  for (ptrdiff_t t = 0; t < length; ++t) {
    T* u = p + t * padded;
    T* product = beta + t * padded;
    V sum = V::set1(T(0));
    crf_each<T, NV>(C, [&](int c, bool) {
      const V rest = V::load(product + c);
      const V both = V::load(alpha + t * padded + c) * rest;
      (V::load(u + c) * rest * V::set1(scales[t])).store(u + c);
      both.store(product + c);
      sum = sum + both;
    });
    const T z = sum.reduce_add();
    in_range = in_range & (z >= crf_pow2<T>(CrfRange<T>::least_z));
    const V inverse = V::set1(T(1) / z);
    crf_each<T, NV>(C, [&](int c, bool) {
      const V row = V::load(product + c) * inverse * weight;
      T* to = rows + t * C + c;
      // A whole register may spill into the next token's row, which is yet to be written.
      if (rows_end - to >= lanes)
        row.store(to);
      else
        row.store_n(to, C - c);
      V::min(ceiling, V::load(u + c) * inverse).store(u + c);
    });
  }
  if (!in_range) return false;
  if (args.tags == nullptr) return true;
  const int32_t* tags = args.tags + first;
  for (ptrdiff_t t = 0; t < length; ++t) rows[t * C + tags[t]] += g;
  const double of_sequence = static_cast<double>(g);
  crf_add_moves(alpha, p, length, C, tables.forward(padded), of_sequence, args.counts);
  for (ptrdiff_t t = 1; t < length; ++t) args.counts[tags[t - 1] * padded + tags[t]] += of_sequence;
  return true;
}

template <class T, int NV>
static void crf_grad_of(const CrfGradArgs<T>& args) {
  for (int b = args.in.begin; b < args.in.end; ++b) {
    const ptrdiff_t first = args.in.cu_seqlens[b], length = args.in.cu_seqlens[b + 1] - first;
    if (length == 0) continue;
    // Marginals are what is expected: minus a gradient without the tags' own share.
    const T g = args.tags == nullptr ? T(-1) : args.grad_out[b];
    if (!(args.in.tables.usable && crf_gradient<T, NV>(args, first, length, g)))
      exact_gradient(args, b);
  }
}

template <class T>
static void crf_grad(const CrfGradArgs<T>& args) {
  switch ((args.in.model.num_tags + Vec<T>::lanes - 1) / Vec<T>::lanes) {
    case 1:
      return crf_grad_of<T, 1>(args);
    case 2:
      return crf_grad_of<T, 2>(args);
    case 3:
      return crf_grad_of<T, 3>(args);
    default:
      return crf_grad_of<T, 0>(args);
  }
}

}  // namespace XDF_ISA
}  // namespace xdf
