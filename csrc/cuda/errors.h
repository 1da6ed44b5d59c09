// A failed CUDA call becomes an exception that Python sees as RuntimeError, or as MemoryError where
// memory is what is missing.
#pragma once

#include <stdexcept>
#include <string>

#if defined(__CUDACC__)
#include <cuda_runtime.h>
#endif

namespace xdf {
namespace cuda {

struct OutOfMemory : std::runtime_error {
  using std::runtime_error::runtime_error;
};

#if defined(__CUDACC__)
inline void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  (void)cudaGetLastError();  // else the next call would report it again
  std::string message = std::string("CUDA: ") + what + ": " + cudaGetErrorString(status) + " (" +
                        cudaGetErrorName(status) + ")";
  if (status == cudaErrorMemoryAllocation) throw OutOfMemory(message);
  if (status == cudaErrorNoKernelImageForDevice)
    message += "; this build has code for compute capability 8.x, 9.0 and, by the driver, later";
  throw std::runtime_error(message);
}
#endif

}  // namespace cuda
}  // namespace xdf
