// Viterbi decoding (Viterbi 1967; Forney 1973), vectorised over destination tags:
//
//   best_t[j] = max_i (delta_{t-1}[i] + transitions[i, j]),   delta_t[j] = best_t[j] + emissions[t,
//   j]
//
// Work per token: C^2 additions and C^2 maxima. No back-pointer is stored: the way back asks at
// each step which tag i attained best_t[j]. That costs C additions and comparisons on the path
// alone, while tracking the argument of each maximum would double the work of the C^2 loop. The
// comparison is exact because both sides are the same rounded sum; the first tag that attains it is
// the lower one.
//
// Every kShiftSteps steps the largest delta is subtracted from all, so that scores keep their
// precision however long the sequence; the path's own score is summed up in double at the end.
#pragma once

#include <math.h>

#include "cpu/vec.h"
#include "xdf/crf.h"

namespace xdf {
namespace XDF_ISA {

constexpr int kShiftSteps = 16;

template <class T>
static void viterbi_prepare(const CrfModel<T>& model, CrfTables<T>& tables) {
  const int C = model.num_tags;
  const ptrdiff_t padded = padded_tags(C);
  T* start = tables.start();
  T* end = tables.end(padded);
  T* forward = tables.forward(padded);
  T* backward = tables.backward(padded, C);
  const T none = T(-INFINITY);
  for (int j = 0; j < padded; ++j) {
    start[j] = j < C ? model.start[j] : none;
    end[j] = j < C ? model.end[j] : none;
  }
  for (int i = 0; i < C; ++i) {
    for (int j = 0; j < padded; ++j) {
      forward[i * padded + j] = j < C ? model.transitions[static_cast<ptrdiff_t>(i) * C + j] : none;
      backward[i * padded + j] =
          j < C ? model.transitions[static_cast<ptrdiff_t>(j) * C + i] : none;
    }
  }
}

// best[c ...] = max_i (delta[i] + table[i, c ...]), next = best + e; returns the largest of next.
template <class T, int NV>
XDF_INLINE Vec<T> viterbi_columns(const T* delta, const T* table, int C, ptrdiff_t padded, int c,
                                  const T* e, T* best, T* next) {
  using V = Vec<T>;
  constexpr int lanes = V::lanes;
  V even[NV], odd[NV];
  XDF_UNROLL
  for (int v = 0; v < NV; ++v) even[v] = odd[v] = V::set1(T(-INFINITY));
  table += c;
  int i = 0;
  for (; i + 1 < C; i += 2, table += 2 * padded) {
    const V from = V::set1(delta[i]), from_odd = V::set1(delta[i + 1]);
    XDF_UNROLL
    for (int v = 0; v < NV; ++v) {
      even[v] = V::max(even[v], from + V::load(table + v * lanes));
      odd[v] = V::max(odd[v], from_odd + V::load(table + padded + v * lanes));
    }
  }
  if (i < C) {
    const V from = V::set1(delta[i]);
    XDF_UNROLL
    for (int v = 0; v < NV; ++v) even[v] = V::max(even[v], from + V::load(table + v * lanes));
  }
  V largest = V::set1(T(-INFINITY));
  XDF_UNROLL
  for (int v = 0; v < NV; ++v) {
    const int at = c + v * lanes;
    const V emission = at + lanes <= C ? V::load(e + at) : V::load_n(e + at, C - at);
    const V value = V::max(even[v], odd[v]);
    value.store(best + at);
    (value + emission).store(next + at);
    largest = V::max(largest, value + emission);
  }
  return largest;
}

// The first tag c with delta[c] + scores[c] == target. There is one.
template <class T>
XDF_INLINE int viterbi_find(const T* delta, const T* scores, int C, T target) {
  using V = Vec<T>;
  constexpr int lanes = V::lanes;
  const V wanted = V::set1(target);
  for (int c = 0; c < C; c += 64) {  // 64 lanes to a word, so that small tag sets need no branch
    const int end = c + 64 < C ? c + 64 : C;
    uint64_t found = 0;
    for (int at = c; at < end; at += lanes) {
      const V sum = V::load(delta + at) + V::load(scores + at);
      found |= static_cast<uint64_t>(V::equal(sum, wanted)) << (at - c);
    }
    if (found != 0) return c + __builtin_ctzll(found);
  }
  return 0;
}

template <class T>
static void viterbi_sequence(const ViterbiArgs<T>& args, int b) {
  using V = Vec<T>;
  constexpr int lanes = V::lanes;
  const CrfModel<T>& model = args.in.model;
  const int C = model.num_tags;
  const ptrdiff_t padded = padded_tags(C);
  const ptrdiff_t first = args.in.cu_seqlens[b], length = args.in.cu_seqlens[b + 1] - first;
  if (length == 0) {
    args.scores[b] = T(0);
    return;
  }
  const T* e = args.in.emissions + first * C;
  const T* forward = args.in.tables.forward(padded);
  T* delta = static_cast<T*>(args.in.workspace);  // [length, padded]
  T* best = delta + length * padded;              // [length, padded]
  for (int c = 0; c < C; c += lanes) {
    const V emission = c + lanes <= C ? V::load(e + c) : V::load_n(e + c, C - c);
    (V::load(args.in.tables.start() + c) + emission).store(delta + c);
  }
  for (ptrdiff_t t = 1; t < length; ++t) {
    const T* row = e + t * C;
    const T* from = delta + (t - 1) * padded;
    T* to = delta + t * padded;
    T* to_best = best + t * padded;
    V largest = V::set1(T(-INFINITY));
    int c = 0;
    for (; C - c > 3 * lanes; c += 4 * lanes)
      largest =
          V::max(largest, viterbi_columns<T, 4>(from, forward, C, padded, c, row, to_best, to));
    switch ((C - c + lanes - 1) / lanes) {
      case 3:
        largest =
            V::max(largest, viterbi_columns<T, 3>(from, forward, C, padded, c, row, to_best, to));
        break;
      case 2:
        largest =
            V::max(largest, viterbi_columns<T, 2>(from, forward, C, padded, c, row, to_best, to));
        break;
      case 1:
        largest =
            V::max(largest, viterbi_columns<T, 1>(from, forward, C, padded, c, row, to_best, to));
        break;
      default:
        break;
    }
    if (t % kShiftSteps == 0) {
      const T shift = largest.reduce_max();
      if (shift > T(-INFINITY))
        for (c = 0; c < C; c += lanes) (V::load(to + c) - V::set1(shift)).store(to + c);
    }
  }

  const T* last = delta + (length - 1) * padded;
  const T* end = args.in.tables.end(padded);
  V largest = V::set1(T(-INFINITY));
  for (int c = 0; c < C; c += lanes)
    largest = V::max(largest, V::load(last + c) + V::load(end + c));
  const T target = largest.reduce_max();
  int32_t* tags = args.tags + first;
  if (!(target > T(-INFINITY))) {
    for (ptrdiff_t t = 0; t < length; ++t) tags[t] = 0;
    args.scores[b] = T(-INFINITY);
    return;
  }
  int tag = viterbi_find(last, end, C, target);
  double score = static_cast<double>(model.end[tag]);
  const T* backward = args.in.tables.backward(padded, C);
  for (ptrdiff_t t = length - 1;; --t) {
    tags[t] = tag;
    score += static_cast<double>(e[t * C + tag]);
    if (t == 0) break;
    const int previous =
        viterbi_find(delta + (t - 1) * padded, backward + tag * padded, C, best[t * padded + tag]);
    score += static_cast<double>(backward[tag * padded + previous]);
    tag = previous;
  }
  args.scores[b] = static_cast<T>(score + static_cast<double>(model.start[tag]));
}

template <class T>
static void viterbi(const ViterbiArgs<T>& args) {
  for (int b = args.in.begin; b < args.in.end; ++b) viterbi_sequence<T>(args, b);
}

}  // namespace XDF_ISA
}  // namespace xdf
