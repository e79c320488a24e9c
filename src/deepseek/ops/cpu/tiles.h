// AMX: eight registers of 16 rows of 64 bytes and the products of two of them. Compiled for the
// processor's instructions, or for an emulation of them after the manual, which runs where there is
// no AMX so that the kernels above can be tested.
//
// Source: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2, TDPBSUD,
// TDPBUSD and TDPBF16PS; the emulation does not flush denormal numbers.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace {

// As LDTILECFG reads it.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};

  void set(int tile, int tile_rows, int bytes) {
    rows[tile] = uint8_t(tile_rows), row_bytes[tile] = uint16_t(bytes);
  }
};
static_assert(sizeof(TileConfig) == 64);

#if defined(DEEPSEEK_AMX)

// In assembly: g++ 12 declares 8 of the 64 bytes as read and drops the other stores.
inline void tile_configure(const TileConfig& config) {
  asm volatile("ldtilecfg %0" ::"m"(config) : "memory");
}
inline void tile_release() { asm volatile("tilerelease" ::: "memory"); }
template <int T>
inline void tile_zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(T));
}
template <int T>
inline void tile_load(const void* from, ptrdiff_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(T) : "memory");
}
template <int T>
inline void tile_store(void* to, ptrdiff_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(T) : "memory");
}
// C += A * B; A holds signed bytes, B unsigned ones, in quads of the inner dimension.
template <int C, int A, int B>
inline void tile_dot_s8u8() {
  asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}
// C += A * B; A holds unsigned bytes, B signed ones.
template <int C, int A, int B>
inline void tile_dot_u8s8() {
  asm volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}
// C += A * B in pairs of bfloat16, with two float32 sums that are added to C at the end.
template <int C, int A, int B>
inline void tile_dot_bf16() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}

#elif defined(DEEPSEEK_AMX_EMULATED)

struct TileState {
  TileConfig config;
  alignas(64) uint8_t tiles[8][16][64];
};
inline thread_local TileState tile_state;

inline void tile_configure(const TileConfig& config) {
  tile_state.config = config;
  std::memset(tile_state.tiles, 0, sizeof(tile_state.tiles));
}
inline void tile_release() { std::memset((void*)&tile_state, 0, sizeof(tile_state)); }
template <int T>
inline void tile_zero() {
  std::memset(tile_state.tiles[T], 0, sizeof(tile_state.tiles[T]));
}
template <int T>
inline void tile_load(const void* from, ptrdiff_t stride) {
  tile_zero<T>();
  for (int r = 0; r < tile_state.config.rows[T]; ++r)
    std::memcpy(tile_state.tiles[T][r], (const uint8_t*)from + r * stride,
                tile_state.config.row_bytes[T]);
}
template <int T>
inline void tile_store(void* to, ptrdiff_t stride) {
  for (int r = 0; r < tile_state.config.rows[T]; ++r)
    std::memcpy((uint8_t*)to + r * stride, tile_state.tiles[T][r], tile_state.config.row_bytes[T]);
}
template <int C, int A, int B, typename Left, typename Right>
inline void tile_dot_bytes() {
  const TileConfig& config = tile_state.config;
  for (int m = 0; m < config.rows[C]; ++m) {
    int32_t sums[16];
    std::memcpy(sums, tile_state.tiles[C][m], 64);
    const Left* a = (const Left*)tile_state.tiles[A][m];
    for (int k = 0; k < config.row_bytes[A]; ++k)
      for (int n = 0; n < config.row_bytes[C] / 4; ++n)
        sums[n] += int32_t(a[k]) * int32_t(((const Right*)tile_state.tiles[B][k / 4])[4 * n + k % 4]);
    std::memcpy(tile_state.tiles[C][m], sums, 64);
  }
}
template <int C, int A, int B>
inline void tile_dot_s8u8() {
  tile_dot_bytes<C, A, B, int8_t, uint8_t>();
}
template <int C, int A, int B>
inline void tile_dot_u8s8() {
  tile_dot_bytes<C, A, B, uint8_t, int8_t>();
}
template <int C, int A, int B>
inline void tile_dot_bf16() {
  const TileConfig& config = tile_state.config;
  auto value = [](const uint8_t* row, int place) {
    uint16_t half;
    std::memcpy(&half, row + 2 * place, 2);
    uint32_t bits = uint32_t(half) << 16;
    float number;
    std::memcpy(&number, &bits, 4);
    return number;
  };
  for (int m = 0; m < config.rows[C]; ++m)
    for (int n = 0; n < config.row_bytes[C] / 4; ++n) {
      float even = 0, odd = 0, sum;
      for (int k = 0; k < config.row_bytes[A] / 4; ++k) {
        const uint8_t *a = tile_state.tiles[A][m], *b = tile_state.tiles[B][k];
        even = __builtin_fmaf(value(a, 2 * k), value(b, 2 * n), even);
        odd = __builtin_fmaf(value(a, 2 * k + 1), value(b, 2 * n + 1), odd);
      }
      std::memcpy(&sum, tile_state.tiles[C][m] + 4 * n, 4);
      sum += even + odd;
      std::memcpy(tile_state.tiles[C][m] + 4 * n, &sum, 4);
    }
}

#endif

}  // namespace
