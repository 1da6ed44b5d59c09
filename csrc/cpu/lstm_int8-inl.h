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

// A row and a block of units whose sums are known (null at the first step: there are none).
struct Int8Cell {
  const Half* input;
  const float* scale;
  const int32_t* sums;
  float* c;

  XDF_MEMBER Vec<float> gate(int index) const {
    constexpr int lanes = Vec<float>::lanes;
    const Vec<float> x = Vec<float>::load(input + index * lanes);
    if (sums == nullptr) return x;
    return Vec<float>::fma(Int32s::load(sums + index * lanes).to_float(),
                           Vec<float>::load(scale + index * lanes), x);
  }
};

// c and h are taken in two passes over some cells: a cell is one long chain of dependent
// operations, and the shorter the chain, the more of them are under way at once. tanh is good to
// 1.4e-4 here, a fiftieth of what the hidden state keeps.
XDF_INLINE void int8_cell_state(const Int8Cell& cell, bool first) {
  using V = Vec<float>;
  const Ratio<float> i = sigmoid_ratio_short(cell.gate(0));
  const Ratio<float> g = tanh_ratio_short(cell.gate(2));
  const V ig_num = i.num * g.num, ig_den = i.den * g.den;
  if (first) return (ig_num / ig_den).store(cell.c);
  const Ratio<float> f = sigmoid_ratio_short(cell.gate(1));
  const V num = V::fma(f.num * V::load(cell.c), ig_den, ig_num * f.den);
  (num / (f.den * ig_den)).store(cell.c);
}

XDF_INLINE Vec<float> int8_hidden(const Int8Cell& cell) {
  const Ratio<float> o = sigmoid_ratio_short(cell.gate(3));
  const Ratio<float> c = tanh_ratio_short(Vec<float>::load(cell.c));
  return (o.num * c.num) / (o.den * c.den);
}

static void lstm_step_int8(const LstmInt8StepArgs& step) {
  constexpr int lanes = Vec<float>::lanes;
  // Sums of so many (row, block of units) pairs are taken before their cells are computed.
  constexpr int kPairs = 16;
  int32_t sums[kPairs * 4 * lanes];
  const LstmInt8StepArgs args = step;  // a copy that no store can change
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
      for (int u = unit; u < end && !args.first; u += lanes) {
        const int8_t* weights = args.recurrent.data + u / lanes * block_size;
        const ptrdiff_t fetched = static_cast<ptrdiff_t>(m / kInt8TileRows) * chunks * share;
        int8_rows(args.h_prev + m * args.h_stride, args.h_stride, rows, H, weights,
                  args.recurrent.start + 4 * u,
                  {reinterpret_cast<const char*>(weights + block_size) + fetched, share}, to);
        to += rows * 4 * lanes;
      }
      const auto cell = [&](int r, int u) -> Int8Cell {
        const int pair = (u - unit) / lanes * rows + r;
        return {args.input[m + r] + 4 * u, args.recurrent.scale + 4 * u,
                args.first ? nullptr : sums + pair * 4 * lanes, args.c[m + r] + u};
      };
      for (int u = unit; u < end; u += lanes)
        for (int r = 0; r < rows; ++r) int8_cell_state(cell(r, u), args.first);
      for (int u = unit; u < end; u += lanes) {
        for (int r = 0; r < rows; ++r) {
          XDF_PREFETCH(args.input[m + r] + 4 * (u + lanes));
          XDF_PREFETCH(args.next_input[m + r] + 4 * u);
          store_hidden(int8_hidden(cell(r, u)), args.h_next + (m + r) * args.h_stride + u);
        }
      }
    }
  }
  // Rows of `out` lie far apart, often at the same place in their pages and so in the same sets of
  // the cache: a row at a time, and not a register from each row in turn.
  for (int r = 0; r < args.rows; ++r)
    memcpy(args.out[r] + args.unit_begin, args.h_next + r * args.h_stride + args.unit_begin,
           static_cast<size_t>(args.unit_end - args.unit_begin));
}

}  // namespace XDF_ISA
}  // namespace xdf
