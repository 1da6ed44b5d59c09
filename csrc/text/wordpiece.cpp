#include "text/wordpiece.h"

#include <algorithm>
#include <atomic>
#include <new>

#include "cpu/parallel.h"
#include "xdf/check.h"

namespace xdf {

using unicode::kCodePoints;
using unicode::Text;

namespace {

constexpr int64_t kRunSize = 1 << 14;   // code points that are worth a task of their own
constexpr int64_t kPointsPerPiece = 4;  // about, for reserving memory

// Surrogates cannot be written in UTF-8; they are read as the replacement character.
uint32_t readable(uint32_t c) {
  return unicode::is_surrogate(c) ? unicode::kReplacement : c;
}

}  // namespace

// Reads items one after the other into one run.
struct WordPiece::Reader {
  struct Letter {
    uint32_t point;
    int32_t at;
  };

  Reader(const WordPiece& wordpiece, bool split_words, PieceRun& run)
      : model(wordpiece), split(split_words), out(run) {}

  const WordPiece& model;
  const bool split;  // items are running text; else each is one word, whatever it is cut into
  PieceRun& out;
  int32_t position = 0;  // of the next word (split), of this one (else)
  bool counted = false;  // this item has its word already (not split)

  // The word that is being read: its letters, unless there are too many, and where the trie stands.
  std::vector<Letter> letters;
  int64_t length = 0;
  int32_t first = 0, last = 0;
  int32_t node = Trie::kRoot, value = Trie::kNone;

  void begin_text() { position = 0; }

  void end_text() {
    out.piece_ends.push_back(static_cast<int32_t>(out.pieces.size()));
    out.word_ends.push_back(static_cast<int32_t>(out.words.size()));
  }

  void read(const Text& item) {
    counted = false;
    if (item.width == 1)
      read(static_cast<const uint8_t*>(item.data), static_cast<int32_t>(item.size));
    else if (item.width == 2)
      read(static_cast<const uint16_t*>(item.data), static_cast<int32_t>(item.size));
    else
      read(static_cast<const uint32_t*>(item.data), static_cast<int32_t>(item.size));
    if (!split) ++position;
  }

  template <class Char>
  void read(const Char* text, int32_t size) {
    int32_t begin = 0;  // of the part since the last added token, which is normalised by itself
    for (int32_t i = 0; i < size;) {
      Action action = model.action(text[i]);
      if (kind_of(action) == kToken) {
        int32_t end = i, id = 0;
        if (token_at(text, size, i, end, id)) {
          finish_word();
          begin_word();
          out.pieces.push_back({id, i, end});
          begin = i = end;
          continue;
        }
        action = model.before_token_[value_of(action)];
      }
      if (kind_of(action) == kMarks) {
        i = read_marks(text, begin, size, i);
      } else {
        take(action, i);
        ++i;
      }
    }
    finish_word();
  }

  // What becomes of the code point at `at`; anything but tokens and marks.
  void take(Action action, int32_t at) {
    switch (kind_of(action)) {
      case kLetter:
        add_letter(value_of(action), at);
        break;
      case kAlone:
        finish_word();
        begin_word();
        out.pieces.push_back({static_cast<int32_t>(value_of(action)), at, at + 1});
        break;
      case kSpace:
        finish_word();
        break;
      case kSeveral: {
        const Action* several = model.several_.data() + value_of(action);
        for (Action n = 1; n <= several[0]; ++n) take(several[n], at);
        break;
      }
      default:
        break;
    }
  }

  void add_letter(uint32_t point, int32_t at) {
    if (length == 0) first = at;
    last = at;
    if (length < model.options_.max_input_chars_per_word) {
      if (static_cast<size_t>(length) == letters.size())
        letters.resize(std::max<size_t>(64, 2 * letters.size()));
      letters[static_cast<size_t>(length)] = {point, at};
    }
    ++length;
    if (node == Trie::kNone) return;
    const Trie::Edge* edge = model.pieces_.find(node, point);
    node = edge ? edge->child : Trie::kNone;
    value = edge ? edge->value : Trie::kNone;
  }

  void begin_word() {
    if (!split && counted) return;
    counted = true;
    out.words.push_back({static_cast<int32_t>(out.pieces.size()), position});
    if (split) ++position;
  }

  void finish_word() {
    if (length == 0) return;
    begin_word();
    const bool fits = length <= model.options_.max_input_chars_per_word;
    if (fits && value != Trie::kNone)
      out.pieces.push_back({value, first, last + 1});
    else if (!fits || !cut_word())
      out.pieces.push_back({model.options_.unknown, first, last + 1});
    length = 0;
    node = Trie::kRoot;
    value = Trie::kNone;
  }

  // Cuts the letters into the longest pieces from left to right; false, and nothing is left behind,
  // if at some place there is none.
  bool cut_word() {
    const size_t before = out.pieces.size();
    int32_t from = Trie::kRoot;
    for (int64_t start = 0; start < length;) {
      int64_t end = start;
      int32_t id = 0;
      int32_t at = from;
      for (int64_t i = start; i < length && at != Trie::kNone; ++i) {
        const Trie::Edge* edge = model.pieces_.find(at, letters[static_cast<size_t>(i)].point);
        if (edge == nullptr) break;
        at = edge->child;
        if (edge->value != Trie::kNone) {
          id = edge->value;
          end = i + 1;
        }
      }
      if (end == start) {
        out.pieces.resize(before);
        return false;
      }
      out.pieces.push_back({id, letters[static_cast<size_t>(start)].at,
                            letters[static_cast<size_t>(end - 1)].at + 1});
      start = end;
      from = model.inside_;
    }
    return true;
  }

  // The longest added token that begins at i.
  template <class Char>
  bool token_at(const Char* text, int32_t size, int32_t i, int32_t& end, int32_t& id) const {
    bool found = false;
    int32_t at = Trie::kRoot;
    for (int32_t j = i; j < size; ++j) {
      const Trie::Edge* edge = model.tokens_.find(at, readable(text[j]));
      if (edge == nullptr) break;
      at = edge->child;
      if (edge->value != Trie::kNone) {
        found = true;
        end = j + 1;
        id = edge->value;
      }
    }
    return found;
  }

  // Reads the marks around i, some of which stay, in the order in which NFD puts them. As in
  // `tokenizers`, the marks change places, but the offsets of the places stay in order. Returns
  // where to go on.
  template <class Char>
  int32_t read_marks(const Char* text, int32_t begin, int32_t size, int32_t i) {
    struct Mark {
      uint32_t point;
      int combining_class;
      bool first;  // of what one code point became
    };
    std::vector<Mark> marks;
    std::vector<int32_t> places;  // of the code points whose first mark is in `marks`
    // Marks before i were dropped, as they have to be, but they count in the order.
    int32_t start = i;
    while (start > begin && !model.is_base(readable(text[start]))) --start;
    int32_t j = start;
    std::u32string parts;
    for (; j < size; ++j) {
      const uint32_t c = readable(text[j]);
      int32_t end = j, id = 0;
      if (j > start && model.is_base(c)) break;
      if (j > i && kind_of(model.action(c)) == kToken && token_at(text, size, j, end, id)) break;
      if (model.is_dropped(c)) continue;
      parts.clear();
      unicode::append_decomposed(c, parts);
      bool is_first = true;
      for (const char32_t part : parts) {
        const int combining_class = unicode::combining_class(part);
        if (combining_class != 0) {
          marks.push_back({part, combining_class, is_first});
          if (is_first) places.push_back(j);
        } else if (j >= i) {  // else it was read already
          take(model.action_after_tokens(part), j);
        }
        is_first = false;
      }
    }
    std::stable_sort(marks.begin(), marks.end(), [](const Mark& a, const Mark& b) {
      return a.combining_class < b.combining_class;
    });
    int32_t place = start;
    size_t next = 0;
    for (const Mark& mark : marks) {
      if (mark.first) place = places[next++];
      if (!unicode::is_nonspacing(mark.point)) add_letter(mark.point, place);
    }
    return j;
  }
};

WordPiece::WordPiece(const Vocabulary& vocabulary, const Vocabulary& added,
                     const WordPieceOptions& options)
    : options_(options) {
  for (const auto& [piece, id] : vocabulary) pieces_.add(piece, id);
  for (const auto& [token, id] : added) tokens_.add(token, id);
  inside_ = pieces_.node(options_.prefix);
  build_actions(vocabulary, added);
}

bool WordPiece::is_dropped(uint32_t c) const {
  return options_.clean_text && unicode::is_dropped(c);
}

bool WordPiece::is_base(uint32_t c) const {
  if (is_dropped(c)) return false;
  std::u32string parts;
  unicode::append_decomposed(c, parts);
  return unicode::combining_class(parts[0]) == 0;
}

void WordPiece::build_actions(const Vocabulary& vocabulary, const Vocabulary& added) {
  const std::vector<uint8_t> properties = unicode::properties();
  std::vector<bool> known(kCodePoints, false);
  for (const auto& entry : vocabulary)
    for (const char32_t c : entry.first) known[c] = true;
  page_of_.resize(kCodePoints / kPage);
  std::vector<Action> page(kPage);
  for (uint32_t begin = 0; begin < kCodePoints; begin += kPage) {
    for (uint32_t c = begin; c < begin + kPage; ++c)
      page[c - begin] = plan(readable(c), properties, known);
    // Most pages are equal to the one before: of letters that are in no piece, or dropped as a
    // whole.
    const size_t size = pages_.size();
    if (size == 0 || !std::equal(page.begin(), page.end(), pages_.end() - kPage))
      pages_.insert(pages_.end(), page.begin(), page.end());
    page_of_[begin / kPage] = static_cast<uint32_t>(pages_.size() - kPage);
  }
  for (const auto& entry : added) {
    const uint32_t c = entry.first[0];
    Action& action = own_action(c);
    if (kind_of(action) == kToken) continue;
    before_token_.push_back(action);
    action = make(kToken, static_cast<uint32_t>(before_token_.size() - 1));
  }
  const Action replacement = action(unicode::kReplacement);
  for (uint32_t c = 0; c < kCodePoints; ++c)
    if (unicode::is_surrogate(c) && action(c) != replacement) own_action(c) = replacement;
}

// The action of c to be changed: its page becomes its own first, if others share it.
WordPiece::Action& WordPiece::own_action(uint32_t c) {
  uint32_t& begin = page_of_[c / kPage];
  if (std::count(page_of_.begin(), page_of_.end(), begin) > 1) {
    const std::vector<Action> page(pages_.begin() + begin, pages_.begin() + begin + kPage);
    begin = static_cast<uint32_t>(pages_.size());
    pages_.insert(pages_.end(), page.begin(), page.end());
  }
  return pages_[begin + c % kPage];
}

WordPiece::Action WordPiece::plan(uint32_t c, const std::vector<uint8_t>& properties,
                                  const std::vector<bool>& known) {
  using namespace unicode;
  const uint8_t property = properties[c];
  const bool strip = options_.strip_accents;
  const bool chinese = options_.handle_chinese_chars && (property & kIsChinese) != 0;
  if (options_.clean_text && (property & kIsDropped) != 0) return make(kDrop, 0);
  if (options_.clean_text && (property & kIsBlank) != 0) return make(kSpace, 0);
  if (strip && (property & kIsNonspacing) != 0) return make(kDrop, 0);
  if (strip && (property & kIsCombining) != 0) return make(kMarks, 0);
  const auto plan_one = [&](uint32_t x) {
    if ((properties[x] & kIsWhite) != 0) return make(kSpace, 0);
    if (chinese || (properties[x] & kIsPunctuation) != 0)
      return make(kAlone, static_cast<uint32_t>(id_alone(x)));
    return make(kLetter, known[x] ? x : kStranger);
  };
  if ((property & kIsMapped) == 0) return plan_one(c);

  std::u32string text(1, c);
  if (strip) {
    text.clear();
    append_decomposed(c, text);
    std::u32string kept;
    for (const char32_t x : text) {
      if ((properties[x] & kIsNonspacing) != 0) continue;
      if ((properties[x] & kIsCombining) != 0) return make(kMarks, 0);
      kept += x;
    }
    text = kept;
  }
  if (options_.lowercase) {
    std::u32string lower;
    for (const char32_t x : text) append_lower(x, lower);
    text = lower;
  }
  if (text.empty()) return make(kDrop, 0);
  if (text.size() == 1) return plan_one(text[0]);
  const uint32_t begin = static_cast<uint32_t>(several_.size());
  several_.push_back(static_cast<Action>(text.size()));
  for (const char32_t x : text) several_.push_back(plan_one(x));
  return make(kSeveral, begin);
}

// The id of a word of one letter.
int32_t WordPiece::id_alone(uint32_t c) const {
  const Trie::Edge* edge = pieces_.find(Trie::kRoot, c);
  const bool fits = options_.max_input_chars_per_word >= 1;
  return fits && edge && edge->value != Trie::kNone ? edge->value : options_.unknown;
}

std::vector<PieceRun> WordPiece::encode(const std::vector<Text>& items,
                                        const std::vector<int64_t>* cu_items, int threads) const {
  const int64_t texts = static_cast<int64_t>(cu_items ? cu_items->size() - 1 : items.size());
  const auto first_item = [&](int64_t text) { return cu_items ? (*cu_items)[text] : text; };
  // Consecutive texts of about kRunSize code points, or all of them if one thread reads them.
  std::vector<int64_t> cu_texts{0};
  int64_t size = 0;
  for (int64_t text = 0; text < texts; ++text) {
    for (int64_t item = first_item(text); item < first_item(text + 1); ++item)
      size += 1 + items[item].size;
    if (text + 1 == texts || (threads != 1 && size >= kRunSize)) {
      cu_texts.push_back(text + 1);
      size = 0;
    }
  }
  std::vector<PieceRun> runs(cu_texts.size() - 1);
  std::atomic<bool> out_of_memory{false};
  parallel_for(static_cast<int>(runs.size()), threads, [&](int n, int) {
    try {
      Reader reader(*this, cu_items == nullptr, runs[n]);
      int64_t points = 0;
      for (int64_t item = first_item(cu_texts[n]); item < first_item(cu_texts[n + 1]); ++item)
        points += items[item].size;
      runs[n].pieces.reserve(static_cast<size_t>(points / kPointsPerPiece));
      runs[n].words.reserve(static_cast<size_t>(points / kPointsPerPiece));
      for (int64_t text = cu_texts[n]; text < cu_texts[n + 1]; ++text) {
        reader.begin_text();
        for (int64_t item = first_item(text); item < first_item(text + 1); ++item)
          reader.read(items[item]);
        reader.end_text();
      }
    } catch (const std::bad_alloc&) {
      out_of_memory = true;
    }
  });
  if (out_of_memory) throw std::bad_alloc();
  size_t total = 0;
  for (const PieceRun& run : runs) total += run.pieces.size();
  XDF_CHECK(total <= INT32_MAX, "texts have ", total,
            " pieces together; at most 2**31 - 1 are allowed");
  return runs;
}

}  // namespace xdf
