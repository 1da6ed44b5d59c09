// Memory for packed weights and workspaces: aligned to cache lines, not initialised.
#pragma once

#include <cstddef>
#include <new>
#include <utility>

namespace xdf {

template <class T>
class AlignedBuffer {
 public:
  static constexpr std::align_val_t kAlign{64};

  AlignedBuffer() = default;
  explicit AlignedBuffer(size_t size) { reserve(size); }
  AlignedBuffer(const AlignedBuffer&) = delete;
  AlignedBuffer& operator=(const AlignedBuffer&) = delete;
  ~AlignedBuffer() { ::operator delete(data_, kAlign); }

  // At least `size` elements; what it held is lost when it grows.
  T* reserve(size_t size) {
    if (size > size_) {
      ::operator delete(data_, kAlign);
      data_ = nullptr;
      size_ = 0;
      data_ = static_cast<T*>(::operator new(size * sizeof(T), kAlign));
      size_ = size;
    }
    return data_;
  }
  T* data() { return data_; }
  const T* data() const { return data_; }
  size_t size() const { return size_; }

 private:
  T* data_ = nullptr;
  size_t size_ = 0;
};

}  // namespace xdf
