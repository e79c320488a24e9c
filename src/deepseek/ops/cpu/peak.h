// What the machine could do at best, measured: products that never leave the registers, and memory
// that is read once. Benchmarks state their figures as shares of these.
#pragma once

#include "tiles.h"
#include "types.h"
#include "vec.h"

namespace {

// Does products of a storage on one core, as fast as its instructions go; returns how many
// multiply-adds they were.
double peak_products(deepseek::Kind kind, int rounds, float* result) {
  constexpr int kSums = 12;
#if defined(DEEPSEEK_AMX) || defined(DEEPSEEK_AMX_EMULATED)
  if (kind != deepseek::Kind::f32) {
    bool is_bf16 = kind == deepseek::Kind::bf16;
    TileConfig config;
    for (int tile = 0; tile < 8; ++tile) config.set(tile, 16, 64);
    tile_configure(config);
    auto round = [&](auto dot_all) {
      for (int i = 0; i < rounds; ++i) dot_all();
    };
    if (is_bf16)
      round([] { tile_dot_bf16<0, 4, 5>(), tile_dot_bf16<1, 4, 6>(), tile_dot_bf16<2, 4, 7>(), tile_dot_bf16<3, 5, 7>(); });
    else
      round([] { tile_dot_s8u8<0, 4, 5>(), tile_dot_s8u8<1, 4, 6>(), tile_dot_s8u8<2, 4, 7>(), tile_dot_s8u8<3, 5, 7>(); });
    tile_release();
    return double(rounds) * 4 * 16 * 16 * (is_bf16 ? 32 : 64);
  }
#endif
  vf sums[kSums];
  vi counts[kSums];
  for (int i = 0; i < kSums; ++i) sums[i] = zero(), counts[i] = zero_i();
  double per_round = 0;
  switch (kind) {
    case deepseek::Kind::f32: {
      vf a = all(result[0]), b = all(result[1]);
      for (int r = 0; r < rounds; ++r)
        for (int i = 0; i < kSums; ++i) sums[i] = fma(a, b, sums[i]);
      per_round = kSums * kLanes;
      break;
    }
    case deepseek::Kind::bf16: {
      uint16_t pair[2] = {0, 0};
      Pair a = pair_of(pair);
      vi b = all_i(int32_t(result[0]));
      for (int r = 0; r < rounds; ++r)
        for (int i = 0; i < kSums; ++i) sums[i] = dot_bf16(sums[i], b, a);
      per_round = 2 * kSums * kLanes;
      break;
    }
    default: {
      vi a = all_i(int32_t(result[0])), b = all_i(int32_t(result[1]));
#if defined(DEEPSEEK_VNNI)
      for (int r = 0; r < rounds; ++r)
        for (int i = 0; i < kSums; ++i) counts[i] = dot_u8s8(counts[i], a, b);
      per_round = 4 * kSums * kLanes;
#else
      for (int r = 0; r < rounds; ++r)
        for (int i = 0; i < kSums; ++i) {
          asm("" : "+x"(a));  // else the product is taken out of the loop
          counts[i] = add_i(counts[i], madd_16(a, b));
        }
      per_round = 2 * kSums * kLanes;
#endif
    }
  }
  vf total = zero();
  for (int i = 0; i < kSums; ++i) total = add(total, add(sums[i], to_float(counts[i])));
  result[2] = sum(total);
  return per_round * rounds;
}

// Reads memory once, in order.
float read_once(const float* from, size_t count) {
  vf sums[8];
  for (vf& each : sums) each = zero();
  for (size_t i = 0; i + 8 * kLanes <= count; i += 8 * kLanes)
    for (int v = 0; v < 8; ++v) sums[v] = add(sums[v], load(from + i + v * kLanes));
  for (int v = 1; v < 8; ++v) sums[0] = add(sums[0], sums[v]);
  return sum(sums[0]);
}

}  // namespace
