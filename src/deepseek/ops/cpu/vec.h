// Vectors of float32 and of packed small integers, for the instruction set that this file is
// compiled for. Everything is in an anonymous namespace: the same kernels are compiled several times.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

inline float half_to_float(uint16_t h) {
  uint32_t sign = uint32_t(h & 0x8000) << 16, mantissa = h & 0x3ff, exponent = (h >> 10) & 31;
  float value;
  uint32_t bits;
  if (exponent == 0) {
    value = float(mantissa) * 5.9604644775390625e-8f;
    return sign ? -value : value;
  }
  bits = sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | (mantissa << 13);
  std::memcpy(&value, &bits, 4);
  return value;
}

inline float bf16_to_float(uint16_t b) {
  uint32_t bits = uint32_t(b) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline uint16_t float_to_bf16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if ((bits & 0x7fffffff) > 0x7f800000) return uint16_t((bits >> 16) | 0x40);
  return uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline uint16_t float_to_half(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  uint32_t sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
  if (magnitude >= 0x47800000) return uint16_t(sign | 0x7c00);
  if (magnitude < 0x38800000) {  // subnormal: steps of 2^-24
    float size;
    std::memcpy(&size, &magnitude, 4);
    return uint16_t(sign | uint32_t(std::lrintf(size * 16777216.0f)));
  }
  uint32_t rounded = magnitude - 0x38000000;
  rounded += 0xfff + ((rounded >> 13) & 1);
  return uint16_t(sign | (rounded >> 13));
}

// Four bytes of any type, for operands that instructions broadcast from memory.
typedef int32_t __attribute__((may_alias, aligned(1))) Quad;

#if defined(__AVX512F__)

constexpr int kLanes = 16;
using vf = __m512;
using vi = __m512i;
inline vf zero() { return _mm512_setzero_ps(); }
inline vi zero_i() { return _mm512_setzero_si512(); }
inline vf load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, vf v) { _mm512_storeu_ps(p, v); }
inline vf all(float x) { return _mm512_set1_ps(x); }
inline vi all_i(int32_t x) { return _mm512_set1_epi32(x); }
inline vi load_i(const void* p) { return _mm512_loadu_si512(p); }
inline vf fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
inline vf add(vf a, vf b) { return _mm512_add_ps(a, b); }
inline vf sub(vf a, vf b) { return _mm512_sub_ps(a, b); }
inline vf mul(vf a, vf b) { return _mm512_mul_ps(a, b); }
inline vf div(vf a, vf b) { return _mm512_div_ps(a, b); }
inline vf vmax(vf a, vf b) { return _mm512_max_ps(a, b); }
inline vf vmin(vf a, vf b) { return _mm512_min_ps(a, b); }
inline vf absolute(vf a) { return _mm512_abs_ps(a); }
inline vf nearest(vf a) { return _mm512_roundscale_ps(a, 0x08); }
inline vf to_float(vi a) { return _mm512_cvtepi32_ps(a); }
inline vi to_int(vf a) { return _mm512_cvtps_epi32(a); }
inline vf as_float(vi a) { return _mm512_castsi512_ps(a); }
inline vi as_int(vf a) { return _mm512_castps_si512(a); }
inline vi add_i(vi a, vi b) { return _mm512_add_epi32(a, b); }
inline vi and_i(vi a, vi b) { return _mm512_and_si512(a, b); }
inline vi left_16(vi a) { return _mm512_slli_epi32(a, 16); }
inline vi nibbles_high(vi a) {
  return _mm512_and_si512(_mm512_srli_epi16(a, 4), _mm512_set1_epi8(15));
}
inline vi nibbles_low(vi a) { return _mm512_and_si512(a, _mm512_set1_epi8(15)); }
inline float sum(vf a) { return _mm512_reduce_add_ps(a); }
inline float largest(vf a) { return _mm512_reduce_max_ps(a); }
inline vf load_half(const uint16_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
}
inline vf where_between(vf a, int first, int low, int high, float other) {
  __m512i place = _mm512_add_epi32(_mm512_set1_epi32(first),
      _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
  __mmask16 kept = _mm512_cmpge_epi32_mask(place, _mm512_set1_epi32(low)) &
                   _mm512_cmplt_epi32_mask(place, _mm512_set1_epi32(high));
  return _mm512_mask_blend_ps(kept, _mm512_set1_ps(other), a);
}
// The lanes whose bits are set, another value in the others.
inline vf where_bits(vf a, uint32_t bits, float other) {
  return _mm512_mask_blend_ps(__mmask16(bits), _mm512_set1_ps(other), a);
}
inline void store_s8(int8_t* p, vi a) { _mm_storeu_si128((__m128i*)p, _mm512_cvtsepi32_epi8(a)); }
inline void store_u8(uint8_t* p, vi a) { _mm_storeu_si128((__m128i*)p, _mm512_cvtusepi32_epi8(a)); }
inline void store_bf16(uint16_t* p, vf a) {
#if defined(__AVX512BF16__)
  __m256bh narrow = _mm512_cvtneps_pbh(a);
  _mm256_storeu_si256((__m256i*)p, (__m256i)narrow);
#else
  __m512i bits = _mm512_castps_si512(a);
  __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  bits = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(_mm512_srli_epi32(bits, 16)));
#endif
}
// Eight-bit integers to bfloat16, 32 of them (exact).
inline vi s8_to_bf16(const int8_t* p) {
  __m256i bytes = _mm256_loadu_si256((const __m256i*)p);
  __m512 low = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_castsi256_si128(bytes)));
  __m512 high = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_extracti128_si256(bytes, 1)));
  __m256i a = _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_castps_si512(low), 16));
  __m256i b = _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_castps_si512(high), 16));
  return _mm512_inserti64x4(_mm512_castsi256_si512(a), b, 1);
}
// One stage of a Walsh-Hadamard transform inside a vector: pairs at distance `half`.
inline vf times_power(vf a, vf whole) { return _mm512_scalef_ps(a, whole); }
template <int half>
inline vf butterfly(vf x) {
  const __mmask16 upper = half == 8 ? 0xff00 : half == 4 ? 0xf0f0 : half == 2 ? 0xcccc : 0xaaaa;
  vf other;
  if constexpr (half == 8) other = _mm512_shuffle_f32x4(x, x, 0x4e);
  else if constexpr (half == 4) other = _mm512_shuffle_f32x4(x, x, 0xb1);
  else if constexpr (half == 2) other = _mm512_permute_ps(x, 0x4e);
  else other = _mm512_permute_ps(x, 0xb1);
  // one more or one less of x: exactly the sum and the difference
  return _mm512_fmadd_ps(x, _mm512_mask_blend_ps(upper, _mm512_set1_ps(1.0f), _mm512_set1_ps(-1.0f)), other);
}
inline void store_i(void* p, vi a) { _mm512_storeu_si512(p, a); }
inline vi or_i(vi a, vi b) { return _mm512_or_si512(a, b); }
inline vi left(vi a, int bits) { return _mm512_slli_epi32(a, bits); }
inline vi right(vi a, int bits) { return _mm512_srli_epi32(a, bits); }
inline void store_half(uint16_t* p, vf a) {
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(a, 0));
}
// Whether any lane is above a bound.
inline bool any_above(vf a, float bound) {
  return _mm512_cmp_ps_mask(a, _mm512_set1_ps(bound), _CMP_GT_OQ) != 0;
}
inline vf where_less(vf a, vf b, vf yes, vf no) {
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), no, yes);
}
// The largest lane of each of kLanes vectors, side by side: halves of two vectors in one, until each is a lane.
inline vf largest_of_each(const vf* x) {
  vf a[8], b[4];
  for (int i = 0; i < 8; ++i)
    a[i] = vmax(_mm512_shuffle_f32x4(x[i], x[i + 8], 0x44), _mm512_shuffle_f32x4(x[i], x[i + 8], 0xee));
  for (int i = 0; i < 4; ++i)
    b[i] = vmax(_mm512_shuffle_f32x4(a[i], a[i + 4], 0x88), _mm512_shuffle_f32x4(a[i], a[i + 4], 0xdd));
  vf c = vmax(_mm512_unpacklo_ps(b[0], b[1]), _mm512_unpackhi_ps(b[0], b[1]));
  vf d = vmax(_mm512_unpacklo_ps(b[2], b[3]), _mm512_unpackhi_ps(b[2], b[3]));
  vf all_four = vmax(_mm512_shuffle_ps(c, d, 0x44), _mm512_shuffle_ps(c, d, 0xee));
  return _mm512_shuffle_f32x4(all_four, all_four, 0xd8);
}
// In the first four lanes the largest of each with those 4, 8 ... behind it.
inline vf largest_of_fours(vf a) {
  a = vmax(a, _mm512_shuffle_f32x4(a, a, 0x4e));
  return vmax(a, _mm512_shuffle_f32x4(a, a, 0xb1));
}
#if defined(__AVX512VNNI__)
#define DEEPSEEK_VNNI 1
// Written out: from the intrinsic g++ copies the sum before and after every product.
inline vi dot_u8s8(vi acc, vi w, vi x) {
  asm("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(w), "v"(x));
  return acc;
}

#endif
inline vi madd_ub(vi w, vi x) { return _mm512_maddubs_epi16(w, x); }
inline vi madd_16(vi a, vi b) { return _mm512_madd_epi16(a, b); }
inline vi add_16(vi a, vi b) { return _mm512_add_epi16(a, b); }
inline vi all_16(int16_t x) { return _mm512_set1_epi16(x); }
inline vi even_bytes(vi a) { return _mm512_and_si512(a, _mm512_set1_epi16(255)); }
inline vi odd_bytes(vi a) { return _mm512_srli_epi16(a, 8); }

#elif defined(__AVX2__)

constexpr int kLanes = 8;
using vf = __m256;
using vi = __m256i;
inline vf zero() { return _mm256_setzero_ps(); }
inline vi zero_i() { return _mm256_setzero_si256(); }
inline vf load(const float* p) { return _mm256_loadu_ps(p); }
inline void store(float* p, vf v) { _mm256_storeu_ps(p, v); }
inline vf all(float x) { return _mm256_set1_ps(x); }
inline vi all_i(int32_t x) { return _mm256_set1_epi32(x); }
inline vi load_i(const void* p) { return _mm256_loadu_si256((const __m256i*)p); }
inline vf fma(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }
inline vf add(vf a, vf b) { return _mm256_add_ps(a, b); }
inline vf sub(vf a, vf b) { return _mm256_sub_ps(a, b); }
inline vf mul(vf a, vf b) { return _mm256_mul_ps(a, b); }
inline vf div(vf a, vf b) { return _mm256_div_ps(a, b); }
inline vf vmax(vf a, vf b) { return _mm256_max_ps(a, b); }
inline vf vmin(vf a, vf b) { return _mm256_min_ps(a, b); }
inline vf absolute(vf a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
inline vf nearest(vf a) { return _mm256_round_ps(a, 0x08); }
inline vf to_float(vi a) { return _mm256_cvtepi32_ps(a); }
inline vi to_int(vf a) { return _mm256_cvtps_epi32(a); }
inline vf as_float(vi a) { return _mm256_castsi256_ps(a); }
inline vi as_int(vf a) { return _mm256_castps_si256(a); }
inline vi add_i(vi a, vi b) { return _mm256_add_epi32(a, b); }
inline vi and_i(vi a, vi b) { return _mm256_and_si256(a, b); }
inline vi left_16(vi a) { return _mm256_slli_epi32(a, 16); }
inline vi nibbles_high(vi a) {
  return _mm256_and_si256(_mm256_srli_epi16(a, 4), _mm256_set1_epi8(15));
}
inline vi nibbles_low(vi a) { return _mm256_and_si256(a, _mm256_set1_epi8(15)); }
inline float sum(vf a) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
inline float largest(vf a) {
  __m128 s = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  s = _mm_max_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
}
inline vf load_half(const uint16_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
inline vf where_between(vf a, int first, int low, int high, float other) {
  __m256i place = _mm256_add_epi32(_mm256_set1_epi32(first), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  __m256i below = _mm256_cmpgt_epi32(_mm256_set1_epi32(low), place);
  __m256i kept = _mm256_andnot_si256(below, _mm256_cmpgt_epi32(_mm256_set1_epi32(high), place));
  return _mm256_blendv_ps(_mm256_set1_ps(other), a, _mm256_castsi256_ps(kept));
}
inline vf where_bits(vf a, uint32_t bits, float other) {
  __m256i lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  __m256i kept = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(int(bits)), lane), lane);
  return _mm256_blendv_ps(_mm256_set1_ps(other), a, _mm256_castsi256_ps(kept));
}
inline void store_s8(int8_t* p, vi a) {
  __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
  _mm_storel_epi64((__m128i*)p, _mm_packs_epi16(words, words));
}
inline void store_u8(uint8_t* p, vi a) {
  __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
  _mm_storel_epi64((__m128i*)p, _mm_packus_epi16(words, words));
}
inline void store_bf16(uint16_t* p, vf a) {
  __m256i bits = _mm256_castps_si256(a);
  __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  bits = _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
  __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(bits), _mm256_extracti128_si256(bits, 1));
  _mm_storeu_si128((__m128i*)p, words);
}
inline vi s8_to_bf16(const int8_t* p) {
  __m128i bytes = _mm_loadu_si128((const __m128i*)p);
  __m256 low = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
  __m256 high = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(bytes, 8)));
  __m256i a = _mm256_srli_epi32(_mm256_castps_si256(low), 16);
  __m256i b = _mm256_srli_epi32(_mm256_castps_si256(high), 16);
  return _mm256_permute4x64_epi64(_mm256_packus_epi32(a, b), 0xd8);
}
inline vf times_power(vf a, vf whole) {
  __m256i bits = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(whole), _mm256_set1_epi32(127)), 23);
  __m256 kept = _mm256_cmp_ps(whole, _mm256_set1_ps(-126.0f), _CMP_GE_OQ);
  return _mm256_and_ps(_mm256_mul_ps(a, _mm256_castsi256_ps(bits)), kept);
}
template <int half>
inline vf butterfly(vf x) {
  vf other;
  if constexpr (half == 4) other = _mm256_permute2f128_ps(x, x, 1);
  else if constexpr (half == 2) other = _mm256_permute_ps(x, 0x4e);
  else other = _mm256_permute_ps(x, 0xb1);
  return _mm256_blend_ps(_mm256_add_ps(x, other), _mm256_sub_ps(other, x),
                         half == 4 ? 0xf0 : half == 2 ? 0xcc : 0xaa);
}
inline void store_i(void* p, vi a) { _mm256_storeu_si256((__m256i*)p, a); }
inline vi or_i(vi a, vi b) { return _mm256_or_si256(a, b); }
inline vi left(vi a, int bits) { return _mm256_slli_epi32(a, bits); }
inline vi right(vi a, int bits) { return _mm256_srli_epi32(a, bits); }
inline void store_half(uint16_t* p, vf a) { _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(a, 0)); }
inline bool any_above(vf a, float bound) {
  return _mm256_movemask_ps(_mm256_cmp_ps(a, _mm256_set1_ps(bound), _CMP_GT_OQ)) != 0;
}
inline vf where_less(vf a, vf b, vf yes, vf no) {
  return _mm256_blendv_ps(no, yes, _mm256_cmp_ps(a, b, _CMP_LT_OQ));
}
#if defined(__AVXVNNI__)
#define DEEPSEEK_VNNI 1
inline vi dot_u8s8(vi acc, vi w, vi x) {
  asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(acc) : "x"(w), "x"(x));
  return acc;
}
#endif
inline vi madd_ub(vi w, vi x) { return _mm256_maddubs_epi16(w, x); }
inline vi madd_16(vi a, vi b) { return _mm256_madd_epi16(a, b); }
inline vi add_16(vi a, vi b) { return _mm256_add_epi16(a, b); }
inline vi all_16(int16_t x) { return _mm256_set1_epi16(x); }
inline vi even_bytes(vi a) { return _mm256_and_si256(a, _mm256_set1_epi16(255)); }
inline vi odd_bytes(vi a) { return _mm256_srli_epi16(a, 8); }

#else  // no instruction set assumed: the compiler's own vectors

constexpr int kLanes = 4;
typedef float vf __attribute__((vector_size(16), aligned(4)));
typedef int32_t vi __attribute__((vector_size(16), aligned(4)));
inline vf zero() { return vf{}; }
inline vi zero_i() { return vi{}; }
inline vf load(const float* p) { vf v; std::memcpy(&v, p, 16); return v; }
inline void store(float* p, vf v) { std::memcpy(p, &v, 16); }
inline vf all(float x) { return vf{} + x; }
inline vi all_i(int32_t x) { return vi{} + x; }
inline vi load_i(const void* p) { vi v; std::memcpy(&v, p, 16); return v; }
inline vf fma(vf a, vf b, vf c) { return a * b + c; }
inline vf add(vf a, vf b) { return a + b; }
inline vf sub(vf a, vf b) { return a - b; }
inline vf mul(vf a, vf b) { return a * b; }
inline vf div(vf a, vf b) { return a / b; }
inline vf vmax(vf a, vf b) { return a > b ? a : b; }
inline vf vmin(vf a, vf b) { return a < b ? a : b; }
inline vf absolute(vf a) { return a < 0 ? -a : a; }
inline vf nearest(vf a) { for (int i = 0; i < 4; ++i) a[i] = nearbyintf(a[i]); return a; }
inline vf to_float(vi a) { return __builtin_convertvector(a, vf); }
inline vi to_int(vf a) { return __builtin_convertvector(nearest(a), vi); }
inline vf as_float(vi a) { vf v; std::memcpy(&v, &a, 16); return v; }
inline vi as_int(vf a) { vi v; std::memcpy(&v, &a, 16); return v; }
inline vi add_i(vi a, vi b) { return a + b; }
inline vi and_i(vi a, vi b) { return a & b; }
inline vi left_16(vi a) { return a << 16; }
inline vi nibbles_high(vi a) { return (a >> 4) & 0x0f0f0f0f; }
inline vi nibbles_low(vi a) { return a & 0x0f0f0f0f; }
inline float sum(vf a) { float s = 0; for (int i = 0; i < 4; ++i) s += a[i]; return s; }
inline float largest(vf a) { float s = a[0]; for (int i = 1; i < 4; ++i) s = s > a[i] ? s : a[i]; return s; }
inline vf load_half(const uint16_t* p) { vf v; for (int i = 0; i < 4; ++i) v[i] = half_to_float(p[i]); return v; }
inline vf where_between(vf a, int first, int low, int high, float other) {
  for (int i = 0; i < 4; ++i) if (first + i < low || first + i >= high) a[i] = other;
  return a;
}
inline vf where_bits(vf a, uint32_t bits, float other) {
  for (int i = 0; i < 4; ++i) if (!(bits >> i & 1)) a[i] = other;
  return a;
}
inline void store_s8(int8_t* p, vi a) { for (int i = 0; i < 4; ++i) p[i] = int8_t(a[i] > 127 ? 127 : a[i] < -128 ? -128 : a[i]); }
inline void store_u8(uint8_t* p, vi a) { for (int i = 0; i < 4; ++i) p[i] = uint8_t(a[i] > 255 ? 255 : a[i] < 0 ? 0 : a[i]); }
inline void store_bf16(uint16_t* p, vf a) { for (int i = 0; i < 4; ++i) p[i] = float_to_bf16(a[i]); }
inline vi s8_to_bf16(const int8_t* p) {
  uint16_t out[8];
  for (int i = 0; i < 8; ++i) out[i] = float_to_bf16(float(p[i]));
  return load_i(out);
}
inline vf times_power(vf a, vf whole) {
  for (int i = 0; i < 4; ++i) a[i] = whole[i] < -126.0f ? 0.0f : ldexpf(a[i], int(whole[i]));
  return a;
}
template <int half>
inline vf butterfly(vf x) {
  vf out;
  for (int i = 0; i < 4; ++i) out[i] = i & half ? x[i ^ half] - x[i] : x[i] + x[i ^ half];
  return out;
}
inline void store_i(void* p, vi a) { std::memcpy(p, &a, 16); }
inline vi or_i(vi a, vi b) { return a | b; }
inline vi left(vi a, int bits) { return a << bits; }
typedef uint32_t vu __attribute__((vector_size(16), aligned(4)));
inline vi right(vi a, int bits) { return (vi)((vu)a >> bits); }
inline void store_half(uint16_t* p, vf a) { for (int i = 0; i < 4; ++i) p[i] = float_to_half(a[i]); }
inline bool any_above(vf a, float bound) {
  for (int i = 0; i < 4; ++i) if (a[i] > bound) return true;
  return false;
}
inline vf where_less(vf a, vf b, vf yes, vf no) { return a < b ? yes : no; }
#define DEEPSEEK_VNNI 1
inline vi dot_u8s8(vi acc, vi w, vi inputs) {
  uint8_t bytes[16];
  int8_t x[16];
  std::memcpy(bytes, &w, 16);
  std::memcpy(x, &inputs, 16);
  for (int i = 0; i < 4; ++i)
    for (int j = 4 * i; j < 4 * i + 4; ++j) acc[i] += bytes[j] * x[j];
  return acc;
}

#endif

#if !defined(__AVX512F__)
// The largest lane of each of kLanes vectors, side by side.
inline vf largest_of_each(const vf* x) {
  alignas(64) float each[kLanes];
  for (int i = 0; i < kLanes; ++i) each[i] = largest(x[i]);
  return load(each);
}
// In the first four lanes the largest of each with those 4, 8 ... behind it.
inline vf largest_of_fours(vf x) {
  alignas(64) float each[kLanes];
  store(each, x);
  for (int i = 4; i < kLanes; ++i) each[i % 4] = std::max(each[i % 4], each[i]);
  return load(each);
}
#endif

// Two vectors of bfloat16, side by side.
inline void store_bf16_pair(uint16_t* p, vf a, vf b) {
#if defined(__AVX512BF16__)
  __m512bh both = _mm512_cvtne2ps_pbh(b, a);
  std::memcpy(p, &both, 64);
#else
  store_bf16(p, a), store_bf16(p + kLanes, b);
#endif
}

// A pair of bfloat16 inputs for `dot_bf16`, in every lane.
#if defined(__AVX512BF16__)
using Pair = vi;
inline Pair pair_of(const uint16_t* x) { return all_i(*(const Quad*)x); }
// acc + the products of pairs of bfloat16, `w` holding a pair in each 32-bit lane.
inline vf dot_bf16(vf acc, vi w, Pair x) {
  asm("vdpbf16ps %2, %1, %0" : "+v"(acc) : "v"(w), "v"(x));
  return acc;
}
#else
struct Pair {
  vf first, second;
};
inline Pair pair_of(const uint16_t* x) {
  return {all(bf16_to_float(x[0])), all(bf16_to_float(x[1]))};
}
inline vf dot_bf16(vf acc, vi w, Pair x) {
  acc = fma(as_float(left_16(w)), x.first, acc);
  return fma(as_float(and_i(w, all_i(int32_t(0xffff0000u)))), x.second, acc);
}
#endif

// 2^x of values up to 120; 0 far below. `Terms` of the series: 7 for float32, 4 where what comes of
// it is rounded to 8 bits anyway (8e-5).
template <int Terms>
inline vf power_of_two(vf x) {
#if defined(__AVX512F__)
  if constexpr (Terms == 4) {
    vf f = _mm512_reduce_ps(x, 0x09);  // above the whole number below, which `scalef` takes by itself
    vf p = fma(f, all(7.8024568986e-2f), all(2.2606725311e-1f));
    p = fma(p, f, all(6.9583340419e-1f));
    p = fma(p, f, all(9.9992522608e-1f));
    return _mm512_scalef_ps(p, x);
  }
#endif
  x = vmax(x, all(-140.0f));
  vf whole = nearest(x), f = sub(x, whole);
  vf p = all(Terms > 4 ? 1.5252733804e-5f : 9.6181291076e-3f);
  if constexpr (Terms > 4) {
    p = fma(p, f, all(1.5403530393e-4f));
    p = fma(p, f, all(1.3333558146e-3f));
    p = fma(p, f, all(9.6181291076e-3f));
  }
  p = fma(p, f, all(5.5504108665e-2f));
  p = fma(p, f, all(2.4022650696e-1f));
  p = fma(p, f, all(6.9314718056e-1f));
  p = fma(p, f, all(1.0f));
  return times_power(p, whole);
}

constexpr float kLog2E = 1.44269504088896341f;

// 1 / x of x from 1 on, to 2e-7.
inline vf inverse(vf x) {
#if defined(__AVX512F__)
  vf first = _mm512_rcp14_ps(x);  // Newton's step squares its error; a division takes three times as long
  return mul(first, sub(all(2.0f), mul(x, first)));
#else
  return div(all(1.0f), x);
#endif
}

inline vf exponential(vf x) { return power_of_two<7>(mul(vmin(x, all(80.0f)), all(kLog2E))); }

}  // namespace
