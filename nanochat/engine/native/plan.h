// The tokens of a step, checked, and cut into pieces for attention. Nothing is computed before this has passed.
#pragma once

#include <algorithm>
#include <vector>

#include "attention.h"

namespace nanochat {

struct Sizes {
  int depth, width, heads, kv_heads, head_dim, vocabulary, context, blocks, threads;
};

// nanochat/engine/runner.py says what the fields mean.
struct Batch {
  const int32_t *tokens, *counts, *past, *tables, *wanted;
  int token_count, sequences, table_width, wanted_count;
  float* logits;
};

// Which field of a batch cannot be.
enum Fault { NONE, TOKENS, COUNTS, PAST, TABLES, WANTED };

// Rows that one thread takes through attention: `count` entries of a list of rows from `first` on, of one sequence.
struct Piece {
  int sequence, first, count;
};

constexpr int PIECE_QUERIES = 16;  // of a key head; more balance worse, fewer share less of the reading

inline int rounded(int count, int unit) { return (count + unit - 1) / unit * unit; }

struct Plan {
  std::vector<int> sequence, position;  // of each row
  std::vector<int> every;               // the list of all rows: 0, 1, 2 ...; may be longer
  std::vector<Piece> pieces;            // of all rows
  std::vector<Piece> wanted;            // of the list of wanted rows
  int longest;                          // positions of the longest sequence
  bool together;                        // each sequence is one piece

  Fault make(const Sizes& s, const Batch& b) {
    sequence.clear(), position.clear(), pieces.clear(), wanted.clear();
    longest = 0, together = true;
    most_rows_ = std::max(1, PIECE_QUERIES / (s.heads / s.kv_heads));
    for (int n = 0; n < b.sequences; n++)
      if (Fault fault = add(s, b, n)) return fault;
    int rows = int(position.size());
    if (rows != b.token_count) return COUNTS;
    for (int r = 0; r < rows; r++)
      if (b.tokens[r] < 0 || b.tokens[r] >= s.vocabulary) return TOKENS;
    for (int r = 0; r < b.wanted_count; r++)
      if (b.wanted[r] < (r ? b.wanted[r - 1] + 1 : 0) || b.wanted[r] >= rows) return WANTED;
    for (int r = 0; r < b.wanted_count; r++) {
      int owner = sequence[size_t(b.wanted[r])];
      if (wanted.empty() || wanted.back().sequence != owner || wanted.back().count == most_rows_)
        wanted.push_back({owner, r, 0});
      wanted.back().count++;
    }
    while (int(every.size()) < rows) every.push_back(int(every.size()));
    return NONE;
  }

 private:
  Fault add(const Sizes& s, const Batch& b, int n) {
    int count = b.counts[n], past = b.past[n];
    if (count < 1 || count > s.context) return COUNTS;
    if (past < 0 || past > s.context - count) return PAST;
    int used = rounded(past + count, BLOCK) / BLOCK;
    if (used > b.table_width) return TABLES;
    const int32_t* table = b.tables + size_t(n) * size_t(b.table_width);
    for (int i = 0; i < used; i++)
      if (table[i] < 0 || table[i] >= s.blocks) return TABLES;
    longest = std::max(longest, past + count);
    together = together && count <= most_rows_;
    for (int i = 0; i < count; i += most_rows_)
      pieces.push_back({n, int(position.size()) + i, std::min(most_rows_, count - i)});
    for (int i = 0; i < count; i++) sequence.push_back(n), position.push_back(past + i);
    return NONE;
  }

  int most_rows_ = 1;
};

}  // namespace nanochat
