#include "text/spans.h"

#include <algorithm>

namespace xdf {
namespace {

constexpr uint32_t kFirstMark = 0x300, kJoiner = 0x200D, kSkinTone = 0x1F3FB, kSkinTones = 5;

// Whether the character at i belongs to the one before it.
bool continues(const unicode::Text& text, int64_t i) {
  const uint32_t c = text[i];
  if (c < kFirstMark) return false;  // also after a joiner: before ASCII it joins nothing
  if (c == kJoiner || c - kSkinTone < kSkinTones || unicode::is_mark(c)) return true;
  return i > 0 && text[i - 1] == kJoiner && !unicode::is_space(c);
}

}  // namespace

Span finish_span(const unicode::Text& text, Span span, int64_t floor) {
  int64_t start = std::max(span.start, floor), end = std::max(start, span.end);
  while (end > start && unicode::is_space(text[end - 1])) --end;
  while (end > start && end < text.size && continues(text, end)) ++end;
  int64_t letter = start;
  while (letter > floor && letter < end && continues(text, letter)) --letter;
  // A mark without a letter (it follows white space, or the text begins with it) is left out.
  if (letter < end && !continues(text, letter) && !unicode::is_space(text[letter])) start = letter;
  while (start < end && (unicode::is_space(text[start]) || continues(text, start))) ++start;
  return {start, end};
}

}  // namespace xdf
