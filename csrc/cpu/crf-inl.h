// Linear-chain CRF: log-likelihood, and its gradient by forward-backward (Lafferty, McCallum &
// Pereira 2001; scaling as in Rabiner 1989).
//
// In probability space, with everything divided by its largest value so that exponentials stay <=
// 1:
//   P[i, j] = exp(transitions[i, j] - max)              once a call
//   p_t[j]  = exp(emissions[t, j] - max_j)              one exponential a token and tag
//   alpha_t[j] = p_t[j] sum_i alpha_{t-1}[i] P[i, j]    lanes are destination tags
//   beta_t[i]  = sum_j P[i, j] p_{t+1}[j] beta_{t+1}[j] lanes are source tags: a transposed copy of
//   P marginal of tag j at t    = alpha_t[j] beta_t[j] / z_t,  z_t = sum_j alpha_t[j] beta_t[j]
//   expected moves from i to j = P[i, j] sum_t alpha_{t-1}[i] u_t[j],  u_t = p_t beta_t f_t / z_t
// The last is a matrix product over t. Work per token: C^2 multiply-adds for the log-likelihood, 3
// C^2 for the gradient, against C^2 exponentials and as many logarithms in log space.
//
// Scaling. alpha and beta are multiplied by powers of two only (f_t), which round nothing: the
// largest value is brought back to 2^top. The factor of a step is taken from the step before it, so
// that finding the maximum is off the chain from one alpha to the next; forward and backward steps
// alternate in one loop for the same reason: neither waits for the other.
//
// Exactness. A sum of positive terms without underflow is accurate to rounding, whatever its size,
// so it is underflow alone that needs care. No value that ought to be positive may fall below
// `floor`, chosen so that its product with any kept P is still a normal number; a sequence where
// one does is done again in log space (crf_exact-inl.h). Scores too far below their maximum to be
// kept at all
// (`gap`) count as forbidden. Each path that uses one has at most e^-gap of what a path could have
// at most, and there are C^T paths: the sequence is done again unless Z exceeds C^T e^-gap by e^45.
#pragma once

#include <math.h>

#include "cpu/activations-inl.h"
#include "cpu/crf_exact-inl.h"
#include "xdf/crf.h"

namespace xdf {
namespace XDF_ISA {

// Powers of two, and natural logarithms for the gaps. With C <= kMaxTags = 2^12:
//  - alpha, beta <= 2^top * 2 * 2^12 (a step's growth is taken back one step later), so that
//    sum_j alpha beta <= 2^(2 top + 38) does not overflow: 2^126 in float.
//  - floor: what a step's sum may come down to; times f >= 2^-14 it is still a normal number.
//  - smallest: the least a step's largest value may be; then f <= 2^(top - smallest).
//  - ceiling: bounds u where tag j cannot be reached at all, where it means nothing; a proper u is
//  at
//    most 1 / (alpha P) <= 2^-floor.
template <class T>
struct CrfRange;
template <>
struct CrfRange<float> {
  static constexpr int top = 44, floor = -110, smallest = -20, ceiling = 110;
  static constexpr float gap = 75.0f, table_gap = 60.0f;
};
template <>
struct CrfRange<double> {
  static constexpr int top = 400, floor = -1000, smallest = -100, ceiling = 1000;
  static constexpr double gap = 600.0, table_gap = 500.0;
};
constexpr double kCrfMargin = 45.0;
constexpr double kLn2 = 0.69314718055994530942;

// 2^n of a normal number.
template <class T>
XDF_INLINE T crf_pow2(int n) {
  if constexpr (sizeof(T) == 4) {
    union {
      uint32_t bits;
      float value;
    } u;
    u.bits = static_cast<uint32_t>(n + 127) << 23;
    return u.value;
  } else {
    union {
      uint64_t bits;
      double value;
    } u;
    u.bits = static_cast<uint64_t>(n + 1023) << 52;
    return u.value;
  }
}

// floor(log2 x) of a positive normal number.
template <class T>
XDF_INLINE int crf_exponent(T x) {
  if constexpr (sizeof(T) == 4) {
    union {
      float value;
      uint32_t bits;
    } u;
    u.value = x;
    return static_cast<int>(u.bits >> 23) - 127;
  } else {
    union {
      double value;
      uint64_t bits;
    } u;
    u.value = x;
    return static_cast<int>(u.bits >> 52) - 1023;
  }
}

// y[j] = exp(x[j] - max), 0 where that is more than `gap` below: *dropped remembers the largest
// finite x - max among those. Returns max. x and y [padded]; they may be the same.
template <class T>
XDF_INLINE T crf_exp(const T* x, ptrdiff_t n, T max, T gap, T* y, Vec<T>* dropped) {
  using V = Vec<T>;
  const V shift = V::set1(max), lowest = V::set1(-gap), zero = V::set1(T(0));
  const V none = V::set1(T(-INFINITY));
  for (ptrdiff_t c = 0; c < n; c += V::lanes) {
    const V d = V::load(x + c) - shift;
    *dropped = V::max(*dropped, V::select_gt(lowest, d, d, none));
    V::select_gt(lowest, d, zero, vexp(d)).store(y + c);
  }
  return max;
}

template <class T>
static void crf_prepare(const CrfModel<T>& model, CrfTables<T>& tables) {
  using V = Vec<T>;
  const int C = model.num_tags;
  const ptrdiff_t padded = padded_tags(C);
  const T none = T(-INFINITY);
  T max_transition = none, max_end = none;
  for (ptrdiff_t k = 0; k < static_cast<ptrdiff_t>(C) * C; ++k)
    max_transition = model.transitions[k] > max_transition ? model.transitions[k] : max_transition;
  for (int j = 0; j < C; ++j) max_end = model.end[j] > max_end ? model.end[j] : max_end;
  tables.usable = max_end > none;
  if (!(max_transition > none))
    max_transition = T(0);  // all forbidden: exponentials are 0 all the same

  T* end = tables.end(padded);
  for (int j = 0; j < padded; ++j) {
    tables.start()[j] = j < C ? model.start[j] : none;
    tables.padding(padded)[j] = j < C ? T(0) : none;
    end[j] = j < C ? model.end[j] : none;
  }
  V dropped = V::set1(none);
  crf_exp(end, padded, max_end, CrfRange<T>::table_gap, end, &dropped);
  T* forward = tables.forward(padded);
  T* backward = tables.backward(padded, C);
  T smallest = T(1);
  for (int i = 0; i < C; ++i) {
    T* row = forward + i * padded;
    for (int j = 0; j < padded; ++j)
      row[j] = j < C ? model.transitions[static_cast<ptrdiff_t>(i) * C + j] : none;
    crf_exp(row, padded, max_transition, CrfRange<T>::table_gap, row, &dropped);
    for (int j = 0; j < C; ++j) {
      if (row[j] > T(0) && row[j] < smallest) smallest = row[j];
      backward[j * padded + i] = row[j];
    }
    for (ptrdiff_t j = C; j < padded; ++j) backward[i * padded + j] = T(0);
  }
  tables.max_transition = static_cast<double>(max_transition);
  tables.max_end = static_cast<double>(max_end);
  tables.gap = -static_cast<double>(dropped.reduce_max());
  tables.log_tags = ::log(static_cast<double>(C));
  tables.floor = crf_pow2<T>(CrfRange<T>::floor - crf_exponent(smallest));
}

// p = exp(e + bias - max) as crf_exp; returns max. bias [padded] is -inf in the padding.
template <class T>
XDF_INLINE T crf_emissions(const T* e, const T* bias, int C, T* p, Vec<T>* dropped) {
  using V = Vec<T>;
  constexpr int lanes = V::lanes;
  V largest = V::set1(T(-INFINITY));
  for (int c = 0; c < C; c += lanes) {
    const V x = (c + lanes <= C ? V::load(e + c) : V::load_n(e + c, C - c)) + V::load(bias + c);
    x.store(p + c);
    largest = V::max(largest, x);
  }
  return crf_exp(p, C, largest.reduce_max(), CrfRange<T>::gap, p, dropped);
}

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

template <class T, class Finish>
XDF_INLINE void crf_multiply(const T* x, const T* table, int C, ptrdiff_t padded, Finish& finish) {
  constexpr int lanes = Vec<T>::lanes;
  int c = 0;
  for (; C - c > 3 * lanes; c += 4 * lanes) crf_columns<T, 4>(x, table, C, padded, c, finish);
  switch ((C - c + lanes - 1) / lanes) {
    case 3:
      crf_columns<T, 3>(x, table, C, padded, c, finish);
      break;
    case 2:
      crf_columns<T, 2>(x, table, C, padded, c, finish);
      break;
    case 1:
      crf_columns<T, 1>(x, table, C, padded, c, finish);
      break;
    default:
      break;
  }
}

// One of the two recursions as it runs.
template <class T>
struct CrfChain {
  T scale;  // what the next step is multiplied by, 2^shift
  int shift;
  int64_t exponent;  // true value = stored value * 2^exponent
  bool in_range;     // no step's largest value has been too small
  Vec<T> floor;
  Vec<T> lost;  // positive where a value fell below the floor that ought to be positive

  XDF_MEMBER void begin(T lowest) {
    scale = T(1);
    shift = 0;
    exponent = -CrfRange<T>::top;
    in_range = true;
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
    const T largest = values.reduce_max();
    const bool fits = largest >= crf_pow2<T>(CrfRange<T>::smallest);
    exponent -= shift;
    shift = fits ? CrfRange<T>::top - crf_exponent(largest) : 0;
    scale = crf_pow2<T>(shift);
    in_range = in_range && fits;
  }
  XDF_MEMBER bool sound() const { return in_range && !(lost.reduce_max() > T(0)); }
};

// alpha = p 2^top for the first token.
template <class T>
XDF_INLINE void crf_alpha_begin(const T* p, int C, T floor, T* alpha, CrfChain<T>& chain) {
  using V = Vec<T>;
  chain.begin(floor);
  for (int c = 0; c < C; c += V::lanes) {
    const V emission = V::load(p + c);
    const V value = emission * V::set1(crf_pow2<T>(CrfRange<T>::top));
    chain.watch(value, emission, emission);
    value.store(alpha + c);
  }
}

template <class T>
struct CrfAlphaStep {
  const T* p;
  T* alpha;
  CrfChain<T>& chain;
  Vec<T> largest = Vec<T>::set1(T(0));

  XDF_MEMBER void operator()(int c, Vec<T> sum) {
    const Vec<T> emission = Vec<T>::load(p + c);
    const Vec<T> value = sum * (emission * Vec<T>::set1(chain.scale));
    chain.watch(value, sum, emission);
    value.store(alpha + c);
    largest = Vec<T>::max(largest, value);
  }
};

template <class T>
struct CrfBetaStep {
  T* beta;
  Vec<T> scale;
  Vec<T> largest = Vec<T>::set1(T(0));

  XDF_MEMBER void operator()(int c, Vec<T> sum) {
    const Vec<T> value = sum * scale;
    value.store(beta + c);
    largest = Vec<T>::max(largest, value);
  }
};

// log Z from the last alpha, or false where it cannot be trusted. shift: the sum of what was taken
// off the emissions; gap: of the emissions left out.
template <class T>
XDF_INLINE bool crf_log_z(const CrfTables<T>& tables, int C, ptrdiff_t length, const T* alpha,
                          const CrfChain<T>& chain, double shift, Vec<T> dropped, double* log_z) {
  using V = Vec<T>;
  if (!chain.sound()) return false;
  V sum = V::set1(T(0));
  const T* end = tables.end(padded_tags(C));
  for (int c = 0; c < C; c += V::lanes) sum = V::fma(V::load(alpha + c), V::load(end + c), sum);
  const T z = sum.reduce_add();
  if (!(z >= crf_pow2<T>(CrfRange<T>::smallest))) return false;
  const int k = crf_exponent(z);
  const double log_mass = ::log(static_cast<double>(z * crf_pow2<T>(-k))) +
                          static_cast<double>(k + chain.exponent) * kLn2;
  const double of_emissions = -static_cast<double>(dropped.reduce_max());
  const double gap = of_emissions < tables.gap ? of_emissions : tables.gap;
  if (!(log_mass + gap >= kCrfMargin + static_cast<double>(length) * tables.log_tags)) return false;
  *log_z =
      log_mass + shift + tables.max_transition * static_cast<double>(length - 1) + tables.max_end;
  return true;
}

// False: to be done in log space.
template <class T>
static bool crf_forward(const CrfSequences<T>& in, const T* e, ptrdiff_t length, double* log_z) {
  const int C = in.model.num_tags;
  const ptrdiff_t padded = padded_tags(C);
  const CrfTables<T>& tables = in.tables;
  T* p = static_cast<T*>(in.workspace);
  T* alpha[2] = {p + padded, p + 2 * padded};
  Vec<T> dropped = Vec<T>::set1(T(-INFINITY));
  T largest = crf_emissions(e, tables.start(), C, p, &dropped);
  if (!(largest > T(-INFINITY))) return false;
  double shift = static_cast<double>(largest);
  CrfChain<T> chain;
  crf_alpha_begin(p, C, tables.floor, alpha[0], chain);
  for (ptrdiff_t t = 1; t < length; ++t) {
    largest = crf_emissions(e + t * C, tables.padding(padded), C, p, &dropped);
    if (!(largest > T(-INFINITY))) return false;
    shift += static_cast<double>(largest);
    CrfAlphaStep<T> step{p, alpha[t & 1], chain};
    crf_multiply(alpha[(t - 1) & 1], tables.forward(padded), C, padded, step);
    chain.stepped(step.largest);
  }
  return crf_log_z(tables, C, length, alpha[(length - 1) & 1], chain, shift, dropped, log_z);
}

template <class T>
static void crf_log_likelihood(const CrfLikelihoodArgs<T>& args) {
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
    for (ptrdiff_t t = 1; t < length; ++t)
      score += static_cast<double>(
                   model.transitions[static_cast<ptrdiff_t>(tags[t - 1]) * C + tags[t]]) +
               static_cast<double>(e[t * C + tags[t]]);
    score += static_cast<double>(model.end[tags[length - 1]]);
    double log_z = 0.0;
    if (score > -INFINITY && !(args.in.tables.usable && crf_forward(args.in, e, length, &log_z))) {
      double* scratch = static_cast<double*>(args.in.workspace);
      log_z = exact_log_z(model, e, length, scratch + C, false, scratch);
    }
    // Rounding may leave a probability just above 1.
    args.out[b] = static_cast<T>(score < log_z ? score - log_z : 0.0);
  }
}

// partial[i + r, c ...] -= g P[i + r, c ...] sum_t alpha[t - 1, i + r] u[t, c ...], t in [begin,
// end)
template <class T, int MR, int NV>
static void crf_moves_tile(const T* alpha, const T* u, ptrdiff_t begin, ptrdiff_t end,
                           ptrdiff_t padded, const T* table, T g, T* partial) {
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
  XDF_UNROLL
  for (int r = 0; r < MR; ++r) {
    XDF_UNROLL
    for (int v = 0; v < NV; ++v) {
      const V weight = V::load(table + r * padded + v * lanes);
      // Where a move is forbidden the sum has no meaning and may have overflowed.
      const V moves = V::select_gt(weight, zero, weight * acc[r][v], zero);
      T* to = partial + r * padded + v * lanes;
      (V::load(to) - V::set1(g) * moves).store(to);
    }
  }
}

template <class T, int NV>
XDF_INLINE void crf_moves_columns(const T* alpha, const T* u, ptrdiff_t begin, ptrdiff_t end, int C,
                                  ptrdiff_t padded, const T* table, T g, T* partial) {
  int i = 0;
  for (; C - i >= 4; i += 4)
    crf_moves_tile<T, 4, NV>(alpha + i, u, begin, end, padded, table + i * padded, g,
                             partial + i * padded);
  for (; i < C; ++i)
    crf_moves_tile<T, 1, NV>(alpha + i, u, begin, end, padded, table + i * padded, g,
                             partial + i * padded);
}

// Tokens whose expected moves are summed up at once: their rows stay in cache, and float sums stay
// short.
constexpr ptrdiff_t kMovesBlock = 128;

template <class T>
static void crf_add_moves(const T* alpha, const T* u, ptrdiff_t length, int C, const T* table, T g,
                          T* partial) {
  constexpr int lanes = Vec<T>::lanes;
  const ptrdiff_t padded = padded_tags(C);
  for (ptrdiff_t begin = 1; begin < length; begin += kMovesBlock) {
    const ptrdiff_t end = begin + kMovesBlock < length ? begin + kMovesBlock : length;
    int c = 0;
    for (; C - c > lanes; c += 2 * lanes)
      crf_moves_columns<T, 2>(alpha, u + c, begin, end, C, padded, table + c, g, partial + c);
    if (c < C)
      crf_moves_columns<T, 1>(alpha, u + c, begin, end, C, padded, table + c, g, partial + c);
  }
}

// Writes the sequence's rows and adds its moves. False: to be done in log space; then nothing has
// been added, and what rows hold is of no use.
template <class T>
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
  T* later = beta + length * padded;          // [padded], p beta of one token
  T* scales = later + padded;                 // [length], of alpha

  V dropped = V::set1(T(-INFINITY));
  double shift = 0.0;
  for (ptrdiff_t t = 0; t < length; ++t) {
    const T* bias = t == 0 ? tables.start() : tables.padding(padded);
    const T largest = crf_emissions(e + t * C, bias, C, p + t * padded, &dropped);
    if (!(largest > T(-INFINITY))) return false;
    shift += static_cast<double>(largest);
  }

  CrfChain<T> forward, backward;
  crf_alpha_begin(p, C, tables.floor, alpha, forward);
  backward.begin(tables.floor);
  T* last = beta + (length - 1) * padded;
  for (int c = 0; c < C; c += lanes)
    (V::load(tables.end(padded) + c) * V::set1(crf_pow2<T>(CrfRange<T>::top))).store(last + c);
  for (ptrdiff_t n = 1; n < length; ++n) {
    scales[n] = forward.scale;
    CrfAlphaStep<T> ahead{p + n * padded, alpha + n * padded, forward};
    crf_multiply(alpha + (n - 1) * padded, tables.forward(padded), C, padded, ahead);
    forward.stepped(ahead.largest);

    const ptrdiff_t t = length - n;
    for (int c = 0; c < C; c += lanes) {
      const V emission = V::load(p + t * padded + c), rest = V::load(beta + t * padded + c);
      const V product = emission * rest;
      backward.watch(product, emission, rest);
      product.store(later + c);
    }
    CrfBetaStep<T> back{beta + (t - 1) * padded, V::set1(backward.scale)};
    crf_multiply(later, tables.backward(padded, C), C, padded, back);
    backward.stepped(back.largest);
  }
  double log_z = 0.0;
  if (!backward.sound() ||
      !crf_log_z(tables, C, length, alpha + (length - 1) * padded, forward, shift, dropped, &log_z))
    return false;

  bool in_range = true;
  T* rows = args.rows + first * C;
  const V ceiling = V::set1(crf_pow2<T>(CrfRange<T>::ceiling));
  scales[0] = T(1);
  for (ptrdiff_t t = 0; t < length; ++t) {
    V sum = V::set1(T(0));
    for (int c = 0; c < C; c += lanes) {
      const V rest = V::load(beta + t * padded + c);
      const V product = V::load(alpha + t * padded + c) * rest;
      (V::load(p + t * padded + c) * rest).store(p + t * padded + c);
      product.store(beta + t * padded + c);
      sum = sum + product;
    }
    const T z = sum.reduce_add();
    in_range = in_range && z >= crf_pow2<T>(CrfRange<T>::smallest);
    const V inverse = V::set1(T(1) / z), weight = V::set1(-g), scale = V::set1(scales[t]);
    for (int c = 0; c < C; c += lanes) {
      const V row = V::load(beta + t * padded + c) * inverse * weight;
      if (c + lanes <= C)
        row.store(rows + t * C + c);
      else
        row.store_n(rows + t * C + c, C - c);
      V::min(ceiling, V::load(p + t * padded + c) * scale * inverse).store(p + t * padded + c);
    }
  }
  if (!in_range) return false;
  if (args.tags == nullptr) return true;
  const int32_t* tags = args.tags + first;
  for (ptrdiff_t t = 0; t < length; ++t) rows[t * C + tags[t]] += g;
  crf_add_moves(alpha, p, length, C, tables.forward(padded), g, args.transitions);
  for (ptrdiff_t t = 1; t < length; ++t) args.transitions[tags[t - 1] * padded + tags[t]] += g;
  return true;
}

template <class T>
static void crf_grad(const CrfGradArgs<T>& args) {
  for (int b = args.in.begin; b < args.in.end; ++b) {
    const ptrdiff_t first = args.in.cu_seqlens[b], length = args.in.cu_seqlens[b + 1] - first;
    if (length == 0) continue;
    const T g =
        args.tags == nullptr ? T(-1) : args.grad_out[b];  // marginals: minus "minus expected"
    if (!(args.in.tables.usable && crf_gradient(args, first, length, g))) exact_gradient(args, b);
  }
}

}  // namespace XDF_ISA
}  // namespace xdf
