#include "cpu/bilstm_tokens.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>

#include "cpu/bilstm_pack.h"
#include "cpu/bilstm_plan.h"
#include "cpu/bilstm_runs.h"
#include "cpu/dispatch.h"
#include "cpu/parallel.h"

namespace xdf {
namespace {

// A step of int8 takes a third of the time.
template <class W>
constexpr int64_t kPartWork = std::is_same_v<W, int8_t> ? 96 * 1024 : 32 * 1024;

// No more than threads could share, some slower than others: after each part a core waits for all
// that it has under way, which costs one that works alone a tenth of its time at H = 600.
template <class W>
int parts_of_step(int64_t rows, int64_t H, int unit_blocks, int threads) {
  const int parts = parts_of_phase(rows, 4 * H * H, kPartWork<W>, unit_blocks);
  return threads > 1 ? std::min(parts, 2 * threads) : 1;
}

Bf16 to_bf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  if (std::isnan(x)) return {static_cast<uint16_t>(bits >> 16 | 0x40)};
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

}  // namespace

// One direction of one group of sequences: its phases are the steps.
template <class W, class In>
class TokenRun : public PhasedRun<TokenRun<W, In>> {
  using Base = PhasedRun<TokenRun<W, In>>;
  friend Base;
  using Base::active, Base::group_, Base::token, Base::unit_blocks_;
  static constexpr bool kInt8 = std::is_same_v<W, int8_t>;
  static constexpr bool kPairs = std::is_same_v<W, Bf16Pair>;
  // What the recurrence takes, and what the output layer gets.
  using Hidden = std::conditional_t<kInt8, uint8_t, std::conditional_t<kPairs, W, float>>;
  using Out = std::conditional_t<kInt8, uint8_t, float>;

 public:
  struct Call {
    const TokenBiLstm& model;
    const int32_t* slots;  // [total] row of each token: of `rows`, or -1 - row of `further`
    const char *rows, *further;
    char* out;
    int threads;
  };

  // Bytes a thread needs for the run it has taken: h twice, c, gates, h before it is rounded.
  static size_t workspace_nbytes(int H) {
    const size_t gates = kInt8 ? 0 : 4 * static_cast<size_t>(round_up(H, kHiddenAlign));
    const size_t unrounded = kPairs ? hidden_row(H) : 0;
    return kMaxGroupRows *
           (2 * hidden_row(H) * sizeof(Hidden) + (cell_row(H) + gates + unrounded) * sizeof(float));
  }

  void start(const Call* call, const LstmGroup& group, char* workspace) {
    call_ = call;
    H_ = call->model.sizes_.hidden_size;
    char* at = workspace;
    for (Hidden*& h : h_) {
      h = reinterpret_cast<Hidden*>(at);
      at += kMaxGroupRows * hidden_row(H_) * sizeof(Hidden);
    }
    // Its padding meets weights of zero, but is read.
    if constexpr (kInt8) std::memset(workspace, kInt8HiddenZero, at - workspace);
    float* c = reinterpret_cast<float*>(at);
    float* gates = c + kMaxGroupRows * cell_row(H_);
    unrounded_ = gates + kMaxGroupRows * 4 * round_up(H_, kHiddenAlign);
    for (int r = 0; r < kMaxGroupRows; ++r) {
      c_rows_[r] = c + r * cell_row(H_);
      gate_rows_[r] = gates + 4 * r * static_cast<ptrdiff_t>(round_up(H_, kHiddenAlign));
    }
    rows_ = group.rows;
    step_ = -1;
    const int lanes = call->model.kernels_.lanes;
    const int blocks = (H_ + lanes - 1) / lanes;
    Base::begin(group, blocks, parts_of_step<W>(group.rows, H_, blocks, call->threads));
  }

 private:
  // An odd number of cache lines: rows share no sets.
  static size_t hidden_row(int H) {
    const size_t line = 64 / sizeof(Hidden);
    return ((static_cast<size_t>(H) + line - 1) / line | 1) * line;
  }
  static size_t cell_row(int H) {
    return static_cast<size_t>(round_up(H, kHiddenAlign)) + kHiddenAlign;
  }

  const In* row_of(ptrdiff_t t) const {
    const ptrdiff_t nbytes = static_cast<ptrdiff_t>(call_->model.row_nbytes_);
    const ptrdiff_t slot = call_->slots[t];
    const char* row =
        slot >= 0 ? call_->rows + slot * nbytes : call_->further - (slot + 1) * nbytes;
    return reinterpret_cast<const In*>(group_.reverse ? row + nbytes / 2 : row);
  }

  bool next_phase() {
    ++step_;
    if (step_ == group_.length[0]) return false;
    rows_ = active(step_, rows_);
    const int next_rows = active(step_ + 1, rows_);
    for (int r = 0; r < rows_; ++r) {
      const ptrdiff_t t = token(r, step_);
      input_[r] = step_ == 0 ? row_of(t) : next_input_[r];
      next_input_[r] = r < next_rows ? row_of(token(r, step_ + 1)) : input_[r];
      Out* out = reinterpret_cast<Out*>(call_->out +
                                        t * static_cast<ptrdiff_t>(call_->model.hidden_nbytes()));
      out_rows_[r] = group_.reverse ? out + H_ : out;
    }
    return true;
  }

  void do_part(int begin, int end, bool descending) const {
    const TokenBiLstm& model = call_->model;
    const int lanes = model.kernels_.lanes;
    const int d = group_.reverse ? 1 : 0;
    if constexpr (kInt8) {
      LstmInt8StepArgs args;
      args.recurrent = model.int8_recurrent_[d].view();
      args.descending = descending;
      args.h_next = h_[step_ & 1];
      fill(args, begin * lanes, std::min(end * lanes, H_));
      model.inference_.lstm_step_int8(args);
    } else {
      LstmStepArgs<float, W, In> args;
      args.recurrent = reinterpret_cast<const W*>(model.recurrent_[d].data());
      args.keep_gates = false;
      args.gates = gate_rows_;
      args.c_prev = 0;
      args.descending = descending;
      fill(args, begin * lanes, std::min(end * lanes, H_));
      if constexpr (kPairs) {
        args.h_next = unrounded_;
        args.h_next_pairs = h_[step_ & 1];
        model.inference_.lstm_step_bf16_pairs(args);
      } else {
        args.h_next = h_[step_ & 1];
        if constexpr (std::is_same_v<W, float>)
          model.kernels_.lstm_step(args);
        else
          model.inference_.lstm_step_bf16(args);
      }
    }
  }

  template <class Args>
  void fill(Args& args, int unit_begin, int unit_end) const {
    args.hidden_size = H_;
    args.rows = rows_;
    args.first = step_ == 0;
    args.h_prev = h_[(step_ + 1) & 1];
    args.h_stride = static_cast<ptrdiff_t>(hidden_row(H_));
    args.input = input_;
    args.next_input = next_input_;
    args.c = c_rows_;
    args.out = out_rows_;
    args.unit_begin = unit_begin;
    args.unit_end = unit_end;
  }

  const Call* call_ = nullptr;
  int H_ = 0, step_ = 0, rows_ = 0;
  Hidden* h_[2] = {};
  float* unrounded_ = nullptr;
  const In* input_[kMaxGroupRows];
  const In* next_input_[kMaxGroupRows];
  float* gate_rows_[kMaxGroupRows];
  float* c_rows_[kMaxGroupRows];
  Out* out_rows_[kMaxGroupRows];
};

size_t TokenBiLstm::row_nbytes(Precision precision, int hidden_size) {
  const size_t element = precision == Precision::kFloat32 ? sizeof(float) : sizeof(Half);
  const int lanes = ::xdf::kernels<float>().lanes;
  return 2 * 4 * static_cast<size_t>(round_up(hidden_size, lanes)) * element;
}

TokenBiLstm::TokenBiLstm(Precision precision, const Sizes& sizes, const float* embedding,
                         const Direction& forward, const Direction& reverse,
                         const int32_t* table_ids, int64_t table_size, int threads)
    : precision_(precision),
      sizes_(sizes),
      kernels_(::xdf::kernels<float>()),
      inference_(inference_kernels()),
      bf16_(bf16_kernels()),
      embedding_(embedding),
      row_nbytes_(row_nbytes(precision, sizes.hidden_size)) {
  pack(0, forward);
  pack(1, reverse);
  table_.reserve(static_cast<size_t>(table_size) * row_nbytes_);
  make_rows(table_ids, table_size, table_.data(), threads);
  bool identity = table_size == sizes.vocab_size;
  for (int64_t n = 0; n < table_size && identity; ++n) identity = table_ids[n] == n;
  if (!identity) {
    slots_.assign(static_cast<size_t>(sizes.vocab_size), -1);
    for (int64_t n = 0; n < table_size; ++n)
      slots_[static_cast<size_t>(table_ids[n])] = static_cast<int32_t>(n);
  }
}

size_t TokenBiLstm::weights_nbytes() const {
  size_t size = input_.size() * sizeof(float);
  for (int d = 0; d < 2; ++d) size += recurrent_[d].size() + int8_recurrent_[d].nbytes();
  return size;
}

void TokenBiLstm::pack(int d, const Direction& from) {
  const int H = sizes_.hidden_size, E = sizes_.embedding_size;
  const int lanes = kernels_.lanes;
  const int columns = 4 * round_up(H, lanes);

  const size_t input_size = static_cast<size_t>(columns) * static_cast<size_t>(E + 1);
  float* to = input_.reserve(2 * input_size) + static_cast<size_t>(d) * input_size;
  to = pack_gates(to, from.w_ih, E, H, lanes);
  for (int m = 0; m < columns; ++m) {
    const int row = gate_row_of(m, H, lanes);
    to[m] = row >= 0 ? from.bias[row] : 0.0f;
  }

  const size_t weights = static_cast<size_t>(columns) * static_cast<size_t>(H);
  if (precision_ == Precision::kFloat32) {
    char* recurrent = recurrent_[d].reserve(weights * sizeof(float));
    pack_gates(reinterpret_cast<float*>(recurrent), from.w_hh, H, H, lanes);
  } else if (precision_ == Precision::kBf16 && bf16_ != nullptr) {
    const size_t pairs = static_cast<size_t>(columns) * static_cast<size_t>(pair_count(H));
    char* recurrent = recurrent_[d].reserve(pairs * sizeof(Bf16Pair));
    pack_gate_pairs(*bf16_, reinterpret_cast<Bf16Pair*>(recurrent), from.w_hh, H, H);
  } else if (precision_ == Precision::kBf16) {
    std::vector<float> packed(weights);
    pack_gates(packed.data(), from.w_hh, H, H, lanes);
    char* recurrent = recurrent_[d].reserve(weights * sizeof(Bf16));
    std::transform(packed.begin(), packed.end(), reinterpret_cast<Bf16*>(recurrent), to_bf16);
  } else {
    int8_recurrent_[d].pack(from.w_hh_int8, from.w_hh_scales, H, columns, lanes,
                            [=](int m) { return gate_row_of(m, H, lanes); });
  }
}

void TokenBiLstm::make_rows(const int32_t* ids, int64_t count, char* to, int threads) const {
  constexpr int kRows = 96;
  const int H = sizes_.hidden_size, E = sizes_.embedding_size;
  const int columns = 4 * round_up(H, kernels_.lanes);
  const size_t input_size = input_.size() / 2;
  const int tasks = static_cast<int>((count + kRows - 1) / kRows);
  // Halves are made from floats; room for those is found here, as a task must not throw.
  const size_t float_rows = std::min<size_t>(kRows, static_cast<size_t>(count));
  const size_t slot_size = float_rows * static_cast<size_t>(columns);
  std::vector<float> floats;
  if (precision_ != Precision::kFloat32)
    floats.resize(slot_size * static_cast<size_t>(parallel_slots(tasks, threads)));
  parallel_for(tasks, threads, [&](int task, int slot) {
    const int64_t first = static_cast<int64_t>(task) * kRows;
    const int rows = static_cast<int>(std::min<int64_t>(kRows, count - first));
    const float* a_rows[kRows];
    float* c_rows[kRows];
    float* values =
        floats.empty() ? nullptr : floats.data() + static_cast<size_t>(slot) * slot_size;
    for (int d = 0; d < 2; ++d) {
      char* half = to + first * static_cast<int64_t>(row_nbytes_) + d * (row_nbytes_ / 2);
      for (int r = 0; r < rows; ++r) {
        a_rows[r] = embedding_ + static_cast<ptrdiff_t>(ids[first + r]) * E;
        c_rows[r] = values == nullptr
                        ? reinterpret_cast<float*>(half + static_cast<size_t>(r) * row_nbytes_)
                        : values + static_cast<ptrdiff_t>(r) * columns;
      }
      const float* panels = input_.data() + static_cast<size_t>(d) * input_size;
      const float* bias = panels + static_cast<ptrdiff_t>(columns) * E;
      kernels_.gemm({a_rows, 1, rows, {panels, E, columns}, c_rows, bias, false});
      for (int r = 0; r < rows && values != nullptr; ++r)
        inference_.to_half(c_rows[r],
                           reinterpret_cast<Half*>(half + static_cast<size_t>(r) * row_nbytes_),
                           columns);
    }
  });
}

template <class W, class In>
void TokenBiLstm::run(const int32_t* slots, const char* rows, const char* further,
                      const int32_t* cu_seqlens, int batch, void* out, int threads) const {
  using Run = TokenRun<W, In>;
  const int H = sizes_.hidden_size;
  const Plan plan(cu_seqlens, batch, threads);
  if (plan.tasks() == 0) return;
  const typename Run::Call call{*this, slots, rows, further, static_cast<char*>(out), threads};
  const int unit_blocks = (H + kernels_.lanes - 1) / kernels_.lanes;
  const int parts = parts_of_step<W>(plan.group(0).rows, H, unit_blocks, threads);
  const int slots_used = std::min(threads, plan.tasks() * parts);
  const size_t size = Run::workspace_nbytes(H);
  char* workspace = bilstm_workspace<char>(size * static_cast<size_t>(slots_used));
  complete_runs<Run>(plan, slots_used, threads, [&](Run& own, const LstmGroup& group, int slot) {
    own.start(&call, group, workspace + static_cast<size_t>(slot) * size);
  });
}

void TokenBiLstm::forward(const int32_t* ids, const int32_t* cu_seqlens, int batch, void* out,
                          int threads) const {
  if (threads <= 0) threads = default_threads();
  const int64_t total = cu_seqlens[batch];
  const int32_t* slots = ids;
  AlignedBuffer<char> further;
  std::vector<int32_t> own_slots;
  if (!slots_.empty()) {
    // Ids without a row of their own: each computed once.
    std::vector<int32_t> missing;
    for (int64_t t = 0; t < total; ++t)
      if (slots_[static_cast<size_t>(ids[t])] < 0) missing.push_back(ids[t]);
    std::sort(missing.begin(), missing.end());
    missing.erase(std::unique(missing.begin(), missing.end()), missing.end());
    further.reserve(missing.size() * row_nbytes_);
    make_rows(missing.data(), static_cast<int64_t>(missing.size()), further.data(), threads);
    own_slots.resize(static_cast<size_t>(total));
    for (int64_t t = 0; t < total; ++t) {
      int32_t slot = slots_[static_cast<size_t>(ids[t])];
      if (slot < 0) {
        const auto at = std::lower_bound(missing.begin(), missing.end(), ids[t]);
        slot = -1 - static_cast<int32_t>(at - missing.begin());
      }
      own_slots[static_cast<size_t>(t)] = slot;
    }
    slots = own_slots.data();
  }
  const auto run_in = [&](auto run_as) {
    (this->*run_as)(slots, table_.data(), further.data(), cu_seqlens, batch, out, threads);
  };
  if (precision_ == Precision::kFloat32)
    run_in(&TokenBiLstm::run<float, float>);
  else if (precision_ == Precision::kBf16 && bf16_ != nullptr)
    run_in(&TokenBiLstm::run<Bf16Pair, Half>);
  else if (precision_ == Precision::kBf16)
    run_in(&TokenBiLstm::run<Bf16, Half>);
  else
    run_in(&TokenBiLstm::run<int8_t, Half>);
}

}  // namespace xdf
