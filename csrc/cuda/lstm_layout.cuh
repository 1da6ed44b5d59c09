// Where the recurrent kernels of an LSTM keep what: packed weights, shared memory, global rows.
//
// Both passes multiply, at each step, a matrix that stays (W_hh, or its transpose in the backward
// pass) with a vector per sequence that changes (h of the last step, or the gates' gradients).
//
//   grid      x: tiles of `rows` sequences, longest first, times blocks of a cluster; y: direction
//   cluster   the blocks that share a tile; each owns a range of hidden units, has their weights in
//             its shared memory, if they fit ("resident"), and computes them for all sequences
//   exchange  the vector of every sequence of the tile, whole in every block; two buffers, one read
//             and one written in a step, so that a step needs one barrier
//   group     the units that a warp computes at once, in all gates and for all rows of the tile: 8
//             in the forward pass, 16 in the backward pass
//
// Gates of a token lie unit by unit, "interleaved": [direction][unit][i, f, g, o]. That is the
// order of the input half, of `gates` and of the gates' gradients.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda/portable.cuh"

namespace xdf {
namespace cuda {

enum class Kind { kFloat32 = 0, kFloat64 = 1, kBf16 = 2, kInt8 = 3 };
enum class InputType { kFloat32 = 0, kFloat64 = 1, kBf16 = 2, kHalf = 3 };

XDF_HD int divide_up(int a, int b) {
  return (a + b - 1) / b;
}

// Arithmetic of float32 and float64: multiply-adds. Packed weights and exchange: [k][...].
template <class T>
struct Scalar {
  using Acc = T;    // of gates, cell states and what is kept for the backward pass
  using Sum = T;    // of products
  using Store = T;  // of weights, exchange and results
  static constexpr bool kTensor = false;
  static constexpr int kWord = 0;
};
// bfloat16, products by tensor cores, sums and cell states in float32.
struct Tensor {
  using Acc = float;
  using Sum = float;
  using Store = Bf16;
  static constexpr bool kTensor = true;
  static constexpr int kWord = 1;  // 2^1 values of the exchange in 32 bits
};
// Weights and hidden state as bytes, as csrc/cpu/lstm_int8-inl.h has them but for the sign of the
// latter: W about scale * W8 with a scale for each row, h about h8 / 63. Products by tensor cores,
// sums exact in 32 bits, gates and cell states in float32. There is no backward pass.
struct Bytes {
  using Acc = float;
  using Sum = int32_t;
  using Store = int8_t;
  static constexpr bool kTensor = true;
  static constexpr int kWord = 2;
};
constexpr float kHiddenLevels = 63.0f;

// The most warps of a block. Weights from the L2 cache want more loads in flight, and so registers.
XDF_HD constexpr int lstm_warps(bool resident) {
  return resident ? 16 : 8;
}
constexpr int kMaxHidden = 8192;

// Sizes of one pass. Elements are of P::Store, offsets in bytes of shared memory.
struct Geometry {
  int hidden;
  int rows;            // sequences of a tile, a multiple of 8
  int cluster;         // blocks of a tile
  int units;           // of a group
  int groups;          // of a direction
  int groups_a_block;  // the last blocks may have fewer
  // Tensor cores: blocks of 32 bytes of k, 16 of Tensor and 32 of Bytes; Scalar: k (forward) or
  // units of 4 k (backward).
  int k_steps;
  int word;  // P::kWord
  int weights_a_group;
  int row_stride;      // tensor cores: elements of a sequence in the exchange
  int exchange_bytes;  // of one buffer
  int exchange_at[2];
  int cells_at;    // P::Acc [own units][rows]
  int first_at;    // int32 [rows]: token at which a sequence starts, in running order
  int lengths_at;  // int32 [rows]
  int weights_at;
  size_t shared_bytes;
};

template <class P>
XDF_HD Geometry geometry(bool backward, int hidden, int rows, int cluster, bool resident) {
  Geometry x;
  const int store = static_cast<int>(sizeof(typename P::Store));
  const int values = backward ? 4 : 1;  // that a unit puts into the exchange
  x.hidden = hidden;
  x.rows = rows;
  x.cluster = cluster;
  x.units = backward ? 16 : 8;
  x.groups = divide_up(hidden, x.units);
  x.groups_a_block = divide_up(x.groups, cluster);
  x.word = P::kWord;
  if (P::kTensor) {
    x.k_steps = backward ? x.groups * 4 : divide_up(hidden, 8 << x.word);
    x.weights_a_group = x.k_steps * (256 << x.word) / (backward ? 2 : 1);
    // 4 words more than k: a stride of 4 modulo 8 words, with which the 8 rows that a warp reads at
    // once lie in different banks.
    x.row_stride = x.k_steps * (8 << x.word) + (4 << x.word);
    x.exchange_bytes = rows * x.row_stride * store;
  } else {
    x.k_steps = hidden;
    x.weights_a_group = hidden * x.units * 4;
    x.row_stride = 0;
    x.exchange_bytes = x.groups * x.units * values * rows * store;
  }
  int at = 0;
  x.exchange_at[0] = at;
  at += x.exchange_bytes;
  x.exchange_at[1] = at;
  at += x.exchange_bytes;
  x.cells_at = at;
  at += x.groups_a_block * x.units * rows * static_cast<int>(sizeof(typename P::Acc));
  x.first_at = at;
  at += rows * 4;
  x.lengths_at = at;
  at += rows * 4;
  x.weights_at = at;
  x.shared_bytes = static_cast<size_t>(at);
  if (resident)
    x.shared_bytes += static_cast<size_t>(x.groups_a_block) *
                      static_cast<size_t>(x.weights_a_group) * static_cast<size_t>(store);
  return x;
}

// Packed weights of both directions, in elements.
inline size_t packed_size(const Geometry& x) {
  return 2 * static_cast<size_t>(x.groups) * static_cast<size_t>(x.weights_a_group);
}

// Element of W_hh [4H, H] that packed weights of a direction have at `at`; row < 0: zero.
//   Tensor   [group][k step][2][lane][8] forward, [group][k step][lane][8] backward: what a lane
//            needs as one operand of mma_bf16. The 16 rows of an operand are 8 units in two gates,
//            i and f, then g and o, or 16 units of the transpose, whose k is 4 unit + gate.
//   Bytes    [group][k step][2][lane][16], likewise for mma_int8
//   Scalar   [group][k][unit][gate] forward, [group][unit j][unit][gate] backward
struct WeightPlace {
  int row, col;
};
XDF_HD WeightPlace weight_place(bool tensor, bool backward, const Geometry& x, int at) {
  int gate, unit, k;  // k: unit of the last step, or of the next one in the backward pass
  if (tensor) {
    // An operand is 4 words of 2^w values in 32 lanes.
    const int w = x.word, e = at & ((1 << w) - 1), r = at >> w & 3, lane = at >> (w + 2) & 31;
    const int half = backward ? 0 : at >> (w + 7) & 1;
    const int rest = at >> (w + (backward ? 7 : 8));
    const int step = rest % x.k_steps, group = rest / x.k_steps, g = lane >> 2;
    const int column = (step * 8 + (lane & 3) + (r >> 1) * 4) * (1 << w) + e;
    if (backward) {
      unit = group * 16 + g + (r & 1) * 8;
      gate = column & 3;
      k = column >> 2;
    } else {
      unit = group * 8 + g;
      gate = 2 * half + (r & 1);
      k = column;
    }
  } else {
    const int a_step = 4 * x.units, rest = at / a_step;
    gate = at & 3;
    unit = rest / x.hidden * x.units + at % a_step / 4;
    k = rest % x.hidden;
  }
  if (unit >= x.hidden || k >= x.hidden) return {-1, -1};
  if (backward) return {gate * x.hidden + k, unit};
  return {gate * x.hidden + unit, k};
}

// Sequence b of a batch. Offsets that do not ascend within the batch make it empty, so that no bad
// offset leads a kernel out of its arrays: their values lie on the device, where nobody has checked
// them.
struct Sequence {
  int first, length;
};
XDF_HD Sequence sequence_of(const int32_t* cu_seqlens, int b, int64_t total) {
  const int64_t first = cu_seqlens[b], end = cu_seqlens[b + 1];
  if (first < 0 || end < first || end > total) return {0, 0};
  return {static_cast<int>(first), static_cast<int>(end - first)};
}

}  // namespace cuda
}  // namespace xdf
