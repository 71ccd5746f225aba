// Sixteen numbers side by side: one register with AVX-512, else a few smaller registers that act as one.
//
// A compiler's vector type that is wider than the machine's registers lives in memory; a struct of vectors that fit is
// taken apart and kept in registers. Operators work lane by lane, a comparison gives -1 or 0 in each lane, and a C cast
// keeps the bits.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && !defined(NANOCHAT_PORTABLE)
#define NANOCHAT_AVX512 1
#endif

#define INLINE inline __attribute__((always_inline))
#if defined(__clang__)
#define UNROLL _Pragma("unroll")
#else
#define UNROLL _Pragma("GCC unroll 32")
#endif

namespace nanochat {

constexpr int LANES = 16;

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

#if defined(NANOCHAT_AVX512)

typedef float f32x16 __attribute__((vector_size(64)));
typedef int32_t i32x16 __attribute__((vector_size(64)));
typedef uint32_t u32x16 __attribute__((vector_size(64)));
typedef uint16_t u16x16 __attribute__((vector_size(32)));
typedef int8_t i8x16 __attribute__((vector_size(16)));

// a where yes is -1, b where it is 0.
template <class V>
INLINE V pick(i32x16 yes, V a, V b) {
  return yes ? a : b;
}

// The same numbers as another type.
template <class To, class From>
INLINE To convert(From x) {
  return __builtin_convertvector(x, To);
}

INLINE f32x16 splat(float x) { return f32x16{x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x}; }
INLINE i32x16 splat(int32_t x) { return i32x16{x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x}; }

#else

#if defined(__AVX__)
constexpr int REGISTER_BYTES = 32;
#else
constexpr int REGISTER_BYTES = 16;
#endif
constexpr int PARTS = 64 / REGISTER_BYTES;
constexpr int EACH = LANES / PARTS;  // lanes of a part

template <class T>
struct Lanes {
  typedef T Part __attribute__((vector_size(EACH * sizeof(T))));
  Part part[PARTS];

  INLINE T operator[](int i) const { return part[i / EACH][i % EACH]; }

  template <class U>
  explicit INLINE operator Lanes<U>() const {
    Lanes<U> same;
    UNROLL for (int i = 0; i < PARTS; i++) same.part[i] = (typename Lanes<U>::Part)part[i];
    return same;
  }

#define NANOCHAT_OPERATOR(OP)                                                  \
  friend INLINE Lanes operator OP(Lanes a, Lanes b) {                          \
    UNROLL for (int i = 0; i < PARTS; i++) a.part[i] = a.part[i] OP b.part[i]; \
    return a;                                                                  \
  }                                                                            \
  friend INLINE Lanes operator OP(Lanes a, T b) {                              \
    UNROLL for (int i = 0; i < PARTS; i++) a.part[i] = a.part[i] OP b;         \
    return a;                                                                  \
  }                                                                            \
  friend INLINE Lanes& operator OP##=(Lanes& a, Lanes b) { return a = a OP b; }
  NANOCHAT_OPERATOR(+)
  NANOCHAT_OPERATOR(-)
  NANOCHAT_OPERATOR(*)
  NANOCHAT_OPERATOR(/)
  NANOCHAT_OPERATOR(&)
  NANOCHAT_OPERATOR(|)
  NANOCHAT_OPERATOR(^)
  NANOCHAT_OPERATOR(<<)
  NANOCHAT_OPERATOR(>>)
#undef NANOCHAT_OPERATOR

#define NANOCHAT_COMPARISON(OP)                                                  \
  friend INLINE Lanes<int32_t> operator OP(Lanes a, Lanes b) {                   \
    Lanes<int32_t> yes;                                                          \
    UNROLL for (int i = 0; i < PARTS; i++) yes.part[i] = a.part[i] OP b.part[i]; \
    return yes;                                                                  \
  }
  NANOCHAT_COMPARISON(<)
  NANOCHAT_COMPARISON(>)
  NANOCHAT_COMPARISON(==)
#undef NANOCHAT_COMPARISON
};

using f32x16 = Lanes<float>;
using i32x16 = Lanes<int32_t>;
using u32x16 = Lanes<uint32_t>;
using u16x16 = Lanes<uint16_t>;
using i8x16 = Lanes<int8_t>;

// a where yes is -1, b where it is 0.
template <class V>
INLINE V pick(i32x16 yes, V a, V b) {
  UNROLL for (int i = 0; i < PARTS; i++) a.part[i] = yes.part[i] ? a.part[i] : b.part[i];
  return a;
}

// The same numbers as another type.
template <class To, class From>
INLINE To convert(From x) {
  To same;
  UNROLL for (int i = 0; i < PARTS; i++) same.part[i] = __builtin_convertvector(x.part[i], typename To::Part);
  return same;
}

// Part by part: a copy of the whole would go by way of memory.
template <class V>
  requires(sizeof(V::part) > 0)
INLINE V load(const void* from) {
  V value;
  UNROLL for (int i = 0; i < PARTS; i++)
    value.part[i] = load<typename V::Part>(static_cast<const char*>(from) + i * sizeof(typename V::Part));
  return value;
}

template <class T>
INLINE void store(void* to, Lanes<T> value) {
  UNROLL for (int i = 0; i < PARTS; i++) store(static_cast<char*>(to) + i * sizeof(value.part[i]), value.part[i]);
}

template <class T>
INLINE Lanes<T> splat(T x) {
  Lanes<T> all;
  UNROLL for (int i = 0; i < PARTS; i++) {
    if constexpr (EACH == 8)
      all.part[i] = typename Lanes<T>::Part{x, x, x, x, x, x, x, x};
    else
      all.part[i] = typename Lanes<T>::Part{x, x, x, x};
  }
  return all;
}

#endif

}  // namespace nanochat
