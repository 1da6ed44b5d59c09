// The contract of the CRF, Viterbi and softmax kernels; kernels.h has the rules common to all.
//
// A linear-chain CRF scores tags y of a sequence of T tokens as
//   s(y) = start[y_0] + sum_t emissions[t, y_t] + sum_{t > 0} transitions[y_{t-1}, y_t] +
//   end[y_{T-1}]
// and gives them the probability exp(s(y) - log Z), Z = sum over all tag paths of exp s. -inf is
// allowed in every score: a forbidden move. NaN and +inf are not; the caller refuses them.
//
// Where nothing is left to define by the formula:
//  - A sequence without tokens has log-likelihood 0, no tags and no gradient.
//  - Tags that use a forbidden move have log-likelihood -inf. Their gradient is the usual one,
//  "observed
//    minus expected", which is its limit as the forbidden score goes to -inf.
//  - A sequence none of whose paths is possible (Z = 0) has log-likelihood -inf, gradient 0,
//  marginals 0,
//    Viterbi score -inf and all tags 0.
#pragma once

#include <cstddef>
#include <cstdint>

namespace xdf {

constexpr int kMaxTags = 4096;  // the kernels' exponents are dimensioned for it
constexpr int kTagAlign = 16;   // rows of tags in tables and workspaces are padded to this

constexpr ptrdiff_t padded_tags(int num_tags) {
  return (static_cast<ptrdiff_t>(num_tags) + kTagAlign - 1) / kTagAlign * kTagAlign;
}

template <class T>
struct CrfModel {
  int num_tags;          // C, 1 .. kMaxTags
  const T* start;        // [C]
  const T* end;          // [C]
  const T* transitions;  // [C, C], from row to column
};

// What the kernels derive from a model once a call. crf_prepare fills it with exponentials, for all
// but Viterbi; viterbi_prepare with padded copies.
template <class T>
struct CrfTables {
  T* memory;              // crf_tables_size(C) elements, the caller's
  double max_transition;  // what was subtracted before exponentials were taken
  double max_end;
  double gap;  // how far below the maximum the nearest finite score lies that was left out
  double log_tags;
  T floor;      // no sum is trusted below this
  bool usable;  // false: every sequence takes the exact path

  // Pc = padded_tags(C). Padding counts as forbidden.
  static size_t size(int num_tags) {
    const size_t padded = static_cast<size_t>(padded_tags(num_tags));
    return padded * (3 + 2 * static_cast<size_t>(num_tags));
  }
  T* start() const { return memory; }                                 // [Pc]
  T* end(ptrdiff_t padded) const { return memory + padded; }          // [Pc]
  T* padding(ptrdiff_t padded) const { return memory + 2 * padded; }  // [Pc] 0 for tags, 1 beyond
  T* forward(ptrdiff_t padded) const { return memory + 3 * padded; }  // [C, Pc] from, to
  T* backward(ptrdiff_t padded, int num_tags) const {                 // [C, Pc] to, from
    return memory + (3 + num_tags) * padded;
  }
};

// Sequences [begin, end) of a batch.
template <class T>
struct CrfSequences {
  CrfModel<T> model;
  CrfTables<T> tables;
  const T* emissions;         // [total, C]
  const int32_t* cu_seqlens;  // [B + 1]
  int begin, end;
  void* workspace;  // aligned to 64 bytes; its size: the functions below, longest sequence
};

// log p(tags) of each sequence.
template <class T>
struct CrfLikelihoodArgs {
  CrfSequences<T> in;
  const int32_t* tags;  // [total]
  T* out;               // [B]; [begin, end) written
};
template <class T>
size_t crf_likelihood_workspace(int num_tags) {
  const size_t padded = static_cast<size_t>(padded_tags(num_tags));
  return padded * 9 * sizeof(T);  // the exact path: 3 of double
}

// With tags: the gradient of sum_b grad_out[b] * log p(tags_b), "observed minus expected". The
// gradients of start and end are sums of rows of `rows` and left to the caller. Without: marginals.
template <class T>
struct CrfGradArgs {
  CrfSequences<T> in;
  const int32_t* tags;  // [total], or null: marginals
  const T* grad_out;    // [B]
  T* rows;              // [total, C]: rows of the sequences written: grad_emissions or marginals
  double* counts;  // [C, Pc]: moves of transitions' gradient, added to, sequence after sequence;
                   // padding columns are undefined
};
template <class T>
size_t crf_grad_workspace(int64_t longest, int num_tags) {
  const size_t padded = static_cast<size_t>(padded_tags(num_tags)),
               rows = static_cast<size_t>(longest);
  const size_t scaled = (3 * rows * padded + padded + rows + kTagAlign) * sizeof(T);
  const size_t exact = (2 * rows + 3) * padded * sizeof(double);
  return (scaled > exact ? scaled : exact) + 64;
}

// The best path; of equal ones, the one with the lowest last tag, then the lowest tag before it,
// ... Equal means equal as computed in T, emission by emission from the left. scores is the sum of
// the path's scores, taken in double.
template <class T>
struct ViterbiArgs {
  CrfSequences<T> in;
  int32_t* tags;  // [total]
  T* scores;      // [B]; [begin, end) written
};
template <class T>
size_t viterbi_workspace(int64_t longest, int num_tags) {
  return 2 * static_cast<size_t>(longest) * static_cast<size_t>(padded_tags(num_tags)) * sizeof(T) +
         64;
}

// out[m, :] = exp(logits[m, :]) / sum exp(logits[m, :]). As in torch, a row with NaN or +inf, or of
// -inf alone, becomes NaN.
template <class T>
struct SoftmaxArgs {
  const T* logits;  // [rows, C]
  T* out;           // [rows, C]
  int64_t rows;
  int num_tags;
};

}  // namespace xdf
