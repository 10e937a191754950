// SPDX-License-Identifier: BSD-3-Clause
//
// setp, set, slct.
#include <unordered_map>

#include "handlers.h"

namespace ptxvm {
namespace {

enum class Join : int32_t { kNone, kAnd, kOr, kXor };

// For which outcomes a comparison holds.
enum Outcome : uint8_t { kLess = 1, kEqual = 2, kGreater = 4, kUnordered = 8 };

// 0: there is no comparison of this name.
uint8_t outcomes(std::string_view name) {
  static const std::unordered_map<std::string_view, uint8_t> table = {
      {"eq", kEqual},
      {"ne", kLess | kGreater},
      {"lt", kLess},
      {"lo", kLess},
      {"le", kLess | kEqual},
      {"ls", kLess | kEqual},
      {"gt", kGreater},
      {"hi", kGreater},
      {"ge", kGreater | kEqual},
      {"hs", kGreater | kEqual},
      {"equ", kEqual | kUnordered},
      {"neu", kLess | kGreater | kUnordered},
      {"ltu", kLess | kUnordered},
      {"leu", kLess | kEqual | kUnordered},
      {"gtu", kGreater | kUnordered},
      {"geu", kGreater | kEqual | kUnordered},
      {"num", kLess | kEqual | kGreater},
      {"nan", kUnordered},
  };
  const auto entry = table.find(name);
  return entry == table.end() ? 0 : entry->second;
}

template <typename T>
auto comparable(T x, bool ftz) {
  if constexpr (std::is_same_v<T, float>)
    return ftz ? flush(x) : x;
  else if constexpr (std::is_same_v<T, Half> || std::is_same_v<T, BFloat16>)
    return to_float(x);
  else
    return x;
}

template <typename T>
LaneMask compare(const Warp& warp, const Instruction& in) {
  const Row<T> a = warp.load<T>(in.arg[2]), b = warp.load<T>(in.arg[3]);
  LaneMask less = 0, greater = 0, equal = 0;
  for (int lane = 0; lane < kLanes; ++lane) {
    const auto x = comparable(a[lane], in.flush), y = comparable(b[lane], in.flush);
    less |= static_cast<LaneMask>(x < y) << lane;
    greater |= static_cast<LaneMask>(x > y) << lane;
    equal |= static_cast<LaneMask>(x == y) << lane;
  }
  return (in.outcomes & kLess ? less : 0) | (in.outcomes & kGreater ? greater : 0) |
         (in.outcomes & kEqual ? equal : 0) |
         (in.outcomes & kUnordered ? ~(less | greater | equal) : 0);
}

LaneMask join(LaneMask a, LaneMask b, int32_t how) {
  switch (static_cast<Join>(how)) {
    case Join::kAnd:
      return a & b;
    case Join::kOr:
      return a | b;
    case Join::kXor:
      return a ^ b;
    default:
      return a;
  }
}

// arg: p, q, a, b, c of "setp.lt.and.f32 p|q, a, b, c"
template <typename T>
Flow run_setp(Warp& warp, const Instruction& in, LaneMask lanes) {
  const LaneMask holds = compare<T>(warp, in);
  const LaneMask c = in.immediate != 0 ? warp.predicate(in.arg[4]) : 0;
  warp.set_predicate(in.arg[1], lanes, join(~holds, c, in.immediate));
  warp.set_predicate(in.arg[0], lanes, join(holds, c, in.immediate));
  return Flow::kNext;
}

// The destination is a register: all ones, or 1.0f if `elements` says so.
template <typename T>
Flow run_set(Warp& warp, const Instruction& in, LaneMask lanes) {
  LaneMask holds = compare<T>(warp, in);
  if (in.immediate != 0) holds = join(holds, warp.predicate(in.arg[4]), in.immediate);
  Lanes<uint32_t> result;
  for (int lane = 0; lane < kLanes; ++lane)
    result[lane] = !has_lane(holds, lane) ? 0 : in.elements == 2 ? 0x3f800000 : ~0u;
  warp.store(in.arg[0], lanes, result);
  return Flow::kNext;
}

template <typename F>
bool with_comparable(Decoder& d, F&& f) {
  const Type type = d.type();
  d.instruction.outcomes = outcomes(d.word(1));
  d.instruction.flush = d.has("ftz");
  if (type.packed || d.instruction.outcomes == 0) return false;
  switch (type.kind) {
    case Kind::kFloat:
      return type.bits == 64 ? f(double{}) : f(float{});
    case Kind::kHalf:
      return f(Half{});
    case Kind::kBFloat16:
      return f(BFloat16{});
    default:
      return with_integer(type, f);
  }
}

void set_join(Decoder& d) {
  const Join how = d.has("and")   ? Join::kAnd
                   : d.has("or")  ? Join::kOr
                   : d.has("xor") ? Join::kXor
                                  : Join::kNone;
  d.instruction.immediate = static_cast<int32_t>(how);
  if (how != Join::kNone) d.instruction.arg[4] = d.predicate(d.operand_count() - 1);
}

bool setp(Decoder& d) {
  d.split_destination();
  set_join(d);
  const size_t sources = d.operand_count() - (d.instruction.immediate != 0 ? 3 : 2);
  d.instruction.arg[0] = d.predicate(0);
  d.instruction.arg[1] = sources == 2 ? d.predicate(1) : d.sink_predicate();
  return with_comparable(d, [&](auto zero) {
    d.instruction.arg[2] = d.source(sources, sizeof zero == 8);
    d.instruction.arg[3] = d.source(sources + 1, sizeof zero == 8);
    d.instruction.run = run_setp<decltype(zero)>;
    return true;
  });
}

bool set(Decoder& d) {
  const Type result = d.type(1);
  if (result.bits != 32) return false;
  set_join(d);
  d.instruction.arg[0] = d.destination(0);
  d.instruction.elements = result.kind == Kind::kFloat ? 2 : 1;
  return with_comparable(d, [&](auto zero) {
    d.instruction.arg[2] = d.source(1, sizeof zero == 8);
    d.instruction.arg[3] = d.source(2, sizeof zero == 8);
    d.instruction.run = run_set<decltype(zero)>;
    return true;
  });
}

// slct d, a, b, c: c >= 0 ? a : b.
bool slct(Decoder& d) {
  const Type by = d.type();
  return with_bits(d.type(1), [&](auto zero) {
    using T = decltype(zero);
    constexpr bool kWide = sizeof(T) == 8;
    d.instruction.arg = {d.destination(0, kWide), d.source(1, kWide), d.source(2, kWide),
                         d.source(3)};
    d.instruction.immediate = by.kind == Kind::kFloat;
    d.instruction.run = [](Warp& warp, const Instruction& in, LaneMask lanes) {
      const Row<T> a = warp.load<T>(in.arg[1]), b = warp.load<T>(in.arg[2]);
      const auto c = warp.load<uint32_t>(in.arg[3]);
      Lanes<T> result;
      for (int lane = 0; lane < kLanes; ++lane) {
        const bool first = in.immediate != 0 ? std::bit_cast<float>(c[lane]) >= 0
                                             : static_cast<int32_t>(c[lane]) >= 0;
        result[lane] = first ? a[lane] : b[lane];
      }
      warp.store(in.arg[0], lanes, result);
      return Flow::kNext;
    };
    return true;
  });
}

}  // namespace

void add_comparisons(Opcodes& opcodes) {
  opcodes["setp"].push_back(setp);
  opcodes["set"].push_back(set);
  opcodes["slct"].push_back(slct);
}

}  // namespace ptxvm
