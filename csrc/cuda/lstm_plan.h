// Which tile, cluster and weights in shared memory a pass runs with. No result depends on it.
#pragma once

#include <cstddef>
#include <initializer_list>

#include "cuda/lstm_layout.cuh"

namespace xdf {
namespace cuda {

struct DeviceLimits {
  int processors;
  size_t shared_bytes;  // that a block may have
  int max_cluster;      // 1: no clusters
};

struct LstmPlan {
  int rows;     // sequences of a tile
  int cluster;  // blocks of a tile
  bool resident;
  int warps;
  size_t shared_bytes;
  double cycles;  // estimated, of a step of the whole batch
};

constexpr int kTileRows[] = {8, 16, 32};

// Kernels there are: the backward pass keeps more in registers, float64 is for checks alone, bytes
// for inference.
inline bool has_kernel(Kind kind, bool backward, int rows, bool resident) {
  if (kind == Kind::kFloat64) return rows == 8 && !resident;
  if (kind == Kind::kInt8 && backward) return false;
  return rows <= (backward ? 16 : 32);
}

// What a step costs, in cycles of a processor, roughly: the figures are from data sheets, not yet
// from measurements; bench/gpu_report.py measures all plans side by side.
template <class P>
double step_cycles(const Geometry& x, bool backward, bool resident, int warps) {
  const double store = sizeof(typename P::Store);
  const double rounds = divide_up(x.groups_a_block, warps);
  const double weights = static_cast<double>(x.groups_a_block) * x.weights_a_group;
  const double tiles = x.rows / 8.0;
  // Reading weights: 128 bytes a cycle from shared memory, a third of that from the L2 cache.
  double work = weights * store / (resident ? 128.0 : 40.0);
  if (P::kTensor) {
    const double chain = rounds * x.k_steps * (resident ? 36.0 : 50.0);
    const double products = weights * store / 512.0 * tiles * 2.0;
    work = work > chain ? work : chain;
    work = work > products ? work : products;
  } else {
    const double products = weights * x.rows / 80.0;
    work = work > products ? work : products;
  }
  const double activations = x.groups_a_block * x.units * x.rows * 10.0 / 16.0;
  const double barrier = x.cluster == 1 ? 60.0 : 500.0 + 15.0 * x.cluster;
  return 400.0 + work + activations + barrier * (backward ? 1.3 : 1.0);
}

// The plan with the least estimated time. `rows`, `cluster`: only such plans, 0 for any. A plan
// with rows == 0 means that there is none.
template <class P>
LstmPlan plan_lstm(Kind kind, bool backward, int hidden, int batch, const DeviceLimits& device,
                   int rows, int cluster) {
  LstmPlan best = {0, 0, false, 0, 0, 0.0};
  for (const int tile : kTileRows) {
    for (int blocks = 1; blocks <= device.max_cluster; blocks *= 2) {
      for (const bool resident : {true, false}) {
        if ((rows != 0 && tile != rows) || (cluster != 0 && blocks != cluster)) continue;
        if (!has_kernel(kind, backward, tile, resident)) continue;
        const Geometry x = geometry<P>(backward, hidden, tile, blocks, resident);
        if (x.shared_bytes > device.shared_bytes) continue;
        // A block without units only waits; where half of them would, half of them do.
        if (blocks > 1 && blocks / 2 * x.groups_a_block >= x.groups) continue;
        LstmPlan plan = {tile, blocks, resident, 0, x.shared_bytes, 0.0};
        plan.warps =
            x.groups_a_block < lstm_warps(resident) ? x.groups_a_block : lstm_warps(resident);
        const int all = 2 * divide_up(batch, tile) * blocks;
        plan.cycles =
            step_cycles<P>(x, backward, resident, plan.warps) * divide_up(all, device.processors);
        if (best.rows == 0 || plan.cycles < best.cycles) best = plan;
      }
    }
  }
  return best;
}

}  // namespace cuda
}  // namespace xdf
