// Pooling of ragged rows: of each run of rows x[begin .. end) one row,
//
//   max    y_k = max_r x_rk            and the first r where it is
//   sum    y_k = sum_r x_rk / d        taken in double, in the order of r
//   last   y_k = x_(end-1)k for the first half of k, x_(begin)k for the second: of a BiLSTM, the
//          states that have read all of the run
//
// A run without rows gives zeros. What a run gives does not hang on the others, and runs of runs
// may be pooled again: that is how a text of several windows is.
#pragma once

#include "cuda/launch.cuh"

namespace xdf {
namespace cuda {

enum class PoolTask { kMax = 0, kSum = 1, kLast = 2 };

// X: of the rows; Out: of what they give, float or double.
template <class X, class Out>
struct PoolArgs {
  PoolTask task;
  int64_t rows;
  int runs, width;
  const int32_t* bounds;    // [runs, 2]; a run that is none of x is one without rows
  const int32_t* divisors;  // [runs], d of the sums; null: 1
  const X* x;               // [rows, width]
  Out* out;                 // [runs, width]
  int64_t* where;           // [runs, width], of max: the row, -1 without rows; null: not wanted
};

template <class X, class Out>
struct PoolRows {
  using Args = PoolArgs<X, Out>;
  static constexpr int kWarps = 4;
  static XDF_DEVICE int phases(const Args&, const Block&) { return 1; }
  // A lane takes a column of a run.
  static XDF_DEVICE void phase(const Args& args, const Block& block, int warp, int) {
    const int64_t begin = args.bounds[2 * static_cast<int64_t>(block.x)];
    const int64_t end = args.bounds[2 * static_cast<int64_t>(block.x) + 1];
    const bool empty = begin < 0 || end <= begin || end > args.rows;
    XDF_EACH_LANE(lane) {
      const int column = (block.y * block.warps + warp) * kLanes + lane;
      if (column < args.width) {
        const int64_t at = static_cast<int64_t>(block.x) * args.width + column;
        int64_t row = empty ? -1 : begin;
        Out value = Out(0);
        if (!empty && args.task == PoolTask::kSum) {
          double sum = 0.0;
          XDF_PIPELINE
          for (int64_t r = begin; r < end; ++r)
            sum += static_cast<double>(to_float(args.x[r * args.width + column]));
          const int divisor = args.divisors == nullptr ? 1 : args.divisors[block.x];
          value = static_cast<Out>(sum / divisor);
        } else if (!empty) {
          if (args.task == PoolTask::kLast && column < args.width / 2) row = end - 1;
          value = to_float(args.x[row * args.width + column]);
          if (args.task == PoolTask::kMax) {
            XDF_PIPELINE
            for (int64_t r = begin + 1; r < end; ++r) {
              const Out other = to_float(args.x[r * args.width + column]);
              if (other > value) {
                value = other;
                row = r;
              }
            }
          }
        }
        args.out[at] = value;
        if (args.where != nullptr) args.where[at] = row;
      }
    }
  }
};

}  // namespace cuda
}  // namespace xdf
