// Python strings to word pieces.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <utility>
#include <vector>

#include "bindings/arrays.h"
#include "bindings/register.h"
#include "bindings/strings.h"
#include "cpu/parallel.h"
#include "text/wordpiece.h"

namespace xdf {
namespace {

std::u32string code_points(const py::handle& object, const char* name) {
  const unicode::Text text = text_view(object, [&] { return std::string(name); });
  std::u32string out(static_cast<size_t>(text.size), U'\0');
  for (int64_t i = 0; i < text.size; ++i) out[static_cast<size_t>(i)] = text[i];
  return out;
}

WordPiece::Vocabulary vocabulary_of(const py::dict& dict, const char* name) {
  WordPiece::Vocabulary out;
  out.reserve(dict.size());
  for (const auto& [key, value] : dict) {
    const int64_t id = value.cast<int64_t>();
    XDF_CHECK(id >= 0 && id <= WordPiece::kMaxId, name, ": holds id ", id, ", must be 0 to ",
              WordPiece::kMaxId);
    out.emplace_back(code_points(key, name), static_cast<int32_t>(id));
    XDF_CHECK(!out.back().first.empty() || name != std::string("added_tokens"), name,
              ": holds the empty string, which would be found everywhere");
  }
  return out;
}

WordPiece make_wordpiece(const py::dict& vocabulary, const py::dict& added_tokens,
                         const py::str& unk_token, const py::str& continuing_subword_prefix,
                         int64_t max_input_chars_per_word, bool clean_text,
                         bool handle_chinese_chars, bool strip_accents, bool lowercase) {
  XDF_CHECK(vocabulary.contains(unk_token), "unk_token: is not in the vocabulary");
  XDF_CHECK(max_input_chars_per_word >= 0, "max_input_chars_per_word: got ",
            max_input_chars_per_word, ", must not be negative");
  const WordPiece::Vocabulary pieces = vocabulary_of(vocabulary, "vocabulary");
  return WordPiece(
      pieces, vocabulary_of(added_tokens, "added_tokens"),
      {clean_text, handle_chinese_chars, strip_accents, lowercase, max_input_chars_per_word,
       code_points(continuing_subword_prefix, "continuing_subword_prefix"),
       vocabulary[unk_token].cast<int32_t>()});
}

// Appends a view of one str; `name` is called for errors.
template <class Name>
void append_view(const py::handle& object, std::vector<unicode::Text>& items, const Name& name) {
  items.push_back(text_view(object, name));
  XDF_CHECK(items.back().size <= WordPiece::kMaxTextSize, name(), " has ", items.back().size,
            " code points; at most ", WordPiece::kMaxTextSize, " are allowed");
}

// In the order of Encoded in xdistil_fast/tokenization.py: ids [total], cu_pieces [N + 1], first
// [W], cu_words [N + 1], positions [W], starts, ends [total].
py::tuple to_arrays(const std::vector<PieceRun>& runs, int threads) {
  std::vector<int64_t> piece_base{0}, word_base{0}, text_base{0};
  for (const PieceRun& run : runs) {
    piece_base.push_back(piece_base.back() + static_cast<int64_t>(run.pieces.size()));
    word_base.push_back(word_base.back() + static_cast<int64_t>(run.words.size()));
    text_base.push_back(text_base.back() + static_cast<int64_t>(run.piece_ends.size()));
  }
  const int64_t total = piece_base.back(), words = word_base.back(), texts = text_base.back();
  py::array_t<int32_t> ids(total), starts(total), ends(total), cu_pieces(texts + 1),
      cu_words(texts + 1);
  py::array_t<int64_t> first(words), positions(words);
  int32_t *ids_data = ids.mutable_data(), *starts_data = starts.mutable_data(),
          *ends_data = ends.mutable_data(), *cu_pieces_data = cu_pieces.mutable_data(),
          *cu_words_data = cu_words.mutable_data();
  int64_t *first_data = first.mutable_data(), *positions_data = positions.mutable_data();
  {
    const py::gil_scoped_release release;
    cu_pieces_data[0] = cu_words_data[0] = 0;
    parallel_for(static_cast<int>(runs.size()), threads, [&](int n, int) {
      const PieceRun& run = runs[static_cast<size_t>(n)];
      int64_t at = piece_base[n];
      for (const Piece& piece : run.pieces) {
        ids_data[at] = piece.id;
        starts_data[at] = piece.start;
        ends_data[at] = piece.end;
        ++at;
      }
      at = word_base[n];
      for (const Word& word : run.words) {
        first_data[at] = piece_base[n] + word.first;
        positions_data[at] = word.position;
        ++at;
      }
      at = text_base[n];
      for (size_t i = 0; i < run.piece_ends.size(); ++i) {
        ++at;
        cu_pieces_data[at] = static_cast<int32_t>(piece_base[n] + run.piece_ends[i]);
        cu_words_data[at] = static_cast<int32_t>(word_base[n] + run.word_ends[i]);
      }
    });
  }
  return py::make_tuple(ids, cu_pieces, first, cu_words, positions, starts, ends);
}

py::tuple encode(const WordPiece& model, const std::vector<unicode::Text>& items,
                 const std::vector<int64_t>* cu_items, int threads) {
  std::vector<PieceRun> runs;
  {
    const py::gil_scoped_release release;
    runs = model.encode(items, cu_items, threads);
  }
  return to_arrays(runs, threads);
}

py::tuple encode_texts(const WordPiece& self, const py::object& texts, int threads) {
  checked_threads(threads);
  const py::tuple held = snapshot(texts, "texts");
  std::vector<unicode::Text> items;
  items.reserve(held.size());
  for (size_t n = 0; n < held.size(); ++n)
    append_view(held[n], items, [&] { return element("texts", n); });
  return encode(self, items, nullptr, threads);
}

py::tuple encode_words(const WordPiece& self, const py::object& sentences, int threads) {
  checked_threads(threads);
  const py::tuple held = snapshot(sentences, "sentences");
  std::vector<py::tuple> words;  // keeps every str alive
  words.reserve(held.size());
  std::vector<unicode::Text> items;
  std::vector<int64_t> cu_items{0};
  for (size_t n = 0; n < held.size(); ++n) {
    words.push_back(snapshot(held[n], element("sentences", n)));
    for (size_t i = 0; i < words[n].size(); ++i)
      append_view(words[n][i], items, [&] { return element(element("sentences", n), i); });
    cu_items.push_back(static_cast<int64_t>(items.size()));
  }
  return encode(self, items, &cu_items, threads);
}

}  // namespace

void register_wordpiece(py::module_& m) {
  using namespace py::literals;
  py::class_<WordPiece>(m, "WordPiece")
      .def(py::init(&make_wordpiece), "vocabulary"_a, "added_tokens"_a, py::kw_only(),
           "unk_token"_a, "continuing_subword_prefix"_a, "max_input_chars_per_word"_a,
           "clean_text"_a, "handle_chinese_chars"_a, "strip_accents"_a, "lowercase"_a)
      .def("encode_texts", &encode_texts, "texts"_a, "threads"_a = 0)
      .def("encode_words", &encode_words, "sentences"_a, "threads"_a = 0);
}

}  // namespace xdf
