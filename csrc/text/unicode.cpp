#include "text/unicode.h"

#include <algorithm>
#include <iterator>

#include "text/unicode_tables.h"

namespace xdf::unicode {
namespace {

constexpr uint32_t kHangulBase = 0xAC00, kHangulCount = 11172, kLeadBase = 0x1100,
                   kVowelBase = 0x1161, kTailBase = 0x11A7, kVowels = 21, kTails = 28;
constexpr uint32_t kCapitalDottedI = 0x130, kDotAbove = 0x307;

bool is_hangul(uint32_t c) {
  return c - kHangulBase < kHangulCount;
}

// The last row of `table`, rows of `width` numbers that ascend by their first, that begins at or
// before c; null if there is none.
template <int width, class T, size_t size>
const T* row_at_or_before(const T (&table)[size], uint32_t c) {
  static_assert(size % width == 0);
  size_t low = 0, high = size / width;
  while (low < high) {
    const size_t middle = (low + high) / 2;
    if (static_cast<uint32_t>(table[middle * width]) <= c)
      low = middle + 1;
    else
      high = middle;
  }
  return low == 0 ? nullptr : table + (low - 1) * width;
}

template <size_t size>
bool in_ranges(const uint32_t (&table)[size], uint32_t c) {
  const uint32_t* row = row_at_or_before<2>(table, c);
  return row != nullptr && c <= row[1];
}

template <int width, size_t size>
void mark_ranges(const uint32_t (&table)[size], uint8_t bit, std::vector<uint8_t>& bits) {
  for (size_t row = 0; row < size; row += width)
    for (uint32_t c = table[row]; c <= table[row + 1]; ++c) bits[c] |= bit;
}

}  // namespace

std::vector<uint8_t> properties() {
  std::vector<uint8_t> bits(kCodePoints, 0);
  mark_ranges<2>(kDropped, kIsDropped, bits);
  mark_ranges<2>(kBlank, kIsBlank, bits);
  mark_ranges<2>(kChinese, kIsChinese, bits);
  mark_ranges<2>(kWhite, kIsWhite, bits);
  mark_ranges<2>(kPunctuation, kIsPunctuation, bits);
  mark_ranges<2>(kNonspacing, kIsNonspacing, bits);
  mark_ranges<3>(kCombining, kIsCombining, bits);
  for (size_t row = 0; row < std::size(kLower); row += 4)
    for (int32_t c = kLower[row]; c <= kLower[row + 1]; c += kLower[row + 2]) bits[c] |= kIsMapped;
  for (size_t row = 0; row < std::size(kDecomposed); row += 3) bits[kDecomposed[row]] |= kIsMapped;
  for (uint32_t c = kHangulBase; is_hangul(c); ++c) bits[c] |= kIsMapped;
  bits[kCapitalDottedI] |= kIsMapped;
  return bits;
}

int combining_class(uint32_t c) {
  const uint32_t* row = row_at_or_before<3>(kCombining, c);
  return row != nullptr && c <= row[1] ? static_cast<int>(row[2]) : 0;
}

void append_decomposed(uint32_t c, std::u32string& out) {
  if (is_hangul(c)) {
    const uint32_t index = c - kHangulBase, tail = index % kTails;
    out += kLeadBase + index / (kVowels * kTails);
    out += kVowelBase + index / kTails % kVowels;
    if (tail != 0) out += kTailBase + tail;
    return;
  }
  const uint32_t* row = row_at_or_before<3>(kDecomposed, c);
  if (row == nullptr || row[0] != c) {
    out += c;
    return;
  }
  append_decomposed(row[1], out);
  if (row[2] != 0) out += row[2];
}

void append_lower(uint32_t c, std::u32string& out) {
  if (c == kCapitalDottedI) {
    out += U'i';
    out += kDotAbove;
    return;
  }
  const int32_t* row = row_at_or_before<4>(kLower, c);
  const int32_t point = static_cast<int32_t>(c);
  const bool changes = row != nullptr && point <= row[1] && (point - row[0]) % row[2] == 0;
  out += static_cast<char32_t>(changes ? point + row[3] : point);
}

bool is_dropped(uint32_t c) {
  return in_ranges(kDropped, c);
}

bool is_nonspacing(uint32_t c) {
  return in_ranges(kNonspacing, c);
}

bool is_mark(uint32_t c) {
  return in_ranges(kMarks, c);
}

bool is_space(uint32_t c) {
  if (c < 0x80) return c == ' ' || (c >= 9 && c <= 13) || (c >= 0x1C && c <= 0x1F);
  return c == 0x85 || c == 0xA0 || c == 0x1680 || (c >= 0x2000 && c <= 0x200A) || c == 0x2028 ||
         c == 0x2029 || c == 0x202F || c == 0x205F || c == 0x3000;
}

}  // namespace xdf::unicode
