// The three ways to hold a matrix and the rows that meet it: fp32, bf16 and int8.
//
// A matrix lies in panels of 32 columns (outputs). A step is 32 bits of each column, so a panel is a run of 128-byte
// steps along the inputs: 1 fp32, a pair of bf16, or 4 int8 of each of its columns. A row lies in the same units, so
// that the 32 bits of a step are spread over all lanes and meet 16 columns at once. Missing columns and inputs are 0.
#pragma once

#include <algorithm>

#include "memory.h"
#include "simd.h"

namespace nanochat {

constexpr int PANEL = 32;        // columns
constexpr int STEP_BYTES = 128;  // of a panel

// Rows made ready for a matrix.
struct Operand {
  const char* rows;
  size_t stride;  // bytes from row to row
};

// A stride over which rows fall on different sets of the first-level cache: an odd number of lines.
INLINE size_t spread_stride(size_t bytes) { return ((bytes + 63) / 64 | 1) * 64; }

struct Fp32 {
  static constexpr int INPUTS = 1;  // of a column in a step
  static constexpr int PADDED = 1;  // inputs come in multiples of it
  using Cache = Fp32;               // how keys and values are held
  using Number = float;
  static size_t row_bytes(int inputs) { return size_t(inputs) * 4; }

  static INLINE f32x16 dot(f32x16 sum, i32x16 weights, i32x16 row) { return fma((f32x16)weights, (f32x16)row, sum); }

  // Step i of a row meets weights.
  static INLINE f32x16 dot_row(f32x16 sum, i32x16 weights, const char* row, int i) {
    return dot(sum, weights, spread(row + i * 4));
  }

  static INLINE void put(Number* to, f32x16 x) { store(to, x); }

  static void fill(char* row, const float* from, int inputs, float scale) {
    float* to = reinterpret_cast<float*>(row);
    for (int i = 0; i < inputs; i++) to[i] = from[i] * scale;
  }
};

// Where pairs of bf16 have to be taken apart, those of a row are held as floats: once is enough.
struct Bf16 {
  static constexpr int INPUTS = 2;
  static constexpr int PADDED = 2;
  using Cache = Bf16;
  using Number = uint16_t;
#if defined(NANOCHAT_AVX512)
  static constexpr int ROW_BYTES = 2;  // of an input of a row
#else
  static constexpr int ROW_BYTES = 4;
#endif
  static size_t row_bytes(int inputs) { return size_t(inputs + 31) / 32 * 32 * ROW_BYTES; }

  static INLINE f32x16 dot(f32x16 sum, i32x16 weights, i32x16 row) { return dot_bf16(sum, weights, row); }

  static INLINE void put(Number* to, f32x16 x) { store(to, to_bf16(x)); }

  static INLINE void put_row(char* to, f32x16 x) {
    if constexpr (ROW_BYTES == 2)
      store(to, to_bf16(x));
    else
      store(to, round_bf16(x) << 16);
  }

  // The pair of step i of a row meets pairs of weights.
  static INLINE f32x16 dot_row(f32x16 sum, i32x16 weights, const char* row, int i) {
    if constexpr (ROW_BYTES == 2) {
      return dot(sum, weights, spread(row + i * 4));
    } else {
      f32x16 first = (f32x16)spread(row + i * 8), second = (f32x16)spread(row + i * 8 + 4);
      return fma(even(weights), first, fma(odd(weights), second, sum));
    }
  }

  static void fill(char* row, const float* from, int inputs, float scale) {
    int i = 0;
    for (; i + LANES <= inputs; i += LANES) put_row(row + i * ROW_BYTES, load<f32x16>(from + i) * splat(scale));
    if (i < inputs) put_row(row + i * ROW_BYTES, load_some(from + i, inputs - i) * splat(scale));
  }
};

// Weights are whole numbers times a scale of their column, stored plus FLIP where the multiplier wants one side
// unsigned; rows are whole numbers times a scale of each 128 inputs, since ReLU^2 leaves a few that are far larger than
// the rest. FLIP adds as many times a row's sum to every column, so each group starts from that number below zero.
// A row is its int8, then the scales of its groups, then the starts. The last group may be half as long.
struct Int8 {
  static constexpr int INPUTS = 4;
  static constexpr int PADDED = 64;
  static constexpr int GROUP = 128;
  static constexpr int FLIP = UNSIGNED_WEIGHTS ? 128 : 0;
  using Cache = Bf16;
  static int bytes(int inputs) { return (inputs + PADDED - 1) / PADDED * PADDED; }
  static int groups(int inputs) { return (inputs + GROUP - 1) / GROUP; }
  static size_t row_bytes(int inputs) { return size_t(bytes(inputs) + groups(inputs) * 8); }

  static void fill(char* row, const float* from, int inputs, float scale) {
    float* scales = reinterpret_cast<float*>(row + bytes(inputs));
    int32_t* starts = reinterpret_cast<int32_t*>(scales + groups(inputs));
    for (int at = 0, g = 0; at < inputs; at += GROUP, g++) {
      f32x16 x[GROUP / LANES] = {};
      int left = std::min(GROUP, inputs - at);
      if (left == GROUP)
        UNROLL for (int v = 0; v < GROUP / LANES; v++) x[v] = load<f32x16>(from + at + v * LANES) * splat(scale);
      else
        for (int i = 0; i < left; i += LANES)
          x[i / LANES] = load_some(from + at + i, std::min(LANES, left - i)) * splat(scale);
      fill_group(row + at, x, std::min(GROUP, bytes(inputs) - at) / LANES, scales + g, starts + g);
    }
  }

  // The largest magnitude is found among the bits as integers: there NaN is above all numbers, makes the scale NaN
  // and so the result; a comparison of floats would lose it.
  static INLINE void fill_group(char* to, const f32x16* x, int count, float* scale, int32_t* start) {
    i32x16 most = {}, total = {};
    UNROLL for (int v = 0; v < GROUP / LANES; v++) {
      i32x16 bits = (i32x16)x[v] & splat(int32_t(0x7fffffff));
      most = larger(bits, most);
    }
    int32_t top = largest(most);
    float peak = load<float>(&top);
    *scale = peak / 127.0f;
    float inverse = peak > 1e-30f ? 127.0f / peak : 0.0f;
    for (int v = 0; v < count; v++) {
      f32x16 shifted = fma(x[v], splat(inverse), splat(ROUND));
      i32x16 whole = (i32x16)shifted - splat(int32_t(0x4b400000));
      total += whole;
      store(to + v * LANES, convert<i8x16>(whole));
    }
    *start = -FLIP * sum(total);
  }
};

// A packed matrix. `scales`: of the columns, int8 only.
struct Matrix {
  int inputs = 0, columns = 0, steps = 0, panels = 0;
  size_t panel_bytes = 0;
  Buffer weights, scales;

  template <class P>
  static Matrix sized(int inputs, int columns) {
    Matrix m;
    m.inputs = inputs, m.columns = columns;
    m.steps = (inputs + P::PADDED - 1) / P::PADDED * P::PADDED / P::INPUTS;
    m.panels = (columns + PANEL - 1) / PANEL;
    m.panel_bytes = size_t(m.steps) * STEP_BYTES;
    m.weights = Buffer(m.bytes());
    bool padded = m.steps * P::INPUTS != inputs || m.panels * PANEL != columns;
    if (padded) std::memset(m.weights.as(), 0, m.bytes());
    if (std::is_same_v<P, Int8>) {
      m.scales = Buffer(size_t(m.panels) * PANEL * sizeof(float));
      std::memset(m.scales.as(), 0, m.scales.bytes());
    }
    return m;
  }
  size_t bytes() const { return size_t(panels) * panel_bytes; }
};

// Columns [from, to) of a source matrix (outputs, inputs), row-major, go to columns first + from ... of `m`.
// Element: 32, 16 or 8 bits as the matrix holds them; `flip` 128 turns int8 into int8 + 128.
template <class Element>
void pack(const Matrix& m, const Element* source, int first, int from, int to, Element flip) {
  constexpr int PER = 4 / int(sizeof(Element));
  for (int row = from; row < to; row++) {
    int column = first + row;
    const Element* read = source + size_t(row) * size_t(m.inputs);
    char* write = m.weights.as() + size_t(column / PANEL) * m.panel_bytes + size_t(column % PANEL) * 4;
    int k = 0;
    for (; k + PER <= m.inputs; k += PER, write += STEP_BYTES) {
      Element unit[PER];
      for (int i = 0; i < PER; i++) unit[i] = Element(read[k + i] ^ flip);
      std::memcpy(write, unit, 4);
    }
    if (k < m.inputs) {
      Element unit[PER] = {};
      for (int i = 0; k + i < m.inputs; i++) unit[i] = Element(read[k + i] ^ flip);
      std::memcpy(write, unit, 4);
    }
  }
}

}  // namespace nanochat
