// Attention of a few queries over a sequence's blocks of keys and values.
//
// A block holds, for each key head, the keys of 16 tokens side by side in the lanes (pairs of dimensions, so that a
// bf16 pair fills a lane), then the values token by token. All scores come first, then their maximum, then weights and
// their sum, then the values; each by one chain in the order of the positions, so that a query's result is the same in
// any tile. A position after the query is never multiplied: what lies there may be anything.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "simd.h"

namespace nanochat {

constexpr int BLOCK = 16;       // tokens
constexpr int SLICE = 32;       // dimensions of a value at a time
constexpr int TILE_QUERIES = 8;

// A pair of vectors in the cache: 32 numbers. Order inside is the cache's own; `spread_out` undoes it.
template <class Element>
struct Pair;

template <>
struct Pair<uint16_t> {
  static constexpr int BYTES = 64;
  f32x16 a, b;  // of a key: even and odd dimension; of a value: even and odd dimensions of a slice
  explicit INLINE Pair(const char* at) {
    i32x16 both = load<i32x16>(at);
    a = even(both), b = odd(both);
  }
  static INLINE void spread_out(float* to, f32x16 a, f32x16 b) {
    float x[LANES], y[LANES];
    store(x, a), store(y, b);
    for (int i = 0; i < LANES; i++) to[2 * i] = x[i], to[2 * i + 1] = y[i];
  }
};

template <>
struct Pair<float> {
  static constexpr int BYTES = 128;
  f32x16 a, b;
  explicit INLINE Pair(const char* at) : a(load<f32x16>(at)), b(load<f32x16>(at + 64)) {}
  static INLINE void spread_out(float* to, f32x16 a, f32x16 b) { store(to, a), store(to + LANES, b); }
};

// Sizes of the cache of one layer.
struct Layout {
  int kv_heads, head_dim, slices;
  size_t pair, keys, head, block;  // bytes: a pair of vectors, the keys of a head, a head, a block

  template <class Element>
  static Layout of(int kv_heads, int head_dim) {
    Layout l;
    l.kv_heads = kv_heads, l.head_dim = head_dim, l.slices = (head_dim + SLICE - 1) / SLICE;
    l.pair = Pair<Element>::BYTES;
    l.keys = size_t(head_dim / 2) * l.pair;
    l.head = l.keys + size_t(BLOCK * l.slices) * l.pair;
    l.block = size_t(kv_heads) * l.head;
    return l;
  }
};

// One token's key and value go to `slot` of a head of a block.
inline void write_token(const Layout& l, uint16_t*, char* head, int slot, const float* key, const float* value) {
  auto* keys = reinterpret_cast<uint16_t*>(head);
  auto* values = reinterpret_cast<uint16_t*>(head + l.keys) + slot * l.slices * SLICE;
  for (int d = 0; d < l.head_dim; d += LANES) {
    int count = l.head_dim - d < LANES ? l.head_dim - d : LANES;
    uint16_t half[LANES];
    store(half, to_bf16(load_some(key + d, count)));
    for (int i = 0; i < count; i += 2) std::memcpy(keys + ((d + i) / 2 * BLOCK + slot) * 2, half + i, 4);
    store(values + d, to_bf16(load_some(value + d, count)));
  }
  for (int d = (l.head_dim + LANES - 1) / LANES * LANES; d < l.slices * SLICE; d++) values[d] = 0;
}

inline void write_token(const Layout& l, float*, char* head, int slot, const float* key, const float* value) {
  float* keys = reinterpret_cast<float*>(head);
  float* values = reinterpret_cast<float*>(head + l.keys) + slot * l.slices * SLICE;
  for (int d = 0; d < l.head_dim; d++) keys[d * BLOCK + slot] = key[d], values[d] = value[d];
  for (int d = l.head_dim; d < l.slices * SLICE; d++) values[d] = 0;
}

// Scores of QUERIES queries and BLOCKS blocks: even and odd dimensions apart, then together.
template <class Element, int QUERIES, int BLOCKS>
void scores(const Layout& l, const float* const* queries, const char* const* heads, const char* const* next,
            float* out, size_t stride) {
  f32x16 a[QUERIES][BLOCKS] = {}, b[QUERIES][BLOCKS] = {};
  for (int i = 0; i < l.head_dim / 2; i++) {
    UNROLL for (int n = 0; n < BLOCKS; n++) {
      Pair<Element> key(heads[n] + size_t(i) * l.pair);
      prefetch_far(next[n] + size_t(i) * l.pair);
      UNROLL for (int q = 0; q < QUERIES; q++) {
        a[q][n] = fma((f32x16)spread(queries[q] + 2 * i), key.a, a[q][n]);
        b[q][n] = fma((f32x16)spread(queries[q] + 2 * i + 1), key.b, b[q][n]);
      }
    }
  }
  UNROLL for (int q = 0; q < QUERIES; q++) {
    UNROLL for (int n = 0; n < BLOCKS; n++) store(out + size_t(q) * stride + n * BLOCK, a[q][n] + b[q][n]);
  }
}

// Turns the scores of positions 0 ... last into weights, zeros behind them in the last block; returns their sum.
inline float weigh(float* at, int last) {
  constexpr i32x16 ORDER = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  int full = (last + 1) / BLOCK * BLOCK;
  i32x16 valid = ORDER < splat(int32_t(last + 1 - full));
  f32x16 most = splat(-INFINITY);
  for (int t = 0; t < full; t += BLOCK) most = larger(load<f32x16>(at + t), most);
  if (full <= last) {
    f32x16 edge = valid ? load<f32x16>(at + full) : splat(-INFINITY);
    store(at + full, edge);
    most = larger(edge, most);
  }
  f32x16 top = splat(largest(most)), total = {};
  for (int t = 0; t < full; t += BLOCK) {
    f32x16 weight = exp_negative(load<f32x16>(at + t) - top);
    total += weight;
    store(at + t, weight);
  }
  if (full <= last) {
    f32x16 weight = exp_negative(load<f32x16>(at + full) - top);
    total += weight;
    store(at + full, weight);
  }
  return sum(total);
}

// Adds weight * value of positions [from, to) to SLICES slices from `slice` on; sums: QUERIES x SLICES x 2 vectors.
template <class Element, int QUERIES, int SLICES>
void mix(const Layout& l, const float* weights, size_t stride, const char* const* heads, int slice, int from, int to,
         f32x16* sums) {
  f32x16 a[QUERIES][SLICES], b[QUERIES][SLICES];
  UNROLL for (int q = 0; q < QUERIES; q++) {
    UNROLL for (int s = 0; s < SLICES; s++) {
      a[q][s] = sums[(q * SLICES + s) * 2];
      b[q][s] = sums[(q * SLICES + s) * 2 + 1];
    }
  }
  size_t row = size_t(l.slices) * l.pair;
  for (int t = from; t < to;) {
    int end = std::min(to, (t / BLOCK + 1) * BLOCK);
    const char* value = heads[t / BLOCK] + l.keys + size_t(slice) * l.pair + size_t(t % BLOCK) * row;
    const char* later = heads[t / BLOCK + 2] + l.keys + size_t(slice) * l.pair;
    for (; t < end; t++, value += row, later += row) {
      f32x16 weight[QUERIES];
      UNROLL for (int q = 0; q < QUERIES; q++) weight[q] = (f32x16)spread(weights + size_t(q) * stride + t);
      UNROLL for (int s = 0; s < SLICES; s++) {
        Pair<Element> v(value + size_t(s) * l.pair);
        prefetch_far(later + size_t(s) * l.pair);
        UNROLL for (int q = 0; q < QUERIES; q++) {
          a[q][s] = fma(weight[q], v.a, a[q][s]);
          b[q][s] = fma(weight[q], v.b, b[q][s]);
        }
      }
    }
  }
  UNROLL for (int q = 0; q < QUERIES; q++) {
    UNROLL for (int s = 0; s < SLICES; s++) {
      sums[(q * SLICES + s) * 2] = a[q][s];
      sums[(q * SLICES + s) * 2 + 1] = b[q][s];
    }
  }
}

// One query of a tile: where its vector is, its position, where the result goes.
struct Query {
  const float* vector;
  int position;
  float* out;
};

// QUERIES queries, in order of position. heads: this head in each block of the sequence, and two more at the end.
// room: QUERIES x stride floats for scores, stride at least the last position rounded up to four blocks.
template <class Element, int QUERIES>
void attend(const Layout& l, const Query* queries, const char* const* heads, float* room, size_t stride) {
  constexpr int WIDE = QUERIES == 1 ? 4 : QUERIES == 2 ? 2 : 1;  // blocks at a time: enough sums to keep the units busy
  const float* vectors[QUERIES];
  for (int q = 0; q < QUERIES; q++) vectors[q] = queries[q].vector;
  int blocks = queries[QUERIES - 1].position / BLOCK + 1, n = 0;
  for (; n + WIDE <= blocks; n += WIDE) {
    const char* next[WIDE];
    for (int i = 0; i < WIDE; i++) next[i] = n + WIDE + i < blocks ? heads[n + WIDE + i] : heads[i] + l.keys;
    scores<Element, QUERIES, WIDE>(l, vectors, heads + n, next, room + n * BLOCK, stride);
  }
  for (; n < blocks; n++) scores<Element, QUERIES, 1>(l, vectors, heads + n, heads + n, room + n * BLOCK, stride);

  float totals[QUERIES];
  for (int q = 0; q < QUERIES; q++) totals[q] = weigh(room + size_t(q) * stride, queries[q].position);

  int common = queries[0].position + 1, slice = 0;
  auto mixed = [&]<int MANY>() {
    f32x16 sums[QUERIES * MANY * 2] = {};
    mix<Element, QUERIES, MANY>(l, room, stride, heads, slice, 0, common, sums);
    for (int q = 0; q < QUERIES; q++) {
      f32x16* mine = sums + q * MANY * 2;
      int end = queries[q].position + 1;
      if (end > common) mix<Element, 1, MANY>(l, room + size_t(q) * stride, stride, heads, slice, common, end, mine);
      for (int s = 0; s < MANY; s++) {
        float at[SLICE];
        Pair<Element>::spread_out(at, mine[2 * s], mine[2 * s + 1]);
        int first = (slice + s) * SLICE, count = std::min(SLICE, l.head_dim - first);
        for (int d = 0; d < count; d++) queries[q].out[first + d] = at[d] / totals[q];
      }
    }
    slice += MANY;
  };
  if constexpr (QUERIES == 1)
    while (slice + 4 <= l.slices) mixed.template operator()<4>();
  if constexpr (QUERIES <= 2)
    while (slice + 2 <= l.slices) mixed.template operator()<2>();
  while (slice < l.slices) mixed.template operator()<1>();
}

// Any number of queries of one sequence and head, in order of position.
template <class Element>
void attend_all(const Layout& l, const std::vector<Query>& queries, const char* const* heads, float* room,
                size_t stride) {
  size_t at = 0, left = queries.size();
  for (; left >= 8; at += 8, left -= 8) attend<Element, 8>(l, &queries[at], heads, room, stride);
  if (left & 4) attend<Element, 4>(l, &queries[at], heads, room, stride), at += 4;
  if (left & 2) attend<Element, 2>(l, &queries[at], heads, room, stride), at += 2;
  if (left & 1) attend<Element, 1>(l, &queries[at], heads, room, stride);
}

}  // namespace nanochat
