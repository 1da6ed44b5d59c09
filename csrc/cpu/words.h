// From the scores of pieces to tags of words: a word's tag is that of its first piece.
#pragma once

#include <cstdint>

#include "cpu/crf.h"

namespace xdf {

// The words of a batch of texts.
struct WordLayout {
  const int64_t* first;     // [W] first piece of each, within its text
  const int32_t* cu_words;  // [batch + 1] where texts begin among them
};

// How tags go together.
struct TagScheme {
  const int32_t* begins;  // [C] of each tag the one that begins its type: B-X of I-X, O of O
  int outside;            // O; -1 where no tag means that
};

// tags [W]: the best tags of the pieces (Viterbi), those of first pieces alone. Dropping the others
// can leave an I-X after a word of another kind; it becomes B-X.
//
// probabilities [W], or null if nobody asks: of words that are not O how probable the model holds
// that tag, 0 to 1; of all others 0. With `marginals` the CRF's marginal at the first piece, else
// the softmax there. Only texts or words that have an entity are computed.
void decode_words(const CrfBatch<float>& pieces, const WordLayout& words, const TagScheme& scheme,
                  bool marginals, int32_t* tags, float* probabilities, int threads);

}  // namespace xdf
