// SPDX-License-Identifier: BSD-3-Clause
//
// Linked to a calibrating program, whose main() need not know of it:
//
//   PTXVM_SEED=N             the order of blocks, warps and steps
//   PTXVM_WRONG_LDMATRIX=N   see Checks::wrong_ldmatrix
//   PTXVM_LENIENT=1          shared memory that nobody wrote may be read
//   PTXVM_FORMS=FILE         where the instruction forms executed are written at the end
//
// A fault makes the program fail, whatever it makes of it itself.
#include <unistd.h>

#include <cstdlib>
#include <fstream>
#include <iostream>

#include "../mutation.h"
#include "../vm.h"

namespace {

int setting(const char* name, int otherwise) {
  const char* value = std::getenv(name);
  return value == nullptr ? otherwise : std::atoi(value);
}

void report() {
  const char* forms = std::getenv("PTXVM_FORMS");
  if (forms != nullptr) std::ofstream(forms) << ptxvm_executed_forms();
  const std::string fault = ptxvm::last_error();
  if (fault.empty()) return;
  std::cout << std::flush;
  std::cerr << "ptxvm: " << fault << std::endl;
  _exit(1);
}

const bool set_up = [] {
  ptxvm::set_seed(static_cast<uint64_t>(setting("PTXVM_SEED", 1)));
  ptxvm::Checks checks = ptxvm::checks();
  checks.wrong_ldmatrix = setting("PTXVM_WRONG_LDMATRIX", 0);
  checks.uninitialised = setting("PTXVM_LENIENT", 0) == 0;
  ptxvm::set_checks(checks);
  std::atexit(report);
  return true;
}();

}  // namespace
