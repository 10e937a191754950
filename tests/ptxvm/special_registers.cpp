// SPDX-License-Identifier: BSD-3-Clause
#include <string_view>
#include <unordered_map>

#include "block.h"
#include "launch.h"
#include "symbols.h"
#include "warp.h"

namespace ptxvm {
namespace {

const Launch& launch(const Warp& warp) { return warp.block.launch; }

uint32_t thread(const Warp& warp, int lane) {
  return static_cast<uint32_t>(warp.id * kLanes + lane);
}

}  // namespace

SpecialValue special_register(std::string_view name) {
  static const std::unordered_map<std::string_view, SpecialValue> table = {
      {"%tid.x",
       [](const Warp& w, int l) -> uint64_t { return thread(w, l) % launch(w).block_size.x; }},
      {"%tid.y",
       [](const Warp& w, int l) -> uint64_t {
         const Index3& size = launch(w).block_size;
         return thread(w, l) / size.x % size.y;
       }},
      {"%tid.z",
       [](const Warp& w, int l) -> uint64_t {
         const Index3& size = launch(w).block_size;
         return thread(w, l) / size.x / size.y;
       }},
      {"%ntid.x", [](const Warp& w, int) -> uint64_t { return launch(w).block_size.x; }},
      {"%ntid.y", [](const Warp& w, int) -> uint64_t { return launch(w).block_size.y; }},
      {"%ntid.z", [](const Warp& w, int) -> uint64_t { return launch(w).block_size.z; }},
      {"%ctaid.x", [](const Warp& w, int) -> uint64_t { return w.block.index.x; }},
      {"%ctaid.y", [](const Warp& w, int) -> uint64_t { return w.block.index.y; }},
      {"%ctaid.z", [](const Warp& w, int) -> uint64_t { return w.block.index.z; }},
      {"%nctaid.x", [](const Warp& w, int) -> uint64_t { return launch(w).grid.x; }},
      {"%nctaid.y", [](const Warp& w, int) -> uint64_t { return launch(w).grid.y; }},
      {"%nctaid.z", [](const Warp& w, int) -> uint64_t { return launch(w).grid.z; }},
      {"%laneid", [](const Warp&, int l) -> uint64_t { return static_cast<uint64_t>(l); }},
      {"%warpid", [](const Warp& w, int) -> uint64_t { return static_cast<uint64_t>(w.id); }},
      {"%nwarpid",
       [](const Warp& w, int) -> uint64_t {
         return static_cast<uint64_t>(launch(w).warps_per_block);
       }},
      {"%smid", [](const Warp&, int) -> uint64_t { return 0; }},
      {"%nsmid", [](const Warp&, int) -> uint64_t { return 1; }},
      {"%gridid", [](const Warp&, int) -> uint64_t { return 0; }},
      {"%lanemask_eq", [](const Warp&, int l) -> uint64_t { return 1u << l; }},
      {"%lanemask_lt", [](const Warp&, int l) -> uint64_t { return (1u << l) - 1; }},
      {"%lanemask_le", [](const Warp&, int l) -> uint64_t { return (2ull << l) - 1; }},
      {"%lanemask_gt", [](const Warp&, int l) -> uint64_t { return ~((2ull << l) - 1); }},
      {"%lanemask_ge", [](const Warp&, int l) -> uint64_t { return ~((1ull << l) - 1); }},
      {"%clock", [](const Warp&, int) -> uint64_t { return 0; }},
      {"%clock64", [](const Warp&, int) -> uint64_t { return 0; }},
      {"%globaltimer", [](const Warp&, int) -> uint64_t { return 0; }},
      {"%dynamic_smem_size",
       [](const Warp& w, int) -> uint64_t { return launch(w).dynamic_shared_bytes; }},
      {"%total_smem_size", [](const Warp& w, int) -> uint64_t { return launch(w).shared_bytes(); }},
  };
  const auto entry = table.find(name);
  return entry == table.end() ? nullptr : entry->second;
}

}  // namespace ptxvm
