// The forward pass over given inputs, for training and for inference: a run's phases are the input
// half of a chunk of steps (one gemm), then each of those steps.
#include <type_traits>

#include "cpu/bilstm.h"
#include "cpu/bilstm_plan.h"
#include "cpu/bilstm_runs.h"

namespace xdf {
namespace {

constexpr int64_t kPartWork = 32 * 1024;

// Elements of workspace a thread needs for the run it has taken.
template <class T, class W>
size_t run_workspace(int I, int H) {
  const size_t Hp = static_cast<size_t>(round_up(H, kHiddenAlign));
  // input halves of a chunk; h twice; c; as operands h once more and x
  const size_t rows = kInputChunkRows + kMaxGroupRows;
  const size_t size = 4 * Hp * rows + 3 * (Hp + kHiddenAlign) * kMaxGroupRows;
  if constexpr (std::is_same_v<T, W>) return size;
  return size + (Hp + kHiddenAlign) * kMaxGroupRows + static_cast<size_t>(inner_size<W>(I)) * rows;
}

int parts_of_step(int64_t rows, int64_t H, int unit_blocks) {
  return parts_of_phase(rows, 4 * H * H, kPartWork, unit_blocks);
}

// What is the same for all runs of a call.
template <class T, class W>
struct Call {
  const BiLstmWeights<T, W>& weights;
  const T* x;
  T* out;
  T* reserve;  // or null
  size_t reserve_direction;
};

template <class T, class W>
class Run : public PhasedRun<Run<T, W>> {
  using Base = PhasedRun<Run<T, W>>;
  friend Base;
  using Base::active, Base::group_, Base::token, Base::unit_blocks_;
  static constexpr bool kRounded = !std::is_same_v<T, W>;

 public:
  void start(const Call<T, W>* call, const LstmGroup& group, T* workspace) {
    call_ = call;
    H_ = call->weights.hidden_size();
    const int Hp = round_up(H_, kHiddenAlign);
    gate_row_ = 4 * static_cast<ptrdiff_t>(Hp);
    reserve_row_ = 5 * static_cast<ptrdiff_t>(Hp);
    h_row_ = Hp + kHiddenAlign;  // an odd number of cache lines: rows share no sets
    pre_ = workspace;
    c_ = pre_ + gate_row_ * (kInputChunkRows + kMaxGroupRows);
    h_ = c_ + h_row_ * kMaxGroupRows;
    operands_ = reinterpret_cast<W*>(h_ + (kRounded ? h_row_ * kMaxGroupRows : 0));
    rows_ = group.rows;
    chunk_end_ = 0;
    step_ = -1;
    const int lanes = call->weights.table().lanes;
    const int blocks = (H_ + lanes - 1) / lanes;
    Base::begin(group, blocks, parts_of_step(group.rows, H_, blocks));
  }

 private:
  // Phases go: input half of steps [a, b), while step_ == chunk_end_ == a; steps a .. b - 1.
  bool next_phase() {
    if (step_ == chunk_end_) {
      chunk_end_ = next_chunk_end_;
      offset_ = 0;
      prepare_step();
      return true;
    }
    offset_ += step_ < 0 ? 0 : rows_;
    ++step_;
    if (step_ == group_.length[0]) return false;
    if (step_ == chunk_end_)
      prepare_input();
    else
      prepare_step();
    return true;
  }

  void do_part(int begin, int end, bool descending) const {
    if (step_ == chunk_end_)
      do_input(begin, end);
    else
      do_step(begin, end, descending);
  }

  void prepare_input() {
    next_chunk_end_ = std::min(step_ + lstm_chunk_steps(group_.rows), group_.length[0]);
    count_ = 0;
    for (int s = step_, rows = rows_; s < next_chunk_end_; ++s) {
      rows = active(s, rows);
      for (int r = 0; r < rows; ++r, ++count_) {
        const ptrdiff_t t = token(r, s);
        x_rows_[count_] = x_operand(call_->x + t * call_->weights.input_size());
        gate_rows_[count_] =
            call_->reserve != nullptr ? reserve() + t * reserve_row_ : pre_ + count_ * gate_row_;
      }
    }
  }

  // A row of x as the product takes it, of row count_ of the chunk.
  const W* x_operand(const T* x) const {
    if constexpr (kRounded) {
      const int I = call_->weights.input_size();
      W* to = operands_ + 2 * h_row_ * kMaxGroupRows +
              static_cast<ptrdiff_t>(count_) * inner_size<W>(I);
      call_->weights.table().to_operand(x, to, I);
      return to;
    } else {
      return x;
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
    const LstmWeights<T, W>& weights = call_->weights.direction(group_.reverse);
    const int block = 4 * call_->weights.table().lanes;
    T* to[kInputChunkRows + kMaxGroupRows];
    for (int m = 0; m < count_; ++m) to[m] = gate_rows_[m] + begin * block;
    const int I = inner_size<W>(weights.input_size);
    const W* panels = weights.input + static_cast<ptrdiff_t>(begin) * block * I;
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
    LstmStepArgs<T, W> args;
    args.recurrent = call_->weights.direction(group_.reverse).recurrent;
    args.hidden_size = H_;
    args.rows = rows_;
    args.first = step_ == 0;
    args.keep_gates = call_->reserve != nullptr;
    W* const h[2] = {operands_, operands_ + h_row_ * kMaxGroupRows};
    args.h_prev = h[(step_ + 1) & 1];
    if constexpr (kRounded) {
      args.h_next = h_;
      args.h_next_pairs = h[step_ & 1];
    } else {
      args.h_next = h[step_ & 1];
    }
    args.h_stride = h_row_;
    args.input = gate_rows_ + offset_;
    // Rows that end with this step have none of the next; what is fetched then does no harm.
    args.next_input = step_ + 1 < chunk_end_ ? args.input + rows_ : args.input;
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

  const Call<T, W>* call_ = nullptr;
  int H_ = 0;
  ptrdiff_t gate_row_ = 0, reserve_row_ = 0, h_row_ = 0;
  T *pre_ = nullptr, *h_ = nullptr, *c_ = nullptr;
  W* operands_ = nullptr;  // h twice; rounded, also the chunk's x

  int step_ = 0, chunk_end_ = 0, next_chunk_end_ = 0;
  int rows_ = 0;    // of the current step
  int count_ = 0;   // rows of the chunk's input half
  int offset_ = 0;  // of the current step among them
  const W* x_rows_[kInputChunkRows + kMaxGroupRows];
  T* gate_rows_[kInputChunkRows + kMaxGroupRows];
  T* c_rows_[kMaxGroupRows];
  T* out_rows_[kMaxGroupRows];
};

}  // namespace

template <class T, class W>
void bilstm_forward(const BiLstmWeights<T, W>& weights, const T* x, const int32_t* cu_seqlens,
                    int batch, T* out, T* reserve, int threads) {
  if (threads <= 0) threads = default_threads();
  const int H = weights.hidden_size();
  const Plan plan(cu_seqlens, batch, threads);
  if (plan.tasks() == 0) return;
  const Call<T, W> call{weights, x, out, reserve, lstm_reserve_size(cu_seqlens[batch], H) / 2};
  const int unit_blocks = (H + weights.table().lanes - 1) / weights.table().lanes;
  const int slots =
      std::min(threads, plan.tasks() * parts_of_step(plan.group(0).rows, H, unit_blocks));
  const size_t size = run_workspace<T, W>(weights.input_size(), H);
  T* workspace = bilstm_workspace<T>(size * static_cast<size_t>(slots));
  using OwnRun = Run<T, W>;
  complete_runs<OwnRun>(plan, slots, threads, [&](OwnRun& run, const LstmGroup& group, int slot) {
    run.start(&call, group, workspace + static_cast<size_t>(slot) * size);
  });
}

template void bilstm_forward(const BiLstmWeights<float>&, const float*, const int32_t*, int, float*,
                             float*, int);
template void bilstm_forward(const BiLstmWeights<float, Bf16Pair>&, const float*, const int32_t*,
                             int, float*, float*, int);
template void bilstm_forward(const BiLstmWeights<double>&, const double*, const int32_t*, int,
                             double*, double*, int);

}  // namespace xdf
