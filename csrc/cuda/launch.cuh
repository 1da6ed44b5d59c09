// Runs a program on the device, or emulates that on the CPU.
//
// A Program has
//   Args                                        plain data, given to every block
//   kWarps                                      the most warps a block may have
//   static int phases(args, block)              the same for all blocks of a cluster
//   static void phase(args, block, warp, p)     what a warp does in phase p
// Between two phases all warps of a block, or of all blocks of a cluster, wait for each other. All
// that outlives a phase is in shared or global memory. On the CPU the warps of a phase run one
// after the other, in order or, to find results that hang on it, in reverse (XDF_EMULATED_REVERSE).
#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda/errors.h"
#include "cuda/portable.cuh"
#if defined(__CUDACC__)
#include <cooperative_groups.h>
#else
#include <cstdlib>
#include <vector>
#endif

namespace xdf {
namespace cuda {

struct Block {
  int x, y;               // place in the grid
  int warps;              // of the block
  int rank, cluster;      // place among the blocks of the cluster, and their number
  unsigned char* shared;  // this block's shared memory
#if defined(__CUDACC__)
  // Where another block of the cluster has what this one has at p.
  XDF_DEVICE unsigned char* peer(unsigned char* p, int r) const {
#if __CUDA_ARCH__ >= 900
    return cooperative_groups::this_cluster().map_shared_rank(p, static_cast<unsigned>(r));
#else
    (void)r;
    return p;
#endif
  }
#else
  unsigned char* const* all_shared;
  unsigned char* peer(unsigned char* p, int r) const { return all_shared[r] + (p - shared); }
#endif
};

// Blocks in x are a multiple of `cluster`; those of a cluster are neighbours in x.
struct Grid {
  int x, y;
  int warps;    // of a block
  int cluster;  // 1: no cluster
  size_t shared_bytes;
};

// Where a call runs. The stream is a cudaStream_t as a number.
struct Stream {
  int device;
  uintptr_t handle;
};

#if defined(__CUDACC__)

template <class Program>
__global__ void __launch_bounds__(Program::kWarps* kLanes, 1)
    run_program(const __grid_constant__ typename Program::Args args) {
  extern __shared__ __align__(16) unsigned char xdf_shared[];
  Block block;
  block.x = static_cast<int>(blockIdx.x);
  block.y = static_cast<int>(blockIdx.y);
  block.warps = static_cast<int>(blockDim.x / kLanes);
  block.rank = 0;
  block.cluster = 1;
#if __CUDA_ARCH__ >= 900
  block.rank = static_cast<int>(cooperative_groups::this_cluster().block_rank());
  block.cluster = static_cast<int>(cooperative_groups::this_cluster().num_blocks());
#endif
  block.shared = xdf_shared;
  const int warp = static_cast<int>(threadIdx.x / kLanes);
  const int phases = Program::phases(args, block);
  for (int p = 0; p < phases; ++p) {
    Program::phase(args, block, warp, p);
#if __CUDA_ARCH__ >= 900
    // After the last phase too: a block must not be gone while others write to its memory.
    if (block.cluster > 1) {
      cooperative_groups::this_cluster().sync();
      continue;
    }
#endif
    if (p + 1 < phases) __syncthreads();
  }
}

template <class Program>
void launch(const typename Program::Args& args, const Grid& grid, Stream stream) {
  if (grid.x == 0 || grid.y == 0) return;
  void (*kernel)(const typename Program::Args) = &run_program<Program>;
  if (grid.shared_bytes > (48u << 10))
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(grid.shared_bytes)),
          "cudaFuncSetAttribute");
  if (grid.cluster > 8)
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1),
          "cudaFuncSetAttribute");
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = static_cast<unsigned>(grid.cluster);
  attribute.val.clusterDim.y = 1;
  attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y));
  config.blockDim = dim3(static_cast<unsigned>(grid.warps * kLanes));
  config.dynamicSmemBytes = grid.shared_bytes;
  config.stream = reinterpret_cast<cudaStream_t>(stream.handle);
  config.attrs = &attribute;
  config.numAttrs = grid.cluster > 1 ? 1 : 0;
  check(cudaLaunchKernelEx(&config, kernel, args), "kernel launch");
}

#else

template <class Program>
void launch(const typename Program::Args& args, const Grid& grid, Stream) {
  const char* order = std::getenv("XDF_EMULATED_REVERSE");
  const bool reverse = order != nullptr && *order == '1';
  const size_t bytes = (grid.shared_bytes + 15) / 16 * 16;
  for (int y = 0; y < grid.y; ++y) {
    for (int first = 0; first < grid.x; first += grid.cluster) {
      const size_t cluster = static_cast<size_t>(grid.cluster);
      // Full of NaN, as what is read before it is written might be. One vector a block, for the
      // address sanitizer to see where each ends.
      std::vector<std::vector<Chunk>> memory(
          cluster, std::vector<Chunk>(bytes / 16, Chunk{{~0u, ~0u, ~0u, ~0u}}));
      std::vector<unsigned char*> shared(cluster);
      std::vector<Block> blocks(cluster);
      for (size_t r = 0; r < cluster; ++r) {
        shared[r] = reinterpret_cast<unsigned char*>(memory[r].data());
        blocks[r] = {first + static_cast<int>(r),
                     y,
                     grid.warps,
                     static_cast<int>(r),
                     grid.cluster,
                     shared[r],
                     shared.data()};
      }
      const int phases = Program::phases(args, blocks[0]);
      const int workers = grid.cluster * grid.warps;
      for (int p = 0; p < phases; ++p)
        for (int n = 0; n < workers; ++n) {
          const int w = reverse ? workers - 1 - n : n;
          Program::phase(args, blocks[static_cast<size_t>(w / grid.warps)], w % grid.warps, p);
        }
    }
  }
}

#endif

}  // namespace cuda
}  // namespace xdf
