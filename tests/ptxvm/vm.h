// SPDX-License-Identifier: BSD-3-Clause
//
// A virtual GPU: executes the PTX that nvcc embeds in objects, on the CPU, and checks as it goes.
//
// Link the sources of this folder instead of libcudart: launches then run here, on host memory.
// Device memory is what cudaMalloc gives or what register_memory() names; kernels may touch
// nothing else. The first fault ends a launch: the launch returns cudaErrorLaunchFailure, and
// last_error() says what happened, in which kernel, source line, block, warp and lane.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <string>

namespace ptxvm {

struct Device {
  int sm_count = 108;
  int compute_major = 8, compute_minor = 0;
  int smem_optin_bytes = 163 * 1024;  // of dynamic and static shared memory per block
};

struct Checks {
  bool races = true;            // of shared and of global memory
  bool uninitialised = true;    // reads of shared memory that nobody in the block wrote
  bool late_copies = true;      // cp.async delivers when it is waited for, never before
  bool bank_conflicts = false;  // counted, see Statistics; costs a twentieth of the time
  uint64_t instruction_limit = 2'000'000'000;  // per block and warp instructions; then: livelock
  // For the calibration's negative control, an ldmatrix that is wrong: 1 has rows for columns, 2
  // has matrices 1 and 2 of four change places. 0: right.
  int wrong_ldmatrix = 0;
};

struct Statistics {
  uint64_t launches = 0, blocks = 0;
  uint64_t instructions = 0;  // per warp
  uint64_t mma = 0, ldmatrix = 0, copies = 0, barriers = 0;
  uint64_t wgmma = 0;  // per warp
  // Passes that shared memory needs for ld, st and ldmatrix: without conflicts, and on top. Only
  // with Checks::bank_conflicts.
  uint64_t shared_passes = 0, bank_conflicts = 0;
  // Of a block, in the last launch.
  uint64_t threads = 0, shared_bytes = 0;
};

// Settings of this process, for launches from now on.
void set_seed(uint64_t seed);  // order of blocks, warps and their steps
void set_device(const Device& device);
void set_checks(const Checks& checks);
const Checks& checks();

// What kernels may read, and write if it is writable. Ranges may overlap.
void register_memory(const void* begin, size_t bytes, bool writable = true);
void unregister_memory(const void* begin, size_t bytes);

// Registered while it lives.
class Memory {
 public:
  Memory(const void* begin, size_t bytes, bool writable = true) : begin_(begin), bytes_(bytes) {
    register_memory(begin, bytes, writable);
  }
  ~Memory() { unregister_memory(begin_, bytes_); }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;

 private:
  const void* begin_;
  size_t bytes_;
};

// The first fault since clear_error(), or "".
std::string last_error();
void clear_error();

// By the kernel's mangled name.
std::map<std::string, Statistics> statistics();
void reset_statistics();

}  // namespace ptxvm
