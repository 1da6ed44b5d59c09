// A linear-chain CRF over a ragged batch, and softmax: cuts the batch into kernel calls and runs
// them on the thread pool. xdf/crf.h says what is computed; arguments are checked by the bindings.
#pragma once

#include <cstdint>

#include "xdf/crf.h"

namespace xdf {

template <class T>
struct CrfBatch {
  CrfModel<T> model;
  const T* emissions;         // [total, C]
  const int32_t* cu_seqlens;  // [batch + 1]
  int batch;
};

template <class T>
void crf_log_likelihood(const CrfBatch<T>& batch, const int32_t* tags, T* out, int threads);

// The gradient of transitions is a sum over the batch. It is taken over chunks of sequences, whose
// number and bounds depend on the batch size and C alone, and then over the chunks in order.
template <class T>
void crf_log_likelihood_grad(const CrfBatch<T>& batch, const int32_t* tags, const T* grad_out,
                             T* grad_emissions, T* grad_start, T* grad_end, T* grad_transitions,
                             int threads);

template <class T>
void crf_marginals(const CrfBatch<T>& batch, T* out, int threads);

template <class T>
void crf_viterbi(const CrfBatch<T>& batch, int32_t* tags, T* scores, int threads);

template <class T>
void softmax(const T* logits, int64_t rows, int columns, T* out, int threads);

}  // namespace xdf
