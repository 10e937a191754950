// SPDX-License-Identifier: BSD-3-Clause
//
// The unit cases that must pass, on a GPU: does it give the answers that the virtual one gives?
//
//   cd tests/ptxvm/unit
//   nvcc -std=c++20 -gencode arch=compute_90a,code=sm_90a *_90a.cu gpu/main.cpp -o gpu_unit
#include <iostream>

#include "../cases.h"

std::vector<unit::Case>& unit::cases() {
  static std::vector<Case> list;
  return list;
}

int main() {
  int failures = 0;
  for (const unit::Case& unit_case : unit::cases()) {
    if (!unit_case.fault.empty()) continue;
    std::string problem;
    try {
      unit_case.run();
      const cudaError_t error = cudaDeviceSynchronize();
      if (error != cudaSuccess) problem = cudaGetErrorString(error);
    } catch (const std::exception& wrong) {
      problem = wrong.what();
    }
    std::cout << unit_case.name << '\t' << (problem.empty() ? "ok" : problem) << '\n';
    failures += !problem.empty();
  }
  return failures != 0;
}
