// The CRF in log space and in double precision: for the few sequences whose probabilities span more
// than the scaled recursion of crf-inl.h can hold, and for those without any possible path. Plain
// scalar code: it does C^2 exponentials a token where the other does C^2 multiply-adds, and may.
#pragma once

#include <math.h>

#include "cpu/vec.h"
#include "xdf/crf.h"

namespace xdf {
namespace XDF_ISA {

// Terms this far below the largest of a sum (2e-22 of it) are not worth an exponential.
constexpr double kNegligible = -50.0;

XDF_INLINE double exact_exp(double x) {
  return x < kNegligible ? 0.0 : ::exp(x);
}

// log sum_i exp(x[i]); -inf if all are.
XDF_INLINE double exact_log_sum(const double* x, int n) {
  double largest = -INFINITY, sum = 0.0;
  for (int i = 0; i < n; ++i) largest = x[i] > largest ? x[i] : largest;
  if (largest == -INFINITY) return largest;
  for (int i = 0; i < n; ++i) sum += exact_exp(x[i] - largest);
  return largest + ::log(sum);
}

// alpha_t[j] = e[j] + log sum_i exp(alpha_{t-1}[i] + transitions[i, j])
template <class T>
static void exact_forward_step(const CrfModel<T>& model, const T* e, const double* from, double* to,
                               double* largest) {
  const int C = model.num_tags;
  for (int j = 0; j < C; ++j) {
    largest[j] = -INFINITY;
    to[j] = 0.0;
  }
  const T* row = model.transitions;
  for (int i = 0; i < C; ++i, row += C) {
    for (int j = 0; j < C; ++j) {
      const double x = from[i] + static_cast<double>(row[j]);
      largest[j] = x > largest[j] ? x : largest[j];
    }
  }
  row = model.transitions;
  for (int i = 0; i < C; ++i, row += C) {
    if (from[i] == -INFINITY) continue;
    for (int j = 0; j < C; ++j) {
      if (largest[j] == -INFINITY) continue;
      to[j] += exact_exp(from[i] + static_cast<double>(row[j]) - largest[j]);
    }
  }
  for (int j = 0; j < C; ++j)
    to[j] = largest[j] == -INFINITY ? largest[j]
                                    : largest[j] + ::log(to[j]) + static_cast<double>(e[j]);
}

// log Z. keep: alpha rows of all tokens are left in `alpha`, a row's stride C; else two rows are
// used.
template <class T>
static double exact_log_z(const CrfModel<T>& model, const T* e, ptrdiff_t length, double* alpha,
                          bool keep, double* scratch) {
  const int C = model.num_tags;
  double* at = alpha;
  for (int j = 0; j < C; ++j) at[j] = static_cast<double>(model.start[j] + e[j]);
  for (ptrdiff_t t = 1; t < length; ++t) {
    double* next = keep || at == alpha ? at + C : alpha;
    exact_forward_step(model, e + t * C, at, next, scratch);
    at = next;
  }
  for (int j = 0; j < C; ++j) scratch[j] = at[j] + static_cast<double>(model.end[j]);
  return exact_log_sum(scratch, C);
}

// As crf_gradient of crf-inl.h.
template <class T>
static void exact_gradient(const CrfGradArgs<T>& args, int b) {
  const CrfModel<T>& model = args.in.model;
  const int C = model.num_tags;
  const ptrdiff_t padded = padded_tags(C);
  const ptrdiff_t first = args.in.cu_seqlens[b], length = args.in.cu_seqlens[b + 1] - first;
  const T* e = args.in.emissions + first * C;
  T* rows = args.rows + first * C;
  double* scratch = static_cast<double*>(args.in.workspace);  // [3, C]
  double* alpha = scratch + 3 * C;                            // [length, C]
  double* beta = alpha + length * C;  // [length, C]: log p(later tokens | tag)
  const double log_z = exact_log_z(model, e, length, alpha, true, scratch);
  if (log_z == -INFINITY) {
    for (ptrdiff_t k = 0; k < length * C; ++k) rows[k] = T(0);
    return;
  }
  double* last = beta + (length - 1) * C;
  for (int i = 0; i < C; ++i) last[i] = static_cast<double>(model.end[i]);
  for (ptrdiff_t t = length - 1; t > 0; --t) {
    double* later = scratch;
    for (int j = 0; j < C; ++j) later[j] = static_cast<double>(e[t * C + j]) + beta[t * C + j];
    const T* row = model.transitions;
    for (int i = 0; i < C; ++i, row += C) {
      for (int j = 0; j < C; ++j) scratch[C + j] = static_cast<double>(row[j]) + later[j];
      beta[(t - 1) * C + i] = exact_log_sum(scratch + C, C);
    }
  }

  const double g = args.tags == nullptr ? -1.0 : static_cast<double>(args.grad_out[b]);
  for (ptrdiff_t k = 0; k < length * C; ++k)
    rows[k] = static_cast<T>(-g * ::exp(alpha[k] + beta[k] - log_z));
  if (args.tags == nullptr) return;
  const int32_t* tags = args.tags + first;
  for (ptrdiff_t t = 0; t < length; ++t) rows[t * C + tags[t]] += static_cast<T>(g);

  double* expected = scratch;  // [C] of one row of transitions
  for (int i = 0; i < C; ++i) {
    const T* row = model.transitions + static_cast<ptrdiff_t>(i) * C;
    for (int j = 0; j < C; ++j) expected[j] = 0.0;
    for (ptrdiff_t t = 1; t < length; ++t) {
      const double from = alpha[(t - 1) * C + i] - log_z;
      if (from == -INFINITY) continue;
      for (int j = 0; j < C; ++j)
        expected[j] += exact_exp(from + static_cast<double>(row[j]) +
                                 static_cast<double>(e[t * C + j]) + beta[t * C + j]);
    }
    for (int j = 0; j < C; ++j) args.counts[i * padded + j] -= g * expected[j];
  }
  for (ptrdiff_t t = 1; t < length; ++t) args.counts[tags[t - 1] * padded + tags[t]] += g;
}

}  // namespace XDF_ISA
}  // namespace xdf
