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
namespace {

constexpr size_t kPageBytes = 4096, kHugeBytes = size_t(2) << 20;

}  // namespace

Memory::Memory(size_t bytes) : bytes_(aligned(std::max<size_t>(bytes, 64), kPageBytes)) {
  // huge pages begin at multiples of their size only; what lies before and behind is given back
  size_t room = bytes_ >= 2 * kHugeBytes ? bytes_ + kHugeBytes : bytes_;
  void* got = mmap(nullptr, room, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (got == MAP_FAILED) throw std::bad_alloc();
  data_ = (uint8_t*)got;
  if (room == bytes_) return;
  data_ = (uint8_t*)aligned(size_t(got), kHugeBytes);
  size_t before = data_ - (uint8_t*)got, behind = kHugeBytes - before;
  if (before) munmap(got, before);
  if (behind) munmap(data_ + bytes_, behind);
#if defined(MADV_HUGEPAGE)
  madvise(data_, bytes_, MADV_HUGEPAGE);
#endif
}

Memory::~Memory() {
  if (data_) munmap(data_, bytes_);
}
#endif

}  // namespace deepseek
