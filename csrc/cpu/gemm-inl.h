// Matrix products for few rows: C[m, :] = init[m, :] + sum_k A[m, k] B[k, :], B packed in panels.
//
// A tile holds MR rows x NV registers of C in registers and runs over k: NV loads of the panel and
// MR broadcasts of A for MR * NV multiply-adds. With 16 registers (AVX2) 3 x 4 is the largest tile
// whose loads (7) stay below what its arithmetic (12 multiply-adds, 6 cycles) leaves time for;
// AVX-512 takes 4 x 4, more rows gain nothing there and g++ starts to spill.
//
// K is cut into blocks whose piece of a panel stays in the first-level cache while all rows pass
// over it. Each block is summed from zero and then added to C: many short sums lose fewer digits
// than one long one. The blocks depend on K alone, never on M, so neither the tile shape nor the
// company of a row changes a bit of its result.
#pragma once

#include "cpu/vec.h"
#include "xdf/kernels.h"

namespace xdf {
namespace XDF_ISA {

#if defined(XDF_ISA_avx512)
constexpr int kTileRows = 4;
#else
constexpr int kTileRows = 3;
#endif
constexpr int kPanelBlockBytes =
    14 * 1024;  // of a panel at a time: leaves the rows room in a 32 KB L1

// Rows for the next tile when `left` remain: a single left-over row runs at half speed (too few
// sums in flight), so 4 = 2 + 2.
XDF_INLINE int next_tile_rows(int left) {
  if (left == kTileRows + 1 && left > 2) return left - 2;
  return left < kTileRows ? left : kTileRows;
}

// acc[r][v] += sum_{k < K} a[r][k * a_stride] * panel[k][v]
template <class T, int MR, int NV>
XDF_INLINE void tile_multiply(const T* const* a, ptrdiff_t a_stride, const T* panel, int K,
                              Vec<T> (&acc)[MR][NV]) {
  constexpr int lanes = Vec<T>::lanes;
  const T* rows[MR];
  XDF_UNROLL
  for (int r = 0; r < MR; ++r) rows[r] = a[r];
  for (int k = 0; k < K; ++k) {
    Vec<T> b[NV];
    XDF_UNROLL
    for (int v = 0; v < NV; ++v) b[v] = Vec<T>::load(panel + v * lanes);
    XDF_UNROLL
    for (int r = 0; r < MR; ++r) {
      const Vec<T> value = Vec<T>::set1(*rows[r]);
      rows[r] += a_stride;
      XDF_UNROLL
      for (int v = 0; v < NV; ++v) acc[r][v] = Vec<T>::fma(value, b[v], acc[r][v]);
    }
    panel += NV * lanes;
  }
}

// Depth of a k block for panels of `columns` elements: K in equal parts that fit kPanelBlockBytes.
template <class T>
XDF_INLINE int k_block(int K, int columns) {
  const int fits = kPanelBlockBytes / (columns * static_cast<int>(sizeof(T)));
  if (K <= fits) return K;
  const int blocks = (K + fits - 1) / fits;
  return (K + blocks - 1) / blocks;
}

enum class Start { kZero, kBias, kAccumulate };

template <class T, int MR, int NV>
static void gemm_tile(const T* const* a, ptrdiff_t a_stride, const T* panel, int K, T* const* c,
                      int col, int N, Start start, const T* bias) {
  constexpr int lanes = Vec<T>::lanes;
  Vec<T> acc[MR][NV];
  const bool whole = col + NV * lanes <= N;
  XDF_UNROLL
  for (int r = 0; r < MR; ++r) {
    XDF_UNROLL
    for (int v = 0; v < NV; ++v)
      acc[r][v] = start == Start::kBias ? Vec<T>::load(bias + col + v * lanes) : Vec<T>::set1(T(0));
  }
  tile_multiply<T, MR, NV>(a, a_stride, panel, K, acc);
  XDF_UNROLL
  for (int r = 0; r < MR; ++r) {
    XDF_UNROLL
    for (int v = 0; v < NV; ++v) {
      const int at = col + v * lanes;
      T* to = c[r] + at;
      if (whole) {
        if (start == Start::kAccumulate) acc[r][v] = acc[r][v] + Vec<T>::load(to);
        acc[r][v].store(to);
      } else if (at < N) {
        if (start == Start::kAccumulate) acc[r][v] = acc[r][v] + Vec<T>::load_n(to, N - at);
        acc[r][v].store_n(to, N - at);
      }
    }
  }
}

template <class T, int NV>
static void gemm_panel_block(const GemmArgs<T>& args, const T* panel, int k0, int K, int col,
                             Start start) {
  const T* a[kTileRows];
  for (int m = 0; m < args.M;) {
    const int rows = next_tile_rows(args.M - m);
    for (int r = 0; r < rows; ++r) a[r] = args.a_rows[m + r] + k0 * args.a_stride;
    T* const* c = args.c_rows + m;
    switch (rows) {
      case 1:
        gemm_tile<T, 1, NV>(a, args.a_stride, panel, K, c, col, args.b.N, start, args.bias);
        break;
      case 2:
        gemm_tile<T, 2, NV>(a, args.a_stride, panel, K, c, col, args.b.N, start, args.bias);
        break;
      case 3:
        gemm_tile<T, 3, NV>(a, args.a_stride, panel, K, c, col, args.b.N, start, args.bias);
        break;
      default:
        gemm_tile<T, kTileRows, NV>(a, args.a_stride, panel, K, c, col, args.b.N, start, args.bias);
    }
    m += rows;
  }
}

template <class T>
static void gemm(const GemmArgs<T>& args) {
  constexpr int lanes = Vec<T>::lanes;
  const int K = args.b.K;
  const int num_vecs = (args.b.N + lanes - 1) / lanes;
  const Start first =
      args.accumulate ? Start::kAccumulate : (args.bias != nullptr ? Start::kBias : Start::kZero);
  const T* panel = args.b.data;
  int col = 0;
  for (int p = 0; p < panel_count(num_vecs); ++p) {
    const int vecs = panel_vecs(num_vecs, p);
    const int columns = vecs * lanes;
    const int depth = k_block<T>(K, columns);
    int k0 = 0;
    do {  // at least once: with K = 0 rows still take their start value
      const int k = K - k0 < depth ? K - k0 : depth;
      const T* block = panel + static_cast<ptrdiff_t>(k0) * columns;
      const Start start = k0 == 0 ? first : Start::kAccumulate;
      switch (vecs) {
        case 1:
          gemm_panel_block<T, 1>(args, block, k0, k, col, start);
          break;
        case 2:
          gemm_panel_block<T, 2>(args, block, k0, k, col, start);
          break;
        case 3:
          gemm_panel_block<T, 3>(args, block, k0, k, col, start);
          break;
        default:
          gemm_panel_block<T, 4>(args, block, k0, k, col, start);
      }
      k0 += depth;
    } while (k0 < K);
    panel += static_cast<ptrdiff_t>(K) * columns;
    col += columns;
  }
}

}  // namespace XDF_ISA
}  // namespace xdf
