// A job is a counter of tasks. Workers and the caller draw from the counter until it is spent; the
// caller then waits for workers that are still inside a task. Jobs live on their callers' stacks
// and hang in a short list that workers search under a lock.
//
// Sleeping and waking cost some 10 us each, as much as a step of one short sentence. So before it
// sleeps a thread looks for kSpins rounds (20 to 40 us) whether what it waits for is there already.
#include "cpu/parallel.h"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#ifdef __linux__
#include <sched.h>
#endif
#ifndef _WIN32
#include <pthread.h>
#endif

namespace xdf {
namespace {

constexpr int kSpins = 1000;

struct Job {
  void (*fn)(void*, int, int);
  void* context;
  int tasks;
  int seats;                   // workers that may still join; guarded by the pool's mutex
  std::atomic<int> inside{0};  // workers that joined and have not left; changed under the mutex
  std::atomic<int> next{0};

  void draw(int slot) {
    for (int i; (i = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) fn(context, i, slot);
  }
};

class Pool {
 public:
  void run(Job& job) {
    const bool one = job.seats == 1;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      jobs_.push_back(&job);
      wanted_ = std::max(wanted_, job.seats);
      grow();
      posted_.fetch_add(1, std::memory_order_release);
    }
    if (one)
      wake_.notify_one();
    else
      wake_.notify_all();
    job.draw(0);
    for (int n = 0; n < kSpins && job.inside.load(std::memory_order_relaxed) != 0; ++n)
      spin_pause();
    std::unique_lock<std::mutex> lock(mutex_);
    jobs_.erase(std::find(jobs_.begin(), jobs_.end(), &job));
    left_.wait(lock, [&] { return job.inside == 0; });
  }

 private:
  void grow() {
    while (workers_ < wanted_) {
      try {
        std::thread([this] { work(); }).detach();
      } catch (const std::system_error&) {
        wanted_ = workers_;  // no more threads to be had: the callers do the work
        return;
      }
      ++workers_;
    }
  }

  // A job with tasks and a seat left, or null. Under the mutex.
  Job* waiting_job() const {
    for (Job* job : jobs_)
      if (job->seats > 0 && job->next.load(std::memory_order_relaxed) < job->tasks) return job;
    return nullptr;
  }

  void work() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      Job* job = nullptr;
      const unsigned seen = posted_.load(std::memory_order_relaxed);
      if (!waiting_job()) {
        lock.unlock();
        for (int n = 0; n < kSpins && posted_.load(std::memory_order_acquire) == seen; ++n)
          spin_pause();
        lock.lock();
      }
      wake_.wait(lock, [&] { return (job = waiting_job()) != nullptr; });
      const int slot = job->seats--;
      ++job->inside;
      lock.unlock();
      job->draw(slot);
      lock.lock();
      if (--job->inside == 0) left_.notify_all();
    }
  }

  std::mutex mutex_;
  std::condition_variable wake_, left_;
  std::vector<Job*> jobs_;
  std::atomic<unsigned> posted_{0};  // jobs ever posted
  int workers_ = 0;
  int wanted_ = 0;
};

// Never destroyed: its threads outlive main(). A forked child has none of them, so it leaves its
// copy alone and makes a new pool.
std::atomic<Pool*> pool{nullptr};
std::mutex pool_mutex;

Pool& get_pool() {
  Pool* p = pool.load(std::memory_order_acquire);
  if (p != nullptr) return *p;
  std::lock_guard<std::mutex> lock(pool_mutex);
  p = pool.load(std::memory_order_acquire);
  if (p == nullptr) {
#ifndef _WIN32
    static const int registered =
        pthread_atfork([] { pool_mutex.lock(); }, [] { pool_mutex.unlock(); },
                       [] {
                         pool.store(nullptr, std::memory_order_release);
                         pool_mutex.unlock();
                       });
    (void)registered;
#endif
    p = new Pool;
    pool.store(p, std::memory_order_release);
  }
  return *p;
}

}  // namespace

int default_threads() {
#ifdef __linux__
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof(set), &set) == 0) return std::max(1, CPU_COUNT(&set));
#endif
  return std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
}

int parallel_slots(int tasks, int threads) {
  return std::max(1, std::min(tasks, threads > 0 ? threads : default_threads()));
}

void parallel_run(int tasks, int threads, void (*fn)(void*, int, int), void* context) {
  if (tasks <= 0) return;
  const int helpers = parallel_slots(tasks, threads) - 1;
  if (helpers == 0) {
    for (int i = 0; i < tasks; ++i) fn(context, i, 0);
    return;
  }
  Job job;
  job.fn = fn;
  job.context = context;
  job.tasks = tasks;
  job.seats = helpers;
  get_pool().run(job);
}

}  // namespace xdf
