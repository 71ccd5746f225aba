// What a training step on a CPU does between its matrix products, in bf16: each function goes over its rows once.
//
// All sums are inside one row and in fp32, so no result depends on the number of threads. Threads are OpenMP's, because
// torch's products use them: a second pool beside it would fight for the cores. Widths and head sizes are multiples of
// 16; nanochat/native.py checks that.
//
// B rows of T tokens, C width, H query heads, K key heads, G = H / K, D head size, V vocabulary

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "../engine/native/simd.h"

using namespace nanochat;

namespace {

using bf16 = uint16_t;
constexpr float EPS = 1.1920929e-7f;  // as nanochat/model.py
constexpr float CAP = 15.0f;          // as nanochat/loss.py; soft_cap of simd.h has the same

INLINE f32x16 wide(u16x16 x) { return (f32x16)(convert<u32x16>(x) << 16); }
INLINE f32x16 get(const bf16* from) { return wide(load<u16x16>(from)); }
INLINE void put(bf16* to, f32x16 x) { store(to, to_bf16(x)); }
INLINE float number(bf16 x) {
  uint32_t bits = uint32_t(x) << 16;
  return load<float>(&bits);
}
INLINE f32x16 positive(f32x16 x) { return pick(x < splat(0.0f), splat(0.0f), x); }  // NaN stays NaN

// Two sums side by side hide the latency of an addition.
template <class Term>
INLINE float sum_over(int count, Term term) {
  f32x16 sums[2] = {};
  int i = 0;
  for (; i + 2 * LANES <= count; i += 2 * LANES) {
    sums[0] = term(i, sums[0]);
    sums[1] = term(i + LANES, sums[1]);
  }
  if (i < count) sums[0] = term(i, sums[0]);
  return sum(sums[0] + sums[1]);
}

INLINE float norm_factor(const bf16* x, int count) {
  float square = sum_over(count, [=](int i, f32x16 s) { return fma(get(x + i), get(x + i), s); });
  return 1.0f / std::sqrt(square / float(count) + EPS);
}

// Columns [first, end) of a row of scores take part. Those outside get 0.
INLINE f32x16 inside(f32x16 x, int at, int first, int end, float outside) {
  if (at >= first && at + LANES <= end) return x;
  i32x16 column = lane_numbers() + splat(at);
  return pick(column < splat(first), splat(outside), pick(column < splat(end), x, splat(outside)));
}

}  // namespace

extern "C" {

// x (rows, C) -> y = x / rms(x).
void nanochat_norm(const bf16* x, bf16* y, int64_t rows, int width, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t row = 0; row < rows; row++) {
    const bf16* from = x + row * width;
    f32x16 factor = splat(norm_factor(from, width));
    for (int i = 0; i < width; i += LANES) put(y + row * width + i, get(from + i) * factor);
  }
}

// d_x = rest + what d_y, the derivative by the norm of x, is by x. d_x may be d_y or rest; rest may be null.
void nanochat_norm_back(const bf16* x, const bf16* d_y, const bf16* rest, bf16* d_x, int64_t rows, int width,
                        int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t row = 0; row < rows; row++) {
    const bf16 *at = x + row * width, *back = d_y + row * width;
    float factor = norm_factor(at, width);
    float along = sum_over(width, [=](int i, f32x16 s) { return fma(get(at + i), get(back + i), s); });
    f32x16 scale = splat(factor), less = splat(-along * factor * factor * factor / float(width));
    for (int i = 0; i < width; i += LANES) {
      f32x16 d = fma(get(at + i), less, get(back + i) * scale);
      put(d_x + row * width + i, rest ? d + get(rest + row * width + i) : d);
    }
  }
}

// Rows of the embedding, rounded to bf16: x (rows, C).
void nanochat_embed(const float* weight, const int64_t* tokens, bf16* x, int64_t rows, int width, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t row = 0; row < rows; row++)
    for (int i = 0; i < width; i += LANES)
      put(x + row * width + i, load<f32x16>(weight + tokens[row] * width + i));
}

// d_weight[token] += d_x[row], in the order of the rows. A token belongs to one thread.
void nanochat_embed_back(const bf16* d_x, const int64_t* tokens, float* d_weight, int64_t rows, int width,
                         int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int owner = 0; owner < threads; owner++)
    for (int64_t row = 0; row < rows; row++) {
      if (tokens[row] % threads != owner) continue;
      float* to = d_weight + tokens[row] * width;
      for (int i = 0; i < width; i += LANES) store(to + i, load<f32x16>(to + i) + get(d_x + row * width + i));
    }
}

// Turns and norms queries and keys. qkv (B, T, (H + 2 K) D) -> q (B, K, T, G, D), k and v (B, K, T, D);
// factors (B, T, H + K): what each head was multiplied with by its norm. angles: cos and sin, each (T, D / 2).
void nanochat_split_heads(const bf16* qkv, const float* cosine, const float* sine, bf16* q, bf16* k, bf16* v,
                          float* factors, const int32_t* sizes) {
  const int rows = sizes[0], tokens = sizes[1], key_heads = sizes[2], group = sizes[3], size = sizes[4];
  const int heads = key_heads * group, half = size / 2;
#pragma omp parallel for num_threads(sizes[5]) schedule(static)
  for (int64_t at = 0; at < int64_t(rows) * tokens; at++) {
    const int64_t row = at / tokens, token = at % tokens;
    const bf16* from = qkv + at * (heads + 2 * key_heads) * size;
    const float *c = cosine + token * half, *s = sine + token * half;
    for (int head = 0; head < heads + 2 * key_heads; head++, from += size) {
      const bool query = head < heads;
      const int one = query ? head / group : (head - heads) % key_heads;
      const int64_t place = (row * key_heads + one) * tokens + token;
      bf16* to = query ? q + (place * group + head % group) * size : (head < heads + key_heads ? k : v) + place * size;
      if (head >= heads + key_heads) {
        std::memcpy(to, from, size_t(size) * 2);
        continue;
      }
      // The length does not change when pairs are turned.
      float factor = norm_factor(from, size);
      factors[at * (heads + key_heads) + head] = factor;
      for (int i = 0; i < half; i += LANES) {
        f32x16 a = get(from + i) * splat(factor), b = get(from + i + half) * splat(factor);
        f32x16 cos = load<f32x16>(c + i), sin = load<f32x16>(s + i);
        put(to + i, fma(a, cos, b * sin));
        put(to + i + half, fma(b, cos, splat(0.0f) - a * sin));
      }
    }
  }
}

// The derivatives by q, k and v, back to that by qkv. q and k are those that nanochat_split_heads made.
void nanochat_split_heads_back(const bf16* q, const bf16* k, const bf16* d_q, const bf16* d_k, const bf16* d_v,
                               const float* cosine, const float* sine, const float* factors, bf16* d_qkv,
                               const int32_t* sizes) {
  const int rows = sizes[0], tokens = sizes[1], key_heads = sizes[2], group = sizes[3], size = sizes[4];
  const int heads = key_heads * group, half = size / 2;
#pragma omp parallel for num_threads(sizes[5]) schedule(static)
  for (int64_t at = 0; at < int64_t(rows) * tokens; at++) {
    const int64_t row = at / tokens, token = at % tokens;
    bf16* to = d_qkv + at * (heads + 2 * key_heads) * size;
    const float *c = cosine + token * half, *s = sine + token * half;
    for (int head = 0; head < heads + 2 * key_heads; head++, to += size) {
      const bool query = head < heads, key = !query && head < heads + key_heads;
      const int one = query ? head / group : (head - heads) % key_heads;
      const int64_t place = (row * key_heads + one) * tokens + token;
      const int64_t own = (query ? place * group + head % group : place) * size;
      if (!query && !key) {
        std::memcpy(to, d_v + own, size_t(size) * 2);
        continue;
      }
      const bf16 *y = (query ? q : k) + own, *back = (query ? d_q : d_k) + own;
      f32x16 factor = splat(factors[at * (heads + key_heads) + head]);
      float along = sum_over(size, [=](int i, f32x16 x) { return fma(get(y + i), get(back + i), x); });
      f32x16 less = splat(-along / float(size));
      for (int i = 0; i < half; i += LANES) {
        f32x16 a = fma(get(y + i), less, get(back + i)) * factor;
        f32x16 b = fma(get(y + i + half), less, get(back + i + half)) * factor;
        f32x16 cos = load<f32x16>(c + i), sin = load<f32x16>(s + i);
        put(to + i, fma(a, cos, splat(0.0f) - b * sin));
        put(to + i + half, fma(a, sin, b * cos));
      }
    }
  }
}

// (B, K, T, S) -> (B, T, K, S); `back` the other way.
void nanochat_swap(const bf16* x, bf16* y, const int32_t* sizes) {
  const int64_t rows = sizes[0], outer = sizes[1], inner = sizes[2], size = sizes[3];
#pragma omp parallel for num_threads(sizes[4]) schedule(static)
  for (int64_t at = 0; at < rows * inner; at++) {
    const int64_t row = at / inner, i = at % inner;
    for (int64_t o = 0; o < outer; o++)
      std::memcpy(y + (at * outer + o) * size, x + ((row * outer + o) * inner + i) * size, size_t(size) * 2);
  }
}

// Softmax of a block of scores, in place: (B K, R G, E), where row r stands at token start + r / G and sees the columns
// from first[its token] (B, T) up to itself; first null: from 0. Columns it does not see become 0.
void nanochat_softmax(bf16* scores, const int32_t* first, float scale, const int32_t* sizes) {
  const int key_heads = sizes[0], tokens = sizes[1], start = sizes[2], group = sizes[3], columns = sizes[5];
  const int64_t block = sizes[4];
#pragma omp parallel for num_threads(sizes[7]) schedule(static)
  for (int64_t at = 0; at < sizes[6] * block; at++) {
    const int token = start + int(at % block) / group, end = token + 1;
    const int begin = first ? first[at / block / key_heads * tokens + token] : 0;
    bf16* row = scores + at * columns;
    const int low = begin / LANES * LANES, high = std::min((end + LANES - 1) / LANES * LANES, columns);
    f32x16 most = splat(-3e38f);
    for (int i = low; i < high; i += LANES) most = larger(inside(get(row + i), i, begin, end, -3e38f), most);
    f32x16 base = splat(-largest(most) * scale), factor = splat(scale), total = {};
    for (int i = low; i < high; i += LANES)
      total += inside(exp_negative(fma(get(row + i), factor, base)), i, begin, end, 0.0f);
    f32x16 share = splat(1.0f / sum(total));
    for (int i = 0; i < low; i += LANES) put(row + i, splat(0.0f));
    for (int i = low; i < high; i += LANES)
      put(row + i, inside(exp_negative(fma(get(row + i), factor, base)), i, begin, end, 0.0f) * share);
    for (int i = high; i < columns; i += LANES) put(row + i, splat(0.0f));
  }
}

// d_p -> derivative by the scores, in place; p: what nanochat_softmax made of them.
void nanochat_softmax_back(const bf16* p, bf16* d_p, float scale, const int32_t* sizes) {
  const int start = sizes[2], group = sizes[3], columns = sizes[5];
  const int64_t block = sizes[4];
#pragma omp parallel for num_threads(sizes[7]) schedule(static)
  for (int64_t at = 0; at < sizes[6] * block; at++) {
    const int end = std::min((start + int(at % block) / group + LANES) / LANES * LANES, columns);
    const bf16* chance = p + at * columns;
    bf16* d = d_p + at * columns;
    f32x16 mean = splat(sum_over(end, [=](int i, f32x16 s) { return fma(get(chance + i), get(d + i), s); }));
    for (int i = 0; i < end; i += LANES) put(d + i, (get(d + i) - mean) * get(chance + i) * splat(scale));
    for (int i = end; i < columns; i += LANES) put(d + i, splat(0.0f));
  }
}

// x -> max(x, 0) in place, and its square.
void nanochat_relu(bf16* x, bf16* square, int64_t count, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t i = 0; i < count; i += LANES) {
    f32x16 r = positive(get(x + i));
    put(x + i, r);
    put(square + i, r * r);
  }
}

// d: the derivative by the square of r, which becomes that by r; and the square once more.
void nanochat_relu_back(const bf16* r, bf16* d, bf16* square, int64_t count, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t i = 0; i < count; i += LANES) {
    f32x16 x = get(r + i);
    put(square + i, x * x);
    put(d + i, get(d + i) * (x + x));
  }
}

// Cross-entropy of a chunk of soft-capped logits (n, V): nats (n,), and logits become a derivative that each row's share
// (n,) has still to be multiplied with: (e^capped - one hot * sum) * (1 - tanh^2), shares 1 / sum. Where the target is
// -1, nats and share are 0. The cap bounds e^capped, so no maximum is taken off first.
void nanochat_cross_entropy(bf16* logits, const int64_t* targets, float* nats, float* shares, int64_t rows,
                            int vocabulary, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t row = 0; row < rows; row++) {
    bf16* at = logits + row * vocabulary;
    const int64_t target = std::max<int64_t>(targets[row], 0);
    float chosen = soft_cap(splat(number(at[target])))[0];
    auto slope = [](f32x16 capped) {
      f32x16 tanh = capped * splat(1.0f / CAP);
      return fma(tanh, splat(0.0f) - tanh, splat(1.0f));
    };
    auto exponent = [](f32x16 x) {
      Power e = power(x);
      return fma(e.two_to_n, e.rest, e.two_to_n);
    };
    f32x16 total = {};
    int i = 0;
    for (; i + LANES <= vocabulary; i += LANES) {
      f32x16 capped = soft_cap(get(at + i)), e = exponent(capped);
      total += e;
      put(at + i, e * slope(capped));
    }
    float rest = 0.0f;
    for (; i < vocabulary; i++) {
      f32x16 capped = soft_cap(splat(number(at[i]))), e = exponent(capped);
      rest += e[0];
      at[i] = to_bf16(e * slope(capped))[0];
    }
    float all = sum(total) + rest;
    f32x16 capped = splat(chosen);
    at[target] = to_bf16((exponent(capped) - splat(all)) * slope(capped))[0];
    nats[row] = targets[row] < 0 ? 0.0f : std::log(all) - chosen;
    shares[row] = targets[row] < 0 ? 0.0f : 1.0f / all;
  }
}

// sum += x, and x is fp32 or bf16 numbers.
void nanochat_add(float* sum, const bf16* x, int64_t count, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t i = 0; i < count; i += LANES) store(sum + i, load<f32x16>(sum + i) + get(x + i));
}

// (rows, C) times a share of each row, which is what brings unnormed derivatives to their size.
void nanochat_scale_rows(const bf16* x, const float* shares, bf16* y, int64_t rows, int width, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t row = 0; row < rows; row++)
    for (int i = 0; i < width; i += LANES) put(y + row * width + i, get(x + row * width + i) * splat(shares[row]));
}

}  // extern "C"
