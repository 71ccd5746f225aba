// Attention of a few queries over a sequence's blocks of keys and values.
//
// A block holds, for each key head, the keys of 16 tokens side by side in the lanes, then the values with their
// dimensions side by side. A step is 32 bits of each lane, as in a matrix: of a key one fp32 or a pair of bf16
// dimensions, of the values those of one token or of a pair. All scores come first, then their maximum, then weights
// and their sum, then the values; each by one chain in the order of the positions, so that a query's result is the
// same in any tile. A position after the query is never multiplied: what lies there may be anything.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "precision.h"

namespace nanochat {

constexpr int BLOCK = 16;  // tokens
constexpr int SLICE = 2;   // vectors of a value come in twos
constexpr int VECTOR_BYTES = 64;
#if defined(NANOCHAT_AVX512)
constexpr int SUMS = 8;          // vectors of sums that keep the units busy
constexpr int LEAST = SLICE;     // vectors of a value at a time
constexpr int TILE_QUERIES = 8;
#else
constexpr int SUMS = 4;
constexpr int LEAST = 1;
constexpr int TILE_QUERIES = 4;
#endif

// Sizes of the cache of one layer.
struct Layout {
  int kv_heads, head_dim, steps, vectors;  // of a key, of a value
  size_t keys, row, head, block;           // bytes: the keys of a head, a step of its values, a head, a block

  template <class C>
  static Layout of(int kv_heads, int head_dim) {
    Layout l;
    l.kv_heads = kv_heads, l.head_dim = head_dim;
    l.steps = head_dim / C::INPUTS, l.vectors = (head_dim + SLICE * LANES - 1) / (SLICE * LANES) * SLICE;
    l.keys = size_t(l.steps) * VECTOR_BYTES, l.row = size_t(l.vectors) * VECTOR_BYTES;
    l.head = l.keys + size_t(BLOCK / C::INPUTS) * l.row;
    l.block = size_t(kv_heads) * l.head;
    return l;
  }
};

// One token's key and value go to `slot` of a head of a block.
template <class C>
void write_token(const Layout& l, char* head, int slot, const float* key, const float* value) {
  constexpr int PER = C::INPUTS;
  auto* keys = reinterpret_cast<typename C::Number*>(head) + slot * PER;
  auto* values = reinterpret_cast<typename C::Number*>(head + l.keys + size_t(slot / PER) * l.row) + slot % PER;
  for (int d = 0; d < l.head_dim; d += LANES) {
    int count = std::min(LANES, l.head_dim - d);
    typename C::Number k[LANES], v[LANES];
    C::put(k, load_some(key + d, count)), C::put(v, load_some(value + d, count));
    for (int i = 0; i < count; i += PER) std::memcpy(keys + (d + i) * BLOCK, k + i, 4);
    for (int i = 0; i < count; i++) values[(d + i) * PER] = v[i];
  }
}

// Scores of QUERIES queries and BLOCKS blocks.
template <class C, int QUERIES, int BLOCKS>
void scores(const Layout& l, const char* const* queries, const char* const* heads, const char* const* next, float* out,
            size_t stride) {
  f32x16 sums[QUERIES][BLOCKS] = {};
  for (int i = 0; i < l.steps; i++) {
    i32x16 keys[BLOCKS];
    UNROLL for (int n = 0; n < BLOCKS; n++) {
      keys[n] = load<i32x16>(heads[n] + size_t(i) * VECTOR_BYTES);
      prefetch_far(next[n] + size_t(i) * VECTOR_BYTES);
    }
    UNROLL for (int q = 0; q < QUERIES; q++) {
      UNROLL for (int n = 0; n < BLOCKS; n++) sums[q][n] = C::dot_row(sums[q][n], keys[n], queries[q], i);
    }
  }
  UNROLL for (int q = 0; q < QUERIES; q++) {
    UNROLL for (int n = 0; n < BLOCKS; n++) store(out + size_t(q) * stride + n * BLOCK, sums[q][n]);
  }
}

// Turns the scores of positions 0 ... last into weights, as numbers of the cache, and returns their sum. Behind them in
// the last block is next to nothing (1e-38), which no sum of 1 or more notices.
template <class C>
float weigh(float* at, int last) {
  auto* weights = reinterpret_cast<typename C::Number*>(at);
  int full = (last + 1) / BLOCK * BLOCK;
  i32x16 valid = lane_numbers() < splat(int32_t(last + 1 - full));
  f32x16 most = splat(-INFINITY);
  for (int t = 0; t < full; t += BLOCK) most = larger(load<f32x16>(at + t), most);
  if (full <= last) {
    f32x16 edge = pick(valid, load<f32x16>(at + full), splat(-INFINITY));
    store(at + full, edge);
    most = larger(edge, most);
  }
  f32x16 top = splat(largest(most)), total = {};
  for (int t = 0; t <= last; t += BLOCK) {
    f32x16 weight = exp_negative(load<f32x16>(at + t) - top);
    total += weight;
    C::put(weights + t, weight);
  }
  return sum(total);
}

// Adds weight * value of steps [from, to) to VECTORS vectors from `vector` on; sums: QUERIES x VECTORS.
// keep: the bits of a step's values that count.
template <class C, int QUERIES, int VECTORS>
void mix(const Layout& l, const float* weights, size_t stride, const char* const* heads, int vector, int from, int to,
         int32_t keep, f32x16* sums) {
  constexpr int STEPS = BLOCK / C::INPUTS;
  f32x16 mine[QUERIES][VECTORS];
  UNROLL for (int i = 0; i < QUERIES * VECTORS; i++) mine[i / VECTORS][i % VECTORS] = sums[i];
  for (int i = from; i < to;) {
    int end = std::min(to, (i / STEPS + 1) * STEPS);
    const char* value = heads[i / STEPS] + l.keys + size_t(vector) * VECTOR_BYTES + size_t(i % STEPS) * l.row;
    const char* later = heads[i / STEPS + 2] + l.keys + size_t(vector) * VECTOR_BYTES;
    for (; i < end; i++, value += l.row, later += l.row) {
      i32x16 v[VECTORS];
      UNROLL for (int n = 0; n < VECTORS; n++) {
        v[n] = load<i32x16>(value + n * VECTOR_BYTES) & splat(keep);
        prefetch_far(later + n * VECTOR_BYTES);
      }
      UNROLL for (int q = 0; q < QUERIES; q++) {
        i32x16 weight = spread(weights + size_t(q) * stride + i);
        UNROLL for (int n = 0; n < VECTORS; n++) mine[q][n] = C::dot(mine[q][n], v[n], weight);
      }
    }
  }
  UNROLL for (int i = 0; i < QUERIES * VECTORS; i++) sums[i] = mine[i / VECTORS][i % VECTORS];
}

// One query of a tile: its vector, ready for the keys; its position; where the result goes.
struct Query {
  const char* vector;
  int position;
  float* out;
};

// QUERIES queries, in order of position. heads: this head in each block of the sequence, and two more at the end.
// room: QUERIES x stride floats for scores, stride at least the last position rounded up to eight blocks.
template <class C, int QUERIES>
void attend(const Layout& l, const Query* queries, const char* const* heads, float* room, size_t stride) {
  constexpr int WIDE = SUMS / QUERIES;  // blocks at a time: enough sums to keep the units busy
  const char* vectors[QUERIES];
  for (int q = 0; q < QUERIES; q++) vectors[q] = queries[q].vector;
  int blocks = queries[QUERIES - 1].position / BLOCK + 1, n = 0;
  for (; n + WIDE <= blocks; n += WIDE) {
    const char* next[WIDE];
    for (int i = 0; i < WIDE; i++) next[i] = n + WIDE + i < blocks ? heads[n + WIDE + i] : heads[i] + l.keys;
    scores<C, QUERIES, WIDE>(l, vectors, heads + n, next, room + n * BLOCK, stride);
  }
  for (; n < blocks; n++) scores<C, QUERIES, 1>(l, vectors, heads + n, heads + n, room + n * BLOCK, stride);

  float totals[QUERIES];
  for (int q = 0; q < QUERIES; q++) totals[q] = weigh<C>(room + size_t(q) * stride, queries[q].position);

  constexpr int PER = C::INPUTS;
  int common = (queries[0].position + 1) / PER, vector = 0;
  auto mixed = [&]<int VECTORS>() {
    f32x16 sums[QUERIES * VECTORS] = {};
    mix<C, QUERIES, VECTORS>(l, room, stride, heads, vector, 0, common, -1, sums);
    for (int q = 0; q < QUERIES; q++) {
      f32x16* mine = sums + q * VECTORS;
      const float* weights = room + size_t(q) * stride;
      int end = (queries[q].position + 1) / PER;
      mix<C, 1, VECTORS>(l, weights, stride, heads, vector, common, end, -1, mine);
      if ((queries[q].position + 1) % PER)  // the other token of the pair is after the query
        mix<C, 1, VECTORS>(l, weights, stride, heads, vector, end, end + 1, 0xffff, mine);
      for (int n = 0; n < VECTORS; n++) {
        int first = (vector + n) * LANES, count = std::min(LANES, l.head_dim - first);
        if (count > 0) store_some(queries[q].out + first, mine[n] / splat(totals[q]), count);
      }
    }
    vector += VECTORS;
  };
  if constexpr (8 * QUERIES <= SUMS)
    while (vector + 8 <= l.vectors) mixed.template operator()<8>();
  if constexpr (4 * QUERIES <= SUMS)
    while (vector + 4 <= l.vectors) mixed.template operator()<4>();
  if constexpr (2 * QUERIES <= SUMS && LEAST == 1)
    while (vector + 2 <= l.vectors) mixed.template operator()<2>();
  while (vector < l.vectors) mixed.template operator()<LEAST>();
}

// Any number of queries of one sequence and head, in order of position.
template <class C>
void attend_all(const Layout& l, const std::vector<Query>& queries, const char* const* heads, float* room,
                size_t stride) {
  size_t at = 0, left = queries.size();
  for (; left >= TILE_QUERIES; at += TILE_QUERIES, left -= TILE_QUERIES)
    attend<C, TILE_QUERIES>(l, &queries[at], heads, room, stride);
  if (left & 4) attend<C, 4>(l, &queries[at], heads, room, stride), at += 4;
  if (left & 2) attend<C, 2>(l, &queries[at], heads, room, stride), at += 2;
  if (left & 1) attend<C, 1>(l, &queries[at], heads, room, stride);
}

}  // namespace nanochat
