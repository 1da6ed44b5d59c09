// What the device code is written in, so that a C++ compiler without CUDA can run it too.
//
// A kernel is a program of a warp, cut into phases by barriers (launch.cuh). Within a phase a
// warp's lanes go step by step together. The source says so: what each lane does for itself stands
// under XDF_EACH_LANE(lane), and values that live from one such block to the next are Lane<T>. nvcc
// makes of a block the code of one thread and of Lane<T> a register; a C++ compiler makes a loop
// over 32 lanes and an array. Operations between lanes (sums, matrix products) are functions of
// Lane<T> with a version for each. tests/cuda runs the second form, on the CPU, against the float64
// reference.
//
// In a block under XDF_EACH_LANE there is no return, break or continue: in one form it is a loop.
#pragma once

#include <math.h>

#include <cstdint>
#include <cstring>

#include "xdf/half.h"

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#define XDF_DEVICE __device__ __forceinline__
#define XDF_HD __host__ __device__ __forceinline__
#define XDF_UNROLL _Pragma("unroll")
#define XDF_PIPELINE _Pragma("unroll 4")
#define XDF_EACH_LANE(lane) if (const int lane = static_cast<int>(threadIdx.x & 31u); true)
#else
#define XDF_DEVICE inline
#define XDF_HD inline
#define XDF_UNROLL
#define XDF_PIPELINE
#define XDF_EACH_LANE(lane) for (int lane = 0; lane < 32; ++lane)
#endif

namespace xdf {
namespace cuda {

constexpr int kLanes = 32;

template <class T>
struct Lane {
#if defined(__CUDACC__)
  T value;
  XDF_DEVICE T& operator[](int) { return value; }
  XDF_DEVICE const T& operator[](int) const { return value; }
#else
  T value[kLanes];
  T& operator[](int lane) { return value[lane]; }
  const T& operator[](int lane) const { return value[lane]; }
#endif
};

// Neighbours in memory, moved as one; at most 16 bytes at a time.
template <class T>
struct alignas(2 * sizeof(T)) Pair {
  T v[2];
};
template <class T>
struct alignas(4 * sizeof(T) < 16 ? 4 * sizeof(T) : 16) Quad {
  T v[4];
};
struct alignas(16) Chunk {
  uint32_t v[4];
};

// --- numbers -----------------------------------------------------------------------------------

XDF_HD float to_float(float x) {
  return x;
}
XDF_HD double to_float(double x) {
  return x;
}
XDF_HD float to_float(int8_t x) {
  return static_cast<float>(x);
}
XDF_HD float to_float(Bf16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}

#if defined(__CUDACC__)
XDF_DEVICE float to_float(Half x) {
  return __half2float(__ushort_as_half(x.bits));
}
#else
inline float to_float(Half x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const int exponent = x.bits >> 10 & 31;
  const int mantissa = x.bits & 1023;
  float value = exponent == 0    ? ldexpf(static_cast<float>(mantissa), -24)
                : exponent == 31 ? (mantissa ? NAN : INFINITY)
                                 : ldexpf(static_cast<float>(1024 + mantissa), exponent - 25);
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  bits |= sign;
  memcpy(&value, &bits, sizeof(value));
  return value;
}
#endif

// Rounded to the nearest, halfway cases to even. Half: what is beyond becomes the largest number.
template <class To>
struct Rounded;
template <>
struct Rounded<float> {
  static XDF_DEVICE float of(float x) { return x; }
};
template <>
struct Rounded<double> {
  static XDF_DEVICE double of(double x) { return x; }
};
template <>
struct Rounded<Bf16> {
  static XDF_DEVICE Bf16 of(float x) {
#if defined(__CUDACC__)
    return {__bfloat16_as_ushort(__float2bfloat16_rn(x))};
#else
    uint32_t bits;
    memcpy(&bits, &x, sizeof(bits));
    if (x != x) return {0x7FC0};
    return {static_cast<uint16_t>((bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16)};
#endif
  }
};
// Beyond -127 .. 127 the nearest of these, NaN the largest.
template <>
struct Rounded<int8_t> {
  static XDF_DEVICE int8_t of(float x) {
    return static_cast<int8_t>(rintf(fmaxf(fminf(x, 127.0f), -127.0f)));
  }
};
template <>
struct Rounded<Half> {
  static XDF_DEVICE Half of(float x) {
    const float limit = 65504.0f;
    x = x > limit ? limit : x < -limit ? -limit : x;
#if defined(__CUDACC__)
    return {__half_as_ushort(__float2half_rn(x))};
#else
    uint32_t bits;
    memcpy(&bits, &x, sizeof(bits));
    const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000u);
    if (x != x) return {0x7E00};
    int exponent;
    frexpf(x, &exponent);  // |x| in [2^(exponent - 1), 2^exponent)
    const int unit = exponent - 11 < -24 ? -24 : exponent - 11;
    const float levels = rintf(ldexpf(fabsf(x), -unit));  // 0 .. 2048, exact but for this rounding
    const int whole = static_cast<int>(levels);
    // Adding lets a carry out of the mantissa raise the exponent.
    const int code = whole < 1024 ? whole : ((unit + 24) << 10) + whole;
    return {static_cast<uint16_t>(sign | static_cast<uint16_t>(code))};
#endif
  }
};

// tanh and sigmoid as accurate as the type; Fast: the processor's own tanh, error 2^-11, which is
// below that of a hidden state in bfloat16.
XDF_DEVICE float exact_tanh(float x) {
  return tanhf(x);
}
XDF_DEVICE double exact_tanh(double x) {
  return tanh(x);
}
template <class T>
XDF_DEVICE T exact_sigmoid(T x) {
  return T(0.5) * exact_tanh(T(0.5) * x) + T(0.5);
}
XDF_DEVICE float fast_tanh(float x) {
#if defined(__CUDACC__)
  float y;
  asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return tanhf(x);
#endif
}
XDF_DEVICE float fast_sigmoid(float x) {
  return 0.5f * fast_tanh(0.5f * x) + 0.5f;
}
XDF_DEVICE float exp_of(float x) {
  return expf(x);
}
XDF_DEVICE double exp_of(double x) {
  return exp(x);
}
XDF_DEVICE float log_of(float x) {
  return logf(x);
}
XDF_DEVICE double log_of(double x) {
  return log(x);
}
XDF_DEVICE float multiply_add(float a, float b, float c) {
  return fmaf(a, b, c);
}
XDF_DEVICE double multiply_add(double a, double b, double c) {
  return fma(a, b, c);
}

// --- memory ------------------------------------------------------------------------------------

// Asks for a line that a later step will read; no result depends on it.
XDF_DEVICE void prefetch(const void* p) {
#if defined(__CUDACC__)
  asm volatile("prefetch.global.L2 [%0];" ::"l"(p));
#else
  (void)p;
#endif
}

// --- between the lanes of a warp -----------------------------------------------------------------

// Orders what lanes wrote before with what other lanes of the warp read after.
XDF_DEVICE void warp_sync() {
#if defined(__CUDACC__)
  __syncwarp();
#endif
}

XDF_DEVICE int warp_count(const Lane<bool>& x) {
#if defined(__CUDACC__)
  return __popc(__ballot_sync(0xFFFFFFFFu, x.value));
#else
  int count = 0;
  for (int lane = 0; lane < kLanes; ++lane) count += x[lane];
  return count;
#endif
}

// combine(a, b) over all lanes, in all lanes, as a butterfly: the order of a sum is fixed.
template <class T, class Combine>
XDF_DEVICE void warp_reduce(Lane<T>& x, Combine combine) {
#if defined(__CUDACC__)
  XDF_UNROLL
  for (int distance = 16; distance > 0; distance /= 2)
    x.value = combine(x.value, __shfl_xor_sync(0xFFFFFFFFu, x.value, distance));
#else
  for (int distance = 16; distance > 0; distance /= 2) {
    const Lane<T> before = x;
    for (int lane = 0; lane < kLanes; ++lane)
      x[lane] = combine(before[lane], before[lane ^ distance]);
  }
#endif
}
template <class T>
struct Larger {
  XDF_DEVICE T operator()(T a, T b) const { return a > b ? a : b; }
};
template <class T>
struct Sum {
  XDF_DEVICE T operator()(T a, T b) const { return a + b; }
};

// d += A B for a matrix A of 16 rows of 16, B of 16 rows of 8, bfloat16, sums in float32. With
// g = lane / 4, q = lane % 4, and registers of two neighbours each, the lower half first
// (PTX, "Matrix Fragments for mma.m16n8k16"):
//   a[0] = A[g][2q, 2q+1]     a[1] = A[g+8][2q, 2q+1]
//   a[2] = A[g][2q+8, 2q+9]   a[3] = A[g+8][2q+8, 2q+9]
//   b[0] = B[2q, 2q+1][g]     b[1] = B[2q+8, 2q+9][g]
//   d[0], d[1] = D[g][2q, 2q+1]   d[2], d[3] = D[g+8][2q, 2q+1]
XDF_DEVICE void mma_bf16(Lane<float> (&d)[4], const Lane<Quad<uint32_t>>& a,
                         const Lane<uint32_t>& b0, const Lane<uint32_t>& b1) {
#if defined(__CUDACC__)
  // volatile: it must not be moved to where only some of the lanes need its result.
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0].value), "+f"(d[1].value), "+f"(d[2].value), "+f"(d[3].value)
      : "r"(a.value.v[0]), "r"(a.value.v[1]), "r"(a.value.v[2]), "r"(a.value.v[3]), "r"(b0.value),
        "r"(b1.value));
#else
  const auto half = [](uint32_t pair, int which) {
    return to_float(Bf16{static_cast<uint16_t>(pair >> 16 * which)});
  };
  float A[16][16], B[16][8];
  for (int lane = 0; lane < kLanes; ++lane) {
    const int g = lane / 4, q = lane % 4;
    for (int e = 0; e < 2; ++e) {
      A[g][2 * q + e] = half(a[lane].v[0], e);
      A[g + 8][2 * q + e] = half(a[lane].v[1], e);
      A[g][2 * q + 8 + e] = half(a[lane].v[2], e);
      A[g + 8][2 * q + 8 + e] = half(a[lane].v[3], e);
      B[2 * q + e][g] = half(b0[lane], e);
      B[2 * q + 8 + e][g] = half(b1[lane], e);
    }
  }
  for (int lane = 0; lane < kLanes; ++lane) {
    const int g = lane / 4, q = lane % 4;
    for (int r = 0; r < 4; ++r) {
      float sum = d[r][lane];
      for (int k = 0; k < 16; ++k) sum += A[g + r / 2 * 8][k] * B[k][2 * q + r % 2];
      d[r][lane] = sum;
    }
  }
#endif
}

// The same for bytes: A of 16 rows of 32, B of 32 rows of 8, sums in 32 bits. A register holds four
// neighbours (PTX, "Matrix Fragments for mma.m16n8k32"):
//   a[0] = A[g][4q .. 4q+3]         a[1] = A[g+8][4q .. 4q+3]
//   a[2] = A[g][4q+16 .. 4q+19]     a[3] = A[g+8][4q+16 .. 4q+19]
//   b[0] = B[4q .. 4q+3][g]         b[1] = B[4q+16 .. 4q+19][g]
//   d as above
XDF_DEVICE void mma_int8(Lane<int32_t> (&d)[4], const Lane<Quad<uint32_t>>& a,
                         const Lane<uint32_t>& b0, const Lane<uint32_t>& b1) {
#if defined(__CUDACC__)
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+r"(d[0].value), "+r"(d[1].value), "+r"(d[2].value), "+r"(d[3].value)
      : "r"(a.value.v[0]), "r"(a.value.v[1]), "r"(a.value.v[2]), "r"(a.value.v[3]), "r"(b0.value),
        "r"(b1.value));
#else
  const auto byte = [](uint32_t word, int which) {
    return static_cast<int>(static_cast<int8_t>(word >> 8 * which & 255u));
  };
  int A[16][32], B[32][8];
  for (int lane = 0; lane < kLanes; ++lane) {
    const int g = lane / 4, q = lane % 4;
    for (int e = 0; e < 4; ++e) {
      A[g][4 * q + e] = byte(a[lane].v[0], e);
      A[g + 8][4 * q + e] = byte(a[lane].v[1], e);
      A[g][4 * q + 16 + e] = byte(a[lane].v[2], e);
      A[g + 8][4 * q + 16 + e] = byte(a[lane].v[3], e);
      B[4 * q + e][g] = byte(b0[lane], e);
      B[4 * q + 16 + e][g] = byte(b1[lane], e);
    }
  }
  for (int lane = 0; lane < kLanes; ++lane) {
    const int g = lane / 4, q = lane % 4;
    for (int r = 0; r < 4; ++r)
      for (int k = 0; k < 32; ++k) d[r][lane] += A[g + r / 2 * 8][k] * B[k][2 * q + r % 2];
  }
#endif
}

}  // namespace cuda
}  // namespace xdf
