// BERT's tokenisation: text to word pieces, as the `tokenizers` library does it with
// BertNormalizer, BertPreTokenizer and WordPiece, id for id and offset for offset.
//
// A text is read once, from left to right. What the normaliser and the pre-tokenizer make of a code
// point hardly ever depends on its neighbours, so it is worked out for all of them when the
// tokenizer is made: a letter of a word (another one perhaps), a word of its own, the end of a
// word, nothing, or several of these. The exception are combining marks that NFD puts in another
// order and that are not dropped afterwards. Words are cut greedily, by the longest piece.
//
// Time is linear in the text, times the longest piece at worst. Nothing is allocated per piece.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "text/trie.h"
#include "text/unicode.h"

namespace xdf {

struct WordPieceOptions {
  bool clean_text;
  bool handle_chinese_chars;
  bool strip_accents;
  bool lowercase;
  int64_t max_input_chars_per_word;  // a longer word is unknown as a whole
  std::u32string prefix;             // before a piece that goes on with a word
  int32_t unknown;                   // id of a word that cannot be cut into pieces
};

// Offsets are code points of the text (of the word, where words were given).
struct Piece {
  int32_t id;
  int32_t start;
  int32_t end;
};

struct Word {
  int32_t first;     // index of its first piece
  int32_t position;  // which word of its text it is
};

// What a run of consecutive texts came to; indices count within the run.
struct PieceRun {
  std::vector<Piece> pieces;
  std::vector<Word> words;
  std::vector<int32_t> piece_ends;  // of each text, in `pieces`
  std::vector<int32_t> word_ends;   // of each text, in `words`
};

class WordPiece {
 public:
  using Vocabulary = std::vector<std::pair<std::u32string, int32_t>>;

  static constexpr int32_t kMaxId = (1 << 28) - 1;
  static constexpr int64_t kMaxTextSize = INT32_MAX - 1;

  // vocabulary: pieces with ids from 0 to kMaxId. added: tokens that are found in a text as they
  // are, before anything else happens to it; none is empty.
  WordPiece(const Vocabulary& vocabulary, const Vocabulary& added, const WordPieceOptions& options);

  // Cuts N texts, on at most `threads` threads (0: all cores). Each text is one item if `cu_items`
  // is null; else text n is the split words items[cu_items[n]] to items[cu_items[n + 1]], and a
  // word counts as one whatever it is cut into. Items are at most kMaxTextSize long. The runs are
  // in the order of the texts. Throws std::bad_alloc, or std::invalid_argument when a text comes to
  // more than 2**31 - 1 pieces.
  std::vector<PieceRun> encode(const std::vector<unicode::Text>& items,
                               const std::vector<int64_t>* cu_items, int threads) const;

 private:
  struct Reader;

  // What becomes of a code point: a kind in the low bits, above them what the kind says.
  using Action = uint32_t;
  enum Kind : Action {
    kLetter,   // part of a word: the normalised code point
    kAlone,    // a word of its own: its id
    kSpace,    // ends a word
    kDrop,     // nothing
    kSeveral,  // several actions: where they are in several_
    kMarks,    // takes part in the order of combining marks and stays
    kToken,    // an added token may begin here: what else becomes of it, in before_token_
  };
  static constexpr int kKindBits = 3;
  static constexpr Action kKindMask = (1 << kKindBits) - 1;
  static Action make(Kind kind, uint32_t value) { return value << kKindBits | kind; }
  static Kind kind_of(Action action) { return static_cast<Kind>(action & kKindMask); }
  static uint32_t value_of(Action action) { return action >> kKindBits; }

  static constexpr uint32_t kPage = 256;
  static constexpr uint32_t kStranger = 0x1FFFFF;  // stands for all letters of no piece

  Action action(uint32_t c) const { return pages_[page_of_[c / kPage] + c % kPage]; }
  Action action_after_tokens(uint32_t c) const {
    const Action found = action(c);
    return kind_of(found) == kToken ? before_token_[value_of(found)] : found;
  }
  bool is_dropped(uint32_t c) const;  // by clean_text
  bool is_base(uint32_t c) const;     // marks may follow it, none goes before it
  int32_t id_alone(uint32_t c) const;
  void build_actions(const Vocabulary& vocabulary, const Vocabulary& added);
  Action& own_action(uint32_t c);
  Action plan(uint32_t c, const std::vector<uint8_t>& properties, const std::vector<bool>& known);

  WordPieceOptions options_;
  Trie pieces_;
  Trie tokens_;
  int32_t inside_;                 // the node in pieces_ after the prefix, or kNone
  std::vector<uint32_t> page_of_;  // [kCodePoints / kPage], begin of its page in pages_
  std::vector<Action> pages_;
  std::vector<Action> several_;  // a count, then as many actions
  std::vector<Action> before_token_;
};

}  // namespace xdf
