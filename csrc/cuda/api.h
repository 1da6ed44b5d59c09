// What the device code offers to the bindings: a call queues kernels on a stream and returns.
// Nothing is allocated, nothing waited for, so calls can be captured into a CUDA graph. All arrays
// are in device memory, row-major, aligned to 16 bytes, and owned by the caller; csrc/cuda/*.cuh
// say which. Sums are taken in one order, without atomics. The values of cu_seqlens, tags and ids
// lie on the device and are not checked: bad offsets make a sequence empty, a bad tag its
// likelihood NaN.
//
// The same functions exist for the CPU, emulated, where all arrays are in host memory (launch.cuh).
#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda/launch.cuh"
#include "cuda/lstm_layout.cuh"
#include "cuda/lstm_plan.h"

namespace xdf {
namespace cuda {

LstmPlan lstm_plan(Kind kind, bool backward, int hidden, int batch, const DeviceLimits& device,
                   int rows, int cluster);
size_t lstm_packed_size(Kind kind, bool backward, int hidden);  // elements
// W_hh [4H, H] of both directions, in torch's order and of the kind's type; float32 may be packed
// for bfloat16.
void lstm_pack(Kind kind, bool backward, int hidden, bool from_float, const void* forward,
               const void* reverse, void* packed, Stream stream);
void order_by_length(int batch, int64_t total, const int32_t* cu_seqlens, int32_t* order,
                     Stream stream);
// The largest cluster that a device runs with all of its shared memory; 1: none.
int max_cluster(int device);
// args.x is filled in from the plan.
void lstm_run(Kind kind, bool backward, int hidden, const LstmPlan& plan, struct LstmArgs args,
              Stream stream);

enum class CrfTask;
template <class T>
struct CrfArgs;
int crf_slots(int num_tags, int batch);
// gradient: also writes those of transitions, start and end.
template <class T>
struct CrfModelGrads {
  T* transitions;
  T* start;
  T* end;
};
template <class T>
void crf_run(CrfTask task, const CrfArgs<T>& args, const CrfModelGrads<T>& grads, Stream stream);

// Of x: float, Bf16 or int8_t; what is none of float goes to float alone.
// gelu: of the result, in its tanh form.
enum class RowType { kFloat32, kBf16, kInt8 };
void linear(RowType x_type, bool out_half, int64_t M, int N, int K, const void* x, const float* w,
            const float* bias, void* out, bool gelu, Stream stream);
template <class T>
void embedding_grad(int64_t positions, int64_t rows, int E, const int64_t* ids,
                    const int64_t* order, const T* grad_out, T* grad_table, Stream stream);

// X to Out: float, Bf16 or int8_t to float, double to double.
template <class X, class Out>
struct PoolArgs;
template <class X, class Out>
void pool_rows(const PoolArgs<X, Out>& args, Stream stream);

}  // namespace cuda
}  // namespace xdf
