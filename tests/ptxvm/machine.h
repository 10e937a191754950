// SPDX-License-Identifier: BSD-3-Clause
//
// The one virtual GPU of a process: modules, memory, settings, results.
#pragma once

#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

#include "global_memory.h"
#include "global_races.h"
#include "launch.h"
#include "module.h"
#include "program.h"
#include "vm.h"

namespace ptxvm {

class Machine {
 public:
  static Machine& instance();

  void load(const std::string& ptx);
  // A parsed kernel as compiled. Throws std::out_of_range if no module has it.
  const Program& program(const std::string& kernel);
  // What a kernel runs as instead, for mutants; null: as compiled.
  void replace(const std::string& kernel, std::unique_ptr<Program> program);
  const Program& runs_as(const std::string& kernel);
  const Module& module_of(const std::string& kernel) const;
  bool was_run(const std::string& kernel) const { return programs_.contains(kernel); }
  std::vector<std::string> kernels() const;
  // Memory of a .global or .const variable, or null.
  std::vector<uint8_t>* variable(const std::string& name);

  // Arguments as cudaLaunchKernel has them. Throws LaunchError.
  void launch(const std::string& kernel, Index3 grid, Index3 block, uint32_t dynamic_shared_bytes,
              void** arguments);

  std::mutex mutex;  // whoever uses the rest holds it
  GlobalMemory memory;
  Device device;
  Checks checks;
  uint64_t seed = 1;
  std::string error;
  std::map<std::string, Statistics> statistics;

 private:
  Machine();

  std::vector<std::unique_ptr<Module>> modules_;
  std::unordered_map<std::string, const Module*> module_of_;  // by kernel
  std::unordered_map<std::string, std::unique_ptr<Program>> programs_, replaced_;
  GlobalRaces races_;
};

}  // namespace ptxvm
