// A few threads that do one job together and sleep between jobs.
//
// The caller is one of them. Inside a job the threads meet at barriers and draw work by number (`next`), so that one
// that was put aside by the system holds up nobody longer than its own piece lasts. Waiting spins for a moment, then
// lets others run: on shared cores pure spinning collapses.
#pragma once

#include <sched.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <memory>
#include <thread>
#include <vector>

namespace nanochat {

inline void relax() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// State that the threads of one process share. After a fork the child makes a new one; the old one's threads are gone.
class Team {
 public:
  using Job = void (*)(void* argument, int thread);

  explicit Team(int threads) : threads_(threads) {
    for (int i = 1; i < threads; i++) workers_.emplace_back([this, i] { work(i); });
  }

  ~Team() {
    job_ = nullptr;
    wake();
    for (std::thread& worker : workers_) worker.join();
  }

  void run(Job job, void* argument) {
    job_ = job, argument_ = argument;
    if (threads_ > 1) wake();
    job(argument, 0);
    barrier();  // nobody reads the job any more
  }

  void barrier() {
    if (threads_ == 1) return;
    uint64_t mine = arrived_.fetch_add(1, std::memory_order_acq_rel);
    uint64_t all = (mine / threads_ + 1) * threads_;
    for (int turn = 0; arrived_.load(std::memory_order_acquire) < all; turn++)
      if (turn < SPINS)
        relax();
      else
        sched_yield();
  }

 private:
  static constexpr int SPINS = 1000;                              // about 20 us
  static constexpr auto AWAKE = std::chrono::microseconds(300);  // longer than the engine thinks between steps; then a worker sleeps

  void wake() {
    jobs_.fetch_add(1, std::memory_order_release);
    jobs_.notify_all();
  }

  void work(int thread) {
    for (uint32_t seen = 0;; seen++) {
      auto until = std::chrono::steady_clock::now() + AWAKE;
      while (jobs_.load(std::memory_order_acquire) == seen) {
        for (int i = 0; i < 32 && jobs_.load(std::memory_order_relaxed) == seen; i++) relax();
        if (std::chrono::steady_clock::now() > until) jobs_.wait(seen, std::memory_order_acquire);
      }
      if (job_ == nullptr) return;
      job_(argument_, thread);
      barrier();
    }
  }

  const uint64_t threads_;
  Job job_ = nullptr;
  void* argument_ = nullptr;
  alignas(64) std::atomic<uint32_t> jobs_{0};
  alignas(64) std::atomic<uint64_t> arrived_{0};
  std::vector<std::thread> workers_;
};

class Pool {
 public:
  explicit Pool(int threads) : threads_(threads) {}
  ~Pool() { forget_parent(); }

  int threads() const { return threads_; }

  // body(thread) on every thread at once; returns when all have. One job at a time.
  template <class Body>
  void run(Body& body) {
    forget_parent();
    if (!team_) team_ = std::make_unique<Team>(threads_), process_ = getpid();
    team_->run([](void* argument, int thread) { (*static_cast<Body*>(argument))(thread); }, &body);
  }

  void barrier() { team_->barrier(); }

 private:
  // A forked child has the memory of its parent's team but none of its threads: it can only be left behind.
  void forget_parent() {
    if (team_ && process_ != getpid()) (void)team_.release();
  }

  int threads_;
  pid_t process_ = 0;
  std::unique_ptr<Team> team_;
};

// Numbers of pieces of work, one counter for each phase of a job.
class Tickets {
 public:
  explicit Tickets(int phases) : counters_(new Counter[size_t(phases)]), phases_(phases) {}
  void reset() {
    for (int i = 0; i < phases_; i++) counters_[size_t(i)].drawn.store(0, std::memory_order_relaxed);
  }
  int next(int phase) { return counters_[size_t(phase)].drawn.fetch_add(1, std::memory_order_relaxed); }

 private:
  struct alignas(64) Counter {
    std::atomic<int> drawn{0};
  };
  std::unique_ptr<Counter[]> counters_;
  int phases_;
};

}  // namespace nanochat
