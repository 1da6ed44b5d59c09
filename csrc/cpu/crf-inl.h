// Linear-chain CRF: its log-likelihood, and what the gradient (crf_grad-inl.h) shares with it.
// Lafferty, McCallum & Pereira 2001; scaling as in Rabiner 1989.
//
// In probability space, everything divided by its largest value so that exponentials stay <= 1:
//   P[i, j]    = exp(transitions[i, j] - max)           once a call
//   p_t[j]     = exp(emissions[t, j] - max_j)           one exponential a token and tag
//   alpha_t[j] = p_t[j] sum_i alpha_{t-1}[i] P[i, j]    lanes are destination tags
//   beta_t[i]  = sum_j P[i, j] p_{t+1}[j] beta_{t+1}[j] lanes are source tags: P transposed
//   Z          = sum_j alpha_t[j] beta_t[j]             at any t
// Work per token: C^2 multiply-adds, against C^2 exponentials in log space. A step waits for the
// one before it, some 30 cycles for small C, so two chains run side by side that do not wait for
// each other: alpha from the left and beta from the right, meeting in the middle.
//
// Scaling. alpha and beta are multiplied by powers of two only, which round nothing: the largest
// value is brought back to 2^top. The factor of a step is taken from the step before it, so that
// finding the maximum is no link of the chain either.
//
// Exactness. A sum of positive terms is accurate to rounding whatever its size, so it is underflow
// alone that needs care. No value that ought to be positive may fall below `floor`, chosen so that
// its product with any kept P is still a normal number; a sequence where one does is done again in
// log space (crf_exact-inl.h). Scores too far below their maximum to be kept at all count as
// forbidden; the nearest of them lies `gap` below. Each path that uses one has at most e^-gap of
// what a path could have at most, and there are C^T paths: unless Z exceeds C^T e^-gap by a factor
// e^45, the sequence is done again.
#pragma once

#include <math.h>

#include "cpu/crf_exact-inl.h"
#include "cpu/exp-inl.h"
#include "xdf/crf.h"

namespace xdf {
namespace XDF_ISA {

// Powers of two, and natural logarithms for the gaps. With C <= kMaxTags = 2^12:
//  - alpha, beta <= 2^(top + 13) (a step's growth is taken back one step later), so that
//    sum_j alpha beta <= 2^(2 top + 38) does not overflow: 2^126 in float.
//  - floor: what a step's sum may come down to; times the least scale, 2^-13, it is still normal.
//  - max_shift: a step's scale is at most 2^max_shift.
//  - least_z: sum_j alpha beta must come to this, far above what underflow takes from it.
//  - ceiling: see crf_gradient.
//  - gap: scores further below the maximum than this may be left out; exp_nonpositive keeps what is
//    nearer. table_gap: less for P, whose smallest value raises the floor.
template <class T>
struct CrfRange;
template <>
struct CrfRange<float> {
  static constexpr int top = 44, floor = -110, max_shift = 64, least_z = -20, ceiling = 110;
  static constexpr float gap = 87.0f, table_gap = 60.0f;
};
template <>
struct CrfRange<double> {
  static constexpr int top = 400, floor = -1000, max_shift = 500, least_z = -100, ceiling = 1000;
  static constexpr double gap = 700.0, table_gap = 500.0;
};
constexpr double kCrfMargin = 45.0;
constexpr double kLn2 = 0.69314718055994530942;

template <class T>
struct CrfBits;
template <>
struct CrfBits<float> {
  using Int = uint32_t;
  static constexpr int mantissa = 23, bias = 127;
};
template <>
struct CrfBits<double> {
  using Int = uint64_t;
  static constexpr int mantissa = 52, bias = 1023;
};

// 2^n, a normal number.
template <class T>
XDF_INLINE T crf_pow2(int n) {
  union {
    typename CrfBits<T>::Int bits;
    T value;
  } u;
  u.bits = static_cast<typename CrfBits<T>::Int>(n + CrfBits<T>::bias) << CrfBits<T>::mantissa;
  return u.value;
}

// floor(log2 x) of a positive normal number.
template <class T>
XDF_INLINE int crf_exponent(T x) {
  union {
    T value;
    typename CrfBits<T>::Int bits;
  } u;
  u.value = x;
  return static_cast<int>(u.bits >> CrfBits<T>::mantissa) - CrfBits<T>::bias;
}

// How far below the maximum `max` the nearest finite score lies that is more than `gap` below it.
template <class T>
static double crf_nearest_dropped(const T* x, const T* bias, int n, T max, T gap) {
  double nearest = INFINITY;
  for (int j = 0; j < n; ++j) {
    const T score = bias == nullptr ? x[j] : x[j] + bias[j];
    const double below = static_cast<double>(max) - static_cast<double>(score);
    if (score > T(-INFINITY) && max - score > gap && below < nearest) nearest = below;
  }
  return nearest;
}

// y = exp(x - max), 0 beyond `table_gap`, padded with 0.
template <class T>
static void crf_exp_table(const T* x, int n, T max, T* y, double* gap) {
  const T table_gap = CrfRange<T>::table_gap;
  const double dropped = crf_nearest_dropped<T>(x, nullptr, n, max, table_gap);
  if (dropped < *gap) *gap = dropped;
  for (int j = 0; j < padded_tags(n); ++j)
    y[j] = j < n && max - x[j] <= table_gap ? x[j] - max : T(-INFINITY);
  for (int j = 0; j < padded_tags(n); j += Vec<T>::lanes)
    exp_nonpositive(Vec<T>::load(y + j)).store(y + j);
}

template <class T>
static void crf_prepare(const CrfModel<T>& model, CrfTables<T>& tables) {
  const int C = model.num_tags;
  const ptrdiff_t padded = padded_tags(C);
  const T none = T(-INFINITY);
  T max_transition = none, max_end = none;
  for (ptrdiff_t k = 0; k < static_cast<ptrdiff_t>(C) * C; ++k)
    max_transition = model.transitions[k] > max_transition ? model.transitions[k] : max_transition;
  for (int j = 0; j < C; ++j) max_end = model.end[j] > max_end ? model.end[j] : max_end;
  tables.usable = max_end > none;
  if (!tables.usable) return;
  if (!(max_transition > none)) max_transition = T(0);  // all are forbidden: P = 0 all the same

  for (int j = 0; j < padded; ++j) {
    tables.start()[j] = j < C ? model.start[j] : none;
    tables.padding(padded)[j] = j < C ? T(0) : T(1);
  }
  tables.gap = INFINITY;
  crf_exp_table(model.end, C, max_end, tables.end(padded), &tables.gap);
  T* backward = tables.backward(padded, C);
  T smallest = T(1);
  for (int i = 0; i < C; ++i) {
    T* row = tables.forward(padded) + i * padded;
    crf_exp_table(model.transitions + static_cast<ptrdiff_t>(i) * C, C, max_transition, row,
                  &tables.gap);
    for (int j = 0; j < C; ++j) {
      if (row[j] > T(0) && row[j] < smallest) smallest = row[j];
      backward[j * padded + i] = row[j];
    }
    for (ptrdiff_t j = C; j < padded; ++j) backward[i * padded + j] = T(0);
  }
  tables.max_transition = static_cast<double>(max_transition);
  tables.max_end = static_cast<double>(max_end);
  tables.log_tags = ::log(static_cast<double>(C));
  tables.floor = crf_pow2<T>(CrfRange<T>::floor - crf_exponent(smallest));
}

// body(c, last) for each register of a row of C tags. NV > 0: there are NV, known when compiling,
// so that short rows stay in registers; 0: any number.
template <class T, int NV, class Body>
XDF_INLINE void crf_each(int C, Body body) {
  constexpr int lanes = Vec<T>::lanes;
  if constexpr (NV > 0) {
    XDF_UNROLL
    for (int v = 0; v < NV; ++v) body(v * lanes, v == NV - 1);
  } else {
    for (int c = 0; c < C; c += lanes) body(c, c + lanes >= C);
  }
}

// The emissions of a sequence as they are exponentiated.
template <class T, int NV>
struct CrfEmissions {
  double shift;      // sum of the maxima that were taken off
  bool possible;     // no token has been without a possible tag
  Vec<T> lowest;     // the least exponent of all but the first token ...
  Vec<T> first_low;  // ... and of that one

  XDF_MEMBER void begin() {
    shift = 0.0;
    possible = true;
    lowest = first_low = Vec<T>::set1(T(0));
  }
  // p = exp(e - max). Padding takes the score of tag 0, which changes no maximum; what comes of it
  // is multiplied by the zeros that pad P.
  XDF_MEMBER void exp(const CrfTables<T>& tables, const T* e, int C, T* p) {
    using V = Vec<T>;
    const V first = V::set1(e[0]), zero = V::set1(T(0));
    const T* padding = tables.padding(padded_tags(C));
    V largest = first;
    crf_each<T, NV>(C, [&](int c, bool last) {
      const V x = last ? V::select_gt(V::load(padding + c), zero, first, V::load_n(e + c, C - c))
                       : V::load(e + c);
      x.store(p + c);
      largest = V::max(largest, x);
    });
    lowest = V::min(lowest, finish(C, p, largest.reduce_max()));
  }
  // The same for the first token, start scores included; padding becomes 0.
  XDF_MEMBER void exp_first(const CrfTables<T>& tables, const T* e, int C, T* p) {
    using V = Vec<T>;
    V largest = V::set1(T(-INFINITY));
    crf_each<T, NV>(C, [&](int c, bool last) {
      const V x = V::load(tables.start() + c) + (last ? V::load_n(e + c, C - c) : V::load(e + c));
      x.store(p + c);
      largest = V::max(largest, x);
    });
    first_low = finish(C, p, largest.reduce_max());
  }
  XDF_MEMBER Vec<T> finish(int C, T* p, T max) {
    using V = Vec<T>;
    shift += static_cast<double>(max);
    possible = possible & (max > T(-INFINITY));
    V low = V::set1(T(0));
    crf_each<T, NV>(C, [&](int c, bool) {
      const V below = V::load(p + c) - V::set1(max);
      low = V::min(below, low);
      exp_nonpositive(below).store(p + c);
    });
    return low;
  }
  // How far below its maximum the nearest emission lies that was left out.
  XDF_MEMBER double gap(const CrfTables<T>& tables, const T* e, ptrdiff_t length, int C) const {
    using V = Vec<T>;
    const T kept = CrfRange<T>::gap;
    const V zero = V::set1(T(0));
    double nearest = INFINITY;
    if ((zero - first_low).reduce_max() > kept) nearest = scan(tables.start(), e, 1, C);
    if ((zero - lowest).reduce_max() > kept) {
      const double rest = scan(nullptr, e + C, length - 1, C);
      nearest = rest < nearest ? rest : nearest;
    }
    return nearest;
  }
  static double scan(const T* start, const T* e, ptrdiff_t length, int C) {
    double nearest = INFINITY;
    for (ptrdiff_t t = 0; t < length; ++t, e += C) {
      T max = T(-INFINITY);
      for (int j = 0; j < C; ++j) {
        const T score = start == nullptr ? e[j] : e[j] + start[j];
        max = score > max ? score : max;
      }
      const double here = crf_nearest_dropped<T>(e, start, C, max, CrfRange<T>::gap);
      nearest = here < nearest ? here : nearest;
    }
    return nearest;
  }
};

// finish(c, sum_i x[i] table[i, c ...]) for NV registers of columns from c on. Two sums, over even
// and odd i, halve the chain of dependent additions.
template <class T, int NV, class Finish>
XDF_INLINE void crf_columns(const T* x, const T* table, int C, ptrdiff_t padded, int c,
                            Finish& finish) {
  using V = Vec<T>;
  constexpr int lanes = V::lanes;
  V even[NV], odd[NV];
  XDF_UNROLL
  for (int v = 0; v < NV; ++v) even[v] = odd[v] = V::set1(T(0));
  table += c;
  int i = 0;
  for (; i + 1 < C; i += 2, table += 2 * padded) {
    const V a = V::set1(x[i]), b = V::set1(x[i + 1]);
    XDF_UNROLL
    for (int v = 0; v < NV; ++v) {
      even[v] = V::fma(a, V::load(table + v * lanes), even[v]);
      odd[v] = V::fma(b, V::load(table + padded + v * lanes), odd[v]);
    }
  }
  if (i < C) {
    const V a = V::set1(x[i]);
    XDF_UNROLL
    for (int v = 0; v < NV; ++v) even[v] = V::fma(a, V::load(table + v * lanes), even[v]);
  }
  XDF_UNROLL
  for (int v = 0; v < NV; ++v) finish(c + v * lanes, even[v] + odd[v]);
}

template <class T, int NV, class Finish>
XDF_INLINE void crf_multiply(const T* x, const T* table, int C, Finish& finish) {
  constexpr int lanes = Vec<T>::lanes;
  const ptrdiff_t padded = padded_tags(C);
  if constexpr (NV > 0) {
    crf_columns<T, NV>(x, table, C, padded, 0, finish);
  } else {
    int c = 0;
    for (; C - c >= 4 * lanes; c += 4 * lanes) crf_columns<T, 4>(x, table, C, padded, c, finish);
    for (; C - c > lanes; c += 2 * lanes) crf_columns<T, 2>(x, table, C, padded, c, finish);
    if (c < C) crf_columns<T, 1>(x, table, C, padded, c, finish);
  }
}

// One of the two recursions as it runs.
template <class T>
struct CrfChain {
  T scale;  // what the next step is multiplied by, 2^shift
  int shift;
  int64_t exponent;  // true value = stored value * 2^exponent
  Vec<T> floor;
  Vec<T> lost;  // positive where a value fell below the floor that ought to be positive

  XDF_MEMBER void begin(T lowest) {
    scale = T(1);
    shift = 0;
    exponent = -CrfRange<T>::top;
    floor = Vec<T>::set1(lowest);
    lost = Vec<T>::set1(T(0));
  }
  // value = x * y * a power of two, x and y >= 0: is it below the floor although neither is 0?
  XDF_MEMBER void watch(Vec<T> value, Vec<T> x, Vec<T> y) {
    using V = Vec<T>;
    lost = V::max(lost, V::select_gt(floor, value, V::min(x, y), V::set1(T(0))));
  }
  // A step has been multiplied by `scale`; the largest of its values decides the next one.
  XDF_MEMBER void stepped(Vec<T> values) {
    exponent -= shift;
    shift = CrfRange<T>::top - crf_exponent(values.reduce_max());
    shift = shift < CrfRange<T>::max_shift ? shift : CrfRange<T>::max_shift;
    scale = crf_pow2<T>(shift);
  }
  XDF_MEMBER bool sound() const { return !(lost.reduce_max() > T(0)); }
};

template <class T, int NV>
XDF_INLINE void crf_alpha_begin(const T* p, int C, T floor, T* alpha, CrfChain<T>& chain) {
  using V = Vec<T>;
  chain.begin(floor);
  crf_each<T, NV>(C, [&](int c, bool) {
    const V emission = V::load(p + c);
    const V value = emission * V::set1(crf_pow2<T>(CrfRange<T>::top));
    chain.watch(value, emission, emission);
    value.store(alpha + c);
  });
}

template <class T, int NV>
XDF_INLINE void crf_beta_begin(const T* end, int C, T floor, T* beta, CrfChain<T>& chain) {
  using V = Vec<T>;
  chain.begin(floor);
  crf_each<T, NV>(C, [&](int c, bool) {
    (V::load(end + c) * V::set1(crf_pow2<T>(CrfRange<T>::top))).store(beta + c);
  });
}

template <class T>
struct CrfAlphaFinish {
  const T* p;
  T* alpha;
  CrfChain<T>& chain;
  Vec<T> largest = Vec<T>::set1(T(0));

  XDF_MEMBER void operator()(int c, Vec<T> sum) {
    const Vec<T> emission = Vec<T>::load(p + c);
    const Vec<T> value = sum * Vec<T>::set1(chain.scale) * emission;
    chain.watch(value, sum, emission);
    value.store(alpha + c);
    largest = Vec<T>::max(largest, value);
  }
};

template <class T>
struct CrfBetaFinish {
  T* beta;
  Vec<T> scale;
  Vec<T> largest = Vec<T>::set1(T(0));

  XDF_MEMBER void operator()(int c, Vec<T> sum) {
    const Vec<T> value = sum * scale;
    value.store(beta + c);
    largest = Vec<T>::max(largest, value);
  }
};

// alpha of one token from that of the token before and its own p.
template <class T, int NV>
XDF_INLINE void crf_alpha_step(const CrfTables<T>& tables, int C, const T* from, const T* p,
                               T* alpha, CrfChain<T>& chain) {
  CrfAlphaFinish<T> finish{p, alpha, chain};
  crf_multiply<T, NV>(from, tables.forward(padded_tags(C)), C, finish);
  chain.stepped(finish.largest);
}

// beta of one token from p and beta of the token after it. scratch [padded] takes p beta.
template <class T, int NV>
XDF_INLINE void crf_beta_step(const CrfTables<T>& tables, int C, const T* from, const T* p, T* beta,
                              T* scratch, CrfChain<T>& chain) {
  using V = Vec<T>;
  crf_each<T, NV>(C, [&](int c, bool) {
    const V emission = V::load(p + c), rest = V::load(from + c);
    const V product = emission * rest;
    chain.watch(product, emission, rest);
    product.store(scratch + c);
  });
  CrfBetaFinish<T> finish{beta, V::set1(chain.scale)};
  crf_multiply<T, NV>(scratch, tables.backward(padded_tags(C), C), C, finish);
  chain.stepped(finish.largest);
}

// log Z from alpha and beta of one token and the exponents of their scaling; false where it cannot
// be trusted.
template <class T, int NV>
static bool crf_log_z(const CrfTables<T>& tables, const T* e, ptrdiff_t length, int C,
                      const T* alpha, const T* beta, int64_t exponent,
                      const CrfEmissions<T, NV>& emissions, double* log_z) {
  using V = Vec<T>;
  V sum = V::set1(T(0));
  for (int c = 0; c < C; c += V::lanes) sum = V::fma(V::load(alpha + c), V::load(beta + c), sum);
  const T z = sum.reduce_add();
  if (!(z >= crf_pow2<T>(CrfRange<T>::least_z))) return false;
  const int k = crf_exponent(z);
  const double mass =
      ::log(static_cast<double>(z * crf_pow2<T>(-k))) + static_cast<double>(k + exponent) * kLn2;
  double gap = emissions.gap(tables, e, length, C);
  gap = tables.gap < gap ? tables.gap : gap;
  if (!(mass + gap >= kCrfMargin + static_cast<double>(length) * tables.log_tags)) return false;
  *log_z = mass + emissions.shift + tables.max_end +
           tables.max_transition * static_cast<double>(length - 1);
  return true;
}

// log Z of a sequence; false: to be done in log space.
template <class T, int NV>
static bool crf_partition(const CrfSequences<T>& in, const T* e, ptrdiff_t length, double* log_z) {
  const int C = in.model.num_tags;
  const ptrdiff_t padded = padded_tags(C);
  const CrfTables<T>& tables = in.tables;
  T* row = static_cast<T*>(in.workspace);
  T* p[2] = {row, row + padded};  // of the tokens alpha takes; then beta's
  T* q[2] = {row + 2 * padded, row + 3 * padded};
  T* alpha[2] = {row + 4 * padded, row + 5 * padded};
  T* beta[2] = {row + 6 * padded, row + 7 * padded};
  T* scratch = row + 8 * padded;
  const ptrdiff_t left = (length - 1) / 2, right = length - 1 - left;
  CrfEmissions<T, NV> emissions;
  CrfChain<T> forward, backward;
  emissions.begin();
  emissions.exp_first(tables, e, C, p[0]);
  crf_alpha_begin<T, NV>(p[0], C, tables.floor, alpha[0], forward);
  crf_beta_begin<T, NV>(tables.end(padded), C, tables.floor, beta[0], backward);
  // Exponentials are taken one token ahead: they, too, are long chains that must not be waited for.
  if (left > 0) emissions.exp(tables, e + C, C, p[1]);
  if (right > 0) emissions.exp(tables, e + (length - 1) * C, C, q[1]);
  for (ptrdiff_t n = 1; n <= right; ++n) {
    const int from = (n - 1) & 1, to = n & 1;
    if (n < left) emissions.exp(tables, e + (n + 1) * C, C, p[from]);
    if (n <= left) crf_alpha_step<T, NV>(tables, C, alpha[from], p[to], alpha[to], forward);
    if (n < right) emissions.exp(tables, e + (length - 1 - n) * C, C, q[from]);
    crf_beta_step<T, NV>(tables, C, beta[from], q[to], beta[to], scratch, backward);
  }
  if (!emissions.possible || !forward.sound() || !backward.sound()) return false;
  return crf_log_z(tables, e, length, C, alpha[left & 1], beta[right & 1],
                   forward.exponent + backward.exponent, emissions, log_z);
}

template <class T, int NV>
static void crf_log_likelihood_of(const CrfLikelihoodArgs<T>& args) {
  const CrfModel<T>& model = args.in.model;
  const int C = model.num_tags;
  for (int b = args.in.begin; b < args.in.end; ++b) {
    const ptrdiff_t first = args.in.cu_seqlens[b], length = args.in.cu_seqlens[b + 1] - first;
    if (length == 0) {
      args.out[b] = T(0);
      continue;
    }
    const T* e = args.in.emissions + first * C;
    const int32_t* tags = args.tags + first;
    // start + emission rounded as in Z, so that the two cancel where there is but one path.
    double score = static_cast<double>(model.start[tags[0]] + e[tags[0]]);
    for (ptrdiff_t t = 1; t < length; ++t) {
      const ptrdiff_t move = static_cast<ptrdiff_t>(tags[t - 1]) * C + tags[t];
      score +=
          static_cast<double>(model.transitions[move]) + static_cast<double>(e[t * C + tags[t]]);
    }
    score += static_cast<double>(model.end[tags[length - 1]]);
    double log_z = 0.0;
    if (score > -INFINITY &&
        !(args.in.tables.usable && crf_partition<T, NV>(args.in, e, length, &log_z))) {
      double* scratch = static_cast<double*>(args.in.workspace);
      log_z = exact_log_z(model, e, length, scratch + C, false, scratch);
    }
    // Rounding may leave a probability just above 1.
    args.out[b] = static_cast<T>(score < log_z ? score - log_z : 0.0);
  }
}

template <class T>
static void crf_log_likelihood(const CrfLikelihoodArgs<T>& args) {
  switch ((args.in.model.num_tags + Vec<T>::lanes - 1) / Vec<T>::lanes) {
    case 1:
      return crf_log_likelihood_of<T, 1>(args);
    case 2:
      return crf_log_likelihood_of<T, 2>(args);
    case 3:
      return crf_log_likelihood_of<T, 3>(args);
    default:
      return crf_log_likelihood_of<T, 0>(args);
  }
}

}  // namespace XDF_ISA
}  // namespace xdf
