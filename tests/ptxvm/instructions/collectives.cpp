// SPDX-License-Identifier: BSD-3-Clause
//
// What lanes of a warp do together: shfl, vote, activemask, match, redux, elect.
#include <algorithm>

#include "handlers.h"

namespace ptxvm {
namespace {

enum Direction : int32_t { kUp, kDown, kButterfly, kIndex };

// arg: destination, predicate, a, b, c, mask of "shfl.sync.mode d|p, a, b, c, mask".
Flow run_shfl(Warp& warp, const Instruction& in, LaneMask lanes) {
  if (!warp.gathered(warp.uniform_value(in.arg[5], lanes), lanes, "shfl.sync")) return Flow::kRetry;
  const auto a = warp.load<uint32_t>(in.arg[2]), b = warp.load<uint32_t>(in.arg[3]),
             c = warp.load<uint32_t>(in.arg[4]);
  Lanes<uint32_t> result{};
  LaneMask in_range = 0;
  for_lanes(lanes, [&](int lane) {
    const int offset = static_cast<int>(b[lane] & 31), clamp = static_cast<int>(c[lane] & 31);
    const int segment = static_cast<int>(c[lane] >> 8 & 31);
    const int first = lane & segment, last = first | (clamp & ~segment);
    int source = lane;
    bool valid = false;
    switch (in.immediate) {
      case kUp:
        source = lane - offset;
        valid = source >= last;
        break;
      case kDown:
        source = lane + offset;
        valid = source <= last;
        break;
      case kButterfly:
        source = lane ^ offset;
        valid = source <= last;
        break;
      case kIndex:
        source = first | (offset & ~segment);
        valid = source <= last;
        break;
    }
    if (!valid) source = lane;
    if (!has_lane(lanes, source))
      throw Fault("shfl.sync reads from inactive lane " + std::to_string(source), lane);
    result[lane] = a[source];
    in_range |= static_cast<LaneMask>(valid) << lane;
  });
  warp.store(in.arg[0], lanes, result);
  warp.set_predicate(in.arg[1], lanes, in_range);
  return Flow::kNext;
}

bool shfl(Decoder& d) {
  if (d.word(1) != "sync" || d.type().bits != 32) return false;
  const std::string_view mode = d.word(2);
  d.instruction.immediate = mode == "up"     ? kUp
                            : mode == "down" ? kDown
                            : mode == "bfly" ? kButterfly
                                             : kIndex;
  d.split_destination();
  const size_t first = d.operand_count() - 4;
  d.instruction.arg = {d.destination(0),    first == 2 ? d.predicate(1) : d.sink_predicate(),
                       d.source(first),     d.source(first + 1),
                       d.source(first + 2), d.source(first + 3)};
  d.instruction.run = run_shfl;
  return true;
}

enum Vote : int32_t { kAll, kAny, kUniform, kBallot };

// arg: destination, predicate, mask.
Flow run_vote(Warp& warp, const Instruction& in, LaneMask lanes) {
  if (!warp.gathered(warp.uniform_value(in.arg[2], lanes), lanes, "vote.sync")) return Flow::kRetry;
  const LaneMask ayes = warp.predicate(in.arg[1]) & lanes;
  if (in.immediate == kBallot) {
    Lanes<uint32_t> result;
    std::fill(std::begin(result.value), std::end(result.value), ayes);
    warp.store(in.arg[0], lanes, result);
    return Flow::kNext;
  }
  const bool holds = in.immediate == kAll   ? ayes == lanes
                     : in.immediate == kAny ? ayes != 0
                                            : ayes == 0 || ayes == lanes;
  warp.set_predicate(in.arg[0], lanes, holds ? kAllLanes : 0);
  return Flow::kNext;
}

bool vote(Decoder& d) {
  if (d.word(1) != "sync") return false;
  const std::string_view mode = d.word(2);
  const Vote kind = mode == "all"   ? kAll
                    : mode == "any" ? kAny
                    : mode == "uni" ? kUniform
                                    : kBallot;
  d.instruction.immediate = kind;
  d.instruction.arg = {kind == kBallot ? d.destination(0) : d.predicate(0), d.predicate(1),
                       d.source(2)};
  d.instruction.run = run_vote;
  return true;
}

bool activemask(Decoder& d) {
  d.instruction.arg = {d.destination(0)};
  d.instruction.run = [](Warp& warp, const Instruction& in, LaneMask lanes) {
    Lanes<uint32_t> result;
    std::fill(std::begin(result.value), std::end(result.value), lanes);
    warp.store(in.arg[0], lanes, result);
    return Flow::kNext;
  };
  return true;
}

// match.any.sync: who has my value. match.all.sync d|p: the mask if all have the same.
// arg: destination, predicate, a, mask; immediate: all.
template <typename T>
Flow run_match(Warp& warp, const Instruction& in, LaneMask lanes) {
  if (!warp.gathered(warp.uniform_value(in.arg[3], lanes), lanes, "match.sync"))
    return Flow::kRetry;
  const Row<T> a = warp.load<T>(in.arg[2]);
  Lanes<uint32_t> same{};
  bool all = true;
  for_lanes(lanes, [&](int lane) {
    for_lanes(lanes, [&](int other) {
      same[lane] |= static_cast<uint32_t>(a[other] == a[lane]) << other;
    });
    all &= same[lane] == lanes;
  });
  if (in.immediate != 0) {
    std::fill(std::begin(same.value), std::end(same.value), all ? lanes : 0);
    warp.set_predicate(in.arg[1], lanes, all ? kAllLanes : 0);
  }
  warp.store(in.arg[0], lanes, same);
  return Flow::kNext;
}

bool match(Decoder& d) {
  d.instruction.immediate = d.word(1) == "all";
  d.split_destination();
  const bool wide = d.type().bits == 64;
  const size_t first = d.operand_count() - 2;
  d.instruction.arg = {d.destination(0), first == 2 ? d.predicate(1) : d.sink_predicate(),
                       d.source(first, wide), d.source(first + 1)};
  d.instruction.run = wide ? run_match<uint64_t> : run_match<uint32_t>;
  return true;
}

// arg: destination, a, mask.
template <typename T, typename F>
Flow run_redux(Warp& warp, const Instruction& in, LaneMask lanes) {
  if (!warp.gathered(warp.uniform_value(in.arg[2], lanes), lanes, "redux.sync"))
    return Flow::kRetry;
  const Row<T> a = warp.load<T>(in.arg[1]);
  T total = a[first_lane(lanes)];
  for_lanes(lanes & (lanes - 1), [&](int lane) { total = F{}(total, a[lane]); });
  Lanes<T> result;
  std::fill(std::begin(result.value), std::end(result.value), total);
  warp.store(in.arg[0], lanes, result);
  return Flow::kNext;
}

bool redux(Decoder& d) {
  if (d.word(1) != "sync" || d.type().bits != 32) return false;
  return with_integer(d.type(), [&](auto zero) {
    using T = decltype(zero);
    const auto set = [&](auto f) {
      d.instruction.arg = {d.destination(0), d.source(1), d.source(2)};
      d.instruction.run = run_redux<T, decltype(f)>;
      return true;
    };
    const std::string_view op = d.word(2);
    if (op == "add") return set([](T a, T b) { return T(uint64_t(a) + uint64_t(b)); });
    if (op == "min") return set([](T a, T b) { return std::min(a, b); });
    if (op == "max") return set([](T a, T b) { return std::max(a, b); });
    if (op == "and") return set([](T a, T b) { return T(a & b); });
    if (op == "or") return set([](T a, T b) { return T(a | b); });
    if (op == "xor") return set([](T a, T b) { return T(a ^ b); });
    return false;
  });
}

}  // namespace

void add_collectives(Opcodes& opcodes) {
  opcodes["shfl"].push_back(shfl);
  opcodes["vote"].push_back(vote);
  opcodes["activemask"].push_back(activemask);
  opcodes["match"].push_back(match);
  opcodes["redux"].push_back(redux);
}

}  // namespace ptxvm
