// Arithmetic on sixteen lanes at a time.
//
// Everything has one meaning on every machine; intrinsics only say it faster. NANOCHAT_PORTABLE leaves them out, so
// that a test can compare. Nothing here is ever summed in an order that depends on the amount of work.
#pragma once

#include "lanes.h"

#if (defined(__x86_64__) || defined(__i386__)) && !defined(NANOCHAT_PORTABLE)
#include <immintrin.h>
#endif
#if defined(__ARM_NEON) && !defined(NANOCHAT_PORTABLE)
#include <arm_neon.h>
#endif

namespace nanochat {

// The first `count` floats (1 to 16), zeros behind them.
INLINE f32x16 load_some(const float* from, int count) {
#if defined(NANOCHAT_AVX512)
  return (f32x16)_mm512_maskz_loadu_ps(__mmask16((1u << count) - 1), from);
#endif
  if (count == LANES) return load<f32x16>(from);
  f32x16 value = {};
  std::memcpy(&value, from, size_t(count) * sizeof(float));
  return value;
}

INLINE void store_some(void* to, f32x16 value, int count) {
#if !defined(NANOCHAT_AVX512)
  if (count == LANES) return store(to, value);
#endif
  std::memcpy(to, &value, size_t(count) * sizeof(float));
}

// 0 to 15.
INLINE i32x16 lane_numbers() {
#if defined(NANOCHAT_AVX512)
  return i32x16{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
#else
  constexpr int32_t NUMBERS[LANES] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return load<i32x16>(NUMBERS);
#endif
}

// The 32 bits at `from` in every lane.
INLINE i32x16 spread(const void* from) { return splat(load<int32_t>(from)); }

// a * b + c, rounded once where the machine can. Written out everywhere: the compiler must not choose case by case,
// or a number would depend on the tile it was computed in.
INLINE f32x16 fma(f32x16 a, f32x16 b, f32x16 c) {
#if defined(NANOCHAT_AVX512)
  return (f32x16)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__) && !defined(NANOCHAT_PORTABLE)
  UNROLL for (int i = 0; i < PARTS; i++) c.part[i] = _mm256_fmadd_ps(a.part[i], b.part[i], c.part[i]);
  return c;
#elif defined(__ARM_NEON) && defined(__aarch64__) && !defined(NANOCHAT_PORTABLE)
  UNROLL for (int i = 0; i < PARTS; i++)
    c.part[i] = (f32x16::Part)vfmaq_f32((float32x4_t)c.part[i], (float32x4_t)a.part[i], (float32x4_t)b.part[i]);
  return c;
#else
  return a * b + c;
#endif
}

// The second where one is NaN.
INLINE f32x16 larger(f32x16 a, f32x16 b) {
#if defined(NANOCHAT_AVX512)
  return (f32x16)_mm512_max_ps((__m512)a, (__m512)b);
#else
  return pick(a > b, a, b);
#endif
}

INLINE i32x16 larger(i32x16 a, i32x16 b) {
#if defined(NANOCHAT_AVX512)
  return a > b ? a : b;
#else
  return pick(a > b, a, b);
#endif
}

// Sum of the lanes: halves onto halves, always the same tree.
INLINE float sum(f32x16 x) {
#if defined(NANOCHAT_AVX512)
  return _mm512_reduce_add_ps((__m512)x);
#else
  UNROLL for (int width = PARTS / 2; width; width /= 2)
    UNROLL for (int i = 0; i < width; i++) x.part[i] += x.part[i + width];
  float at[EACH];
  std::memcpy(at, &x.part[0], sizeof(at));
  UNROLL for (int width = EACH / 2; width; width /= 2)
    UNROLL for (int i = 0; i < width; i++) at[i] += at[i + width];
  return at[0];
#endif
}

// No lane may be NaN.
INLINE float largest(f32x16 x) {
#if defined(NANOCHAT_AVX512)
  return _mm512_reduce_max_ps((__m512)x);
#else
  float most = x[0];
  UNROLL for (int i = 1; i < LANES; i++) most = x[i] > most ? x[i] : most;
  return most;
#endif
}

INLINE int32_t sum(i32x16 x) {
#if defined(NANOCHAT_AVX512)
  return _mm512_reduce_add_epi32((__m512i)x);
#else
  int32_t all = 0;
  UNROLL for (int i = 0; i < LANES; i++) all += x[i];
  return all;
#endif
}

INLINE int32_t largest(i32x16 x) {
#if defined(NANOCHAT_AVX512)
  return _mm512_reduce_max_epi32((__m512i)x);
#else
  int32_t most = x[0];
  UNROLL for (int i = 1; i < LANES; i++) most = x[i] > most ? x[i] : most;
  return most;
#endif
}

// A bf16 is the upper half of a float; rounded to nearest, ties to even, NaN stays NaN. Here in the lower half.
INLINE u32x16 round_bf16(f32x16 x) {
  u32x16 bits = (u32x16)x;
  u32x16 rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  u32x16 nan = (bits >> 16) | 0x40;
  return pick(x == x, rounded, nan);
}

INLINE u16x16 to_bf16(f32x16 x) {
#if defined(NANOCHAT_AVX512) && defined(__AVX512BF16__)
  return (u16x16)_mm512_cvtneps_pbh((__m512)x);
#else
  return convert<u16x16>(round_bf16(x));
#endif
}

// Two bf16 in a lane: the lower one is the even element of a pair, the upper one the odd.
INLINE f32x16 even(i32x16 pair) { return (f32x16)(pair << 16); }
INLINE f32x16 odd(i32x16 pair) { return (f32x16)(pair & splat(int32_t(0xffff0000))); }

// c + a.even * b.even + a.odd * b.odd for pairs of bf16.
INLINE f32x16 dot_bf16(f32x16 c, i32x16 a, i32x16 b) {
#if defined(NANOCHAT_AVX512) && defined(__AVX512BF16__)
  return (f32x16)_mm512_dpbf16_ps((__m512)c, (__m512bh)a, (__m512bh)b);
#else
  return fma(even(a), even(b), fma(odd(a), odd(b), c));
#endif
}

// Whether the first numbers of dot_int8 are unsigned: the instruction made for it wants one side to be.
#if defined(NANOCHAT_AVX512) || (defined(__AVXVNNI__) && !defined(NANOCHAT_PORTABLE))
constexpr bool UNSIGNED_WEIGHTS = true;
#else
constexpr bool UNSIGNED_WEIGHTS = false;
#endif

// c + the sum over four bytes of a (unsigned, or signed without -128) times those of b (signed without -128).
INLINE i32x16 dot_int8(i32x16 c, i32x16 a, i32x16 b) {
#if defined(NANOCHAT_AVX512) && defined(__AVX512VNNI__)
  return (i32x16)_mm512_dpbusd_epi32((__m512i)c, (__m512i)a, (__m512i)b);
#elif defined(NANOCHAT_AVX512)
  UNROLL for (int shift = 0; shift < 32; shift += 8) c += ((a >> shift) & 255) * ((b << (24 - shift)) >> 24);
  return c;
#elif defined(__AVXVNNI__) && !defined(NANOCHAT_PORTABLE)
  UNROLL for (int i = 0; i < PARTS; i++)
    c.part[i] = (i32x16::Part)_mm256_dpbusd_avx_epi32((__m256i)c.part[i], (__m256i)a.part[i], (__m256i)b.part[i]);
  return c;
#elif defined(__AVX2__) && !defined(NANOCHAT_PORTABLE)
  // The sign of a goes to b. Two products are at most 2 * 127 * 127, which 16 bits hold.
  UNROLL for (int i = 0; i < PARTS; i++) {
    __m256i w = (__m256i)a.part[i], x = _mm256_sign_epi8((__m256i)b.part[i], w);
    __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w), x);
    c.part[i] += (i32x16::Part)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
  }
  return c;
#elif defined(__ARM_FEATURE_DOTPROD) && !defined(NANOCHAT_PORTABLE)
  UNROLL for (int i = 0; i < PARTS; i++)
    c.part[i] = (i32x16::Part)vdotq_s32((int32x4_t)c.part[i], (int8x16_t)a.part[i], (int8x16_t)b.part[i]);
  return c;
#else
  UNROLL for (int shift = 0; shift < 32; shift += 8)
    c += ((a << (24 - shift)) >> 24) * ((b << (24 - shift)) >> 24);
  return c;
#endif
}

constexpr float ROUND = 12582912.0f;  // 1.5 * 2^23: a float near it has no fraction, so adding it rounds

struct Power {
  f32x16 two_to_n, rest;  // exp(x) = two_to_n * (1 + rest)
};

// x in [-87, 88]. rest within 2 units of the last place (the polynomial is that of Cephes' expf).
INLINE Power power(f32x16 x) {
  f32x16 shifted = fma(x, splat(1.44269504f), splat(ROUND));
  f32x16 n = shifted - splat(ROUND);
  f32x16 r = fma(n, splat(-0.693359375f), x);
  r = fma(n, splat(2.12194440e-4f), r);
  f32x16 p = splat(1.9875691500e-4f);
  p = fma(p, r, splat(1.3981999507e-3f));
  p = fma(p, r, splat(8.3334519073e-3f));
  p = fma(p, r, splat(4.1665795894e-2f));
  p = fma(p, r, splat(1.6666665459e-1f));
  p = fma(p, r, splat(5.0000001201e-1f));
  i32x16 exponent = (i32x16)shifted - splat(int32_t(0x4b400000)) + 127;  // 0x4b400000: the bits of ROUND
  return {(f32x16)(exponent << 23), fma(p, r * r, r)};
}

// exp of a number up to 0; NaN stays NaN, and nothing is less than exp(-87) = 1.6e-38.
INLINE f32x16 exp_negative(f32x16 x) {
  Power e = power(larger(splat(-87.0f), x));
  return fma(e.two_to_n, e.rest, e.two_to_n);
}

// 15 * tanh(x / 15) by way of exp(z) - 1, which keeps small numbers exact; NaN stays NaN.
INLINE f32x16 soft_cap(f32x16 x) {
  f32x16 z = x * splat(2.0f / 15.0f);
  z = pick(z > splat(20.0f), splat(20.0f), z);
  z = pick(z < splat(-20.0f), splat(-20.0f), z);
  Power e = power(z);
  f32x16 less_one = fma(e.two_to_n, e.rest, e.two_to_n - splat(1.0f));
  return splat(15.0f) * less_one / (less_one + splat(2.0f));
}

INLINE void prefetch_far(const void* at) { __builtin_prefetch(at, 0, 2); }  // to the second level

}  // namespace nanochat
