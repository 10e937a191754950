// SPDX-License-Identifier: BSD-3-Clause
//
// The CUDA runtime as far as launchers need it, on the virtual GPU. Launches and copies are done
// when the call returns; streams and events are names only.
#include "runtime.h"

#include <cuda_runtime.h>

#include <cstdlib>
#include <cstring>
#include <map>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

#include "machine.h"

namespace ptxvm {
namespace {

struct Function {
  std::string name;
  int most_dynamic_shared = 48 * 1024;
};

struct Registry {
  std::unordered_map<const void*, Function> functions;     // by host stub
  std::unordered_map<const void*, std::string> variables;  // by host shadow
  std::vector<std::string> ptx;                            // not yet loaded
  std::map<void*, size_t> allocations;
};

Registry& registry() {
  static Registry* instance = new Registry;  // as long-lived as the machine
  return *instance;
}

thread_local cudaError_t last = cudaSuccess;

cudaError_t note(cudaError_t error) {
  if (error != cudaSuccess) last = error;
  return error;
}

// Refuses a call: what was wrong goes to last_error().
cudaError_t refuse(cudaError_t error, const std::string& why) {
  Machine& machine = Machine::instance();
  if (machine.error.empty()) machine.error = why;
  return note(error);
}

// A fat binary is a header and entries; those of kind 1 are PTX.
void read_fat_binary(const void* wrapper) {
  struct Wrapper {
    uint32_t magic, version;
    const uint8_t* data;
    void* file;
  };
  const uint8_t* data = static_cast<const Wrapper*>(wrapper)->data;
  const auto read = [&](const uint8_t* at, auto& value) { std::memcpy(&value, at, sizeof value); };
  uint32_t magic;
  uint16_t header;
  uint64_t bytes;
  read(data, magic);
  read(data + 6, header);
  read(data + 8, bytes);
  if (magic != 0xBA55ED50) return;
  const uint8_t* end = data + header + bytes;
  for (const uint8_t* entry = data + header; entry < end;) {
    uint16_t kind;
    uint32_t entry_header, compressed;
    uint64_t entry_bytes;
    read(entry, kind);
    read(entry + 4, entry_header);
    read(entry + 8, entry_bytes);
    read(entry + 16, compressed);
    if (kind == 1) {
      const char* text = reinterpret_cast<const char*>(entry) + entry_header;
      registry().ptx.push_back(compressed != 0 ? std::string()
                                               : std::string(text, strnlen(text, entry_bytes)));
    }
    entry += entry_header + entry_bytes;
  }
}

Index3 index3(dim3 d) { return {d.x, d.y, d.z}; }

cudaError_t launch(const void* stub, dim3 grid, dim3 block, void** arguments, size_t shared_bytes) {
  Machine& machine = Machine::instance();
  const std::lock_guard lock(machine.mutex);
  load_registered_modules(machine);
  const auto function = registry().functions.find(stub);
  if (function == registry().functions.end())
    return refuse(cudaErrorInvalidDeviceFunction, "launch of an unknown kernel");
  const std::string& name = function->second.name;
  const auto refuse_launch = [&](cudaError_t error, const std::string& why) {
    return refuse(error, "launch of " + demangled(name) + ": " + why);
  };
  try {
    const Program& program = machine.program(name);
    const uint64_t threads = index3(block).count();
    if (threads == 0 || threads > 1024 || block.x > 1024 || block.y > 1024 || block.z > 64)
      return refuse_launch(cudaErrorInvalidConfiguration, "invalid block size");
    if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > 0x7fffffff || grid.y > 65535 ||
        grid.z > 65535)
      return refuse_launch(cudaErrorInvalidConfiguration, "invalid grid size");
    if (shared_bytes > static_cast<size_t>(function->second.most_dynamic_shared))
      return refuse_launch(cudaErrorInvalidValue,
                           std::to_string(shared_bytes) +
                               " bytes of dynamic shared memory, more than "
                               "cudaFuncAttributeMaxDynamicSharedMemorySize allows");
    if (program.static_shared_bytes > 48 * 1024)
      return refuse_launch(cudaErrorInvalidValue, "more than 48 KB of static shared memory");
    if (program.static_shared_bytes + shared_bytes >
        static_cast<size_t>(machine.device.smem_optin_bytes))
      return refuse_launch(cudaErrorInvalidValue, "more shared memory than the device has");
    machine.launch(name, index3(grid), index3(block), static_cast<uint32_t>(shared_bytes),
                   arguments);
    return cudaSuccess;
  } catch (const LaunchError& error) {
    return refuse(cudaErrorLaunchFailure, error.what());
  } catch (const std::out_of_range&) {
    return refuse_launch(cudaErrorNoKernelImageForDevice,
                         "no PTX; compile with -gencode arch=compute_80,code=compute_80 "
                         "--compress-mode=none");
  } catch (const std::exception& error) {
    return refuse_launch(cudaErrorInvalidPtx, error.what());
  }
}

struct CallConfiguration {
  dim3 grid, block;
  size_t shared_bytes;
  cudaStream_t stream;
};

thread_local std::vector<CallConfiguration> configurations;

}  // namespace

void load_registered_modules(Machine& machine) {
  for (const std::string& ptx : registry().ptx) machine.load(ptx);
  registry().ptx.clear();
}

}  // namespace ptxvm

using ptxvm::Machine;
using ptxvm::note;
using ptxvm::registry;

extern "C" {

// What nvcc's host code calls.

void** __cudaRegisterFatBinary(void* wrapper) {
  static void* handle = nullptr;
  ptxvm::read_fat_binary(wrapper);
  return &handle;
}

void __cudaRegisterFatBinaryEnd(void**) {}

void __cudaUnregisterFatBinary(void**) {}

void __cudaRegisterFunction(void**, const char* stub, char*, const char* name, int, uint3*, uint3*,
                            dim3*, dim3*, int*) {
  registry().functions[stub].name = name;
}

void __cudaRegisterVar(void**, char* shadow, char*, const char* name, int, size_t, int, int) {
  registry().variables[shadow] = name;
}

char __cudaInitModule(void**) { return 0; }

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared_bytes,
                                     cudaStream_t stream) {
  ptxvm::configurations.push_back({grid, block, shared_bytes, stream});
  return 0;
}

cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared_bytes,
                                       void* stream) {
  const ptxvm::CallConfiguration& top = ptxvm::configurations.back();
  *grid = top.grid;
  *block = top.block;
  *shared_bytes = top.shared_bytes;
  *static_cast<cudaStream_t*>(stream) = top.stream;
  ptxvm::configurations.pop_back();
  return cudaSuccess;
}

cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* stub) {
  *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void*>(stub));
  return cudaSuccess;
}

cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments,
                               size_t shared_bytes, cudaStream_t) {
  return ptxvm::launch(reinterpret_cast<const void*>(kernel), grid, block, arguments, shared_bytes);
}

// The public runtime.

cudaError_t cudaLaunchKernel(const void* stub, dim3 grid, dim3 block, void** arguments,
                             size_t shared_bytes, cudaStream_t) {
  return ptxvm::launch(stub, grid, block, arguments, shared_bytes);
}

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* stub,
                                void** arguments) {
  return ptxvm::launch(stub, config->gridDim, config->blockDim, arguments,
                       config->dynamicSmemBytes);
}

cudaError_t cudaFuncSetAttribute(const void* stub, cudaFuncAttribute attribute, int value) {
  const auto function = registry().functions.find(stub);
  if (function == registry().functions.end()) return note(cudaErrorInvalidDeviceFunction);
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
  if (value > Machine::instance().device.smem_optin_bytes) return note(cudaErrorInvalidValue);
  function->second.most_dynamic_shared = value;
  return cudaSuccess;
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* stub) {
  const auto function = registry().functions.find(stub);
  if (function == registry().functions.end()) return note(cudaErrorInvalidDeviceFunction);
  *attributes = {};
  attributes->maxThreadsPerBlock = 1024;
  attributes->ptxVersion = attributes->binaryVersion = 80;
  attributes->maxDynamicSharedSizeBytes = function->second.most_dynamic_shared;
  return cudaSuccess;
}

cudaError_t cudaGetDevice(int* ordinal) {
  *ordinal = 0;
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int ordinal) {
  return ordinal == 0 ? cudaSuccess : note(cudaErrorInvalidDevice);
}

cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  const ptxvm::Device& device = Machine::instance().device;
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = device.sm_count;
      break;
    case cudaDevAttrComputeCapabilityMajor:
      *value = device.compute_major;
      break;
    case cudaDevAttrComputeCapabilityMinor:
      *value = device.compute_minor;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = device.smem_optin_bytes;
      break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      *value = device.smem_optin_bytes + 1024;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlock:
      *value = 48 * 1024;
      break;
    case cudaDevAttrReservedSharedMemoryPerBlock:
      *value = 1024;
      break;
    case cudaDevAttrMaxThreadsPerBlock:
      *value = 1024;
      break;
    case cudaDevAttrMaxThreadsPerMultiProcessor:
      *value = 2048;
      break;
    case cudaDevAttrMaxRegistersPerBlock:
    case cudaDevAttrMaxRegistersPerMultiprocessor:
      *value = 65536;
      break;
    case cudaDevAttrWarpSize:
      *value = 32;
      break;
    case cudaDevAttrMaxGridDimX:
      *value = 0x7fffffff;
      break;
    case cudaDevAttrMaxGridDimY:
    case cudaDevAttrMaxGridDimZ:
      *value = 65535;
      break;
    default:
      return note(cudaErrorInvalidValue);
  }
  return cudaSuccess;
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int) {
  const ptxvm::Device& device = Machine::instance().device;
  *properties = {};
  std::strcpy(properties->name, "virtual GPU");
  properties->major = device.compute_major;
  properties->minor = device.compute_minor;
  properties->multiProcessorCount = device.sm_count;
  properties->warpSize = 32;
  properties->maxThreadsPerBlock = 1024;
  properties->maxThreadsPerMultiProcessor = 2048;
  properties->maxThreadsDim[0] = properties->maxThreadsDim[1] = 1024;
  properties->maxThreadsDim[2] = 64;
  properties->maxGridSize[0] = 0x7fffffff;
  properties->maxGridSize[1] = properties->maxGridSize[2] = 65535;
  properties->regsPerBlock = properties->regsPerMultiprocessor = 65536;
  properties->sharedMemPerBlock = 48 * 1024;
  properties->sharedMemPerBlockOptin = static_cast<size_t>(device.smem_optin_bytes);
  properties->sharedMemPerMultiprocessor = static_cast<size_t>(device.smem_optin_bytes) + 1024;
  properties->l2CacheSize = 40 << 20;
  properties->totalGlobalMem = size_t{8} << 30;
  return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void*, int, size_t) {
  *blocks = 1;
  return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void*, int,
                                                                   size_t, unsigned) {
  *blocks = 1;
  return cudaSuccess;
}

cudaError_t cudaGetLastError() {
  const cudaError_t error = ptxvm::last;
  ptxvm::last = cudaSuccess;
  return error;
}

cudaError_t cudaPeekAtLastError() { return ptxvm::last; }

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorLaunchFailure:
      return "the virtual GPU found a fault; see ptxvm::last_error()";
    case cudaErrorInvalidDeviceFunction:
      return "invalid device function";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorMemoryAllocation:
      return "out of memory";
    case cudaErrorNoKernelImageForDevice:
      return "no kernel image is available";
    case cudaErrorInvalidPtx:
      return "the virtual GPU cannot read the PTX; see ptxvm::last_error()";
    default:
      return "error of the virtual GPU";
  }
}

const char* cudaGetErrorName(cudaError_t error) {
  return error == cudaSuccess ? "cudaSuccess" : "cudaError";
}

// Memory starts as NaN, and ends where it was asked to end.
cudaError_t cudaMalloc(void** pointer, size_t bytes) {
  *pointer = std::aligned_alloc(256, (bytes + 255) / 256 * 256);
  if (*pointer == nullptr && bytes != 0) return note(cudaErrorMemoryAllocation);
  std::memset(*pointer, 0xff, bytes);
  registry().allocations[*pointer] = bytes;
  ptxvm::register_memory(*pointer, bytes);
  return cudaSuccess;
}

cudaError_t cudaFree(void* pointer) {
  if (pointer == nullptr) return cudaSuccess;
  const auto allocation = registry().allocations.find(pointer);
  if (allocation == registry().allocations.end()) return note(cudaErrorInvalidValue);
  ptxvm::unregister_memory(pointer, allocation->second);
  registry().allocations.erase(allocation);
  std::free(pointer);
  return cudaSuccess;
}

cudaError_t cudaMallocAsync(void** pointer, size_t bytes, cudaStream_t) {
  return cudaMalloc(pointer, bytes);
}

cudaError_t cudaFreeAsync(void* pointer, cudaStream_t) { return cudaFree(pointer); }

cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
  std::memcpy(to, from, bytes);
  return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind,
                            cudaStream_t) {
  std::memcpy(to, from, bytes);
  return cudaSuccess;
}

cudaError_t cudaMemcpy2DAsync(void* to, size_t to_pitch, const void* from, size_t from_pitch,
                              size_t width, size_t height, cudaMemcpyKind, cudaStream_t) {
  for (size_t row = 0; row < height; ++row)
    std::memcpy(static_cast<char*>(to) + row * to_pitch,
                static_cast<const char*>(from) + row * from_pitch, width);
  return cudaSuccess;
}

cudaError_t cudaMemset(void* to, int value, size_t bytes) {
  std::memset(to, value, bytes);
  return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  std::memset(to, value, bytes);
  return cudaSuccess;
}

// A __device__ or __constant__ variable's memory.
cudaError_t cudaGetSymbolAddress(void** pointer, const void* shadow) {
  Machine& machine = Machine::instance();
  const std::lock_guard lock(machine.mutex);
  ptxvm::load_registered_modules(machine);
  const auto name = registry().variables.find(shadow);
  std::vector<uint8_t>* memory =
      name == registry().variables.end() ? nullptr : machine.variable(name->second);
  if (memory == nullptr) return note(cudaErrorInvalidSymbol);
  *pointer = memory->data();
  return cudaSuccess;
}

cudaError_t cudaMemcpyToSymbol(const void* shadow, const void* from, size_t bytes, size_t offset,
                               cudaMemcpyKind) {
  void* pointer;
  if (const cudaError_t error = cudaGetSymbolAddress(&pointer, shadow); error != cudaSuccess)
    return error;
  std::memcpy(static_cast<char*>(pointer) + offset, from, bytes);
  return cudaSuccess;
}

cudaError_t cudaMemGetInfo(size_t* free_bytes, size_t* total_bytes) {
  *free_bytes = *total_bytes = size_t{8} << 30;
  return cudaSuccess;
}

cudaError_t cudaDeviceSynchronize() { return ptxvm::last; }
cudaError_t cudaStreamSynchronize(cudaStream_t) { return ptxvm::last; }

cudaError_t cudaStreamCreate(cudaStream_t* stream) {
  *stream = nullptr;
  return cudaSuccess;
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  return cudaStreamCreate(stream);
}
cudaError_t cudaStreamDestroy(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaStreamWaitEvent(cudaStream_t, cudaEvent_t, unsigned) { return cudaSuccess; }

cudaError_t cudaEventCreate(cudaEvent_t* event) {
  *event = nullptr;
  return cudaSuccess;
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  return cudaEventCreate(event);
}
cudaError_t cudaEventDestroy(cudaEvent_t) { return cudaSuccess; }
cudaError_t cudaEventRecord(cudaEvent_t, cudaStream_t) { return cudaSuccess; }
cudaError_t cudaEventSynchronize(cudaEvent_t) { return cudaSuccess; }

cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t, cudaEvent_t) {
  *milliseconds = 1;
  return cudaSuccess;
}

}  // extern "C"
