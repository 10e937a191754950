// SPDX-License-Identifier: BSD-3-Clause
//
// Mutants of a kernel: one instruction of its PTX is deleted, or has a number changed or two source
// registers swapped. Tests that are worth something notice: by wrong values, or by a fault.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace ptxvm {

// Mangled names of the kernels that objects have registered.
std::vector<std::string> kernels();

// From now on the kernel (by its mangled name) runs with one instruction changed, drawn by the
// seed. Returns what was changed. Throws std::out_of_range if there is no such kernel.
std::string mutate(const std::string& kernel, uint64_t seed);

// The kernel runs as compiled again.
void restore(const std::string& kernel);

}  // namespace ptxvm

// The same for ctypes. Texts live until the next call.
extern "C" {
__attribute__((visibility("default"))) const char* ptxvm_kernels();  // one a line
__attribute__((visibility("default"))) const char* ptxvm_mutate(const char* kernel, uint64_t seed);
__attribute__((visibility("default"))) void ptxvm_restore(const char* kernel);
}
