// Work on rows beside the recurrence: packing its weights, the order of sequences, the output
// layer, the gradient of an embedding.
#pragma once

#include "cuda/launch.cuh"
#include "cuda/lstm_layout.cuh"

namespace xdf {
namespace cuda {

// Packs W_hh of both directions; From: float or the stored type.
template <class P, class From, bool kBackward>
struct PackWeights {
  using Store = typename P::Store;
  struct Args {
    Geometry x;
    const From* weights[2];  // [4H, H] of each direction
    Store* packed;
  };
  static constexpr int kWarps = 8;
  static XDF_DEVICE int phases(const Args&, const Block&) { return 1; }
  static XDF_DEVICE void phase(const Args& args, const Block& block, int warp, int) {
    const int size = args.x.groups * args.x.weights_a_group;
    XDF_EACH_LANE(lane) {
      const int at = (block.x * block.warps + warp) * kLanes + lane;
      if (at < size) {
        const WeightPlace place = weight_place(P::kTensor, kBackward, args.x, at);
        Store value = Rounded<Store>::of(0);
        if (place.row >= 0)
          value = Rounded<Store>::of(to_float(
              args.weights[block.y][static_cast<int64_t>(place.row) * args.x.hidden + place.col]));
        args.packed[static_cast<int64_t>(block.y) * size + at] = value;
      }
    }
  }
};

// order[place] = sequence, longest first, equal ones as they come. Each sequence counts those
// before it: B^2 comparisons, spread over all processors, and no barrier.
struct OrderByLength {
  struct Args {
    int batch;
    int64_t total;
    const int32_t* cu_seqlens;
    int32_t* order;
  };
  static constexpr int kWarps = 4;
  static XDF_DEVICE int phases(const Args&, const Block&) { return 1; }
  static XDF_DEVICE void phase(const Args& args, const Block& block, int warp, int) {
    // A warp places one sequence; its lanes share the comparisons.
    const int b = block.x * block.warps + warp;
    if (b >= args.batch) return;
    const int own = sequence_of(args.cu_seqlens, b, args.total).length;
    Lane<int> before;
    XDF_EACH_LANE(lane) {
      before[lane] = 0;
      for (int other = lane; other < args.batch; other += kLanes) {
        const int length = sequence_of(args.cu_seqlens, other, args.total).length;
        before[lane] += length > own || (length == own && other < b);
      }
    }
    warp_reduce(before, Sum<int>());
    XDF_EACH_LANE(lane) {
      if (lane == 0) args.order[before[lane]] = b;
    }
  }
};

// out[m, n] = bias[n] + sum_k x[m, k] w[n, k], or its GELU x sigmoid(2 u) with u = sqrt(2 / pi) (x
// + 0.044715 x^3). A warp takes a row and 8 n; lanes share k, so a sum's order depends on K alone.
template <class X, class Out>
struct LinearRows {
  struct Args {
    int64_t M;
    int N, K;
    const X* x;      // [M, K]
    const float* w;  // [N, K]
    const float* bias;
    Out* out;  // [M, N]
    bool gelu;
  };
  static constexpr int kWarps = 4, kColumns = 8;
  static XDF_DEVICE int phases(const Args&, const Block&) { return 1; }
  static XDF_DEVICE void phase(const Args& args, const Block& block, int warp, int) {
    const int64_t m = static_cast<int64_t>(block.x) * block.warps + warp;
    const int begin = block.y * kColumns;
    if (m >= args.M) return;
    const X* x = args.x + m * args.K;
    Lane<float> sums[kColumns];
    XDF_EACH_LANE(lane) {
      XDF_UNROLL
      for (int n = 0; n < kColumns; ++n) sums[n][lane] = 0.0f;
      for (int k = lane; k < args.K; k += kLanes) {
        const float value = to_float(x[k]);
        XDF_UNROLL
        for (int n = 0; n < kColumns; ++n)
          if (begin + n < args.N)
            sums[n][lane] = multiply_add(
                value, args.w[static_cast<int64_t>(begin + n) * args.K + k], sums[n][lane]);
      }
    }
    XDF_UNROLL
    for (int n = 0; n < kColumns; ++n) {
      warp_reduce(sums[n], Sum<float>());
      XDF_EACH_LANE(lane) {
        if (lane == n && begin + n < args.N) {
          float y = sums[n][lane] + args.bias[begin + n];
          if (args.gelu) y *= exact_sigmoid(y * (1.5957691216f + 0.0713548163f * y * y));
          args.out[m * args.N + begin + n] = Rounded<Out>::of(y);
        }
      }
    }
  }
};

// grad_table[id] = sum of grad_out rows of that id, in their order. Positions are sorted by id,
// equal ones as they come; the warp of the first position of an id sums them all. Rows of other ids
// are left as they are. An id that is no row of the table is passed over.
template <class T>
struct EmbeddingGrad {
  struct Args {
    int64_t positions, rows;
    int E;
    const int64_t* ids;    // [positions], ascending
    const int64_t* order;  // [positions]: row of grad_out
    const T* grad_out;     // [positions, E]
    T* grad_table;         // [rows, E]
  };
  static constexpr int kWarps = 4;
  static XDF_DEVICE int phases(const Args&, const Block&) { return 1; }
  static XDF_DEVICE void phase(const Args& args, const Block& block, int warp, int) {
    const int64_t begin = static_cast<int64_t>(block.x) * block.warps + warp;
    if (begin >= args.positions) return;
    const int64_t id = args.ids[begin];
    if (id < 0 || id >= args.rows || (begin > 0 && args.ids[begin - 1] == id)) return;
    XDF_EACH_LANE(lane) {
      for (int column = lane; column < args.E; column += kLanes) {
        T sum = T(0);
        for (int64_t n = begin; n < args.positions && args.ids[n] == id; ++n)
          sum += args.grad_out[args.order[n] * args.E + column];
        args.grad_table[id * args.E + column] = sum;
      }
    }
  }
};

}  // namespace cuda
}  // namespace xdf
