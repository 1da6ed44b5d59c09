// The forward pass of a BiLSTM as work for a pool of threads.
//
// A run is one direction of one group of sequences: a chain of phases, each of which needs the one
// before. A phase is either the input half of a chunk of steps (one gemm) or one step of the
// recurrence, and falls into parts, ranges of hidden units, that do not need one another. A thread
// first takes whole runs and does all their parts, so its weights stay in its own cache. When no
// run is left it joins one that is still going and takes parts of it. That levels out cores of
// unequal speed, and lets more cores than runs work on one sentence.
//
// Which thread does which part changes no result: a unit's sums are its own.
#include <atomic>
#include <memory>
#include <thread>

#include "cpu/bilstm.h"
#include "cpu/bilstm_plan.h"
#include "cpu/parallel.h"

namespace xdf {
namespace {

constexpr int kMaxParts = 16;
constexpr int64_t kPartWork = 32 * 1024;  // multiply-adds of a part of a step at least: some 1 us
constexpr int kSpins = 1000;              // looks for a part before a thread lets others run
constexpr int kJoinSpins = 20000;         // before a thread leaves a run that it has joined

// Elements of workspace a thread needs for the run it has taken.
size_t run_workspace(int H) {
  const size_t Hp = static_cast<size_t>(round_up(H, kHiddenAlign));
  // input halves of a chunk; h twice; c
  return 4 * Hp * (kInputChunkRows + kMaxGroupRows) + 3 * (Hp + kHiddenAlign) * kMaxGroupRows;
}

int parts_of_step(int64_t rows, int64_t H, int unit_blocks) {
  const int64_t parts = rows * 4 * H * H / kPartWork;
  return static_cast<int>(std::max<int64_t>(1, std::min<int64_t>({parts, kMaxParts, unit_blocks})));
}

// What is the same for all runs of a call.
template <class T>
struct Call {
  const BiLstmWeights<T>& weights;
  const T* x;
  T* out;
  T* reserve;  // or null
  size_t reserve_direction;
};

// A run and what its current phase needs. Whoever finishes the last part of a phase sets up the
// next one; the release of `free_parts` publishes it to those that claim a part of it.
template <class T>
class Run {
 public:
  // Where a thread works in a run: it goes on next to where it was, so that it finds the weights
  // it used last still in its cache.
  struct Place {
    int part;
    bool descending;
  };

  void start(const Call<T>* call, const LstmGroup& group, T* workspace) {
    call_ = call;
    group_ = group;
    H_ = call->weights.hidden_size();
    const int Hp = round_up(H_, kHiddenAlign);
    gate_row_ = 4 * static_cast<ptrdiff_t>(Hp);
    reserve_row_ = 5 * static_cast<ptrdiff_t>(Hp);
    h_row_ = Hp + kHiddenAlign;  // an odd number of cache lines: rows share no sets
    pre_ = workspace;
    h_ = pre_ + gate_row_ * (kInputChunkRows + kMaxGroupRows);
    c_ = h_ + 2 * h_row_ * kMaxGroupRows;
    rows_ = group.rows;
    const int lanes = call->weights.table().lanes;
    unit_blocks_ = (H_ + lanes - 1) / lanes;
    parts_ = parts_of_step(group.rows, H_, unit_blocks_);
    chunk_end_ = 0;
    step_ = -1;
    finished_.store(false, std::memory_order_relaxed);
    next_phase();
  }

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
    const int begin = unit_blocks_ * part / parts_, end = unit_blocks_ * (part + 1) / parts_;
    if (step_ == chunk_end_)
      do_input(begin, end);
    else
      do_step(begin, end, place.descending);
    if (done_.fetch_add(1, std::memory_order_acq_rel) + 1 == parts_) next_phase();
    return true;
  }

 private:
  static int nearest(uint32_t free, int to) {
    for (int distance = 0;; ++distance) {
      if (to >= distance && (free >> (to - distance) & 1)) return to - distance;
      if (to + distance < kMaxParts && (free >> (to + distance) & 1)) return to + distance;
    }
  }

  int token(int row, int step) const {
    return group_.reverse ? group_.first[row] - step : group_.first[row] + step;
  }
  int active(int step, int rows) const {
    while (rows > 0 && group_.length[rows - 1] <= step) --rows;
    return rows;
  }

  // Phases go: input half of steps [a, b), while step_ == chunk_end_ == a; steps a .. b - 1.
  void next_phase() {
    done_.store(0, std::memory_order_relaxed);
    if (step_ == chunk_end_) {
      chunk_end_ = next_chunk_end_;
      offset_ = 0;
      prepare_step();
    } else {
      offset_ += step_ < 0 ? 0 : rows_;
      ++step_;
      if (step_ == group_.length[0]) {
        finished_.store(true, std::memory_order_release);
        return;
      }
      if (step_ == chunk_end_)
        prepare_input();
      else
        prepare_step();
    }
    free_parts_.store((1u << parts_) - 1, std::memory_order_release);
  }

  void prepare_input() {
    next_chunk_end_ = std::min(step_ + lstm_chunk_steps(group_.rows), group_.length[0]);
    count_ = 0;
    for (int s = step_, rows = rows_; s < next_chunk_end_; ++s) {
      rows = active(s, rows);
      for (int r = 0; r < rows; ++r, ++count_) {
        const ptrdiff_t t = token(r, s);
        x_rows_[count_] = call_->x + t * call_->weights.input_size();
        gate_rows_[count_] =
            call_->reserve != nullptr ? reserve() + t * reserve_row_ : pre_ + count_ * gate_row_;
      }
    }
  }

  void prepare_step() {
    rows_ = active(step_, rows_);
    for (int r = 0; r < rows_; ++r) {
      const ptrdiff_t t = token(r, step_);
      c_rows_[r] =
          call_->reserve != nullptr ? reserve() + t * reserve_row_ + gate_row_ : c_ + r * h_row_;
      if (call_->reserve != nullptr) {  // what no unit owns
        const ptrdiff_t padded =
            static_cast<ptrdiff_t>(unit_blocks_) * call_->weights.table().lanes;
        std::fill(c_rows_[r] - gate_row_ + 4 * padded, c_rows_[r], T(0));
        std::fill(c_rows_[r] + padded, c_rows_[r] - gate_row_ + reserve_row_, T(0));
      }
      out_rows_[r] = call_->out + (2 * t + (group_.reverse ? 1 : 0)) * H_;
    }
  }

  void do_input(int begin, int end) const {
    const LstmWeights<T>& weights = call_->weights.direction(group_.reverse);
    const int block = 4 * call_->weights.table().lanes;
    T* to[kInputChunkRows + kMaxGroupRows];
    for (int m = 0; m < count_; ++m) to[m] = gate_rows_[m] + begin * block;
    const int I = weights.input_size;
    const T* panels = weights.input + static_cast<ptrdiff_t>(begin) * block * I;
    call_->weights.table().gemm({x_rows_,
                                 1,
                                 count_,
                                 {panels, I, (end - begin) * block},
                                 to,
                                 weights.bias + begin * block,
                                 false});
  }

  void do_step(int begin, int end, bool descending) const {
    const int lanes = call_->weights.table().lanes;
    LstmStepArgs<T> args;
    args.weights = call_->weights.direction(group_.reverse);
    args.rows = rows_;
    args.first = step_ == 0;
    args.keep_gates = call_->reserve != nullptr;
    T* const h[2] = {h_, h_ + h_row_ * kMaxGroupRows};
    args.h_prev = h[(step_ + 1) & 1];
    args.h_next = h[step_ & 1];
    args.h_stride = h_row_;
    args.gates = gate_rows_ + offset_;
    args.c = c_rows_;
    args.c_prev = call_->reserve == nullptr ? 0 : (group_.reverse ? reserve_row_ : -reserve_row_);
    args.out = out_rows_;
    args.unit_begin = begin * lanes;
    args.unit_end = std::min(end * lanes, H_);
    args.descending = descending;
    call_->weights.table().lstm_step(args);
  }

  T* reserve() const {
    return call_->reserve + (group_.reverse ? call_->reserve_direction : size_t{0});
  }

  const Call<T>* call_ = nullptr;
  LstmGroup group_{};
  int H_ = 0, unit_blocks_ = 0, parts_ = 1;
  ptrdiff_t gate_row_ = 0, reserve_row_ = 0, h_row_ = 0;
  T *pre_ = nullptr, *h_ = nullptr, *c_ = nullptr;

  int step_ = 0, chunk_end_ = 0, next_chunk_end_ = 0;
  int rows_ = 0;    // of the current step
  int count_ = 0;   // rows of the chunk's input half
  int offset_ = 0;  // of the current step among them
  const T* x_rows_[kInputChunkRows + kMaxGroupRows];
  T* gate_rows_[kInputChunkRows + kMaxGroupRows];
  T* c_rows_[kMaxGroupRows];
  T* out_rows_[kMaxGroupRows];

  std::atomic<uint32_t> free_parts_{0};
  std::atomic<int> done_{0};
  std::atomic<bool> finished_{true};
};

}  // namespace

template <class T>
void bilstm_forward(const BiLstmWeights<T>& weights, const T* x, const int32_t* cu_seqlens,
                    int batch, T* out, T* reserve, int threads) {
  if (threads <= 0) threads = default_threads();
  const int H = weights.hidden_size();
  const Plan plan(cu_seqlens, batch, threads);
  const int runs = plan.tasks();
  if (runs == 0) return;
  const Call<T> call{weights, x, out, reserve, lstm_reserve_size(cu_seqlens[batch], H) / 2};
  const int unit_blocks = (H + weights.table().lanes - 1) / weights.table().lanes;
  const int slots = std::min(threads, runs * parts_of_step(plan.group(0).rows, H, unit_blocks));
  const size_t size = run_workspace(H);
  T* workspace = bilstm_workspace<T>(size * static_cast<size_t>(slots));
  const std::unique_ptr<Run<T>[]> taken(new Run<T>[static_cast<size_t>(slots)]);
  std::atomic<int> next{0};

  parallel_for(slots, threads, [&](int, int slot) {
    Run<T>& own = taken[static_cast<size_t>(slot)];
    for (int task; (task = next.fetch_add(1, std::memory_order_relaxed)) < runs;) {
      own.start(&call, plan.group(task), workspace + static_cast<size_t>(slot) * size);
      typename Run<T>::Place place{0, true};
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
      typename Run<T>::Place place{kMaxParts * n / slots, true};
      Run<T>& run = taken[static_cast<size_t>(other)];
      for (int idle = 0; idle < kJoinSpins && !run.finished(); ++idle) {
        if (run.work(place))
          idle = 0;
        else
          spin_pause();
      }
    }
  });
}

template void bilstm_forward(const BiLstmWeights<float>&, const float*, const int32_t*, int, float*,
                             float*, int);
template void bilstm_forward(const BiLstmWeights<double>&, const double*, const int32_t*, int,
                             double*, double*, int);

}  // namespace xdf
