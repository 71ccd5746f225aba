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

constexpr int VECTORS = PANEL / LANES;  // vectors of a panel

// Rows of a tile, and vectors of the panel that it goes over at once: as many as the registers hold.
#if defined(NANOCHAT_AVX512)
template <class P>
constexpr int MOST_ROWS = 14;  // x 2 vectors of sums, 2 of weights and 1 of the row: 31 of 32 registers
constexpr int width(int) { return VECTORS; }
#else
// Found by trial on Zen 4 with AVX2. fp32: 6 rows x 2 registers of sums, 2 of weights and 1 of the row are 15 of 16.
template <class P>
constexpr int MOST_ROWS = P::INPUTS == 1 ? 6 : P::INPUTS == 2 ? 5 : 4;
constexpr int width(int rows) { return rows <= 3 ? VECTORS : 1; }
#endif

// Hides from the compiler where a pointer came from: it would keep one of each row in memory instead of adding.
INLINE const char* opaque(const char* at) {
  asm("" : "+r"(at));
  return at;
}

template <class P, int ROWS>
struct Tile {
  static constexpr int WIDTH = width(ROWS);

  static INLINE void walk(const Operand& a, const char* w, const Matrix& m, float* out, Ahead ahead) {
    f32x16 sums[ROWS][WIDTH] = {};
    for (int i = 0; i < m.steps; i++) {
      i32x16 b[WIDTH];
      UNROLL for (int v = 0; v < WIDTH; v++) b[v] = load<i32x16>(w + v * 64);
      prefetch_far(ahead.at);
      prefetch_far(ahead.at + ahead.gap);
      UNROLL for (int r = 0; r < ROWS; r++) {
        UNROLL for (int v = 0; v < WIDTH; v++) sums[r][v] = P::dot_row(sums[r][v], b[v], a.rows + r * a.stride, i);
      }
      w += STEP_BYTES, ahead.at += ahead.stride;
    }
    UNROLL for (int r = 0; r < ROWS; r++) {
      UNROLL for (int v = 0; v < WIDTH; v++) store(out + (r * VECTORS + v) * LANES, sums[r][v]);
    }
  }
};

// Whole numbers within a group of inputs, floats across groups.
template <int ROWS>
struct Tile<Int8, ROWS> {
  static constexpr int STEPS = Int8::GROUP / Int8::INPUTS;
  static constexpr int WIDTH = width(ROWS);

  static INLINE void walk(const Operand& a, const char* w, const Matrix& m, float* out, Ahead ahead) {
    int groups = Int8::groups(m.inputs);
    f32x16 sums[ROWS][WIDTH] = {};
    for (int g = 0; g < groups; g++) {
      const char* row = opaque(a.rows + g * Int8::GROUP);
      const char* scales = opaque(a.rows + m.steps * Int8::INPUTS + g * 4);
      const char* starts = opaque(scales + groups * 4);
      int steps = std::min(STEPS, m.steps - g * STEPS);
      i32x16 whole[ROWS][WIDTH];
      UNROLL for (int r = 0; r < ROWS; r++) {
        i32x16 start = spread(starts + r * a.stride);
        UNROLL for (int v = 0; v < WIDTH; v++) whole[r][v] = start;
      }
      for (int i = 0; i < steps; i++) {
        i32x16 b[WIDTH];
        UNROLL for (int v = 0; v < WIDTH; v++) b[v] = load<i32x16>(w + v * 64);
        prefetch_far(ahead.at);
        prefetch_far(ahead.at + ahead.gap);
        UNROLL for (int r = 0; r < ROWS; r++) {
          i32x16 x = spread(row + r * a.stride + i * 4);
          UNROLL for (int v = 0; v < WIDTH; v++) whole[r][v] = dot_int8(whole[r][v], b[v], x);
        }
        w += STEP_BYTES, ahead.at += ahead.stride;
      }
      UNROLL for (int r = 0; r < ROWS; r++) {
        f32x16 scale = (f32x16)spread(scales + r * a.stride);
        UNROLL for (int v = 0; v < WIDTH; v++) sums[r][v] = fma(convert<f32x16>(whole[r][v]), scale, sums[r][v]);
      }
    }
    UNROLL for (int r = 0; r < ROWS; r++) {
      UNROLL for (int v = 0; v < WIDTH; v++) store(out + (r * VECTORS + v) * LANES, sums[r][v]);
    }
  }
};

// The whole width of the panel. out: ROWS x VECTORS vectors.
template <class P, int ROWS>
void run_tile(const Operand& a, const char* w, const Matrix& m, float* out, Ahead ahead) {
  Tile<P, ROWS>::walk(a, w, m, out, ahead);
  if constexpr (width(ROWS) < VECTORS) {
    ahead.at += size_t(m.steps) * ahead.stride;
    Tile<P, ROWS>::walk(a, w + 64, m, out + LANES, ahead);
  }
}

template <class P>
using TileRun = void (*)(const Operand&, const char*, const Matrix&, float*, Ahead);

template <class P, int... ROWS>
constexpr auto tile_row(std::integer_sequence<int, ROWS...>) {
  return std::array<TileRun<P>, sizeof...(ROWS)>{&run_tile<P, ROWS + 1>...};
}

template <class P>
constexpr auto TILES = tile_row<P>(std::make_integer_sequence<int, MOST_ROWS<P>>());

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
  int tiles = (rows + MOST_ROWS<P> - 1) / MOST_ROWS<P>;
  int walks = VECTORS / width((rows + tiles - 1) / tiles);  // of a tile
  alignas(64) float out[MOST_ROWS<P> * PANEL];
  for (int end = panel + count; panel < end; panel++) {
    const char* w = m.weights.as() + size_t(panel) * m.panel_bytes;
    for (int t = 0, row = 0; t < tiles; t++) {
      int height = rows / tiles + (t < rows % tiles), column = panel * PANEL;
      // One walk: its own stream a little further on. Several: each fetches its share of the next panel.
      size_t share = STEP_BYTES / size_t(tiles * walks);
      Ahead ahead = tiles * walks == 1
                        ? Ahead{w + distance(rows), STEP_BYTES, 64}
                        : Ahead{w + m.panel_bytes + size_t(t * walks) * share * size_t(m.steps), share, share / 2};
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
