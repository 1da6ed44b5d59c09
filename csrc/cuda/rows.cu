// Launches of the kernels over rows.
#include "cuda/rows.cuh"

#include "cuda/api.h"
#include "cuda/pooling.cuh"

namespace xdf {
namespace cuda {
namespace {

template <class X, class Out>
void run_linear(int64_t M, int N, int K, const void* x, const float* w, const float* bias,
                void* out, bool gelu, Stream stream) {
  using Program = LinearRows<X, Out>;
  const Grid grid = {static_cast<int>((M + Program::kWarps - 1) / Program::kWarps),
                     divide_up(N, Program::kColumns), Program::kWarps, 1, 0};
  launch<Program>({M, N, K, static_cast<const X*>(x), w, bias, static_cast<Out*>(out), gelu}, grid,
                  stream);
}

}  // namespace

void linear(RowType x_type, bool out_half, int64_t M, int N, int K, const void* x, const float* w,
            const float* bias, void* out, bool gelu, Stream stream) {
  if (x_type == RowType::kBf16)
    return run_linear<Bf16, float>(M, N, K, x, w, bias, out, gelu, stream);
  if (x_type == RowType::kInt8)
    return run_linear<int8_t, float>(M, N, K, x, w, bias, out, gelu, stream);
  if (out_half) return run_linear<float, Half>(M, N, K, x, w, bias, out, gelu, stream);
  run_linear<float, float>(M, N, K, x, w, bias, out, gelu, stream);
}

template <class T>
void embedding_grad(int64_t positions, int64_t rows, int E, const int64_t* ids,
                    const int64_t* order, const T* grad_out, T* grad_table, Stream stream) {
  using Program = EmbeddingGrad<T>;
  const Grid grid = {static_cast<int>((positions + Program::kWarps - 1) / Program::kWarps), 1,
                     Program::kWarps, 1, 0};
  launch<Program>({positions, rows, E, ids, order, grad_out, grad_table}, grid, stream);
}

template void embedding_grad<float>(int64_t, int64_t, int, const int64_t*, const int64_t*,
                                    const float*, float*, Stream);
template void embedding_grad<double>(int64_t, int64_t, int, const int64_t*, const int64_t*,
                                     const double*, double*, Stream);

template <class X, class Out>
void pool_rows(const PoolArgs<X, Out>& args, Stream stream) {
  using Program = PoolRows<X, Out>;
  const int columns = Program::kWarps * kLanes;
  launch<Program>(args, {args.runs, divide_up(args.width, columns), Program::kWarps, 1, 0}, stream);
}

template void pool_rows<float, float>(const PoolArgs<float, float>&, Stream);
template void pool_rows<double, double>(const PoolArgs<double, double>&, Stream);
template void pool_rows<Bf16, float>(const PoolArgs<Bf16, float>&, Stream);
template void pool_rows<int8_t, float>(const PoolArgs<int8_t, float>&, Stream);

}  // namespace cuda
}  // namespace xdf
