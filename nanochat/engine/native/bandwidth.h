// How fast this machine reads memory: the bound of a decoding step.
#pragma once

#include <chrono>

#include "memory.h"
#include "simd.h"
#include "threads.h"

namespace nanochat {

// Reads [from, to) as STREAMS runs side by side, asking for memory `ahead` bytes early (0: leaves that to the machine).
template <int STREAMS>
i32x16 read_all(const char* from, const char* to, size_t ahead) {
  size_t share = size_t(to - from) / STREAMS;
  i32x16 sums[STREAMS * 2] = {};
  for (size_t i = 0; i + 128 <= share; i += 128) {
    UNROLL for (int s = 0; s < STREAMS; s++) {
      const char* at = from + size_t(s) * share + i;
      if (ahead) prefetch_far(at + ahead), prefetch_far(at + ahead + 64);
      sums[2 * s] ^= load<i32x16>(at), sums[2 * s + 1] ^= load<i32x16>(at + 64);
    }
  }
  i32x16 all = {};
  for (const i32x16& one : sums) all ^= one;
  return all;
}

// Bytes per second of the best of three ways to read `bytes` of memory, each tried three times.
inline double read_bandwidth(int threads, size_t bytes) {
  using Read = i32x16 (*)(const char*, const char*, size_t);
  constexpr struct {
    Read read;
    size_t ahead;
  } WAYS[] = {{read_all<1>, 0}, {read_all<1>, 2048}, {read_all<4>, 1024}};
  Buffer memory(bytes);
  std::memset(memory.as(), 1, bytes);
  Pool pool(threads);
  double best = 0;
  volatile int32_t sink = 0;
  for (auto way : WAYS) {
    for (int turn = 0; turn < 3; turn++) {
      auto start = std::chrono::steady_clock::now();
      auto job = [&](int thread) {
        size_t share = bytes / size_t(threads) / 4096 * 4096;
        const char* from = memory.as() + size_t(thread) * share;
        i32x16 seen = way.read(from, from + share, way.ahead);
        sink = sink ^ seen[0];  // else the compiler would leave the reading out
      };
      pool.run(job);
      std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
      best = std::max(best, double(bytes) / seconds.count());
    }
  }
  return best;
}

}  // namespace nanochat
