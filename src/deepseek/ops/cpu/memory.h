// Memory that weights, states and pages lie in.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>

namespace deepseek {

inline size_t aligned(size_t bytes, size_t to = 64) { return (bytes + to - 1) / to * to; }

// Memory of one allocation, aligned for vectors and huge pages where the system gives them.
class Memory {
 public:
  Memory() = default;
  explicit Memory(size_t bytes);
  ~Memory();
  Memory(Memory&& other) noexcept { swap(other); }
  Memory& operator=(Memory&& other) noexcept { swap(other); return *this; }
  uint8_t* data() const { return data_; }
  size_t bytes() const { return bytes_; }

 private:
  void swap(Memory& other) { std::swap(data_, other.data_); std::swap(bytes_, other.bytes_); }
  uint8_t* data_ = nullptr;
  size_t bytes_ = 0;
};

}  // namespace deepseek
