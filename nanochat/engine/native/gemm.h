// Rows times a packed matrix.
//
// A tile of rows and columns stays in registers while its inputs go by. Each sum is one chain over the inputs in order,
// whatever the tile's shape and whoever computes it: that is why a row's result never depends on its company.
#pragma once

#include <array>
#include <utility>

#include "precision.h"

namespace nanochat {

// What to ask memory for while computing: two lines a step, `gap` apart, moving on by `stride`.
struct Ahead {
  const char* at;
  size_t stride, gap;
};

#if defined(NANOCHAT_AVX512)
constexpr int MOST_ROWS = 14;  // x 2 vectors of sums, 2 of weights and 1 of the row: 31 of 32 registers
#else
constexpr int MOST_ROWS = 4;
#endif

// Hides from the compiler where a pointer came from: it would keep one of each row in memory instead of adding.
INLINE const char* opaque(const char* at) {
  asm("" : "+r"(at));
  return at;
}

constexpr int VECTORS = PANEL / LANES;  // vectors of a panel

template <class P, int ROWS>
struct Tile {
  // out: ROWS x VECTORS vectors.
  static void run(const Operand& a, const char* w, const Matrix& m, float* out, Ahead ahead) {
    f32x16 sums[ROWS][VECTORS] = {};
    for (int i = 0; i < m.steps; i++) {
      i32x16 b[VECTORS];
      UNROLL for (int v = 0; v < VECTORS; v++) b[v] = load<i32x16>(w + v * 64);
      prefetch_far(ahead.at);
      prefetch_far(ahead.at + ahead.gap);
      UNROLL for (int r = 0; r < ROWS; r++) {
        i32x16 x = spread(a.rows + r * a.stride + i * 4);
        UNROLL for (int v = 0; v < VECTORS; v++) sums[r][v] = P::dot(sums[r][v], b[v], x);
      }
      w += STEP_BYTES, ahead.at += ahead.stride;
    }
    UNROLL for (int r = 0; r < ROWS; r++) {
      UNROLL for (int v = 0; v < VECTORS; v++) store(out + (r * VECTORS + v) * LANES, sums[r][v]);
    }
  }
};

// Whole numbers within a group of inputs, floats across groups.
template <int ROWS>
struct Tile<Int8, ROWS> {
  static constexpr int STEPS = Int8::GROUP / Int8::INPUTS;

  static void run(const Operand& a, const char* w, const Matrix& m, float* out, Ahead ahead) {
    int groups = Int8::groups(m.inputs);
    f32x16 sums[ROWS][VECTORS] = {};
    for (int g = 0; g < groups; g++) {
      const char* row = opaque(a.rows + g * Int8::GROUP);
      const char* scales = opaque(a.rows + m.steps * Int8::INPUTS + g * 4);
      const char* starts = opaque(scales + groups * 4);
      int steps = std::min(STEPS, m.steps - g * STEPS);
      i32x16 whole[ROWS][VECTORS];
      UNROLL for (int r = 0; r < ROWS; r++) {
        i32x16 start = spread(starts + r * a.stride);
        UNROLL for (int v = 0; v < VECTORS; v++) whole[r][v] = start;
      }
      for (int i = 0; i < steps; i++) {
        i32x16 b[VECTORS];
        UNROLL for (int v = 0; v < VECTORS; v++) b[v] = load<i32x16>(w + v * 64);
        prefetch_far(ahead.at);
        prefetch_far(ahead.at + ahead.gap);
        UNROLL for (int r = 0; r < ROWS; r++) {
          i32x16 x = spread(row + r * a.stride + i * 4);
          UNROLL for (int v = 0; v < VECTORS; v++) whole[r][v] = dot_int8(whole[r][v], b[v], x);
        }
        w += STEP_BYTES, ahead.at += ahead.stride;
      }
      UNROLL for (int r = 0; r < ROWS; r++) {
        f32x16 scale = (f32x16)spread(scales + r * a.stride);
        UNROLL for (int v = 0; v < VECTORS; v++)
          sums[r][v] = fma(__builtin_convertvector(whole[r][v], f32x16), scale, sums[r][v]);
      }
    }
    UNROLL for (int r = 0; r < ROWS; r++) {
      UNROLL for (int v = 0; v < VECTORS; v++) store(out + (r * VECTORS + v) * LANES, sums[r][v]);
    }
  }
};

template <class P>
using TileRun = void (*)(const Operand&, const char*, const Matrix&, float*, Ahead);

template <class P, int... ROWS>
constexpr auto tile_row(std::integer_sequence<int, ROWS...>) {
  return std::array<TileRun<P>, sizeof...(ROWS)>{&Tile<P, ROWS + 1>::run...};
}

template <class P>
constexpr auto TILES = tile_row<P>(std::make_integer_sequence<int, MOST_ROWS>());

// How far ahead of its own stream a tile asks for memory. Found by trial on Zen 4, 1 to 14 rows: a tile of few rows is
// as fast as memory and is served best by the machine's own reading ahead, one of many rows computes meanwhile.
INLINE size_t distance(int rows) { return rows < 6 ? 1024 : 8192; }

// Where results go: of row r and column c to at + r * stride + c * size, in bytes.
struct Target {
  char* at;
  size_t stride, size;
  INLINE char* of(int row, int column) const { return at + size_t(row) * stride + size_t(column) * size; }
};

// Rows x the `count` panels from `panel` on. finish(to, column, low, high): 32 results of a row, from `column` on.
template <class P, class Finish>
void multiply(const Operand& a, int rows, const Matrix& m, int panel, int count, const Target& target,
              Finish&& finish) {
  int tiles = (rows + MOST_ROWS - 1) / MOST_ROWS;
  alignas(64) float out[MOST_ROWS * PANEL];
  for (int end = panel + count; panel < end; panel++) {
    const char* w = m.weights.as() + size_t(panel) * m.panel_bytes;
    for (int t = 0, row = 0; t < tiles; t++) {
      int height = rows / tiles + (t < rows % tiles), column = panel * PANEL;
      // One tile: its own stream a little further on. Several: each fetches its share of the next panel.
      size_t share = STEP_BYTES / size_t(tiles);
      Ahead ahead = tiles == 1 ? Ahead{w + distance(rows), STEP_BYTES, 64}
                               : Ahead{w + m.panel_bytes + size_t(t) * share * size_t(m.steps), share, share / 2};
      for (int r = 0; r < height; r++)
        for (size_t i = 0; i < PANEL * target.size; i += 64)
          __builtin_prefetch(target.of(row + r, column) + i, 1);
      TILES<P>[size_t(height - 1)](Operand{a.rows + size_t(row) * a.stride, a.stride}, w, m, out, ahead);
      for (int r = 0; r < height; r++) {
        f32x16 low = load<f32x16>(out + r * PANEL), high = load<f32x16>(out + r * PANEL + LANES);
        if (std::is_same_v<P, Int8>) {
          low *= load<f32x16>(m.scales.template as<float>() + column);
          high *= load<f32x16>(m.scales.template as<float>() + column + LANES);
        }
        finish(target.of(row + r, column), column, low, high);
      }
      row += height;
    }
  }
}

}  // namespace nanochat
