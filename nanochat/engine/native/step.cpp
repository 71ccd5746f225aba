// One forward pass over the tokens of many sequences, as one job of a team of threads.
//
// Every thread walks through the same phases (embed; per layer: norm, qkv, attention, o, norm, fc1, fc2; head), draws
// pieces of each by number and meets the others at a barrier after it. Mathematics: nanochat/model.py.
// Compiled for one precision at a time, NANOCHAT_PRECISION: a third of the waiting at first use.
#include "bandwidth.h"
#include "model.h"
#include "rows.h"
#include "threads.h"

namespace nanochat {

constexpr int PHASES_PER_LAYER = 12;  // at most
constexpr int PRIVATE_NUMBERS = 4096;  // so many numbers are made ready by every thread for itself

using P = NANOCHAT_PRECISION;

class Model {
  using C = P::Cache;

 public:
  Model(const Sizes& sizes, const float* cosine, const float* sine)
      : s_(sizes),
        l_(Layout::of<C>(sizes.kv_heads, sizes.head_dim)),
        wide_(row_stride(sizes.width)),
        qkv_columns_((sizes.heads + 2 * sizes.kv_heads) * sizes.head_dim),
        cosine_(cosine),
        sine_(sine),
        pool_(sizes.threads),
        tickets_(sizes.depth * PHASES_PER_LAYER + 8),
        layers_(size_t(sizes.depth)),
        cache_(size_t(sizes.depth) * size_t(sizes.blocks) * l_.block),
        desks_(size_t(sizes.threads)) {
    for (Layer& layer : layers_) {
      layer.qkv = Matrix::sized<P>(s_.width, qkv_columns_);
      layer.o = Matrix::sized<P>(s_.width, s_.width);
      layer.fc1 = Matrix::sized<P>(s_.width, 4 * s_.width);
      layer.fc2 = Matrix::sized<P>(4 * s_.width, s_.width);
    }
    head_ = Matrix::sized<P>(s_.width, s_.vocabulary);
  }

  bool take(int layer, Part part, const void* data, const float* scales) {
    if (part == EMBEDDING) {
      embedding_ = static_cast<const C::Number*>(data);
      return true;
    }
    int q = s_.heads * s_.head_dim, k = s_.kv_heads * s_.head_dim;
    Layer& at = layers_[size_t(layer)];
    switch (part) {
      case Q: return pack_into(at.qkv, data, scales, 0, q);
      case K: return pack_into(at.qkv, data, scales, q, k);
      case V: return pack_into(at.qkv, data, scales, q + k, k);
      case O: return pack_into(at.o, data, scales, 0, s_.width);
      case FC1: return pack_into(at.fc1, data, scales, 0, 4 * s_.width);
      case FC2: return pack_into(at.fc2, data, scales, 0, s_.width);
      case HEAD: return pack_into(head_, data, scales, 0, s_.vocabulary);
      default: return false;
    }
  }

  int forward(const Batch& batch) {
    if (Fault fault = plan_.make(s_, batch)) return fault;
    batch_ = batch;
    make_room(batch);
    tickets_.reset();
    auto job = [this](int thread) { work(thread); };
    pool_.run(job);
    return 0;
  }

  void copy(int source, int target) {
    for (int layer = 0; layer < s_.depth; layer++)
      std::memcpy(block_at(layer, target), block_at(layer, source), l_.block);
  }

 private:
  // A thread on its way through the phases.
  struct Worker {
    int thread, phase;
    Desk& desk;
  };

  // ---- before a step

  void make_room(const Batch& b) {
    size_t rows = size_t(b.token_count), inner = size_t(row_stride(4 * s_.width));
    room_.stream.reserve(rows * size_t(wide_) * 4);
    room_.chosen.reserve(size_t(b.wanted_count) * size_t(wide_) * 4);
    room_.qkv.reserve(rows * size_t(qkv_stride()) * 4);
    room_.mixed.reserve(rows * size_t(wide_) * 4);
    room_.ready.reserve(rows * spread_stride(P::row_bytes(4 * s_.width)));
    room_.inner.reserve(rows * spread_stride(Bf16::row_bytes(int(inner))));
    if (!std::is_same_v<P, Bf16>) room_.hidden.reserve(rows * inner * 4);
    for (Desk& desk : desks_) {
      desk.scores.reserve(size_t(TILE_QUERIES) * size_t(score_stride()) * 4);
      for (int inputs : {s_.width, 4 * s_.width}) {
        size_t most = s_.threads == 1 ? rows : std::min(rows, size_t(PRIVATE_NUMBERS / inputs));
        desk.ready.reserve(most * spread_stride(P::row_bytes(inputs)));
      }
      desk.heads.reserve(size_t(plan_.longest / BLOCK + 4));
      size_t queries = size_t(PIECE_QUERIES + s_.heads);
      desk.vectors.reserve(queries * C::row_bytes(s_.head_dim));
      desk.queries.reserve(queries);
    }
  }

  // ---- a step, on every thread

  void work(int thread) {
    Worker me{thread, 0, desks_[size_t(thread)]};
    int rows = batch_.token_count, wanted = batch_.wanted_count;
    float* stream = room_.stream.as<float>();
    each(me, rows, [&](int r) { embed(r); });
    for (int layer = 0; layer < s_.depth; layer++) {
      const Layer& w = layers_[size_t(layer)];
      // After the last layer's keys are written, only the wanted rows matter.
      bool narrow = layer == s_.depth - 1 && wanted != rows;
      project(me, w.qkv, stream, rows);
      bool split = narrow || !plan_.together;
      if (split) each(me, rows * s_.kv_heads, [&](int i) { write(layer, i / s_.kv_heads, i % s_.kv_heads); });
      if (narrow) {
        if (!wanted) return;
        float* chosen = room_.chosen.as<float>();
        attention(me, layer, plan_.wanted, batch_.wanted, false);
        each(me, wanted, [&](int r) {
          std::memcpy(chosen + row(r), stream + row(batch_.wanted[r]), size_t(wide_) * 4);
        });
        stream = chosen, rows = wanted;
      } else {
        attention(me, layer, plan_.pieces, plan_.every.data(), !split);
      }
      finish_layer(me, w, stream, rows);
    }
    if (wanted) head(me, stream);
  }

  // Queries, keys and values of all rows.
  void project(Worker& me, const Matrix& w, const float* stream, int rows) {
    multiply_all(me, ready(me, stream, wide_, rows, s_.width, true), rows, w,
                 target(room_.qkv.as<float>(), qkv_stride()), [](char* to, int, f32x16 low, f32x16 high) {
                   store(to, low), store(to + 64, high);
                 });
  }

  // Output projection and MLP, each added to the residual stream.
  void finish_layer(Worker& me, const Layer& w, float* stream, int rows) {
    auto add = [](char* to, int, f32x16 low, f32x16 high) {
      store(to, load<f32x16>(to) + low), store(to + 64, load<f32x16>(to + 64) + high);
    };
    Target residual = target(stream, wide_);
    multiply_all(me, ready(me, room_.mixed.as<float>(), wide_, rows, s_.width, false), rows, w.o, residual, add);
    Operand normed = ready(me, stream, wide_, rows, s_.width, true);
    int inner = row_stride(4 * s_.width);
    if constexpr (std::is_same_v<P, Bf16>) {
      size_t stride = spread_stride(Bf16::row_bytes(inner));
      multiply_all(me, normed, rows, w.fc1, Target{room_.inner.as(), stride, Bf16::ROW_BYTES},
                   [](char* to, int, f32x16 low, f32x16 high) {
                     Bf16::put_row(to, relu_squared(low));
                     Bf16::put_row(to + LANES * Bf16::ROW_BYTES, relu_squared(high));
                   });
      multiply_all(me, Operand{room_.inner.as(), stride}, rows, w.fc2, residual, add);
    } else {
      float* hidden = room_.hidden.as<float>();
      multiply_all(me, normed, rows, w.fc1, target(hidden, inner), [](char* to, int, f32x16 low, f32x16 high) {
        store(to, relu_squared(low)), store(to + 64, relu_squared(high));
      });
      multiply_all(me, ready(me, hidden, inner, rows, 4 * s_.width, false), rows, w.fc2, residual, add);
    }
  }

  void head(Worker& me, const float* stream) {
    int rows = batch_.wanted_count, columns = s_.vocabulary;
    multiply_all(me, ready(me, stream, wide_, rows, s_.width, true), rows, head_, target(batch_.logits, columns),
                 [=](char* to, int column, f32x16 low, f32x16 high) {
                   low = soft_cap(low), high = soft_cap(high);
                   if (int left = columns - column; left >= PANEL) {
                     store(to, low), store(to + 64, high);
                   } else {
                     store_some(to, low, std::min(left, LANES));
                     if (left > LANES) store_some(to + 64, high, left - LANES);
                   }
                 });
  }

  // NaN stays NaN.
  static INLINE f32x16 relu_squared(f32x16 x) {
    x = pick(x < splat(0.0f), splat(0.0f), x);
    return x * x;
  }

  void embed(int r) {
    float* to = room_.stream.as<float>() + row(r);
    const C::Number* from = embedding_ + size_t(batch_.tokens[r]) * size_t(s_.width);
    for (int i = 0; i < s_.width; i++) {
      if constexpr (sizeof(C::Number) == 2) {
        uint32_t bits = uint32_t(from[i]) << 16;
        std::memcpy(to + i, &bits, 4);
      } else {
        to[i] = from[i];
      }
    }
    std::memset(to + s_.width, 0, size_t(wide_ - s_.width) * 4);
    scale_row(to, s_.width, norm_factor(to, s_.width));
  }

  // ---- attention

  // Rotates and norms the queries of a key head in place, and writes the key and value of the row.
  void write(int layer, int r, int kv_head) {
    int size = s_.head_dim, half = size / 2, share = s_.heads / s_.kv_heads, position = plan_.position[size_t(r)];
    const float *cosine = cosine_ + size_t(position) * size_t(half), *sine = sine_ + size_t(position) * size_t(half);
    float* q = room_.qkv.as<float>() + size_t(r) * size_t(qkv_stride());
    float* k = q + (s_.heads + kv_head) * size;
    for (int h = kv_head * share; h < (kv_head + 1) * share; h++)
      rotate_and_norm(q + h * size, size, cosine, sine, 1.0f / std::sqrt(float(size)));
    rotate_and_norm(k, size, cosine, sine, 1.0f);
    char* head = block_at(layer, block_of(plan_.sequence[size_t(r)], position)) + size_t(kv_head) * l_.head;
    write_token<C>(l_, head, position % BLOCK, k, k + s_.kv_heads * size);
  }

  // writing: a piece holds all of a sequence's rows, so that it writes their keys itself.
  void attention(Worker& me, int layer, const std::vector<Piece>& pieces, const int* list, bool writing) {
    each(me, int(pieces.size()) * s_.kv_heads, [&](int i) {
      const Piece& piece = pieces[size_t(i / s_.kv_heads)];
      int kv_head = i % s_.kv_heads;
      if (writing)
        for (int n = 0; n < piece.count; n++) write(layer, list[piece.first + n], kv_head);
      attend_piece(me, layer, piece, list, kv_head);
    });
  }

  void attend_piece(Worker& me, int layer, const Piece& piece, const int* list, int kv_head) {
    int size = s_.head_dim, share = s_.heads / s_.kv_heads;
    char* vector = me.desk.vectors.as();
    Desk& desk = me.desk;
    desk.queries.clear(), desk.heads.clear();
    for (int n = 0; n < piece.count; n++) {
      int r = list[piece.first + n];
      const float* q = room_.qkv.as<float>() + size_t(r) * size_t(qkv_stride());
      float* out = room_.mixed.as<float>() + row(piece.first + n);
      for (int h = kv_head * share; h < (kv_head + 1) * share; h++, vector += C::row_bytes(size)) {
        C::fill(vector, q + h * size, size, 1.0f);
        desk.queries.push_back({vector, plan_.position[size_t(r)], out + h * size});
      }
    }
    int blocks = desk.queries.back().position / BLOCK + 1;
    for (int b = 0; b < blocks; b++)
      desk.heads.push_back(block_at(layer, block_of(piece.sequence, b * BLOCK)) + size_t(kv_head) * l_.head);
    for (int b = 0; b < 2; b++) desk.heads.push_back(desk.heads.back());
    attend_all<C>(l_, desk.queries, desk.heads.data(), desk.scores.as<float>(), size_t(score_stride()));
  }

  // ---- phases

  // body(i) for every i below count, on whichever thread; then all meet.
  template <class Body>
  void each(Worker& me, int count, Body&& body) {
    int grain = std::max(1, std::min(16, count / (8 * s_.threads)));
    for (int i; (i = tickets_.next(me.phase) * grain) < count;)
      for (int at = i; at < std::min(count, i + grain); at++) body(at);
    meet(me);
  }

  void meet(Worker& me) {
    if (s_.threads > 1) pool_.barrier();
    me.phase++;
  }

  bool alone(int rows, int inputs) const { return s_.threads == 1 || rows * inputs <= PRIVATE_NUMBERS; }

  // The rows as a matrix wants them. Few: each thread for itself, which is quicker than to wait for each other.
  Operand ready(Worker& me, const float* from, int stride, int rows, int inputs, bool normed) {
    if (std::is_same_v<P, Fp32> && !normed) return {reinterpret_cast<const char*>(from), size_t(stride) * 4};
    size_t bytes = spread_stride(P::row_bytes(inputs));
    bool mine = alone(rows, inputs);
    char* to = (mine ? me.desk.ready : room_.ready).as();
    auto fill = [=](int r) {
      const float* x = from + size_t(r) * size_t(stride);
      P::fill(to + size_t(r) * bytes, x, inputs, normed ? norm_factor(x, inputs) : 1.0f);
    };
    if (mine)
      for (int r = 0; r < rows; r++) fill(r);
    else
      each(me, rows, fill);
    return {to, bytes};
  }

  template <class Finish>
  void multiply_all(Worker& me, const Operand& a, int rows, const Matrix& m, const Target& target, Finish finish) {
    int group = m.panels >= 16 * s_.threads ? 4 : m.panels >= 6 * s_.threads ? 2 : 1;
    int units = (m.panels + group - 1) / group;
    // With few panels and many rows the rows are divided as well.
    int parts = std::max(1, std::min((rows + MOST_ROWS<P> - 1) / MOST_ROWS<P>, 4 * s_.threads / units));
    for (int i; (i = tickets_.next(me.phase)) < units * parts;) {
      int part = i % parts, panel = i / parts * group;
      int from = int(int64_t(rows) * part / parts), to = int(int64_t(rows) * (part + 1) / parts);
      multiply<P>(Operand{a.rows + size_t(from) * a.stride, a.stride}, to - from, m, panel,
                  std::min(group, m.panels - panel), Target{target.of(from, 0), target.stride, target.size}, finish);
    }
    meet(me);
  }

  // ---- where things are

  static Target target(float* at, int stride) { return {reinterpret_cast<char*>(at), size_t(stride) * 4, 4}; }
  size_t row(int r) const { return size_t(r) * size_t(wide_); }
  int qkv_stride() const { return row_stride(qkv_columns_); }
  int score_stride() const { return rounded(plan_.longest, 8 * BLOCK) + BLOCK; }
  int block_of(int sequence, int position) const {
    return batch_.tables[size_t(sequence) * size_t(batch_.table_width) + size_t(position / BLOCK)];
  }
  char* block_at(int layer, int block) const {
    return cache_.as() + (size_t(layer) * size_t(s_.blocks) + size_t(block)) * l_.block;
  }

  bool pack_into(Matrix& m, const void* data, const float* scales, int first, int columns) {
    using Source = std::conditional_t<P::INPUTS == 1, uint32_t, std::conditional_t<P::INPUTS == 2, uint16_t, uint8_t>>;
    auto source = static_cast<const Source*>(data);
    tickets_.reset();
    auto job = [&](int) {
      for (int from; (from = tickets_.next(0) * PANEL) < columns;)
        pack<Source>(m, source, first, from, std::min(columns, from + PANEL), P::INPUTS == 4 ? Int8::FLIP : 0);
    };
    pool_.run(job);
    if (scales) std::memcpy(m.scales.as<float>() + first, scales, size_t(columns) * 4);
    return true;
  }

  const Sizes s_;
  const Layout l_;
  const int wide_, qkv_columns_;
  const float *cosine_, *sine_;  // (context, head_dim / 2), kept by the caller
  const C::Number* embedding_ = nullptr;  // (vocabulary, width), kept by the caller
  Pool pool_;
  Tickets tickets_;
  std::vector<Layer> layers_;
  Matrix head_;
  Buffer cache_;
  Room room_;
  std::vector<Desk> desks_;
  Batch batch_{};
  Plan plan_;
};

}  // namespace nanochat

using nanochat::Model;

// What Python sees. Null, false or a number other than 0: it failed.
extern "C" {

void* nanochat_make(const int32_t* sizes, const float* cosine, const float* sine) {
  nanochat::Sizes s;
  static_assert(sizeof(s) == 9 * sizeof(int32_t));
  std::memcpy(&s, sizes, sizeof(s));
  try {
    return new Model(s, cosine, sine);
  } catch (const std::bad_alloc&) {
    return nullptr;
  }
}

void nanochat_drop(void* model) { delete static_cast<Model*>(model); }

bool nanochat_load(void* model, int layer, int part, const void* data, const float* scales) {
  return static_cast<Model*>(model)->take(layer, nanochat::Part(part), data, scales);
}

// integers: tokens, counts, past, tables, wanted.  sizes: T, N, W, R.
int nanochat_forward(void* model, const int32_t* const* integers, const int32_t* sizes, float* logits) {
  nanochat::Batch b{integers[0], integers[1], integers[2], integers[3], integers[4],
                    sizes[0],    sizes[1],    sizes[2],    sizes[3],    logits};
  try {
    return static_cast<Model*>(model)->forward(b);
  } catch (const std::bad_alloc&) {
    return -1;
  }
}

void nanochat_copy(void* model, int source, int target) { static_cast<Model*>(model)->copy(source, target); }

double nanochat_read_bandwidth(int threads, int64_t bytes) { return nanochat::read_bandwidth(threads, size_t(bytes)); }
}
