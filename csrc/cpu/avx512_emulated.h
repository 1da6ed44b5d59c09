// AVX-512 in AVX2 instructions, for tests on machines without AVX-512 (XDF_EMULATE): SIMDe's
// intrinsics, and here those that SIMDe 0.7.4 lacks.
#pragma once

#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>
#include <simde/x86/f16c.h>

namespace xdf {
namespace emulated {

union Floats {
  __m512 whole;
  __m256 half[2];
  float lane[16];
};
union Ints {
  __m512i whole;
  __m256i half[2];
  int32_t lane[16];
};
union Bits {
  uint32_t bits;
  float value;
};

static inline float float_of_bits(uint32_t bits) {
  return Bits{bits}.value;
}

static inline __m512 maskz_loadu_ps(__mmask16 mask, const float* p) {
  Floats r;
  for (int i = 0; i < 16; ++i) r.lane[i] = (mask >> i & 1) != 0 ? p[i] : 0.0f;
  return r.whole;
}

static inline void mask_storeu_ps(float* p, __mmask16 mask, __m512 x) {
  const Floats from{x};
  for (int i = 0; i < 16; ++i)
    if ((mask >> i & 1) != 0) p[i] = from.lane[i];
}

// By halves, as compilers do: the order sets how a sum is rounded.
static inline float reduce_add_ps(__m512 x) {
  Floats r{x};
  for (int n = 8; n > 0; n /= 2)
    for (int i = 0; i < n; ++i) r.lane[i] += r.lane[i + n];
  return r.lane[0];
}

static inline float reduce_max_ps(__m512 x) {
  Floats r{x};
  for (int n = 8; n > 0; n /= 2)
    for (int i = 0; i < n; ++i)
      if (!(r.lane[i] > r.lane[i + n])) r.lane[i] = r.lane[i + n];
  return r.lane[0];
}

static inline __m512 cvtepi32_ps(__m512i x) {
  const Ints from{x};
  Floats r;
  for (int i = 0; i < 2; ++i) r.half[i] = _mm256_cvtepi32_ps(from.half[i]);
  return r.whole;
}

static inline __m512i cvtps_epi32(__m512 x) {
  const Floats from{x};
  Ints r;
  for (int i = 0; i < 2; ++i) r.half[i] = _mm256_cvtps_epi32(from.half[i]);
  return r.whole;
}

static inline __m512i cvtepu16_epi32(__m256i x) {
  Ints r;
  r.half[0] = _mm256_cvtepu16_epi32(_mm256_castsi256_si128(x));
  r.half[1] = _mm256_cvtepu16_epi32(_mm256_extracti128_si256(x, 1));
  return r.whole;
}

static inline __m128i cvtepi32_epi8(__m512i x) {
  const Ints from{x};
  int8_t bytes[16];
  for (int i = 0; i < 16; ++i) bytes[i] = static_cast<int8_t>(from.lane[i]);
  return _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes));
}

static inline __m512 cvtph_ps(__m256i x) {
  Floats r;
  r.half[0] = _mm256_cvtph_ps(_mm256_castsi256_si128(x));
  r.half[1] = _mm256_cvtph_ps(_mm256_extracti128_si256(x, 1));
  return r.whole;
}

template <int kRounding>
static inline __m256i cvtps_ph(__m512 x) {
  const Floats from{x};
  return _mm256_set_m128i(_mm256_cvtps_ph(from.half[1], kRounding),
                          _mm256_cvtps_ph(from.half[0], kRounding));
}

// Without the exact rounding of the instruction, which differs between processors.
static inline __m512 dpbf16_ps(__m512 sum, __m512i a, __m512i b) {
  Floats r{sum};
  const Ints x{a}, y{b};
  for (int i = 0; i < 16; ++i) {
    const uint32_t u = static_cast<uint32_t>(x.lane[i]), v = static_cast<uint32_t>(y.lane[i]);
    r.lane[i] += float_of_bits(u & 0xffff0000u) * float_of_bits(v & 0xffff0000u);
    r.lane[i] += float_of_bits(u << 16) * float_of_bits(v << 16);
  }
  return r.whole;
}

static inline __m256i cvtneps_pbh(__m512 x) {
  const Floats from{x};
  uint16_t upper[16];
  for (int i = 0; i < 16; ++i) {
    Bits lane;
    lane.value = from.lane[i];
    const uint32_t rounded = lane.bits + 0x7fffu + (lane.bits >> 16 & 1u);
    const bool is_nan = lane.value != lane.value;
    upper[i] = static_cast<uint16_t>(is_nan ? lane.bits >> 16 | 0x40u : rounded >> 16);
  }
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(upper));
}

}  // namespace emulated
}  // namespace xdf

#undef _mm512_madd_epi16  // SIMDe 0.7.4 gives the masked one this name
#define _mm512_madd_epi16(a, b) simde_mm512_madd_epi16(a, b)
#define _mm512_maskz_loadu_ps(mask, p) xdf::emulated::maskz_loadu_ps(mask, p)
#define _mm512_mask_storeu_ps(p, mask, x) xdf::emulated::mask_storeu_ps(p, mask, x)
#define _mm512_reduce_add_ps(x) xdf::emulated::reduce_add_ps(x)
#define _mm512_reduce_max_ps(x) xdf::emulated::reduce_max_ps(x)
#define _mm512_cvtepi32_ps(x) xdf::emulated::cvtepi32_ps(x)
#define _mm512_cvtps_epi32(x) xdf::emulated::cvtps_epi32(x)
#define _mm512_cvtepu16_epi32(x) xdf::emulated::cvtepu16_epi32(x)
#define _mm512_cvtepi32_epi8(x) xdf::emulated::cvtepi32_epi8(x)
#define _mm512_cvtph_ps(x) xdf::emulated::cvtph_ps(x)
#undef _mm512_dpbf16_ps
#define _mm512_dpbf16_ps(sum, a, b) xdf::emulated::dpbf16_ps(sum, (__m512i)(a), (__m512i)(b))
#undef _mm512_cvtneps_pbh
#define _mm512_cvtneps_pbh(x) xdf::emulated::cvtneps_pbh(x)
#undef _mm512_cvtps_ph  // a macro where the compiler does not optimise
#define _mm512_cvtps_ph(x, rounding) xdf::emulated::cvtps_ph<(rounding)>(x)
