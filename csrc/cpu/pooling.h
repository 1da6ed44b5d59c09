// From the hidden states of a text's pieces to one vector for the text.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "cpu/quantize.h"
#include "xdf/kernels.h"

namespace xdf {

// kMax, kMean: over all pieces. kLast: the forward state of the last piece and the reverse state of
// the first, those that have read the whole text. kNone: no pooling, a vector for every piece.
enum class Pooling { kNone, kMax, kMean, kLast };

// The pooled state of one text, fed in parts. Sums are exact for bytes, and for floats taken in
// double and in the order of the pieces, so that no result depends on where a text is cut.
class PooledState {
 public:
  PooledState() = default;
  PooledState(Pooling pooling, int hidden_size, bool bytes);

  // Forgets everything: a text without pieces, whose pooled state is zero.
  void clear();
  // The states of the next `count` pieces, rows of 2H floats or bytes, `stride` bytes apart.
  void add(const unsigned char* rows, int64_t count, size_t stride);
  // The pooled state [2H].
  void finish(float* out) const;

 private:
  template <class Hidden>
  void add_rows(const unsigned char* rows, int64_t count, size_t stride);

  Pooling pooling_ = Pooling::kNone;
  int width_ = 0;  // 2H
  bool bytes_ = false;
  int64_t count_ = 0;
  std::vector<double> state_;  // in units of 1 / kInt8HiddenLevels if of bytes
  std::vector<uint16_t> sums_;
  std::vector<unsigned char> highest_;
};

}  // namespace xdf
