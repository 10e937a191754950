// SPDX-License-Identifier: BSD-3-Clause
//
// ld and st, of all spaces and vectors. Cache operators and hints mean nothing here.
#include "../block.h"
#include "../launch.h"
#include "../memory_access.h"
#include "handlers.h"

namespace ptxvm {
namespace {

Space space_of(const Decoder& d) {
  for (std::string_view word : d.words()) {
    if (word == "global" || word == "const") return Space::kGlobal;
    if (word.starts_with("shared")) return Space::kShared;
    if (word == "local") return Space::kLocal;
    if (word.starts_with("param")) return Space::kParam;
  }
  return Space::kGeneric;
}

// arg: destinations, address. Values are extended to the register's width as T is signed or not.
template <typename T>
Flow run_load(Warp& warp, const Instruction& in, LaneMask lanes) {
  const Lanes<uint64_t> address = addresses(warp, in, in.elements);
  const uint32_t bytes = sizeof(T) * in.elements;
  if (in.space == Space::kShared) count_passes(warp, address, lanes, bytes);
  for_lanes(lanes, [&](int lane) {
    const uint8_t* from = access_memory(warp, in.space, address[lane], bytes, lane, Use::kRead);
    for (int i = 0; i < in.elements; ++i) {
      T value;
      std::memcpy(&value, from + i * sizeof(T), sizeof(T));
      warp.set_lane_value(in.arg[i], lane, in.wide_destination, static_cast<uint64_t>(value));
    }
  });
  return Flow::kNext;
}

// arg: address, values.
template <typename T>
Flow run_store(Warp& warp, const Instruction& in, LaneMask lanes) {
  const Lanes<uint64_t> address = addresses(warp, in, 0);
  const uint32_t bytes = sizeof(T) * in.elements;
  if (in.space == Space::kShared) count_passes(warp, address, lanes, bytes);
  for_lanes(lanes, [&](int lane) {
    uint8_t* to = access_memory(warp, in.space, address[lane], bytes, lane, Use::kWrite);
    for (int i = 0; i < in.elements; ++i) {
      const uint64_t value = warp.lane_value(in.arg[1 + i], lane, in.wide_source);
      std::memcpy(to + i * sizeof(T), &value, sizeof(T));
    }
  });
  return Flow::kNext;
}

// Floating and bit types move like integers of their size.
Type as_integer(Type type) {
  if (type.packed) return {Kind::kUnsigned, 32};
  return {type.is_signed() ? Kind::kSigned : Kind::kUnsigned, type.bits};
}

bool valid_vector(size_t elements, Type type) {
  return (elements == 1 || elements == 2 || elements == 4) &&
         elements * as_integer(type).bits <= 128;
}

bool ld(Decoder& d) {
  d.instruction.wide_destination = d.is_wide(0, d.type().bits == 64);
  const std::vector<uint32_t> destinations = d.destinations(0, d.instruction.wide_destination);
  if (!valid_vector(destinations.size(), d.type())) return false;
  std::copy(destinations.begin(), destinations.end(), d.instruction.arg.begin());
  d.instruction.elements = static_cast<uint8_t>(destinations.size());
  d.instruction.space = space_of(d);
  d.address(1, destinations.size());
  return with_integer(as_integer(d.type()), [&](auto zero) {
    d.instruction.run = run_load<decltype(zero)>;
    return true;
  });
}

bool st(Decoder& d) {
  d.instruction.wide_source = d.is_wide(1, d.type().bits == 64);
  const std::vector<uint32_t> sources = d.sources(1, d.instruction.wide_source);
  if (!valid_vector(sources.size(), d.type())) return false;
  std::copy(sources.begin(), sources.end(), d.instruction.arg.begin() + 1);
  d.instruction.elements = static_cast<uint8_t>(sources.size());
  d.instruction.space = space_of(d);
  d.address(0, 0);
  return with_integer(as_integer(d.type()), [&](auto zero) {
    d.instruction.run = run_store<decltype(zero)>;
    return true;
  });
}

}  // namespace

void add_memory(Opcodes& opcodes) {
  for (const char* name : {"ld", "ldu"}) opcodes[name].push_back(ld);
  opcodes["st"].push_back(st);
}

}  // namespace ptxvm
