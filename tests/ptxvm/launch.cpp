// SPDX-License-Identifier: BSD-3-Clause
#include "launch.h"

#include <cxxabi.h>

#include <algorithm>
#include <cstdlib>
#include <numeric>

namespace ptxvm {

std::string demangled(const std::string& name) {
  int status = 0;
  char* text = abi::__cxa_demangle(name.c_str(), nullptr, nullptr, &status);
  const std::string result = status == 0 ? text : name;
  std::free(text);
  return result;
}

void Launch::run() {
  ++statistics.launches;
  statistics.threads = static_cast<uint64_t>(threads_per_block);
  statistics.shared_bytes = shared_bytes();
  races.start_launch();
  std::vector<uint32_t> order(grid.count());
  std::iota(order.begin(), order.end(), 0u);
  std::shuffle(order.begin(), order.end(), random);
  Block block(*this);
  for (uint32_t number : order) {
    ++statistics.blocks;
    block.run(number);
  }
}

}  // namespace ptxvm
