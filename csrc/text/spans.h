// Ends of words and entities, as a reader would mark them.
#pragma once

#include <cstdint>

#include "text/unicode.h"

namespace xdf {

// Code points `start` to `end` (exclusive) of a text.
struct Span {
  int64_t start;
  int64_t end;
};

// Mends the span that a tokenizer reports. White space at either end is left out. Combining marks
// (and what a zero-width joiner joins) stay with the letter before them: an end moves on over them,
// a start moves back to the letter. Nothing before `floor`, the end of the span before this one, is
// taken. The span may come out empty. Needs 0 <= start, floor and start, end, floor <= text.size.
Span finish_span(const unicode::Text& text, Span span, int64_t floor);

}  // namespace xdf
