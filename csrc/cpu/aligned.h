// Memory for packed weights and workspaces: aligned to cache lines, not initialised. Large buffers
// ask for huge pages: a step of the recurrence reads all of W_hh, and with small pages that is a
// page walk every 4 KB (3 % of the time at H = 600) and, where it should just fit a cache, pages
// that the system scattered over the same sets of it.
#pragma once

#include <cstddef>
#include <new>
#include <utility>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace xdf {

template <class T>
class AlignedBuffer {
 public:
  AlignedBuffer() = default;
  explicit AlignedBuffer(size_t size) { reserve(size); }
  AlignedBuffer(const AlignedBuffer&) = delete;
  AlignedBuffer& operator=(const AlignedBuffer&) = delete;
  ~AlignedBuffer() { release(); }

  // At least `size` elements; what it held is lost when it grows.
  T* reserve(size_t size) {
    if (size > size_) {
      release();
      data_ = static_cast<T*>(::operator new(nbytes(size), alignment(size)));
      size_ = size;
#ifdef __linux__
      if (alignment(size) == kHugePage) madvise(data_, nbytes(size), MADV_HUGEPAGE);
#endif
    }
    return data_;
  }
  T* data() { return data_; }
  const T* data() const { return data_; }
  size_t size() const { return size_; }

 private:
  static constexpr std::align_val_t kCacheLine{64}, kHugePage{2 << 20};
  static constexpr size_t kHugeFrom = 256 << 10;

  static std::align_val_t alignment(size_t size) {
    return size * sizeof(T) < kHugeFrom ? kCacheLine : kHugePage;
  }
  // Whole pages, where they are huge: what is beyond the end costs nothing until it is touched,
  // and a page that belongs to two buffers may be given to neither.
  static size_t nbytes(size_t size) {
    const size_t page = alignment(size) == kHugePage ? static_cast<size_t>(kHugePage) : 1;
    return (size * sizeof(T) + page - 1) / page * page;
  }
  void release() {
    ::operator delete(data_, alignment(size_));
    data_ = nullptr;
    size_ = 0;
  }

  T* data_ = nullptr;
  size_t size_ = 0;
};

}  // namespace xdf
