// Launches of the recurrent kernels.
#include <type_traits>

#include "cuda/api.h"
#include "cuda/lstm_backward.cuh"
#include "cuda/lstm_forward.cuh"
#include "cuda/rows.cuh"

namespace xdf {
namespace cuda {
namespace {

// body(P{}) for the arithmetic of a kind.
template <class Body>
auto with_arithmetic(Kind kind, Body body) {
  if (kind == Kind::kFloat32) return body(Scalar<float>{});
  if (kind == Kind::kFloat64) return body(Scalar<double>{});
  if (kind == Kind::kInt8) return body(Bytes{});
  return body(Tensor{});
}

template <class P, int NB, bool kResident>
void run(bool backward, const LstmArgs& args, const Grid& grid, Stream stream) {
  if (!backward) {
    launch<LstmForward<P, NB, kResident>>(args, grid, stream);
  } else {
    if constexpr (NB <= 2 && !std::is_same_v<P, Bytes>)
      launch<LstmBackward<P, NB, kResident>>(args, grid, stream);
  }
}

template <class P, bool kResident>
void run_rows(bool backward, const LstmArgs& args, const Grid& grid, Stream stream) {
  if (args.x.rows == 8) return run<P, 1, kResident>(backward, args, grid, stream);
  if constexpr (sizeof(typename P::Acc) == 4) {
    if (args.x.rows == 16) return run<P, 2, kResident>(backward, args, grid, stream);
    if (args.x.rows == 32) return run<P, 4, kResident>(backward, args, grid, stream);
  }
}

template <class P, class From>
void pack(bool backward, const Geometry& x, const void* forward, const void* reverse, void* packed,
          Stream stream) {
  const From* weights[2] = {static_cast<const From*>(forward), static_cast<const From*>(reverse)};
  auto* to = static_cast<typename P::Store*>(packed);
  Grid grid = {0, 2, 8, 1, 0};
  grid.x = divide_up(x.groups * x.weights_a_group, grid.warps * kLanes);
  if (!backward) {
    launch<PackWeights<P, From, false>>({x, {weights[0], weights[1]}, to}, grid, stream);
  } else {
    if constexpr (!std::is_same_v<P, Bytes>)
      launch<PackWeights<P, From, true>>({x, {weights[0], weights[1]}, to}, grid, stream);
  }
}

}  // namespace

LstmPlan lstm_plan(Kind kind, bool backward, int hidden, int batch, const DeviceLimits& device,
                   int rows, int cluster) {
  return with_arithmetic(kind, [&](auto p) {
    return plan_lstm<decltype(p)>(kind, backward, hidden, batch, device, rows, cluster);
  });
}

size_t lstm_packed_size(Kind kind, bool backward, int hidden) {
  return with_arithmetic(kind, [&](auto p) {
    return packed_size(geometry<decltype(p)>(backward, hidden, 8, 1, false));
  });
}

void lstm_pack(Kind kind, bool backward, int hidden, bool from_float, const void* forward,
               const void* reverse, void* packed, Stream stream) {
  with_arithmetic(kind, [&](auto p) {
    using P = decltype(p);
    const Geometry x = geometry<P>(backward, hidden, 8, 1, false);
    if constexpr (std::is_same_v<P, Tensor>) {
      if (from_float) return pack<P, float>(backward, x, forward, reverse, packed, stream);
    }
    pack<P, typename P::Store>(backward, x, forward, reverse, packed, stream);
  });
}

void order_by_length(int batch, int64_t total, const int32_t* cu_seqlens, int32_t* order,
                     Stream stream) {
  const Grid grid = {divide_up(batch, OrderByLength::kWarps), 1, OrderByLength::kWarps, 1, 0};
  launch<OrderByLength>({batch, total, cu_seqlens, order}, grid, stream);
}

int max_cluster(int device) {
#if defined(__CUDACC__)
  int major = 0, shared_bytes = 0;
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device),
        "cudaDeviceGetAttribute");
  if (major < 9) return 1;
  check(cudaDeviceGetAttribute(&shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
        "cudaDeviceGetAttribute");
  // 8 is what every device with clusters has; 16 is asked for.
  void (*kernel)(LstmArgs) = &run_program<LstmForward<Tensor, 1, true>>;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes),
        "cudaFuncSetAttribute");
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1),
        "cudaFuncSetAttribute");
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = 16;
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(16, 1);
  config.blockDim = dim3(lstm_warps(true) * kLanes);
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.attrs = &attribute;
  config.numAttrs = 1;
  int clusters = 0;
  if (cudaOccupancyMaxActiveClusters(&clusters, kernel, &config) != cudaSuccess) {
    (void)cudaGetLastError();
    return 8;
  }
  return clusters > 0 ? 16 : 8;
#else
  return device >= 0 ? 16 : 1;
#endif
}

void lstm_run(Kind kind, bool backward, int hidden, const LstmPlan& plan, LstmArgs args,
              Stream stream) {
  with_arithmetic(kind, [&](auto p) {
    using P = decltype(p);
    args.x = geometry<P>(backward, hidden, plan.rows, plan.cluster, plan.resident);
    const Grid grid = {divide_up(args.batch, plan.rows) * plan.cluster, 2, plan.warps, plan.cluster,
                       plan.shared_bytes};
    if constexpr (sizeof(typename P::Acc) == 4) {
      if (plan.resident) return run_rows<P, true>(backward, args, grid, stream);
    }
    run_rows<P, false>(backward, args, grid, stream);
  });
}

}  // namespace cuda
}  // namespace xdf
