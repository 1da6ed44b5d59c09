// Matrix products for few rows: C[m, :] = init[m, :] + sum_k A[m, k] B[k, :], B packed in panels.
//
// A tile holds MR rows x NV registers of C in registers and runs over k: NV loads of the panel and
// MR broadcasts of A for MR * NV multiply-adds. With 16 registers (AVX2) 6 x 2 leaves one register
// for the broadcast and keeps the loads (8) well below what the arithmetic (12 multiply-adds, 6
// cycles) leaves time for; it reads a panel at a third of what the second-level cache delivers.
// AVX-512 takes 8 x 2: sixteen sums in flight hide the latency of two multiply-adds a cycle.
//
// K is cut into blocks whose piece of a panel stays close by while all rows pass over it. Each
// block is summed from zero and then added to C: many short sums lose fewer digits than one long
// one. The blocks depend on K alone, never on M, so neither the tile shape nor the company of a row
// changes a bit of its result.
#pragma once

#include "cpu/vec.h"
#include "xdf/kernels.h"

namespace xdf {
namespace XDF_ISA {

#if defined(XDF_ISA_avx512) || defined(XDF_ISA_neondot)  // 32 registers
constexpr int kTileRows = 8;
#elif defined(XDF_ISA_avx2)
constexpr int kTileRows = 6;
#else
constexpr int kTileRows = 4;  // without fused multiply-adds a product takes a register of its own
#endif
// Of a panel: with a tile's rows no more than a little above a 32 KB L1, which still streams it
// from the second level fast enough; larger pieces mean fewer tiles to start and to end.
constexpr int kPanelBlockBytes = 40 * 1024;

// Rows for the next tile when `left` remain: as even as they come, because a tile of few rows runs
// at a fraction of the speed (too few sums in flight).
XDF_INLINE int next_tile_rows(int left) {
  const int tiles = (left + kTileRows - 1) / kTileRows;
  return (left + tiles - 1) / tiles;
}

// Memory to be fetched while a tile is computed, `bytes_per_k` each k.
struct Prefetch {
  const char* at;
  int bytes_per_k;
};

// Fetches kBytes, whole cache lines if `from` begins one.
template <int kBytes>
XDF_INLINE void prefetch_lines(const void* from) {
  XDF_UNROLL
  for (int at = 0; at < kBytes; at += 64) XDF_PREFETCH(static_cast<const char*>(from) + at);
}

// acc[r][p][v] += sum_{k < K} a[r][k * a_stride] * B[k][v] of panel p, which starts at panel + p *
// panel_stride; B may be stored in fewer bits than A, and T = float, A = Bf16Pair
template <bool kPrefetch, class T, class A, class W, int MR, int P, int NV>
XDF_INLINE void tile_multiply(const A* const (&a)[MR], ptrdiff_t a_stride, const W* panel,
                              ptrdiff_t panel_stride, int K, Prefetch ahead,
                              Vec<T> (&acc)[MR][P][NV]) {
  constexpr int lanes = Vec<T>::lanes;
  ptrdiff_t at = 0;
  for (int k = 0; k < K; ++k) {
    if constexpr (kPrefetch) {
      XDF_PREFETCH(ahead.at);
      ahead.at += ahead.bytes_per_k;
    }
    XDF_UNROLL
    for (int p = 0; p < P; ++p) {
      Vec<A> b[NV];
      XDF_UNROLL
      for (int v = 0; v < NV; ++v) b[v] = Vec<A>::load(panel + p * panel_stride + v * lanes);
      XDF_UNROLL
      for (int r = 0; r < MR; ++r) {
        const Vec<A> value = Vec<A>::set1(a[r][at]);
        XDF_UNROLL
        for (int v = 0; v < NV; ++v) acc[r][p][v] = multiply_add(value, b[v], acc[r][p][v]);
      }
    }
    at += a_stride;
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

// Rows [m, m + MR) and P panels of NV registers from column `col`, k in [k0, k0 + K).
template <int MR, int P, int NV, class T, class W>
static void gemm_tile(const GemmArgs<T, W>& args, int m, const W* panel, int k0, int K, int col,
                      Start start) {
  constexpr int lanes = Vec<T>::lanes;
  const int N = args.b.N;
  const W* a[MR];
  XDF_UNROLL
  for (int r = 0; r < MR; ++r) a[r] = args.a_rows[m + r] + k0 * args.a_stride;
  Vec<T> acc[MR][P][NV];
  XDF_UNROLL
  for (int i = 0; i < MR * P * NV; ++i) {
    acc[i / (P * NV)][i / NV % P][i % NV] =
        start == Start::kBias ? Vec<T>::load(args.bias + col + i % (P * NV) * lanes)
                              : Vec<T>::set1(T(0));
  }
  tile_multiply<false>(a, args.a_stride, panel + static_cast<ptrdiff_t>(k0) * NV * lanes,
                       static_cast<ptrdiff_t>(args.b.K) * NV * lanes, K, {}, acc);
  const bool whole = col + P * NV * lanes <= N;
  XDF_UNROLL
  for (int i = 0; i < MR * P * NV; ++i) {
    Vec<T> sum = acc[i / (P * NV)][i / NV % P][i % NV];
    const int at = col + i % (P * NV) * lanes;
    T* to = args.c_rows[m + i / (P * NV)] + at;
    if (whole) {
      if (start == Start::kAccumulate) sum = sum + Vec<T>::load(to);
      sum.store(to);
    } else if (at < N) {
      if (start == Start::kAccumulate) sum = sum + Vec<T>::load_n(to, N - at);
      sum.store_n(to, N - at);
    }
  }
}

// A tile of `rows` rows, at most MR.
template <int P, int NV, int MR, class T, class W>
XDF_INLINE void gemm_tile_of(int rows, const GemmArgs<T, W>& args, int m, const W* panel, int k0,
                             int K, int col, Start start) {
  if constexpr (MR > 1) {
    if (rows < MR) return gemm_tile_of<P, NV, MR - 1>(rows, args, m, panel, k0, K, col, start);
  }
  gemm_tile<MR, P, NV>(args, m, panel, k0, K, col, start);
}

// P panels of NV registers each, all rows, at most MR of them at a time.
template <int P, int NV, int MR = kTileRows, class T, class W>
static void gemm_panels(const GemmArgs<T, W>& args, const W* panel, int col) {
  const int K = args.b.K;
  const int depth = k_block<W>(K, NV * Vec<T>::lanes);
  Start start =
      args.accumulate ? Start::kAccumulate : (args.bias != nullptr ? Start::kBias : Start::kZero);
  int k0 = 0;
  do {  // at least once: with K = 0 rows still take their start value
    const int k = K - k0 < depth ? K - k0 : depth;
    for (int m = 0; m < args.M;) {
      const int rows = next_tile_rows(args.M - m);
      gemm_tile_of<P, NV, MR>(rows, args, m, panel, k0, k, col, start);
      m += rows;
    }
    start = Start::kAccumulate;
    k0 += depth;
  } while (k0 < K);
}

template <class T, class W>
static void gemm(const GemmArgs<T, W>& args) {
  constexpr int lanes = Vec<T>::lanes;
  const int num_vecs = (args.b.N + lanes - 1) / lanes;
  const int pairs = num_vecs / 2;  // panels of two registers; they come first
  const ptrdiff_t panel_size = static_cast<ptrdiff_t>(args.b.K) * 2 * lanes;
  const W* panel = args.b.data;
  int p = 0;
  // Few rows: several panels at a time, for as many sums in flight.
  if (args.M == 1)
    for (; p + 4 <= pairs; p += 4)
      gemm_panels<4, 2, 1>(args, panel + p * panel_size, 2 * p * lanes);
  if (args.M <= 3)
    for (; p + 2 <= pairs; p += 2)
      gemm_panels<2, 2, 3>(args, panel + p * panel_size, 2 * p * lanes);
  for (; p < pairs; ++p) gemm_panels<1, 2>(args, panel + p * panel_size, 2 * p * lanes);
  if (num_vecs % 2 != 0) gemm_panels<1, 1>(args, panel + p * panel_size, 2 * p * lanes);
}

}  // namespace XDF_ISA
}  // namespace xdf
