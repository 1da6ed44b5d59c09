// What the `tokenizers` library knows of single code points; see make_unicode_tables.py.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace xdf::unicode {

constexpr uint32_t kCodePoints = 0x110000;
constexpr uint32_t kReplacement = 0xFFFD;

// The code points of a str as CPython stores them, `width` (1, 2 or 4) bytes each. Surrogates may
// stand among them.
struct Text {
  const void* data;
  int64_t size;
  int width;

  uint32_t operator[](int64_t i) const {
    if (width == 1) return static_cast<const uint8_t*>(data)[i];
    if (width == 2) return static_cast<const uint16_t*>(data)[i];
    return static_cast<const uint32_t*>(data)[i];
  }
};

inline bool is_surrogate(uint32_t c) {
  return c >= 0xD800 && c < 0xE000;
}

// Properties as bits, for all code points at once.
enum Property : uint8_t {
  kIsDropped = 1,       // by clean_text
  kIsBlank = 2,         // a space after clean_text
  kIsChinese = 4,       // gets spaces around by handle_chinese_chars
  kIsWhite = 8,         // the pre-tokenizer cuts there
  kIsPunctuation = 16,  // the pre-tokenizer makes a word of it
  kIsNonspacing = 32,   // dropped by strip_accents
  kIsCombining = 64,    // of a combining class other than 0
  kIsMapped = 128,      // NFD or lower-casing changes it
};
std::vector<uint8_t> properties();  // [kCodePoints]

// Canonical combining class.
int combining_class(uint32_t c);

// Appends the NFD of one code point.
void append_decomposed(uint32_t c, std::u32string& out);

// Appends its lower case.
void append_lower(uint32_t c, std::u32string& out);

// Whether clean_text drops it.
bool is_dropped(uint32_t c);

// Whether strip_accents drops it.
bool is_nonspacing(uint32_t c);

// General category M.
bool is_mark(uint32_t c);

// What Python's str.isspace holds for white space.
bool is_space(uint32_t c);

}  // namespace xdf::unicode
