#include "cpu/words.h"

#include <algorithm>
#include <vector>

namespace xdf {
namespace {

// The rows at `first` of the words that are not O.
void softmax_of_words(const CrfBatch<float>& pieces, const WordLayout& words, int outside,
                      const int32_t* tags, float* probabilities, int threads) {
  const ptrdiff_t C = pieces.model.num_tags;
  const int32_t total = words.cu_words[pieces.batch];
  std::vector<float> rows;
  for (int32_t w = 0; w < total; ++w) {
    if (tags[w] == outside) continue;
    const float* row = pieces.emissions + words.first[w] * C;
    rows.insert(rows.end(), row, row + C);
  }
  std::vector<float> shares(rows.size());
  softmax(rows.data(), static_cast<int64_t>(rows.size()) / C, static_cast<int>(C), shares.data(),
          threads);
  const float* row = shares.data();
  for (int32_t w = 0; w < total; ++w) {
    if (tags[w] == outside) continue;
    probabilities[w] = row[tags[w]];
    row += C;
  }
}

// The marginals of the texts with a word that is not O.
void marginals_of_words(const CrfBatch<float>& pieces, const WordLayout& words, int outside,
                        const int32_t* tags, float* probabilities, int threads) {
  const ptrdiff_t C = pieces.model.num_tags;
  std::vector<float> emissions;
  std::vector<int32_t> cu_seqlens{0}, texts;
  for (int b = 0; b < pieces.batch; ++b) {
    const int32_t *begin = tags + words.cu_words[b], *end = tags + words.cu_words[b + 1];
    if (std::all_of(begin, end, [=](int32_t tag) { return tag == outside; })) continue;
    texts.push_back(b);
    emissions.insert(emissions.end(), pieces.emissions + pieces.cu_seqlens[b] * C,
                     pieces.emissions + pieces.cu_seqlens[b + 1] * C);
    cu_seqlens.push_back(static_cast<int32_t>(static_cast<ptrdiff_t>(emissions.size()) / C));
  }
  std::vector<float> all(emissions.size());
  crf_marginals<float>(
      {pieces.model, emissions.data(), cu_seqlens.data(), static_cast<int>(texts.size())},
      all.data(), threads);
  for (size_t n = 0; n < texts.size(); ++n) {
    const int32_t b = texts[n];
    for (int32_t w = words.cu_words[b]; w < words.cu_words[b + 1]; ++w) {
      const int64_t piece = words.first[w] - pieces.cu_seqlens[b] + cu_seqlens[n];
      if (tags[w] != outside) probabilities[w] = all[static_cast<size_t>(piece * C + tags[w])];
    }
  }
}

}  // namespace

void decode_words(const CrfBatch<float>& pieces, const WordLayout& words, const TagScheme& scheme,
                  bool marginals, int32_t* tags, float* probabilities, int threads) {
  std::vector<int32_t> best(static_cast<size_t>(pieces.cu_seqlens[pieces.batch]));
  std::vector<float> scores(static_cast<size_t>(pieces.batch));
  crf_viterbi(pieces, best.data(), scores.data(), threads);
  for (int b = 0; b < pieces.batch; ++b) {
    int32_t before = -1;
    for (int32_t w = words.cu_words[b]; w < words.cu_words[b + 1]; ++w) {
      const int32_t tag = best[static_cast<size_t>(words.first[w])], begins = scheme.begins[tag];
      tags[w] = begins == before ? tag : begins;
      before = begins;
    }
  }
  if (probabilities == nullptr) return;
  const int32_t total = words.cu_words[pieces.batch];
  std::fill_n(probabilities, total, 0.0f);
  const auto of_words = marginals ? marginals_of_words : softmax_of_words;
  of_words(pieces, words, scheme.outside, tags, probabilities, threads);
  // Rounding may carry a certain tag past 1.
  for (int32_t w = 0; w < total; ++w) probabilities[w] = std::min(probabilities[w], 1.0f);
}

}  // namespace xdf
