// SPDX-License-Identifier: BSD-3-Clause
#include "warpgroup.h"

#include <algorithm>
#include <utility>

#include "block.h"
#include "launch.h"

namespace ptxvm {

void ProductsInFlight::start(size_t watched_registers) {
  registers_.assign(watched_registers, {});
  products_.clear();
  steps = ran_ = 0;
  groups_ = 0;
}

void ProductsInFlight::refuse(const std::string& what, uint32_t index) const {
  const Register& one = registers_[index];
  const std::string& name = warp_.block.launch.program.watched[index];
  if (one.in_d != 0 || one.in_a != 0)
    throw Fault(what + " " + name + ", which is " + (one.in_d != 0 ? "D" : "A") +
                    " of a wgmma in flight, not waited for",
                -1, one.instruction, "issued");
  throw Fault(what + " " + name + ", which was written since the last wgmma.fence");
}

void ProductsInFlight::touch(const std::vector<WatchedUse>& uses, bool all_lanes) {
  for (const WatchedUse& use : uses) {
    Register& one = registers_[use.index];
    if (one.in_d != 0 || one.in_a != 0)
      refuse(use.kind == WatchedUse::kRead ? "read of" : "write to", use.index);
    if (use.kind == WatchedUse::kWrite) one.written = true;
    if (use.kind == WatchedUse::kCopy)
      one.written = registers_[use.from].written || (one.written && !all_lanes);
  }
}

void ProductsInFlight::fence() {
  for (Register& one : registers_) {
    one.written = false;
    if (one.in_d == 0) one.d_registers = 0;
  }
}

void ProductsInFlight::issue(Product product, const std::vector<WatchedUse>& registers) {
  const size_t d_registers = registers.size() - (product.a.empty() ? 4 : 0);
  for (size_t i = 0; i < registers.size(); ++i) {
    const uint32_t index = registers[i].index;
    Register& one = registers_[index];
    const bool is_d = i < d_registers;
    if (one.written || (is_d ? one.in_a : one.in_d) != 0)
      refuse(is_d ? "wgmma accumulates in" : "wgmma multiplies", index);
    if (one.d_registers != 0 && (!is_d || one.d_registers != d_registers))
      throw Fault("wgmma of D of one of another shape, no wait and wgmma.fence between", -1,
                  one.instruction, "issued");
    if (is_d) one.d_registers = d_registers;
    ++(is_d ? one.in_d : one.in_a);
    one.instruction = product.step.instruction;
  }
  if (warp_.block.launch.checks.races) {
    SharedRaces& races = warp_.block.races;
    races.begin_async_reads(warp_.accessor(-1), product.a);
    races.begin_async_reads(warp_.accessor(-1), product.b);
  }
  product.group = groups_;
  products_.push_back(std::move(product));
  const bool late = warp_.block.launch.checks.late_copies && warp_.block.launch.random() % 2 == 0;
  if (!late) run(products_.size());
}

void ProductsInFlight::run(size_t count) {
  for (; ran_ < count; ++ran_) products_[ran_].multiply(warp_, products_[ran_]);
}

void ProductsInFlight::finish(const Product& product) {
  const std::vector<WatchedUse>& registers =
      warp_.block.launch.program.watched_uses[product.step.instruction];
  const size_t d_registers = registers.size() - (product.a.empty() ? 4 : 0);
  for (size_t i = 0; i < registers.size(); ++i) {
    Register& one = registers_[registers[i].index];
    --(i < d_registers ? one.in_d : one.in_a);
  }
  if (!warp_.block.launch.checks.races) return;
  warp_.block.races.end_async_reads(warp_.accessor(-1), product.a);
  warp_.block.races.end_async_reads(warp_.accessor(-1), product.b);
}

void ProductsInFlight::wait(uint32_t pending) {
  size_t count = 0;
  while (count < products_.size() && products_[count].group + pending < groups_) ++count;
  run(std::max(count, ran_));
  for (size_t i = 0; i < count; ++i) finish(products_[i]);
  products_.erase(products_.begin(), products_.begin() + static_cast<ptrdiff_t>(count));
  ran_ -= count;
}

}  // namespace ptxvm
