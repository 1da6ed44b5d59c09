// A step of the LSTM with the recurrent product in integers (xdf/kernels.h: LstmInt8StepArgs):
//
//   u_{t-1}    = round(63 h_{t-1}) + 64                     in 1 .. 127
//   a_t        = (W_ih x_t + b) + s (W u_{t-1} - 64 W 1)    W in -127 .. 127, s a column's scale
//   c_t, h_t   as lstm-inl.h
//
// The input half comes from a table in half precision. Work per token and direction: 4 H^2
// multiply-adds of bytes (int8-inl.h) and five activations a unit. All four gates of a block of
// units are taken together, so that nothing but c and h is kept from step to step.
#pragma once

#include <string.h>

#include "cpu/activations-inl.h"
#include "cpu/int8-inl.h"
#include "xdf/kernels.h"

namespace xdf {
namespace XDF_ISA {

// Of a row of the table, the gates of a block of units.
constexpr int kInt8InputBytes = 4 * Vec<float>::lanes * static_cast<int>(sizeof(Half));

// The hidden state of `lanes` units as bytes; NaN, which only weights beyond all measure make,
// becomes the largest.
XDF_INLINE void store_hidden(Vec<float> h, uint8_t* to) {
  const Vec<float> largest = Vec<float>::set1(static_cast<float>(kInt8HiddenLevels));
  const Vec<float> lowest = Vec<float>::set1(static_cast<float>(-kInt8HiddenLevels));
  const Vec<float> scaled = Vec<float>::max(Vec<float>::min(h * largest, largest), lowest);
#if defined(XDF_ISA_avx512)
  const __m512i levels =
      _mm512_add_epi32(_mm512_cvtps_epi32(scaled.v), _mm512_set1_epi32(kInt8HiddenZero));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8(levels));
#elif defined(XDF_ISA_avx2)
  const __m256i levels =
      _mm256_add_epi32(_mm256_cvtps_epi32(scaled.v), _mm256_set1_epi32(kInt8HiddenZero));
  const __m128i words =
      _mm_packs_epi32(_mm256_castsi256_si128(levels), _mm256_extracti128_si256(levels, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm_packus_epi16(words, words));
#else
  const Vec<float> levels = Vec<float>::round(scaled);
  for (int i = 0; i < Vec<float>::lanes; ++i)
    to[i] = static_cast<uint8_t>(static_cast<int32_t>(levels.v[i]) + kInt8HiddenZero);
#endif
}

// The pre-activation of a gate: W_ih x + b from the table and, except at the first step, the sums.
template <bool kFirst>
XDF_INLINE Vec<float> int8_gate(const Half* input, Int32s sums, const float* scale) {
  const Vec<float> x = Vec<float>::load(input);
  return kFirst ? x : Vec<float>::fma(sums.to_float(), Vec<float>::load(scale), x);
}

// tanh is good to 1.4e-4 in a cell, a fiftieth of what the hidden state keeps.
template <bool kFirst>
XDF_INLINE Vec<float> int8_cell_state(Vec<float> a_i, Vec<float> a_f, Vec<float> a_g,
                                      const float* c_prev) {
  using V = Vec<float>;
  const Ratio<float> i = sigmoid_ratio_short(a_i);
  const Ratio<float> g = tanh_ratio_short(a_g);
  const V ig = (i.num * g.num) / (i.den * g.den);
  if constexpr (kFirst) return ig;
  const Ratio<float> f = sigmoid_ratio_short(a_f);
  // A division more than over one denominator, but three products fewer: dividers work beside the
  // multipliers, which are what cells wait for.
  return V::fma(f.num / f.den, V::load(c_prev), ig);
}

XDF_INLINE Vec<float> int8_hidden(Vec<float> a_o, Vec<float> c) {
  const Ratio<float> o = sigmoid_ratio_short(a_o);
  const Ratio<float> tanh_c = tanh_ratio_short(c);
  return (o.num * tanh_c.num) / (o.den * tanh_c.den);
}

// All MR rows of a group of few, whose sums stay in registers. What counts here is that weights
// arrive, as each is used for MR rows only; while the cells of a block of units are computed, those
// of the next are on their way. Inlined among the others it would lose registers (a tenth of the
// time of one row).
template <bool kFirst, int MR>
XDF_NOINLINE void int8_few_rows(const LstmInt8StepArgs& args) {
  using V = Vec<float>;
  constexpr int lanes = V::lanes;
  const ptrdiff_t block_size = int8_block_size(args.hidden_size);
  const int blocks = (args.unit_end - args.unit_begin + lanes - 1) / lanes;
  for (int n = 0; n < blocks; ++n) {
    const int u = args.unit_begin + (args.descending ? blocks - 1 - n : n) * lanes;
    Int32s acc[MR][4];
    if constexpr (!kFirst)
      int8_multiply<false>(args.h_prev, args.h_stride, args.hidden_size,
                           args.recurrent.data + u / lanes * block_size,
                           args.recurrent.start + 4 * u, {}, acc);
    XDF_UNROLL
    for (int r = 0; r < MR; ++r) {
      prefetch_lines<kInt8InputBytes>(args.next_input[r] + 4 * u);
      V a[4];
      XDF_UNROLL
      for (int v = 0; v < 4; ++v)
        a[v] = int8_gate<kFirst>(args.input[r] + 4 * u + v * lanes, acc[r][v],
                                 args.recurrent.scale + 4 * u + v * lanes);
      float* c_at = args.c[r] + u;
      const V c = int8_cell_state<kFirst>(a[0], a[1], a[2], c_at);
      c.store(c_at);
      store_hidden(int8_hidden(a[3], c), args.h_next + r * args.h_stride + u);
    }
  }
}

// Any number of rows. c and h are taken in two passes over some cells: a cell is one long chain of
// dependent operations, and the shorter the chain, the more of them are under way at once.
template <bool kFirst>
static void int8_many_rows(const LstmInt8StepArgs& args) {
  using V = Vec<float>;
  constexpr int lanes = V::lanes;
  // Sums of so many (row, block of units) pairs are taken before their cells are computed.
  constexpr int kPairs = lanes < 16 ? 16 : 8;
  int32_t sums[kPairs * 4 * lanes];
  const int H = args.hidden_size;
  const int chunks = int8_chunks(H);
  const ptrdiff_t block_size = int8_block_size(H);
  const int tiles = (args.rows + kInt8TileRows - 1) / kInt8TileRows;
  const int share = (4 * lanes * kInt8Chunk + tiles - 1) / tiles;  // of a chunk's bytes
  const int rows_at_once = args.rows < kPairs ? args.rows : kPairs;
  const int units_at_once = kPairs / rows_at_once * lanes;
  for (int unit = args.unit_begin; unit < args.unit_end; unit += units_at_once) {
    const int end = unit + units_at_once < args.unit_end ? unit + units_at_once : args.unit_end;
    for (int m = 0; m < args.rows; m += rows_at_once) {
      const int rows = args.rows - m < rows_at_once ? args.rows - m : rows_at_once;
      int32_t* to = sums;
      for (int u = unit; u < end && !kFirst; u += lanes) {
        const int8_t* weights = args.recurrent.data + u / lanes * block_size;
        const ptrdiff_t fetched = static_cast<ptrdiff_t>(m / kInt8TileRows) * chunks * share;
        int8_rows<4>(args.h_prev + m * args.h_stride, args.h_stride, rows, H, weights,
                     args.recurrent.start + 4 * u,
                     {reinterpret_cast<const char*>(weights + block_size) + fetched, share}, to);
        to += rows * 4 * lanes;
      }
      const auto gate = [&](int r, int u, int index) -> V {
        const int at = ((u - unit) / lanes * rows + r) * 4 * lanes;
        return int8_gate<kFirst>(args.input[m + r] + 4 * u + index * lanes,
                                 kFirst ? Int32s{} : Int32s::load(sums + at + index * lanes),
                                 args.recurrent.scale + 4 * u + index * lanes);
      };
      for (int u = unit; u < end; u += lanes) {
        for (int r = 0; r < rows; ++r) {
          prefetch_lines<kInt8InputBytes>(args.next_input[m + r] + 4 * u);
          float* c = args.c[m + r] + u;
          int8_cell_state<kFirst>(gate(r, u, 0), gate(r, u, 1), gate(r, u, 2), c).store(c);
        }
      }
      for (int u = unit; u < end; u += lanes) {
        for (int r = 0; r < rows; ++r) {
          prefetch_lines<kInt8InputBytes>(args.input[m + r] + 4 * (u + lanes));
          store_hidden(int8_hidden(gate(r, u, 3), V::load(args.c[m + r] + u)),
                       args.h_next + (m + r) * args.h_stride + u);
        }
      }
    }
  }
}

template <bool kFirst, int MR>
XDF_INLINE void int8_step(const LstmInt8StepArgs& args) {
  if constexpr (MR > 0) {
    if (args.rows < MR) return int8_step<kFirst, MR - 1>(args);
    if (args.rows == MR) return int8_few_rows<kFirst, MR>(args);
  }
  int8_many_rows<kFirst>(args);
}

static void lstm_step_int8(const LstmInt8StepArgs& step) {
  // Few are less than a tile. With 16 registers the constants of a cell find no room beside sums.
  constexpr int kFewRows = kTileRows < 8 ? 0 : kInt8TileRows - 1;
  const LstmInt8StepArgs args = step;  // a copy that no store can change
  if (args.first)
    int8_step<true, kFewRows>(args);
  else
    int8_step<false, kFewRows>(args);
  // Rows of `out` lie far apart, often at the same place in their pages and so in the same sets of
  // the cache: a row at a time, and not a register from each row in turn.
  for (int r = 0; r < args.rows; ++r)
    memcpy(args.out[r] + args.unit_begin, args.h_next + r * args.h_stride + args.unit_begin,
           static_cast<size_t>(args.unit_end - args.unit_begin));
}

}  // namespace XDF_ISA
}  // namespace xdf
