// A step of the LSTM with the recurrent product in integers (xdf/kernels.h: LstmInt8StepArgs):
//
//   u_{t-1}    = round(63 h_{t-1}) + 64                     in 1 .. 127
//   a_t        = (W_ih x_t + b) + s (W u_{t-1} - 64 W 1)    W in -127 .. 127, s a column's scale
//   c_t, h_t   as lstm-inl.h
//
// The input half comes from a table in half precision. Work per token and direction: 4 H^2
// multiply-adds of bytes; by vpmaddubsw, 32 an instruction, of which every fourth needs one more to
// widen the sums: 51 multiply-adds a cycle at two instructions a cycle, 3.2 times what float has.
//
// A tile is some rows and all four gates of one block of units: its weights, 4 * lanes * H bytes,
// stay in L1 while all rows pass over them, and gates never leave the registers. That makes two
// loads a cycle as well, so that a tile of two rows is as good as any: more rows would save no
// load, because a row's own sums of 16 bits live for one chunk only. (The dot-product instructions
// need no such sums; there a weight is loaded once for four rows.)
#pragma once

#include <string.h>

#include "cpu/activations-inl.h"
#include "xdf/kernels.h"

namespace xdf {
namespace XDF_ISA {

// A register of 32-bit sums, `lanes` of them, and what a tile does with it.
#if defined(XDF_ISA_avx512)

struct Int32s {
  __m512i v;
  static XDF_MEMBER Int32s load(const int32_t* p) { return {_mm512_loadu_si512(p)}; }
  XDF_MEMBER Vec<float> to_float() const { return {_mm512_cvtepi32_ps(v)}; }
};

#elif defined(XDF_ISA_avx2)

struct Int32s {
  __m256i v;
  static XDF_MEMBER Int32s load(const int32_t* p) {
    return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))};
  }
  XDF_MEMBER Vec<float> to_float() const { return {_mm256_cvtepi32_ps(v)}; }
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

// acc[r][gate] += the products of one chunk of k; weights at [gate][quad][lanes][4].
#if defined(XDF_ISA_avx512) && defined(__AVX512VNNI__)

constexpr int kInt8TileRows = 4;
template <int MR>
XDF_INLINE void int8_chunk(const uint8_t* const (&h)[MR], ptrdiff_t k, const int8_t* weights,
                           Int32s (&acc)[MR][4]) {
  XDF_UNROLL
  for (int quad = 0; quad < 4; ++quad) {
    __m512i w[4];
    XDF_UNROLL
    for (int gate = 0; gate < 4; ++gate)
      w[gate] = _mm512_loadu_si512(weights + (gate * 4 + quad) * 64);
    XDF_UNROLL
    for (int r = 0; r < MR; ++r) {
      const __m512i u = _mm512_set1_epi32(quad_at(h[r] + k + 4 * quad));
      XDF_UNROLL
      for (int gate = 0; gate < 4; ++gate)
        acc[r][gate].v = _mm512_dpbusd_epi32(acc[r][gate].v, u, w[gate]);
    }
  }
}

#elif defined(XDF_ISA_avx512)

constexpr int kInt8TileRows = 2;
template <int MR>
XDF_INLINE void int8_chunk(const uint8_t* const (&h)[MR], ptrdiff_t k, const int8_t* weights,
                           Int32s (&acc)[MR][4]) {
  const __m512i ones = _mm512_set1_epi16(1);
  XDF_UNROLL
  for (int r = 0; r < MR; ++r) {
    __m512i u[4];
    XDF_UNROLL
    for (int quad = 0; quad < 4; ++quad) u[quad] = _mm512_set1_epi32(quad_at(h[r] + k + 4 * quad));
    XDF_UNROLL
    for (int gate = 0; gate < 4; ++gate) {
      const int8_t* w = weights + gate * 256;
      const __m512i a = _mm512_add_epi16(_mm512_maddubs_epi16(u[0], _mm512_loadu_si512(w)),
                                         _mm512_maddubs_epi16(u[1], _mm512_loadu_si512(w + 64)));
      const __m512i b = _mm512_add_epi16(_mm512_maddubs_epi16(u[2], _mm512_loadu_si512(w + 128)),
                                         _mm512_maddubs_epi16(u[3], _mm512_loadu_si512(w + 192)));
      const __m512i sums = _mm512_madd_epi16(_mm512_add_epi16(a, b), ones);
      acc[r][gate].v = _mm512_add_epi32(acc[r][gate].v, sums);
    }
  }
}

#elif defined(XDF_ISA_avx2)

constexpr int kInt8TileRows = 2;
template <int MR>
XDF_INLINE void int8_chunk(const uint8_t* const (&h)[MR], ptrdiff_t k, const int8_t* weights,
                           Int32s (&acc)[MR][4]) {
  const __m256i ones = _mm256_set1_epi16(1);
  XDF_UNROLL
  for (int r = 0; r < MR; ++r) {
    __m256i u[4];
    XDF_UNROLL
    for (int quad = 0; quad < 4; ++quad) u[quad] = _mm256_set1_epi32(quad_at(h[r] + k + 4 * quad));
    XDF_UNROLL
    for (int gate = 0; gate < 4; ++gate) {
      const __m256i* w = reinterpret_cast<const __m256i*>(weights + gate * 128);
      const __m256i a = _mm256_add_epi16(_mm256_maddubs_epi16(u[0], _mm256_load_si256(w)),
                                         _mm256_maddubs_epi16(u[1], _mm256_load_si256(w + 1)));
      const __m256i b = _mm256_add_epi16(_mm256_maddubs_epi16(u[2], _mm256_load_si256(w + 2)),
                                         _mm256_maddubs_epi16(u[3], _mm256_load_si256(w + 3)));
      const __m256i sums = _mm256_madd_epi16(_mm256_add_epi16(a, b), ones);
      acc[r][gate].v = _mm256_add_epi32(acc[r][gate].v, sums);
    }
  }
}

#else

constexpr int kInt8TileRows = 1;
template <int MR>
XDF_INLINE void int8_chunk(const uint8_t* const (&h)[MR], ptrdiff_t k, const int8_t* weights,
                           Int32s (&acc)[MR][4]) {
  for (int r = 0; r < MR; ++r)
    for (int gate = 0; gate < 4; ++gate)
      for (int quad = 0; quad < 4; ++quad)
        for (int lane = 0; lane < Int32s::lanes; ++lane)
          for (int byte = 0; byte < 4; ++byte)
            acc[r][gate].v[lane] += h[r][k + 4 * quad + byte] *
                                    weights[((gate * 4 + quad) * Int32s::lanes + lane) * 4 + byte];
}

#endif

// The hidden state of `lanes` units as bytes.
XDF_INLINE void store_hidden(Vec<float> h, uint8_t* to) {
  const Vec<float> scaled = h * Vec<float>::set1(static_cast<float>(kInt8HiddenLevels));
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

// From the pre-activations of `lanes` units to c and h. tanh here is good to 1e-4, a fiftieth of
// what the hidden state keeps.
XDF_INLINE void int8_cell(const LstmInt8StepArgs& args, int row, int unit, Vec<float> a_i,
                          Vec<float> a_f, Vec<float> a_g, Vec<float> a_o) {
  using V = Vec<float>;
  const Ratio<float> i = sigmoid_ratio_short(a_i);
  const Ratio<float> f = sigmoid_ratio_short(a_f);
  const Ratio<float> g = tanh_ratio_short(a_g);
  const Ratio<float> o = sigmoid_ratio_short(a_o);
  float* c_at = args.c[row] + unit;
  const V ig = i.den * g.den;
  V c = i.num * g.num;
  if (args.first)
    c = c / ig;
  else
    c = V::fma(f.num * V::load(c_at), ig, c * f.den) / (f.den * ig);
  const Ratio<float> tanh_c = tanh_ratio_short(c);
  const V h = (o.num * tanh_c.num) / (o.den * tanh_c.den);
  c.store(c_at);
  store_hidden(h, args.h_next + row * args.h_stride + unit);
  if (unit + V::lanes <= args.hidden_size)
    h.store(args.out[row] + unit);
  else
    h.store_n(args.out[row] + unit, args.hidden_size - unit);
}

// Rows [m, m + MR) and one block of units, from `unit`.
template <int MR>
static void int8_tile(const LstmInt8StepArgs& args, int m, const int8_t* weights, int unit) {
  constexpr int lanes = Vec<float>::lanes;
  Int32s acc[MR][4];
  const uint8_t* h[MR];
  XDF_UNROLL
  for (int r = 0; r < MR; ++r) {
    h[r] = args.h_prev + (m + r) * args.h_stride;
    // What the row needs in the next block: long out of the first levels, or never in them.
    XDF_PREFETCH(args.input[m + r] + 4 * (unit + lanes));
    XDF_UNROLL
    for (int gate = 0; gate < 4; ++gate)
      acc[r][gate] = Int32s::load(args.weights.start + 4 * unit + gate * lanes);
  }
  const ptrdiff_t K = round_up(args.hidden_size, kInt8Chunk);
  for (ptrdiff_t k = 0; k < K; k += kInt8Chunk, weights += 4 * lanes * kInt8Chunk)
    int8_chunk(h, k, weights, acc);
  XDF_UNROLL
  for (int r = 0; r < MR; ++r) {
    const Half* input = args.input[m + r] + 4 * unit;
    const float* scale = args.weights.scale + 4 * unit;
    Vec<float> a[4];
    XDF_UNROLL
    for (int gate = 0; gate < 4; ++gate)
      a[gate] = Vec<float>::fma(acc[r][gate].to_float(), Vec<float>::load(scale + gate * lanes),
                                Vec<float>::load(input + gate * lanes));
    int8_cell(args, m + r, unit, a[0], a[1], a[2], a[3]);
  }
}

// The step that has none before it: no product.
static void int8_first_step(const LstmInt8StepArgs& args) {
  constexpr int lanes = Vec<float>::lanes;
  for (int unit = args.unit_begin; unit < args.unit_end; unit += lanes) {
    for (int r = 0; r < args.rows; ++r) {
      const Half* input = args.input[r] + 4 * unit;
      int8_cell(args, r, unit, Vec<float>::load(input), Vec<float>::load(input + lanes),
                Vec<float>::load(input + 2 * lanes), Vec<float>::load(input + 3 * lanes));
    }
  }
}

template <int MR>
XDF_INLINE void int8_tile_of(int rows, const LstmInt8StepArgs& args, int m, const int8_t* weights,
                             int unit) {
  if constexpr (MR > 1) {
    if (rows < MR) return int8_tile_of<MR - 1>(rows, args, m, weights, unit);
  }
  int8_tile<MR>(args, m, weights, unit);
}

static void lstm_step_int8(const LstmInt8StepArgs& args) {
  constexpr int lanes = Vec<float>::lanes;
  if (args.first) return int8_first_step(args);
  const ptrdiff_t block_size =
      static_cast<ptrdiff_t>(round_up(args.hidden_size, kInt8Chunk)) * 4 * lanes;
  for (int r = 0; r < args.rows; ++r) XDF_PREFETCH(args.input[r] + 4 * args.unit_begin);
  for (int unit = args.unit_begin; unit < args.unit_end; unit += lanes) {
    const int8_t* weights = args.weights.recurrent + unit / lanes * block_size;
    for (int m = 0; m < args.rows; m += kInt8TileRows)
      int8_tile_of<kInt8TileRows>(args.rows - m, args, m, weights, unit);
  }
}

}  // namespace XDF_ISA
}  // namespace xdf
