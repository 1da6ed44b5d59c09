// Vec<T>: one SIMD register of the instruction set this translation unit is compiled for.
//
// Kernels are written once over this type. It is included only by files that are compiled once per
// instruction set, and everything lies in the namespace of that set, so that no symbol compiled
// with, say, AVX-512 can ever be picked by the linker for a machine that lacks it. For the same
// reason no standard library template is used here or in the kernels.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(XDF_EMULATE) && defined(XDF_ISA_avx512)
#include "cpu/avx512_emulated.h"
#elif defined(XDF_ISA_avx2) || defined(XDF_ISA_avx512)
#include <immintrin.h>
#elif defined(XDF_ISA_neondot)
#include <arm_neon.h>
#endif

#include "xdf/half.h"

#ifndef XDF_ISA
#error "compile with -DXDF_ISA=<instruction set>"
#endif

#if defined(__GNUC__)
#define XDF_INLINE static inline __attribute__((always_inline))
#define XDF_MEMBER inline __attribute__((always_inline))
#define XDF_NOINLINE static __attribute__((noinline))
#define XDF_UNROLL _Pragma("GCC unroll 16")
#define XDF_PREFETCH(address) __builtin_prefetch(address)
// The compiler must have computed the register at this point, and may not regroup sums across it.
#define XDF_KEEP_ORDER(reg) __asm__("" : "+x"(reg))
#else
#define XDF_INLINE static inline
#define XDF_MEMBER inline
#define XDF_NOINLINE static
#define XDF_UNROLL
#define XDF_PREFETCH(address) ((void)(address))
#define XDF_KEEP_ORDER(reg) ((void)(reg))
#endif

namespace xdf {
namespace XDF_ISA {

XDF_INLINE float float_of_bits(uint32_t bits) {
  union {
    uint32_t bits;
    float value;
  } u{bits};
  return u.value;
}

XDF_INLINE uint32_t bits_of_float(float value) {
  union {
    float value;
    uint32_t bits;
  } u{value};
  return u.bits;
}

XDF_INLINE float to_float(Bf16 x) {
  return float_of_bits(static_cast<uint32_t>(x.bits) << 16);
}

// Of a finite number. The product scales the exponent and makes subnormal numbers normal.
XDF_INLINE float to_float(Half x) {
  const float magnitude = float_of_bits((x.bits & 0x7fffu) << 13) * 5.192296858534828e33f;  // 2^112
  return float_of_bits(bits_of_float(magnitude) | (x.bits & 0x8000u) << 16);
}

// Of a number whose magnitude is at most 65504, to nearest, ties to even.
XDF_INLINE Half to_half(float x) {
  const uint32_t sign = bits_of_float(x) >> 16 & 0x8000u;
  uint32_t bits = bits_of_float(x) & 0x7fffffffu;
  if (bits < 0x38800000u) {  // subnormal: the adder rounds, its unit is 2^-24
    bits = bits_of_float(float_of_bits(bits) + 0.5f) - bits_of_float(0.5f);
  } else {
    bits += 0xc8000fffu + (bits >> 13 & 1u);  // the exponent's bias, half a unit, ties
    bits >>= 13;
  }
  return {static_cast<uint16_t>(sign | bits)};
}

// Portable fallback: an array that compilers map to whatever registers the target has. `fma` is a
// multiply and an add, each rounded, because a fused one without hardware support is a library
// call.
template <class T>
struct Vec {
  static constexpr int lanes = 16 / static_cast<int>(sizeof(T));
  T v[lanes];

  static XDF_MEMBER Vec set1(T x) {
    Vec r;
    for (int i = 0; i < lanes; ++i) r.v[i] = x;
    return r;
  }
  static XDF_MEMBER Vec load(const T* p) {
    Vec r;
    for (int i = 0; i < lanes; ++i) r.v[i] = p[i];
    return r;
  }
  template <class Stored>  // Half, Bf16
  static XDF_MEMBER Vec load(const Stored* p) {
    Vec r;
    for (int i = 0; i < lanes; ++i) r.v[i] = to_float(p[i]);
    return r;
  }
  XDF_MEMBER void store(T* p) const {
    for (int i = 0; i < lanes; ++i) p[i] = v[i];
  }
  XDF_MEMBER void store(Half* p) const {
    for (int i = 0; i < lanes; ++i) p[i] = to_half(v[i]);
  }
  // The first n >= 0 lanes; the others are zero (load_n) or left alone in memory (store_n).
  static XDF_MEMBER Vec load_n(const T* p, int n) {
    Vec r;
    for (int i = 0; i < lanes; ++i) r.v[i] = i < n ? p[i] : T(0);
    return r;
  }
  XDF_MEMBER void store_n(T* p, int n) const {
    for (int i = 0; i < lanes; ++i)
      if (i < n) p[i] = v[i];
  }
  friend XDF_MEMBER Vec operator+(Vec a, Vec b) {
    for (int i = 0; i < lanes; ++i) a.v[i] += b.v[i];
    return a;
  }
  friend XDF_MEMBER Vec operator-(Vec a, Vec b) {
    for (int i = 0; i < lanes; ++i) a.v[i] -= b.v[i];
    return a;
  }
  friend XDF_MEMBER Vec operator*(Vec a, Vec b) {
    for (int i = 0; i < lanes; ++i) a.v[i] *= b.v[i];
    return a;
  }
  friend XDF_MEMBER Vec operator/(Vec a, Vec b) {
    for (int i = 0; i < lanes; ++i) a.v[i] /= b.v[i];
    return a;
  }
  // a * b + c
  static XDF_MEMBER Vec fma(Vec a, Vec b, Vec c) {
    for (int i = 0; i < lanes; ++i) c.v[i] = a.v[i] * b.v[i] + c.v[i];
    return c;
  }
  // As the x86 instructions: the second operand where either is NaN.
  static XDF_MEMBER Vec min(Vec a, Vec b) {
    for (int i = 0; i < lanes; ++i) b.v[i] = a.v[i] < b.v[i] ? a.v[i] : b.v[i];
    return b;
  }
  static XDF_MEMBER Vec max(Vec a, Vec b) {
    for (int i = 0; i < lanes; ++i) b.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i];
    return b;
  }
  // a > b ? x : y, lane by lane
  static XDF_MEMBER Vec select_gt(Vec a, Vec b, Vec x, Vec y) {
    for (int i = 0; i < lanes; ++i) y.v[i] = a.v[i] > b.v[i] ? x.v[i] : y.v[i];
    return y;
  }
  // Bit i: lane i of a equals that of b.
  static XDF_MEMBER unsigned equal(Vec a, Vec b) {
    unsigned bits = 0;
    for (int i = 0; i < lanes; ++i) bits |= static_cast<unsigned>(a.v[i] == b.v[i]) << i;
    return bits;
  }
  // Over the lanes, in an order that is the instruction set's own.
  XDF_MEMBER T reduce_max() const {
    T r = v[0];
    for (int i = 1; i < lanes; ++i) r = v[i] > r ? v[i] : r;
    return r;
  }
  XDF_MEMBER T reduce_add() const {
    T r = v[0];
    for (int i = 1; i < lanes; ++i) r += v[i];
    return r;
  }
  // Nearest integer, ties to even, for |x| < 2^22 (float) or 2^51 (double).
  static XDF_MEMBER Vec round(Vec a) {
    const T magic =
        sizeof(T) == 4 ? T(12582912.0) : T(6755399441055744.0);  // 1.5 * 2^(mantissa bits)
    for (int i = 0; i < lanes; ++i) {
      volatile T shifted = a.v[i] + magic;  // volatile: no compiler may fold the two additions
      a.v[i] = shifted - magic;
    }
    return a;
  }
  // 2^n for integral n within the exponent range of normal numbers.
  static XDF_MEMBER Vec pow2(Vec n) {
    for (int i = 0; i < lanes; ++i) {
      if constexpr (sizeof(T) == 4) {
        union {
          uint32_t bits;
          float value;
        } u;
        u.bits = static_cast<uint32_t>(static_cast<int32_t>(n.v[i]) + 127) << 23;
        n.v[i] = u.value;
      } else {
        union {
          uint64_t bits;
          double value;
        } u;
        u.bits = static_cast<uint64_t>(static_cast<int64_t>(n.v[i]) + 1023) << 52;
        n.v[i] = u.value;
      }
    }
    return n;
  }
};

#if defined(XDF_ISA_avx2)
template <>
struct Vec<float> {
  static constexpr int lanes = 8;
  __m256 v;

  static XDF_MEMBER __m256i mask(int n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }
  static XDF_MEMBER Vec set1(float x) { return {_mm256_set1_ps(x)}; }
  static XDF_MEMBER Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
  static XDF_MEMBER Vec load(const Half* p) {
    return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
  }
  static XDF_MEMBER Vec load(const Bf16* p) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16))};
  }
  XDF_MEMBER void store(Half* p) const {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                     _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  XDF_MEMBER void store(float* p) const { _mm256_storeu_ps(p, v); }
  static XDF_MEMBER Vec load_n(const float* p, int n) { return {_mm256_maskload_ps(p, mask(n))}; }
  // By halves: the masked store is microcoded on AMD processors, some 20 cycles each.
  XDF_MEMBER void store_n(float* p, int n) const {
    if (n >= lanes) return store(p);
    __m128 rest = _mm256_castps256_ps128(v);
    if (n & 4) {
      _mm_storeu_ps(p, rest);
      p += 4;
      rest = _mm256_extractf128_ps(v, 1);
    }
    if (n & 2) {
      _mm_storel_pi(reinterpret_cast<__m64*>(p), rest);
      p += 2;
      rest = _mm_movehl_ps(rest, rest);
    }
    if (n & 1) _mm_store_ss(p, rest);
  }
  friend XDF_MEMBER Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
  friend XDF_MEMBER Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
  friend XDF_MEMBER Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
  friend XDF_MEMBER Vec operator/(Vec a, Vec b) { return {_mm256_div_ps(a.v, b.v)}; }
  static XDF_MEMBER Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
  static XDF_MEMBER Vec min(Vec a, Vec b) { return {_mm256_min_ps(a.v, b.v)}; }
  static XDF_MEMBER Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.v, b.v)}; }
  static XDF_MEMBER Vec select_gt(Vec a, Vec b, Vec x, Vec y) {
    return {_mm256_blendv_ps(y.v, x.v, _mm256_cmp_ps(a.v, b.v, _CMP_GT_OQ))};
  }
  static XDF_MEMBER unsigned equal(Vec a, Vec b) {
    return static_cast<unsigned>(_mm256_movemask_ps(_mm256_cmp_ps(a.v, b.v, _CMP_EQ_OQ)));
  }
  XDF_MEMBER float reduce_max() const {
    __m128 r = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    r = _mm_max_ps(r, _mm_movehl_ps(r, r));
    return _mm_cvtss_f32(_mm_max_ss(r, _mm_movehdup_ps(r)));
  }
  XDF_MEMBER float reduce_add() const {
    __m128 r = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    r = _mm_add_ps(r, _mm_movehl_ps(r, r));
    return _mm_cvtss_f32(_mm_add_ss(r, _mm_movehdup_ps(r)));
  }
  static XDF_MEMBER Vec round(Vec a) {
    return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
  }
  static XDF_MEMBER Vec pow2(Vec n) {
    const __m256i i = _mm256_add_epi32(_mm256_cvtps_epi32(n.v), _mm256_set1_epi32(127));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(i, 23))};
  }
};
#endif

#if defined(XDF_ISA_avx512)
template <>
struct Vec<float> {
  static constexpr int lanes = 16;
  __m512 v;

  static XDF_MEMBER __mmask16 mask(int n) {
    return n >= 16 ? static_cast<__mmask16>(0xffff) : static_cast<__mmask16>((1u << n) - 1u);
  }
  static XDF_MEMBER Vec set1(float x) { return {_mm512_set1_ps(x)}; }
  static XDF_MEMBER Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static XDF_MEMBER Vec load(const Half* p) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
  }
  static XDF_MEMBER Vec load(const Bf16* p) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16))};
  }
  XDF_MEMBER void store(Half* p) const {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                        _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
#if defined(XDF_ISA_avx512bf16)
  // To nearest even; subnormal numbers become zero, as in products.
  XDF_MEMBER void store(Bf16* p) const {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh(v));
  }
#endif
  XDF_MEMBER void store(float* p) const { _mm512_storeu_ps(p, v); }
  static XDF_MEMBER Vec load_n(const float* p, int n) {
    return {_mm512_maskz_loadu_ps(mask(n), p)};
  }
  XDF_MEMBER void store_n(float* p, int n) const { _mm512_mask_storeu_ps(p, mask(n), v); }
  friend XDF_MEMBER Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
  friend XDF_MEMBER Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
  friend XDF_MEMBER Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
  friend XDF_MEMBER Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
  static XDF_MEMBER Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
  static XDF_MEMBER Vec min(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }
  static XDF_MEMBER Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
  static XDF_MEMBER Vec select_gt(Vec a, Vec b, Vec x, Vec y) {
    return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ), y.v, x.v)};
  }
  static XDF_MEMBER unsigned equal(Vec a, Vec b) {
    return static_cast<unsigned>(_mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_OQ));
  }
  XDF_MEMBER float reduce_max() const { return _mm512_reduce_max_ps(v); }
  XDF_MEMBER float reduce_add() const { return _mm512_reduce_add_ps(v); }
  static XDF_MEMBER Vec round(Vec a) {
    return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
  }
  static XDF_MEMBER Vec pow2(Vec n) {
    const __m512i i = _mm512_add_epi32(_mm512_cvtps_epi32(n.v), _mm512_set1_epi32(127));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(i, 23))};
  }
};
#endif

#if defined(XDF_ISA_avx512bf16)
template <>
struct Vec<Bf16Pair> {
  static constexpr int lanes = 16;
  __m512i v;

  static XDF_MEMBER Vec set1(const Bf16Pair& x) {
    int32_t bits;
    __builtin_memcpy(&bits, &x, sizeof(bits));
    return {_mm512_set1_epi32(bits)};
  }
  static XDF_MEMBER Vec load(const Bf16Pair* p) { return {_mm512_loadu_si512(p)}; }
  XDF_MEMBER void store(Bf16Pair* p) const { _mm512_storeu_si512(p, v); }
  // Lane by lane, first as the lower half.
  static XDF_MEMBER Vec of(Vec<float> first, Vec<float> second) {
    const __m256i low = (__m256i)_mm512_cvtneps_pbh(first.v);
    const __m256i high = (__m256i)_mm512_cvtneps_pbh(second.v);
    return {_mm512_or_si512(_mm512_cvtepu16_epi32(low),
                            _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16))};
  }
};
#endif

#if defined(XDF_ISA_neondot)
template <>
struct Vec<float> {
  static constexpr int lanes = 4;
  float32x4_t v;

  static XDF_MEMBER Vec set1(float x) { return {vdupq_n_f32(x)}; }
  static XDF_MEMBER Vec load(const float* p) { return {vld1q_f32(p)}; }
  static XDF_MEMBER Vec load(const Half* p) {
    return {vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(&p->bits)))};
  }
  static XDF_MEMBER Vec load(const Bf16* p) {
    return {vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(&p->bits), 16))};
  }
  XDF_MEMBER void store(Half* p) const {
    vst1_u16(&p->bits, vreinterpret_u16_f16(vcvt_f16_f32(v)));
  }
  XDF_MEMBER void store(float* p) const { vst1q_f32(p, v); }
  static XDF_MEMBER Vec load_n(const float* p, int n) {
    Vec r = set1(0.0f);
    for (int i = 0; i < lanes; ++i)
      if (i < n) r.v[i] = p[i];
    return r;
  }
  XDF_MEMBER void store_n(float* p, int n) const {
    for (int i = 0; i < lanes; ++i)
      if (i < n) p[i] = v[i];
  }
  friend XDF_MEMBER Vec operator+(Vec a, Vec b) { return {vaddq_f32(a.v, b.v)}; }
  friend XDF_MEMBER Vec operator-(Vec a, Vec b) { return {vsubq_f32(a.v, b.v)}; }
  friend XDF_MEMBER Vec operator*(Vec a, Vec b) { return {vmulq_f32(a.v, b.v)}; }
  friend XDF_MEMBER Vec operator/(Vec a, Vec b) { return {vdivq_f32(a.v, b.v)}; }
  static XDF_MEMBER Vec fma(Vec a, Vec b, Vec c) { return {vfmaq_f32(c.v, a.v, b.v)}; }
  // Not vminq_f32, which gives NaN where either is NaN.
  static XDF_MEMBER Vec min(Vec a, Vec b) { return select_gt(b, a, a, b); }
  static XDF_MEMBER Vec max(Vec a, Vec b) { return select_gt(a, b, a, b); }
  static XDF_MEMBER Vec select_gt(Vec a, Vec b, Vec x, Vec y) {
    return {vbslq_f32(vcgtq_f32(a.v, b.v), x.v, y.v)};
  }
  static XDF_MEMBER unsigned equal(Vec a, Vec b) {
    const uint32x4_t bits = {1, 2, 4, 8};
    return vaddvq_u32(vandq_u32(vceqq_f32(a.v, b.v), bits));
  }
  XDF_MEMBER float reduce_max() const { return vmaxvq_f32(v); }
  XDF_MEMBER float reduce_add() const { return vaddvq_f32(v); }
  static XDF_MEMBER Vec round(Vec a) { return {vrndnq_f32(a.v)}; }
  static XDF_MEMBER Vec pow2(Vec n) {
    const int32x4_t i = vaddq_s32(vcvtnq_s32_f32(n.v), vdupq_n_s32(127));
    return {vreinterpretq_f32_s32(vshlq_n_s32(i, 23))};
  }
};
#endif

// sum + a b, lane by lane.
template <class T>
XDF_INLINE Vec<T> multiply_add(Vec<T> a, Vec<T> b, Vec<T> sum) {
  return Vec<T>::fma(a, b, sum);
}
#if defined(XDF_ISA_avx512bf16)
// Both products of a pair; the instruction takes subnormal numbers for zero.
XDF_INLINE Vec<float> multiply_add(Vec<Bf16Pair> a, Vec<Bf16Pair> b, Vec<float> sum) {
  return {_mm512_dpbf16_ps(sum.v, (__m512bh)a.v, (__m512bh)b.v)};
}
#endif

}  // namespace XDF_ISA
}  // namespace xdf
