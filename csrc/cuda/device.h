// The device itself: what there is, and memory of it. In the emulation all of it is the host's.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "cuda/lstm_plan.h"

namespace xdf {
namespace cuda {

struct DeviceInfo {
  std::string name;
  int major, minor;  // compute capability
  size_t total_memory, free_memory;
  DeviceLimits limits;
};

int driver_version();   // 1000 major + 10 minor; 0: no driver
int runtime_version();  // what this was built with
int device_count();     // throws std::runtime_error where CUDA cannot start
DeviceInfo device_info(int device);

// Makes a device the calling thread's for as long as it lives.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device);
  ~DeviceGuard();
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_;
};

// Memory of a device. Copies wait for all that was queued on the default stream, and for
// themselves.
class Memory {
 public:
  Memory(size_t bytes, int device);  // throws OutOfMemory
  ~Memory();
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;

  void write(size_t offset, const void* from, size_t bytes);
  void read(size_t offset, void* to, size_t bytes) const;
  uintptr_t address() const { return reinterpret_cast<uintptr_t>(data_); }
  size_t bytes() const { return bytes_; }

 private:
  void* data_ = nullptr;
  size_t bytes_;
  int device_;
};

}  // namespace cuda
}  // namespace xdf
