// The product of a step, for one warp: its group of units, all rows of the tile.
//
// With g = lane / 4 and q = lane % 4, a lane has the sums of rows 8 n + 2q + e (n < NB, e < 2) and
//   forward    of unit g of the group in all gates: sums[n][gate / 2][gate % 2 * 2 + e]
//   backward   of units g and g + 8:                sums[n][half * 2 + e]
// which is how tensor cores leave them; so all gates of a unit and a row meet in one lane. k
// ascends, one sum a value, so that a sequence's results do not hang on its company.
//
// A step reads, per warp and 32 bytes of k, 1 KB of weights forward (half of it backward) and 256
// NB bytes of exchange, all without bank conflicts; NB is what a weight read is shared by.
#pragma once

#include <type_traits>

#include "cuda/lstm_layout.cuh"

namespace xdf {
namespace cuda {

template <class P, int NB>
struct Products;

XDF_DEVICE void multiply(Lane<float> (&d)[4], const Lane<Quad<uint32_t>>& a,
                         const Lane<uint32_t>& b0, const Lane<uint32_t>& b1) {
  mma_bf16(d, a, b0, b1);
}
XDF_DEVICE void multiply(Lane<int32_t> (&d)[4], const Lane<Quad<uint32_t>>& a,
                         const Lane<uint32_t>& b0, const Lane<uint32_t>& b1) {
  mma_int8(d, a, b0, b1);
}

// By tensor cores: Tensor and Bytes, which differ in how many values a word has.
template <class P, int NB>
struct TensorProducts {
  using Store = typename P::Store;
  using Sum = typename P::Sum;
  static constexpr int kOperand = 128 << P::kWord;  // elements

  static XDF_DEVICE void exchanged(const Geometry& x, const Store* from, int step, int n,
                                   Lane<uint32_t>& b0, Lane<uint32_t>& b1) {
    XDF_EACH_LANE(lane) {
      const Store* at =
          from + (n * 8 + (lane >> 2)) * x.row_stride + ((step * 8 + (lane & 3)) << P::kWord);
      memcpy(&b0[lane], __builtin_assume_aligned(at, 4), 4);
      memcpy(&b1[lane], __builtin_assume_aligned(at + (4 << P::kWord), 4), 4);
    }
  }
  static XDF_DEVICE void operand(const Store* at, Lane<Quad<uint32_t>>& a) {
    XDF_EACH_LANE(lane) {
      a[lane] = reinterpret_cast<const Quad<uint32_t>*>(at)[lane];
    }
  }
  static XDF_DEVICE void forward(const Geometry& x, const Store* weights, const Store* from,
                                 int active, Lane<Sum> (&sums)[NB][2][4]) {
    XDF_PIPELINE
    for (int step = 0; step < x.k_steps; ++step) {
      Lane<Quad<uint32_t>> a0, a1;
      operand(weights + step * 2 * kOperand, a0);
      operand(weights + step * 2 * kOperand + kOperand, a1);
      XDF_UNROLL
      for (int n = 0; n < NB; ++n) {
        if (n == 0 || n * 8 < active) {
          Lane<uint32_t> b0, b1;
          exchanged(x, from, step, n, b0, b1);
          multiply(sums[n][0], a0, b0, b1);
          multiply(sums[n][1], a1, b0, b1);
        }
      }
    }
  }
  static XDF_DEVICE void backward(const Geometry& x, const Store* weights, const Store* from,
                                  int active, Lane<Sum> (&sums)[NB][4]) {
    XDF_PIPELINE
    for (int step = 0; step < x.k_steps; ++step) {
      Lane<Quad<uint32_t>> a;
      operand(weights + step * kOperand, a);
      XDF_UNROLL
      for (int n = 0; n < NB; ++n) {
        if (n == 0 || n * 8 < active) {
          Lane<uint32_t> b0, b1;
          exchanged(x, from, step, n, b0, b1);
          multiply(sums[n], a, b0, b1);
        }
      }
    }
  }
};
template <int NB>
struct Products<Tensor, NB> : TensorProducts<Tensor, NB> {};
template <int NB>
struct Products<Bytes, NB> : TensorProducts<Bytes, NB> {};

template <class T, int NB>
struct Products<Scalar<T>, NB> {
  static XDF_DEVICE void forward(const Geometry& x, const T* weights, const T* from, int active,
                                 Lane<T> (&sums)[NB][2][4]) {
    XDF_PIPELINE
    for (int k = 0; k < x.k_steps; ++k) {
      XDF_EACH_LANE(lane) {
        const Quad<T> w = reinterpret_cast<const Quad<T>*>(weights)[k * 8 + (lane >> 2)];
        XDF_UNROLL
        for (int n = 0; n < NB; ++n) {
          if (n == 0 || n * 8 < active) {
            const Pair<T> h =
                *reinterpret_cast<const Pair<T>*>(from + k * (NB * 8) + n * 8 + 2 * (lane & 3));
            XDF_UNROLL
            for (int gate = 0; gate < 4; ++gate) {
              XDF_UNROLL
              for (int e = 0; e < 2; ++e) {
                T& sum = sums[n][gate / 2][gate % 2 * 2 + e][lane];
                sum = multiply_add(w.v[gate], h.v[e], sum);
              }
            }
          }
        }
      }
    }
  }
  static XDF_DEVICE void backward(const Geometry& x, const T* weights, const T* from, int active,
                                  Lane<T> (&sums)[NB][4]) {
    XDF_PIPELINE
    for (int j = 0; j < x.k_steps; ++j) {
      XDF_EACH_LANE(lane) {
        const Quad<T>* w = reinterpret_cast<const Quad<T>*>(weights) + j * 16 + (lane >> 2);
        const Quad<T> of_unit[2] = {w[0], w[8]};
        XDF_UNROLL
        for (int n = 0; n < NB; ++n) {
          if (n == 0 || n * 8 < active) {
            XDF_UNROLL
            for (int gate = 0; gate < 4; ++gate) {
              const Pair<T> z = *reinterpret_cast<const Pair<T>*>(from + (j * 4 + gate) * (NB * 8) +
                                                                  n * 8 + 2 * (lane & 3));
              XDF_UNROLL
              for (int r = 0; r < 4; ++r) {
                T& sum = sums[n][r][lane];
                sum = multiply_add(of_unit[r / 2].v[gate], z.v[r % 2], sum);
              }
            }
          }
        }
      }
    }
  }
};

// --- the exchange --------------------------------------------------------------------------------

// Where value `at` of a row lies in a buffer: at = unit forward, 4 unit + gate backward.
template <class P>
XDF_DEVICE int exchange_place(const Geometry& x, int row, int at) {
  return P::kTensor ? row * x.row_stride + at : at * x.rows + row;
}

// Copies what a warp has put into its own block's buffer for one group to the other blocks of the
// cluster, 16 bytes at a time, of Bytes 8: that is all that a row of a group has.
template <class P, bool kBackward>
XDF_DEVICE void push_group(const Block& block, const Geometry& x, int buffer_at, int group,
                           int active) {
  if (block.cluster == 1) return;
  constexpr int kStore = static_cast<int>(sizeof(typename P::Store));
  using Moved = std::conditional_t<kStore == 1, Pair<uint32_t>, Chunk>;
  constexpr int kMoved = static_cast<int>(sizeof(Moved));
  const int bytes = x.units * (kBackward ? 4 : 1) * kStore;  // of a row and group
  const int a_row = bytes / kMoved;
  const int chunks = P::kTensor ? active * a_row : bytes * x.rows / kMoved;
  warp_sync();
  XDF_EACH_LANE(lane) {
    for (int n = lane; n < chunks * (block.cluster - 1); n += kLanes) {
      const int turn = n / chunks, chunk = n - turn * chunks;
      // Each block starts with its own successor, so that they do not all write to one.
      const int to = block.rank + 1 + turn;
      const int at = P::kTensor ? chunk / a_row * x.row_stride * kStore + group * bytes +
                                      chunk % a_row * kMoved
                                : group * bytes * x.rows + chunk * kMoved;
      unsigned char* own = block.shared + buffer_at + at;
      *reinterpret_cast<Moved*>(block.peer(own, to < block.cluster ? to : to - block.cluster)) =
          *reinterpret_cast<const Moved*>(own);
    }
  }
}

}  // namespace cuda
}  // namespace xdf
