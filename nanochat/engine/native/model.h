// What a model keeps: packed matrices, and the room that a step writes to.
#pragma once

#include "attention.h"
#include "gemm.h"
#include "plan.h"

namespace nanochat {

enum Part { Q, K, V, O, FC1, FC2, HEAD, EMBEDDING };

struct Layer {
  Matrix qkv, o, fc1, fc2;
};

// Floats from row to row of a result: whole panels, and rows fall on different sets of the first-level cache.
inline int row_stride(int columns) { return int(spread_stride(size_t(rounded(columns, PANEL)) * 4) / 4); }

// Grows with the largest step seen.
struct Room {
  Buffer stream, chosen;             // residual stream of all rows, and of the wanted ones in the last layer
  Buffer qkv, mixed, hidden, ready;  // fp32 results; `ready`: rows made ready for a matrix
  Buffer inner;                      // rows of the MLP's inside, ready for fc2
};

// What a thread needs for itself.
struct Desk {
  Buffer ready;    // the few rows that are quicker made ready twice than waited for
  Buffer vectors;  // a piece's queries, ready for the keys
  Buffer scores;   // TILE_QUERIES x positions
  std::vector<const char*> heads;
  std::vector<Query> queries;
};

}  // namespace nanochat
