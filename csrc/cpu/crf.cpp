#include "cpu/crf.h"

#include <algorithm>
#include <memory>

#include "cpu/aligned.h"
#include "cpu/dispatch.h"
#include "cpu/parallel.h"

namespace xdf {
namespace {

// Multiply-adds that take about as long as waking a thread: a batch with less to do stays on fewer.
constexpr int64_t kWorkPerThread = 1 << 20;
// Chunks of a batch whose gradients of transitions are kept apart, and what they may take together.
constexpr int64_t kMaxGradChunks = 64, kMinGradChunks = 8, kGradChunkElements = 1 << 18;
constexpr size_t kArenaKept = 16 << 20;  // bytes a thread keeps between calls

// Memory of the calling thread, reused from call to call: a decoded sentence must not cost a
// malloc.
class Arena {
 public:
  explicit Arena(size_t bytes) {
    if (buffer() == nullptr) buffer() = std::make_unique<AlignedBuffer<char>>();
    data_ = buffer()->reserve(bytes);
  }
  ~Arena() {
    if (buffer()->size() > kArenaKept) buffer().reset();
  }
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;
  char* data() const { return data_; }

 private:
  static std::unique_ptr<AlignedBuffer<char>>& buffer() {
    static thread_local std::unique_ptr<AlignedBuffer<char>> memory;
    return memory;
  }
  char* data_;
};

size_t align64(size_t bytes) {
  return (bytes + 63) / 64 * 64;
}

int64_t longest_sequence(const int32_t* cu_seqlens, int batch) {
  int32_t longest = 0;
  for (int b = 0; b < batch; ++b) longest = std::max(longest, cu_seqlens[b + 1] - cu_seqlens[b]);
  return longest;
}

// Threads for `work` multiply-adds.
int useful_threads(int threads, int64_t work) {
  const int64_t wanted = threads > 0 ? threads : default_threads();
  return static_cast<int>(std::min(wanted, 1 + work / kWorkPerThread));
}

// Cuts `count` things into `pieces` of like size: where piece i begins.
int piece_begin(int64_t count, int pieces, int i) {
  return static_cast<int>(count * i / pieces);
}

// The memory of one call: tables, then `shared` bytes, then a workspace for each thread.
template <class T>
struct CallPlan {
  CallPlan(const CrfBatch<T>& batch, int tasks_wanted, int threads_wanted, size_t shared_bytes,
           size_t workspace_bytes)
      : tasks(std::min(batch.batch, tasks_wanted)),
        threads(threads_wanted),
        shared_offset(align64(CrfTables<T>::size(batch.model.num_tags) * sizeof(T))),
        workspace_offset(shared_offset + align64(shared_bytes)),
        workspace_size(align64(workspace_bytes)),
        arena(workspace_offset +
              workspace_size * static_cast<size_t>(parallel_slots(tasks, threads))) {
    tables.memory = reinterpret_cast<T*>(arena.data());
  }

  double* shared() const { return reinterpret_cast<double*>(arena.data() + shared_offset); }

  CrfSequences<T> sequences(const CrfBatch<T>& batch, int task, int slot) const {
    return {batch.model,
            tables,
            batch.emissions,
            batch.cu_seqlens,
            piece_begin(batch.batch, tasks, task),
            piece_begin(batch.batch, tasks, task + 1),
            arena.data() + workspace_offset + workspace_size * static_cast<size_t>(slot)};
  }

  int tasks, threads;
  size_t shared_offset, workspace_offset, workspace_size;
  Arena arena;
  CrfTables<T> tables;
};

template <class T>
int64_t work_of(const CrfBatch<T>& batch) {
  return static_cast<int64_t>(batch.cu_seqlens[batch.batch]) * batch.model.num_tags *
         padded_tags(batch.model.num_tags);
}

// Enough pieces to even out sequences of different length, few enough to be cheap to hand out.
int tasks_for(int threads) {
  return threads == 1 ? 1 : 8 * threads;
}

// sums[j] = sum over sequences, ascending, of their first (or last) row.
template <class T>
void sum_edge_rows(const CrfBatch<T>& batch, const T* rows, bool first, double* sums, T* out) {
  const int C = batch.model.num_tags;
  std::fill(sums, sums + C, 0.0);
  for (int b = 0; b < batch.batch; ++b) {
    const ptrdiff_t begin = batch.cu_seqlens[b], end = batch.cu_seqlens[b + 1];
    if (begin == end) continue;
    const T* row = rows + (first ? begin : end - 1) * C;
    for (int j = 0; j < C; ++j) sums[j] += static_cast<double>(row[j]);
  }
  for (int j = 0; j < C; ++j) out[j] = static_cast<T>(sums[j]);
}

}  // namespace

template <class T>
void crf_log_likelihood(const CrfBatch<T>& batch, const int32_t* tags, T* out, int threads) {
  const KernelTable<T>& table = kernels<T>();
  threads = useful_threads(threads, 2 * work_of(batch));
  CallPlan<T> plan(batch, tasks_for(threads), threads, 0,
                   crf_likelihood_workspace<T>(batch.model.num_tags));
  table.crf_prepare(batch.model, plan.tables);
  parallel_for(plan.tasks, threads, [&](int task, int slot) {
    table.crf_log_likelihood({plan.sequences(batch, task, slot), tags, out});
  });
}

template <class T>
void crf_log_likelihood_grad(const CrfBatch<T>& batch, const int32_t* tags, const T* grad_out,
                             T* grad_emissions, T* grad_start, T* grad_end, T* grad_transitions,
                             int threads) {
  const KernelTable<T>& table = kernels<T>();
  const int C = batch.model.num_tags;
  const ptrdiff_t padded = padded_tags(C), matrix = C * padded;
  threads = useful_threads(threads, 4 * work_of(batch));
  const int64_t chunks =
      std::clamp<int64_t>(kGradChunkElements / matrix, kMinGradChunks, kMaxGradChunks);
  const size_t partials = static_cast<size_t>(std::min<int64_t>(chunks, batch.batch));
  const size_t shared = static_cast<size_t>(padded) + partials * static_cast<size_t>(matrix);
  CallPlan<T> plan(batch, static_cast<int>(chunks), threads, shared * sizeof(double),
                   crf_grad_workspace<T>(longest_sequence(batch.cu_seqlens, batch.batch), C));
  table.crf_prepare(batch.model, plan.tables);
  double* sums = plan.shared();
  double* counts = sums + padded;  // of each chunk
  parallel_for(plan.tasks, threads, [&](int task, int slot) {
    double* mine = counts + task * matrix;
    std::fill(mine, mine + matrix, 0.0);
    table.crf_grad({plan.sequences(batch, task, slot), tags, grad_out, grad_emissions, mine});
  });
  for (int i = 0; i < C; ++i) {
    std::fill(sums, sums + C, 0.0);
    for (int task = 0; task < plan.tasks; ++task) {
      const double* from = counts + task * matrix + i * padded;
      for (int j = 0; j < C; ++j) sums[j] += from[j];
    }
    for (int j = 0; j < C; ++j)
      grad_transitions[static_cast<ptrdiff_t>(i) * C + j] = static_cast<T>(sums[j]);
  }
  sum_edge_rows(batch, grad_emissions, true, sums, grad_start);
  sum_edge_rows(batch, grad_emissions, false, sums, grad_end);
}

template <class T>
void crf_marginals(const CrfBatch<T>& batch, T* out, int threads) {
  const KernelTable<T>& table = kernels<T>();
  const int C = batch.model.num_tags;
  threads = useful_threads(threads, 3 * work_of(batch));
  CallPlan<T> plan(batch, tasks_for(threads), threads, 0,
                   crf_grad_workspace<T>(longest_sequence(batch.cu_seqlens, batch.batch), C));
  table.crf_prepare(batch.model, plan.tables);
  parallel_for(plan.tasks, threads, [&](int task, int slot) {
    table.crf_grad({plan.sequences(batch, task, slot), nullptr, nullptr, out, nullptr});
  });
}

template <class T>
void crf_viterbi(const CrfBatch<T>& batch, int32_t* tags, T* scores, int threads) {
  const KernelTable<T>& table = kernels<T>();
  const int C = batch.model.num_tags;
  threads = useful_threads(threads, 2 * work_of(batch));
  CallPlan<T> plan(batch, tasks_for(threads), threads, 0,
                   viterbi_workspace<T>(longest_sequence(batch.cu_seqlens, batch.batch), C));
  table.viterbi_prepare(batch.model, plan.tables);
  parallel_for(plan.tasks, threads, [&](int task, int slot) {
    table.viterbi({plan.sequences(batch, task, slot), tags, scores});
  });
}

template <class T>
void softmax(const T* logits, int64_t rows, int columns, T* out, int threads) {
  const KernelTable<T>& table = kernels<T>();
  threads = useful_threads(threads, rows * columns * 16);  // an exponential is worth some
  const int tasks = static_cast<int>(std::min<int64_t>(rows, tasks_for(threads)));
  parallel_for(tasks, threads, [&](int task, int) {
    const int64_t begin = rows * task / tasks, end = rows * (task + 1) / tasks;
    table.softmax({logits + begin * columns, out + begin * columns, end - begin, columns});
  });
}

#define XDF_INSTANTIATE(T)                                                                        \
  template void crf_log_likelihood(const CrfBatch<T>&, const int32_t*, T*, int);                  \
  template void crf_log_likelihood_grad(const CrfBatch<T>&, const int32_t*, const T*, T*, T*, T*, \
                                        T*, int);                                                 \
  template void crf_marginals(const CrfBatch<T>&, T*, int);                                       \
  template void crf_viterbi(const CrfBatch<T>&, int32_t*, T*, int);                               \
  template void softmax(const T*, int64_t, int, T*, int);
XDF_INSTANTIATE(float)
XDF_INSTANTIATE(double)
#undef XDF_INSTANTIATE

}  // namespace xdf
