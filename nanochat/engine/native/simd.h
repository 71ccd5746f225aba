// Sixteen lanes at a time, in vector types of the compiler: AVX-512 where there is one, else what it makes of them.
//
// Everything has one meaning on every machine; intrinsics only say it faster. NANOCHAT_PORTABLE leaves them out, so
// that a test can compare. Nothing here is ever summed in an order that depends on the amount of work.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && !defined(NANOCHAT_PORTABLE)
#define NANOCHAT_AVX512 1
#endif
#if (defined(__x86_64__) || defined(__i386__)) && !defined(NANOCHAT_PORTABLE)
#include <immintrin.h>
#endif
#if defined(__ARM_NEON) && !defined(NANOCHAT_PORTABLE)
#include <arm_neon.h>
#endif

#define INLINE inline __attribute__((always_inline))
#if defined(__clang__)
#define UNROLL _Pragma("unroll")
#else
#define UNROLL _Pragma("GCC unroll 32")
#endif

namespace nanochat {

constexpr int LANES = 16;

typedef float f32x16 __attribute__((vector_size(64)));
typedef int32_t i32x16 __attribute__((vector_size(64)));
typedef uint32_t u32x16 __attribute__((vector_size(64)));
typedef uint16_t u16x16 __attribute__((vector_size(32)));
typedef int8_t i8x16 __attribute__((vector_size(16)));

template <class V>
INLINE V load(const void* from) {
  V value;
  std::memcpy(&value, from, sizeof(V));
  return value;
}

template <class V>
INLINE void store(void* to, V value) {
  std::memcpy(to, &value, sizeof(V));
}

// The first `count` floats (1 to 16), zeros behind them.
INLINE f32x16 load_some(const float* from, int count) {
#if defined(NANOCHAT_AVX512)
  return (f32x16)_mm512_maskz_loadu_ps(__mmask16((1u << count) - 1), from);
#endif
  f32x16 value = {};
  std::memcpy(&value, from, size_t(count) * sizeof(float));
  return value;
}

INLINE void store_some(void* to, f32x16 value, int count) { std::memcpy(to, &value, size_t(count) * sizeof(float)); }

INLINE f32x16 splat(float x) { return f32x16{x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x}; }
INLINE i32x16 splat(int32_t x) { return i32x16{x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x}; }

// The 32 bits at `from` in every lane.
INLINE i32x16 spread(const void* from) { return splat(load<int32_t>(from)); }

// a * b + c, rounded once where the machine can. Written out everywhere: the compiler must not choose case by case,
// or a number would depend on the tile it was computed in.
INLINE f32x16 fma(f32x16 a, f32x16 b, f32x16 c) {
#if defined(NANOCHAT_AVX512)
  return (f32x16)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__) && !defined(NANOCHAT_PORTABLE)
  __m256 x[2], y[2], z[2];
  std::memcpy(x, &a, 64), std::memcpy(y, &b, 64), std::memcpy(z, &c, 64);
  UNROLL for (int i = 0; i < 2; i++) z[i] = _mm256_fmadd_ps(x[i], y[i], z[i]);
  return load<f32x16>(z);
#elif defined(__ARM_NEON) && defined(__aarch64__) && !defined(NANOCHAT_PORTABLE)
  float32x4_t x[4], y[4], z[4];
  std::memcpy(x, &a, 64), std::memcpy(y, &b, 64), std::memcpy(z, &c, 64);
  UNROLL for (int i = 0; i < 4; i++) z[i] = vfmaq_f32(z[i], x[i], y[i]);
  return load<f32x16>(z);
#else
  return a * b + c;
#endif
}

// The second where one is NaN.
INLINE f32x16 larger(f32x16 a, f32x16 b) {
#if defined(NANOCHAT_AVX512)
  return (f32x16)_mm512_max_ps((__m512)a, (__m512)b);
#else
  return a > b ? a : b;
#endif
}

// Sum of the lanes: halves onto halves, always the same tree.
INLINE float sum(f32x16 x) {
#if defined(NANOCHAT_AVX512)
  return _mm512_reduce_add_ps((__m512)x);
#endif
  float at[LANES];
  store(at, x);
  for (int width = LANES / 2; width; width /= 2)
    for (int i = 0; i < width; i++) at[i] += at[i + width];
  return at[0];
}

// No lane may be NaN.
INLINE float largest(f32x16 x) {
#if defined(NANOCHAT_AVX512)
  return _mm512_reduce_max_ps((__m512)x);
#endif
  float at[LANES], most;
  store(at, x);
  most = at[0];
  for (int i = 1; i < LANES; i++) most = at[i] > most ? at[i] : most;
  return most;
}

INLINE int32_t sum(i32x16 x) {
#if defined(NANOCHAT_AVX512)
  return _mm512_reduce_add_epi32((__m512i)x);
#endif
  int32_t all = 0;
  for (int i = 0; i < LANES; i++) all += x[i];
  return all;
}

INLINE int32_t largest(i32x16 x) {
#if defined(NANOCHAT_AVX512)
  return _mm512_reduce_max_epi32((__m512i)x);
#endif
  int32_t most = x[0];
  for (int i = 1; i < LANES; i++) most = x[i] > most ? x[i] : most;
  return most;
}

// A bf16 is the upper half of a float; rounded to nearest, ties to even, NaN stays NaN.
INLINE u16x16 to_bf16(f32x16 x) {
#if defined(NANOCHAT_AVX512) && defined(__AVX512BF16__)
  return (u16x16)_mm512_cvtneps_pbh((__m512)x);
#else
  u32x16 bits = (u32x16)x;
  u32x16 rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  u32x16 nan = (bits >> 16) | 0x40;
  return __builtin_convertvector((x == x) ? rounded : nan, u16x16);
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

// c + the sum over four bytes of a (unsigned) times those of b (signed).
INLINE i32x16 dot_int8(i32x16 c, i32x16 a, i32x16 b) {
#if defined(NANOCHAT_AVX512) && defined(__AVX512VNNI__)
  return (i32x16)_mm512_dpbusd_epi32((__m512i)c, (__m512i)a, (__m512i)b);
#else
  UNROLL for (int shift = 0; shift < 32; shift += 8) c += ((a >> shift) & 255) * ((b << (24 - shift)) >> 24);
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
  z = z > splat(20.0f) ? splat(20.0f) : z;
  z = z < splat(-20.0f) ? splat(-20.0f) : z;
  Power e = power(z);
  f32x16 less_one = fma(e.two_to_n, e.rest, e.two_to_n - splat(1.0f));
  return splat(15.0f) * less_one / (less_one + splat(2.0f));
}

INLINE void prefetch_far(const void* at) { __builtin_prefetch(at, 0, 2); }  // to the second level

}  // namespace nanochat
