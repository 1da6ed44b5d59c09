// The forward pass of a BiLSTM as work for a pool of threads.
//
// A run is one direction of one group of sequences: a chain of phases, each of which needs the one
// before. A phase (mostly one step of the recurrence) falls into parts, ranges of hidden units,
// that do not need one another. A thread first takes whole runs and does all their parts, so its
// weights stay in its own cache. When no run is left it joins one that is still going and takes
// parts of it. That levels out cores of unequal speed, and lets more cores than runs work on one
// sentence.
//
// Which thread does which part changes no result: a unit's sums are its own.
#pragma once

#include <algorithm>
#include <atomic>
#include <memory>
#include <thread>

#include "cpu/bilstm_plan.h"
#include "cpu/parallel.h"

namespace xdf {

constexpr int kMaxParts = 16;
constexpr int kSpins = 1000;       // looks for a part before a thread lets others run
constexpr int kJoinSpins = 20000;  // before a thread leaves a run that it has joined

// Parts of a phase in which each row takes `row_work` multiply-adds; `part_work` of them are some
// 1 us, below which handing out costs more than it brings.
inline int parts_of_phase(int64_t rows, int64_t row_work, int64_t part_work, int unit_blocks) {
  const int64_t parts = rows * row_work / part_work;
  return static_cast<int>(std::max<int64_t>(1, std::min<int64_t>({parts, kMaxParts, unit_blocks})));
}

// What is common to runs. Derived has
//   bool next_phase()                              sets up the next phase; false after the last
//   void do_part(int begin, int end, bool descending)   the units of blocks [begin, end)
// Whoever finishes the last part of a phase sets up the next one; the release of `free_parts_`
// publishes it to those that claim a part of it.
template <class Derived>
class PhasedRun {
 public:
  // Where a thread works in a run: it goes on next to where it was, so that it finds the weights
  // it used last still in its cache.
  struct Place {
    int part;
    bool descending;
  };

  bool finished() const { return finished_.load(std::memory_order_acquire); }

  // Does the free part nearest to `place`; false if none is free.
  bool work(Place& place) {
    uint32_t free = free_parts_.load(std::memory_order_acquire);
    int part;
    do {
      if (free == 0) return false;
      part = nearest(free, place.part);
    } while (!free_parts_.compare_exchange_weak(
        free, free & ~(1u << part), std::memory_order_acq_rel, std::memory_order_acquire));
    place.descending = part < place.part || (part == place.part && !place.descending);
    place.part = part;
    derived().do_part(unit_blocks_ * part / parts_, unit_blocks_ * (part + 1) / parts_,
                      place.descending);
    if (done_.fetch_add(1, std::memory_order_acq_rel) + 1 == parts_) advance();
    return true;
  }

 protected:
  void begin(const LstmGroup& group, int unit_blocks, int parts) {
    group_ = group;
    unit_blocks_ = unit_blocks;
    parts_ = parts;
    finished_.store(false, std::memory_order_relaxed);
    advance();
  }
  int token(int row, int step) const {
    return group_.reverse ? group_.first[row] - step : group_.first[row] + step;
  }
  // Of `rows` rows those that have a token at `step`.
  int active(int step, int rows) const {
    while (rows > 0 && group_.length[rows - 1] <= step) --rows;
    return rows;
  }

  LstmGroup group_{};
  int unit_blocks_ = 0;

 private:
  Derived& derived() { return static_cast<Derived&>(*this); }

  static int nearest(uint32_t free, int to) {
    for (int distance = 0;; ++distance) {
      if (to >= distance && (free >> (to - distance) & 1)) return to - distance;
      if (to + distance < kMaxParts && (free >> (to + distance) & 1)) return to + distance;
    }
  }

  void advance() {
    done_.store(0, std::memory_order_relaxed);
    if (derived().next_phase())
      free_parts_.store((1u << parts_) - 1, std::memory_order_release);
    else
      finished_.store(true, std::memory_order_release);
  }

  int parts_ = 1;
  std::atomic<uint32_t> free_parts_{0};
  std::atomic<int> done_{0};
  std::atomic<bool> finished_{true};
};

// Takes every run of a plan to its end on `slots` threads; start(run, group, slot) begins one.
template <class Run, class Start>
void complete_runs(const Plan& plan, int slots, int threads, Start&& start) {
  const std::unique_ptr<Run[]> taken(new Run[static_cast<size_t>(slots)]);
  std::atomic<int> next{0};
  parallel_for(slots, threads, [&](int, int slot) {
    Run& own = taken[static_cast<size_t>(slot)];
    for (int task; (task = next.fetch_add(1, std::memory_order_relaxed)) < plan.tasks();) {
      start(own, plan.group(task), slot);
      typename Run::Place place{0, true};
      for (int idle = 0; !own.finished(); ++idle) {
        if (own.work(place))
          idle = 0;
        else if (idle < kSpins)
          spin_pause();
        else
          std::this_thread::yield();
      }
    }
    for (int n = 1; n < slots; ++n) {
      const int other = (slot + n) % slots;
      typename Run::Place place{kMaxParts * n / slots, true};
      Run& run = taken[static_cast<size_t>(other)];
      for (int idle = 0; idle < kJoinSpins && !run.finished(); ++idle) {
        if (run.work(place))
          idle = 0;
        else
          spin_pause();
      }
    }
  });
}

}  // namespace xdf
