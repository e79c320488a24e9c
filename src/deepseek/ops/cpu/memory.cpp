#include "memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>

namespace deepseek {

#if defined(__SANITIZE_ADDRESS__)
Memory::Memory(size_t bytes) : bytes_(aligned(std::max<size_t>(bytes, 64))) {
  data_ = (uint8_t*)std::aligned_alloc(64, bytes_);
  std::memset(data_, 0, bytes_);
}

Memory::~Memory() { std::free(data_); }
#else
Memory::Memory(size_t bytes) : bytes_(aligned(std::max<size_t>(bytes, 64), 4096)) {
  void* got = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (got == MAP_FAILED) throw std::bad_alloc();
  data_ = (uint8_t*)got;
#if defined(MADV_HUGEPAGE)
  if (bytes_ >= (size_t(8) << 20)) madvise(data_, bytes_, MADV_HUGEPAGE);
#endif
}

Memory::~Memory() {
  if (data_) munmap(data_, bytes_);
}
#endif

}  // namespace deepseek
