// Memory that is asked for once: aligned to huge pages where it is large, never moved, given back at the end.
#pragma once

#include <cstdlib>
#include <new>
#include <utility>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace nanochat {

class Buffer {
 public:
  Buffer() = default;
  // The system hands out large pieces zeroed and only when they are touched: an empty cache costs no memory.
  explicit Buffer(size_t bytes) : bytes_(bytes) {
    constexpr size_t HUGE_PAGE = size_t(2) << 20;
    size_t alignment = bytes >= HUGE_PAGE ? HUGE_PAGE : 4096;
    if (posix_memalign(&at_, alignment, bytes + 4096) != 0) throw std::bad_alloc();
#if defined(__linux__)
    if (bytes >= HUGE_PAGE) madvise(at_, bytes, MADV_HUGEPAGE);
#endif
  }
  Buffer(Buffer&& other) noexcept { swap(other); }
  Buffer& operator=(Buffer&& other) noexcept {
    swap(other);
    return *this;
  }
  ~Buffer() { std::free(at_); }

  template <class T = char>
  T* as() const {
    return static_cast<T*>(at_);
  }
  size_t bytes() const { return bytes_; }

  // Room for at least so much; what was inside is lost when it grows.
  void reserve(size_t bytes) {
    if (bytes > bytes_) {
      *this = Buffer();  // first the old one goes, so that there are never two
      *this = Buffer(bytes);
    }
  }

 private:
  void swap(Buffer& other) {
    std::swap(at_, other.at_);
    std::swap(bytes_, other.bytes_);
  }
  void* at_ = nullptr;
  size_t bytes_ = 0;
};

}  // namespace nanochat
