// The thread pool. One for the process, made on first use, shared by all models and Python threads.
#pragma once

#include <type_traits>

namespace xdf {

// A moment's wait inside a loop that looks for what another thread is about to write.
inline void spin_pause() {
#if defined(__x86_64__) && defined(__GNUC__)
  __builtin_ia32_pause();
#elif defined(__aarch64__) && defined(__GNUC__)
  __asm__ volatile("yield");
#endif
}

// Cores this process may use (its CPU affinity).
int default_threads();

// Threads that parallel_run uses for that many tasks.
int parallel_slots(int tasks, int threads);

// Calls fn(context, i, slot) once for each i in [0, tasks), on at most `threads` threads (0: all
// cores), the caller among them, and returns when all are done. `slot` < parallel_slots(tasks,
// threads) is the caller's or worker's own for this call: an index into workspaces. Tasks start in
// ascending order, so put the longest first. The caller never waits for a busy pool: what no worker
// takes it does itself, so concurrent calls cannot block one another. fn must not throw. After
// fork() the child starts a pool of its own.
void parallel_run(int tasks, int threads, void (*fn)(void*, int, int), void* context);

template <class F>
void parallel_for(int tasks, int threads, F&& body) {
  using Body = std::remove_reference_t<F>;
  parallel_run(
      tasks, threads,
      [](void* context, int i, int slot) { (*static_cast<Body*>(context))(i, slot); },
      const_cast<void*>(static_cast<const void*>(&body)));
}

}  // namespace xdf
