// Argument checks. A failed check throws std::invalid_argument, which Python sees as ValueError.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace xdf {

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::invalid_argument(message.str());
}

}  // namespace xdf

// XDF_CHECK(rows > 0, "rows: got ", rows, ", must be positive")
#define XDF_CHECK(condition, ...)               \
  do {                                          \
    if (!(condition)) ::xdf::fail(__VA_ARGS__); \
  } while (false)
