// Products of hidden states as bytes with weights as bytes (xdf/kernels.h: Int8Matrix), for some
// rows and one block of 4 * lanes columns:
//
//   sum[r, n] = start[n] + sum_k u[r, k] W[k, n] = sum_k (u[r, k] - 64) W[k, n]
//
// By vpmaddubsw, 32 multiply-adds an instruction, of which every fourth needs one more to widen the
// sums: 51 multiply-adds a cycle at two instructions a cycle, 3.2 times what float has. The weights
// of a block lie in L1 while all rows pass over them. That makes two loads a cycle as well, so that
// a tile of two rows is as good as any: more rows would save no load, because a row's own sums of
// 16 bits live for one chunk only. (The dot-product instructions need no such sums; there a weight
// is loaded once for four rows.)
#pragma once

#include <string.h>

#include "cpu/gemm-inl.h"
#include "xdf/kernels.h"

namespace xdf {
namespace XDF_ISA {

// A register of 32-bit sums, `lanes` of them, and what a tile does with it.
#if defined(XDF_ISA_avx512)

struct Int32s {
  __m512i v;
  static XDF_MEMBER Int32s load(const int32_t* p) { return {_mm512_loadu_si512(p)}; }
  XDF_MEMBER void store(int32_t* p) const { _mm512_storeu_si512(p, v); }
  XDF_MEMBER Vec<float> to_float() const { return {_mm512_cvtepi32_ps(v)}; }
};

#elif defined(XDF_ISA_avx2)

struct Int32s {
  __m256i v;
  static XDF_MEMBER Int32s load(const int32_t* p) {
    return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))};
  }
  XDF_MEMBER void store(int32_t* p) const { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v); }
  XDF_MEMBER Vec<float> to_float() const { return {_mm256_cvtepi32_ps(v)}; }
};

#elif defined(XDF_ISA_neondot)

struct Int32s {
  int32x4_t v;
  static XDF_MEMBER Int32s load(const int32_t* p) { return {vld1q_s32(p)}; }
  XDF_MEMBER void store(int32_t* p) const { vst1q_s32(p, v); }
  XDF_MEMBER Vec<float> to_float() const { return {vcvtq_f32_s32(v)}; }
};

#else

struct Int32s {
  static constexpr int lanes = Vec<float>::lanes;
  int32_t v[lanes];
  static XDF_MEMBER Int32s load(const int32_t* p) {
    Int32s r;
    for (int i = 0; i < lanes; ++i) r.v[i] = p[i];
    return r;
  }
  XDF_MEMBER void store(int32_t* p) const {
    for (int i = 0; i < lanes; ++i) p[i] = v[i];
  }
  XDF_MEMBER Vec<float> to_float() const {
    Vec<float> r;
    for (int i = 0; i < lanes; ++i) r.v[i] = static_cast<float>(v[i]);
    return r;
  }
};

#endif

// Four bytes of a row's hidden state.
XDF_INLINE int32_t quad_at(const uint8_t* p) {
  int32_t quad;
  memcpy(&quad, p, sizeof(quad));
  return quad;
}

// acc[r][gate] += the products of the first kQuads quads of a chunk of k; weights at
// [gate][quad][lanes][4]. NV: gates, or first registers of a block, that are wanted; at most 4.
#if defined(XDF_ISA_avx512vnni)

constexpr int kInt8TileRows = 4;
template <int kQuads, int MR, int NV>
XDF_INLINE void int8_chunk(const uint8_t* const (&h)[MR], ptrdiff_t k, const int8_t* weights,
                           Int32s (&acc)[MR][NV]) {
  XDF_UNROLL
  for (int quad = 0; quad < kQuads; ++quad) {
    __m512i w[NV];
    XDF_UNROLL
    for (int gate = 0; gate < NV; ++gate)
      w[gate] = _mm512_loadu_si512(weights + (gate * 4 + quad) * 64);
    XDF_UNROLL
    for (int r = 0; r < MR; ++r) {
      const __m512i u = _mm512_set1_epi32(quad_at(h[r] + k + 4 * quad));
      XDF_UNROLL
      for (int gate = 0; gate < NV; ++gate)
        acc[r][gate].v = _mm512_dpbusd_epi32(acc[r][gate].v, u, w[gate]);
    }
  }
}

#elif defined(XDF_ISA_avx512)

constexpr int kInt8TileRows = 2;
template <int kQuads, int MR, int NV>
XDF_INLINE void int8_chunk(const uint8_t* const (&h)[MR], ptrdiff_t k, const int8_t* weights,
                           Int32s (&acc)[MR][NV]) {
  const __m512i ones = _mm512_set1_epi16(1);
  XDF_UNROLL
  for (int r = 0; r < MR; ++r) {
    __m512i u[4];
    XDF_UNROLL
    for (int quad = 0; quad < kQuads; ++quad)
      u[quad] = _mm512_set1_epi32(quad_at(h[r] + k + 4 * quad));
    XDF_UNROLL
    for (int gate = 0; gate < NV; ++gate) {
      const int8_t* w = weights + gate * 256;
      __m512i sums = _mm512_maddubs_epi16(u[0], _mm512_loadu_si512(w));
      XDF_UNROLL
      for (int quad = 1; quad < kQuads; ++quad)
        sums = _mm512_add_epi16(sums,
                                _mm512_maddubs_epi16(u[quad], _mm512_loadu_si512(w + 64 * quad)));
      acc[r][gate].v = _mm512_add_epi32(acc[r][gate].v, _mm512_madd_epi16(sums, ones));
    }
  }
}

#elif defined(XDF_ISA_avx2)

constexpr int kInt8TileRows = 2;
template <int kQuads, int MR, int NV>
XDF_INLINE void int8_chunk(const uint8_t* const (&h)[MR], ptrdiff_t k, const int8_t* weights,
                           Int32s (&acc)[MR][NV]) {
  const __m256i ones = _mm256_set1_epi16(1);
  XDF_UNROLL
  for (int r = 0; r < MR; ++r) {
    __m256i u[4];
    XDF_UNROLL
    for (int quad = 0; quad < kQuads; ++quad)
      u[quad] = _mm256_set1_epi32(quad_at(h[r] + k + 4 * quad));
    XDF_UNROLL
    for (int gate = 0; gate < NV; ++gate) {
      const __m256i* w = reinterpret_cast<const __m256i*>(weights + gate * 128);
      __m256i sums = _mm256_maddubs_epi16(u[0], _mm256_load_si256(w));
      XDF_UNROLL
      for (int quad = 1; quad < kQuads; ++quad) {
        sums = _mm256_add_epi16(sums, _mm256_maddubs_epi16(u[quad], _mm256_load_si256(w + quad)));
        // A tree of sums would need a register more than there is.
        XDF_KEEP_ORDER(sums);
      }
      acc[r][gate].v = _mm256_add_epi32(acc[r][gate].v, _mm256_madd_epi16(sums, ones));
    }
  }
}

#elif defined(XDF_ISA_neondot)

constexpr int kInt8TileRows = 4;
template <int kQuads, int MR, int NV>
XDF_INLINE void int8_chunk(const uint8_t* const (&h)[MR], ptrdiff_t k, const int8_t* weights,
                           Int32s (&acc)[MR][NV]) {
  XDF_UNROLL
  for (int quad = 0; quad < kQuads; ++quad) {
    int8x16_t w[NV];
    XDF_UNROLL
    for (int gate = 0; gate < NV; ++gate) w[gate] = vld1q_s8(weights + (gate * 4 + quad) * 16);
    XDF_UNROLL
    for (int r = 0; r < MR; ++r) {
      const int8x16_t u = vreinterpretq_s8_s32(vdupq_n_s32(quad_at(h[r] + k + 4 * quad)));
      XDF_UNROLL
      for (int gate = 0; gate < NV; ++gate) acc[r][gate].v = vdotq_s32(acc[r][gate].v, u, w[gate]);
    }
  }
}

#else

constexpr int kInt8TileRows = 1;
template <int kQuads, int MR, int NV>
XDF_INLINE void int8_chunk(const uint8_t* const (&h)[MR], ptrdiff_t k, const int8_t* weights,
                           Int32s (&acc)[MR][NV]) {
  for (int r = 0; r < MR; ++r)
    for (int gate = 0; gate < NV; ++gate)
      for (int quad = 0; quad < kQuads; ++quad)
        for (int lane = 0; lane < Int32s::lanes; ++lane)
          for (int byte = 0; byte < 4; ++byte)
            acc[r][gate].v[lane] += h[r][k + 4 * quad + byte] *
                                    weights[((gate * 4 + quad) * Int32s::lanes + lane) * 4 + byte];
}

#endif

XDF_INLINE int int8_chunks(int K) {
  return (K + kInt8Chunk - 1) / kInt8Chunk;
}

// Bytes of one block of columns.
XDF_INLINE ptrdiff_t int8_block_size(int K) {
  return static_cast<ptrdiff_t>(int8_chunks(K)) * kInt8Chunk * 4 * Vec<float>::lanes;
}

// acc[r][gate] = the sums of MR rows, the first at `x`, and one block of columns; meanwhile `ahead`
// is fetched, that many bytes for each chunk of k.
template <bool kPrefetch, int MR, int NV>
XDF_INLINE void int8_multiply(const uint8_t* x, ptrdiff_t x_stride, int K, const int8_t* weights,
                              const int32_t* start, Prefetch ahead, Int32s (&acc)[MR][NV]) {
  constexpr int lanes = Vec<float>::lanes;
  const uint8_t* rows[MR];
  XDF_UNROLL
  for (int r = 0; r < MR; ++r) {
    rows[r] = x + r * x_stride;
    XDF_UNROLL
    for (int v = 0; v < NV; ++v) acc[r][v] = Int32s::load(start + v * lanes);
  }
  ptrdiff_t k = 0;
  for (; k + kInt8Chunk / 2 < K; k += kInt8Chunk) {
    if constexpr (kPrefetch) {
      XDF_PREFETCH(ahead.at);
      ahead.at += ahead.bytes_per_k;
    }
    int8_chunk<4>(rows, k, weights, acc);
    weights += 4 * lanes * kInt8Chunk;
  }
  if (k < K) int8_chunk<2>(rows, k, weights, acc);
}

// The same to sums[r][NV][lanes].
template <int MR, int NV>
static void int8_tile(const uint8_t* x, ptrdiff_t x_stride, int K, const int8_t* weights,
                      const int32_t* start, Prefetch ahead, int32_t* sums) {
  Int32s acc[MR][NV];
  int8_multiply<true>(x, x_stride, K, weights, start, ahead, acc);
  XDF_UNROLL
  for (int r = 0; r < MR; ++r) {
    XDF_UNROLL
    for (int v = 0; v < NV; ++v) acc[r][v].store(sums + (r * NV + v) * Vec<float>::lanes);
  }
}

template <int MR, int NV>
XDF_INLINE void int8_tile_of(int rows, const uint8_t* x, ptrdiff_t x_stride, int K,
                             const int8_t* weights, const int32_t* start, Prefetch ahead,
                             int32_t* sums) {
  if constexpr (MR > 1) {
    if (rows < MR)
      return int8_tile_of<MR - 1, NV>(rows, x, x_stride, K, weights, start, ahead, sums);
  }
  int8_tile<MR, NV>(x, x_stride, K, weights, start, ahead, sums);
}

// The same for any number of rows; `ahead` goes on from tile to tile.
template <int NV>
XDF_INLINE void int8_rows(const uint8_t* x, ptrdiff_t x_stride, int rows, int K,
                          const int8_t* weights, const int32_t* start, Prefetch ahead,
                          int32_t* sums) {
  for (int r = 0; r < rows; r += kInt8TileRows) {
    int8_tile_of<kInt8TileRows, NV>(rows - r, x + r * x_stride, x_stride, K, weights, start, ahead,
                                    sums + r * NV * Vec<float>::lanes);
    ahead.at += static_cast<ptrdiff_t>(int8_chunks(K)) * ahead.bytes_per_k;
  }
}

}  // namespace XDF_ISA
}  // namespace xdf
