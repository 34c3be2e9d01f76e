// Work shared with XLA's own threads, and joined before the call returns.
#pragma once

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>

namespace jaxnorm {

// Runs tasks 0 .. n - 1, each once, in any order. The caller works too, so it never waits for a thread that the pool
// cannot spare; a helper that the pool starts only after the last task was taken finds nothing to do and touches nothing
// of the caller's. What a task throws is thrown to the caller once all have ended.
class Threads {
 public:
  using Schedule = std::function<void(std::function<void()>)>;

  Threads(int64_t count, Schedule schedule) : count_(std::max<int64_t>(count, 1)), schedule_(std::move(schedule)) {}
  static Threads none() { return Threads(1, nullptr); }

  int64_t count() const { return count_; }

  void each(int64_t n, const std::function<void(int64_t)>& task) const {
    const int64_t helpers = std::min(count_, n) - 1;
    if (helpers < 1) {
      for (int64_t i = 0; i < n; ++i) task(i);
      return;
    }
    auto shared = std::make_shared<Shared>(n, &task);
    try {
      for (int64_t i = 0; i < helpers; ++i) schedule_([shared] { shared->work(); });
    } catch (...) {  // the pool rejected a task; the threads already started, and the caller, finish the work
    }
    shared->work();
    shared->wait();
  }

 private:
  struct Shared {
    const int64_t n;
    const std::function<void(int64_t)>* const task;  // the caller's: only a thread that has taken a task reads it
    std::atomic<int64_t> next{0}, ended{0};
    std::mutex mutex;
    std::condition_variable all_ended;
    std::exception_ptr thrown;

    Shared(int64_t n, const std::function<void(int64_t)>* task) : n(n), task(task) {}

    void work() {
      for (int64_t i; (i = next.fetch_add(1)) < n;) {
        try {
          (*task)(i);
        } catch (...) {
          const std::lock_guard<std::mutex> lock(mutex);
          thrown = std::current_exception();
        }
        if (ended.fetch_add(1) + 1 == n) {
          const std::lock_guard<std::mutex> lock(mutex);
          all_ended.notify_all();
        }
      }
    }

    void wait() {
      for (int spin = 0; spin < 2000 && ended.load() < n; ++spin) pause();
      std::unique_lock<std::mutex> lock(mutex);
      all_ended.wait(lock, [this] { return ended.load() == n; });
      if (thrown) std::rethrow_exception(thrown);
    }

    static void pause() {
#if defined(__x86_64__)
      __builtin_ia32_pause();
#endif
    }
  };

  const int64_t count_;
  const Schedule schedule_;
};

}  // namespace jaxnorm
