#include "cuda/device.h"

#include <string>

#include "cuda/api.h"
#include "cuda/errors.h"

namespace xdf {
namespace cuda {

#if defined(__CUDACC__)

int driver_version() {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}

int runtime_version() {
  return CUDART_VERSION;
}

int device_count() {
  int count = 0;
  check(cudaGetDeviceCount(&count), "no usable GPU");
  return count;
}

DeviceInfo device_info(int device) {
  const DeviceGuard guard(device);
  cudaDeviceProp properties;
  check(cudaGetDeviceProperties(&properties, device), "cudaGetDeviceProperties");
  DeviceInfo info;
  info.name = properties.name;
  info.major = properties.major;
  info.minor = properties.minor;
  check(cudaMemGetInfo(&info.free_memory, &info.total_memory), "cudaMemGetInfo");
  info.limits = {properties.multiProcessorCount, properties.sharedMemPerBlockOptin,
                 max_cluster(device)};
  return info;
}

DeviceGuard::DeviceGuard(int device) {
  check(cudaGetDevice(&before_), "cudaGetDevice");
  if (before_ != device) check(cudaSetDevice(device), "cudaSetDevice");
}

DeviceGuard::~DeviceGuard() {
  (void)cudaSetDevice(before_);
}

Memory::Memory(size_t bytes, int device) : bytes_(bytes), device_(device) {
  const DeviceGuard guard(device);
  if (bytes > 0)
    check(cudaMalloc(&data_, bytes), ("cannot have " + std::to_string(bytes) + " bytes").c_str());
}

Memory::~Memory() {
  (void)cudaFree(data_);
}

void Memory::write(size_t offset, const void* from, size_t bytes) {
  const DeviceGuard guard(device_);
  check(cudaMemcpy(static_cast<char*>(data_) + offset, from, bytes, cudaMemcpyHostToDevice),
        "copy to the device");
}

void Memory::read(size_t offset, void* to, size_t bytes) const {
  const DeviceGuard guard(device_);
  check(cudaMemcpy(to, static_cast<const char*>(data_) + offset, bytes, cudaMemcpyDeviceToHost),
        "copy from the device");
}

#else

// An H100 in name: what it can do decides about plans.
int driver_version() {
  return 0;
}
int runtime_version() {
  return 0;
}
int device_count() {
  return 1;
}
DeviceInfo device_info(int device) {
  const DeviceGuard guard(device);
  const size_t memory = size_t{1} << 30;
  return {"emulated", 9, 0, memory, memory, {132, size_t{227} << 10, 16}};
}
DeviceGuard::DeviceGuard(int device) : before_(device) {
  if (device != 0) throw std::runtime_error("CUDA: cudaSetDevice: invalid device ordinal");
}
DeviceGuard::~DeviceGuard() = default;
Memory::Memory(size_t bytes, int device) : bytes_(bytes), device_(device) {
  const DeviceGuard guard(device);
  const size_t limit = size_t{1} << 30;
  if (bytes > limit) throw OutOfMemory("CUDA: cannot have " + std::to_string(bytes) + " bytes");
  data_ = bytes == 0 ? nullptr : new Chunk[(bytes + 15) / 16];
}
Memory::~Memory() {
  delete[] static_cast<Chunk*>(data_);
}
void Memory::write(size_t offset, const void* from, size_t bytes) {
  const DeviceGuard guard(device_);
  memcpy(static_cast<char*>(data_) + offset, from, bytes);
}
void Memory::read(size_t offset, void* to, size_t bytes) const {
  const DeviceGuard guard(device_);
  memcpy(to, static_cast<const char*>(data_) + offset, bytes);
}

#endif

}  // namespace cuda
}  // namespace xdf
