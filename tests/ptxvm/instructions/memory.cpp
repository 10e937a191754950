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

bool same_for_all(const Lanes<uint64_t>& address) {
  uint64_t different = 0;
  for (int lane = 0; lane < kLanes; ++lane) different |= address[lane] ^ address[0];
  return different == 0;
}

// Calls move(lane, from) for each lane with where its address lies, checked.
template <uint32_t kBytes, typename Move>
void for_sources(Warp& warp, Space space, const Lanes<uint64_t>& address, LaneMask lanes,
                 const Move& move) {
  if (space == Space::kShared) {
    count_passes(warp, address, lanes, kBytes);
    SharedRaces::Reads reads(warp.block.races, warp.clock, warp.pc());
    const bool races = warp.block.launch.checks.races;
    if (lanes == kAllLanes && same_for_all(address)) {
      const uint32_t at = shared_address(warp, address[0], kBytes, 0);
      if (!races || reads.together(at - kSharedBegin, kBytes)) {
        for_lanes(lanes, [&](int lane) { move(lane, warp.block.shared(at)); });
        return;
      }
    }
    for_lanes(lanes, [&](int lane) {
      const uint32_t at = shared_address(warp, address[lane], kBytes, lane);
      if (races) reads.lane(lane, at - kSharedBegin, kBytes);
      move(lane, warp.block.shared(at));
    });
  } else if (space == Space::kParam && lanes == kAllLanes && same_for_all(address)) {
    const uint8_t* from = access_memory(warp, space, address[0], kBytes, 0, Use::kRead);
    for_lanes(lanes, [&](int lane) { move(lane, from); });
  } else if (space == Space::kGlobal) {
    for_lanes(lanes, [&](int lane) {
      move(lane, access_global(warp, address[lane], kBytes, lane, Use::kRead));
    });
  } else {
    for_lanes(lanes, [&](int lane) {
      move(lane, access_memory(warp, space, address[lane], kBytes, lane, Use::kRead));
    });
  }
}

// arg: destinations, address. Values are extended to the register's width as T is signed or not.
template <typename T, int kElements, typename Register>
Flow run_load(Warp& warp, const Instruction& in, LaneMask lanes) {
  const Lanes<uint64_t> address = addresses(warp, in, kElements);
  uint8_t* rows[kElements];
  for (int i = 0; i < kElements; ++i) rows[i] = warp.row(in.arg[i]);
  for_sources<sizeof(T) * kElements>(
      warp, in.space, address, lanes, [&](int lane, const uint8_t* from) {
        for (int i = 0; i < kElements; ++i) {
          T value;
          std::memcpy(&value, from + i * sizeof(T), sizeof(T));
          const auto extended = static_cast<Register>(value);
          std::memcpy(rows[i] + lane * sizeof(Register), &extended, sizeof(Register));
        }
      });
  return Flow::kNext;
}

// arg: address, values.
template <typename T, int kElements, typename Register>
Flow run_store(Warp& warp, const Instruction& in, LaneMask lanes) {
  constexpr uint32_t kBytes = sizeof(T) * kElements;
  const Lanes<uint64_t> address = addresses(warp, in, 0);
  if (in.space == Space::kShared) count_passes(warp, address, lanes, kBytes);
  const uint8_t* rows[kElements];
  for (int i = 0; i < kElements; ++i) rows[i] = warp.row(in.arg[1 + i]);
  for_lanes(lanes, [&](int lane) {
    uint8_t* to = access_memory(warp, in.space, address[lane], kBytes, lane, Use::kWrite);
    for (int i = 0; i < kElements; ++i)
      std::memcpy(to + i * sizeof(T), rows[i] + lane * sizeof(Register), sizeof(T));
  });
  return Flow::kNext;
}

// Calls f with a constant of the number of elements, and a zero of the register's type.
template <typename F>
bool with_vector(int elements, bool wide, F&& f) {
  const auto of = [&](auto count) { return wide ? f(count, uint64_t{}) : f(count, uint32_t{}); };
  if (elements == 1) return of(std::integral_constant<int, 1>{});
  if (elements == 2) return of(std::integral_constant<int, 2>{});
  return of(std::integral_constant<int, 4>{});
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
    using T = decltype(zero);
    return with_vector(d.instruction.elements, d.instruction.wide_destination,
                       [&](auto count, auto whole) {
                         d.instruction.run = run_load<T, count(), decltype(whole)>;
                         return true;
                       });
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
    using T = decltype(zero);
    return with_vector(d.instruction.elements, d.instruction.wide_source,
                       [&](auto count, auto whole) {
                         d.instruction.run = run_store<T, count(), decltype(whole)>;
                         return true;
                       });
  });
}

}  // namespace

void add_memory(Opcodes& opcodes) {
  for (const char* name : {"ld", "ldu"}) opcodes[name].push_back(ld);
  opcodes["st"].push_back(st);
}

}  // namespace ptxvm
