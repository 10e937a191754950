// SPDX-License-Identifier: BSD-3-Clause
//
// mov, selp, cvta, isspacep.
#include "handlers.h"

namespace ptxvm {
namespace {

// mov.b64 {%r1, %r2}, %rd1: elements of 64 / n or 32 / n bits. arg: elements, then the whole.
template <bool kWide>
Flow run_unpack(Warp& warp, const Instruction& in, LaneMask lanes) {
  const int bits = (kWide ? 64 : 32) / in.elements;
  for_lanes(lanes, [&](int lane) {
    const uint64_t whole = warp.lane_value(in.arg[in.elements], lane, kWide);
    for (int i = 0; i < in.elements; ++i)
      warp.set_lane_value(in.arg[i], lane, false,
                          whole >> (i * bits) & (~uint64_t{0} >> (64 - bits)));
  });
  return Flow::kNext;
}

template <bool kWide>
Flow run_pack(Warp& warp, const Instruction& in, LaneMask lanes) {
  const int bits = (kWide ? 64 : 32) / in.elements;
  for_lanes(lanes, [&](int lane) {
    uint64_t whole = 0;
    for (int i = 0; i < in.elements; ++i)
      whole |= (warp.lane_value(in.arg[i], lane, false) & (~uint64_t{0} >> (64 - bits)))
               << (i * bits);
    warp.set_lane_value(in.arg[in.elements], lane, kWide, whole);
  });
  return Flow::kNext;
}

bool mov_vector(Decoder& d) {
  const bool unpack = d.is_vector(0), wide = d.type().bits == 64;
  const std::vector<uint32_t> elements = unpack ? d.destinations(0) : d.sources(1);
  if (elements.size() != 2 && elements.size() != 4) return false;
  d.instruction.elements = static_cast<uint8_t>(elements.size());
  for (size_t i = 0; i < elements.size(); ++i) d.instruction.arg[i] = elements[i];
  d.instruction.arg[elements.size()] = unpack ? d.source(1, wide) : d.destination(0, wide);
  if (unpack)
    d.instruction.run = wide ? run_unpack<true> : run_unpack<false>;
  else
    d.instruction.run = wide ? run_pack<true> : run_pack<false>;
  return true;
}

bool mov(Decoder& d) {
  const Type type = d.type();
  if (type.kind == Kind::kPredicate) {
    d.instruction.arg = {d.predicate(0), d.predicate(1)};
    d.instruction.run = [](Warp& warp, const Instruction& in, LaneMask lanes) {
      warp.set_predicate(in.arg[0], lanes, warp.predicate(in.arg[1]));
      return Flow::kNext;
    };
    return true;
  }
  if (d.is_vector(0) || d.is_vector(1)) return mov_vector(d);
  if (type.bits == 64) return unary<uint64_t>(d, [](uint64_t a) { return a; });
  return unary<uint32_t>(d, [](uint32_t a) { return a; });
}

template <typename T>
Flow run_selp(Warp& warp, const Instruction& in, LaneMask lanes) {
  const Row<T> a = warp.load<T>(in.arg[1]), b = warp.load<T>(in.arg[2]);
  const LaneMask first = warp.predicate(in.arg[3]);
  Lanes<T> result;
  for (int lane = 0; lane < kLanes; ++lane)
    result[lane] = has_lane(first, lane) ? a[lane] : b[lane];
  warp.store(in.arg[0], lanes, result);
  return Flow::kNext;
}

bool selp(Decoder& d) {
  const bool wide = d.type().bits == 64;
  d.instruction.arg = {d.destination(0, wide), d.source(1, wide), d.source(2, wide),
                       d.predicate(3)};
  d.instruction.run = wide ? run_selp<uint64_t> : run_selp<uint32_t>;
  return true;
}

uint64_t window_of(const Decoder& d) {
  for (std::string_view word : d.words()) {
    if (word.starts_with("shared")) return kSharedWindow;
    if (word == "local") return kLocalWindow;
    if (word.starts_with("param")) return kParamWindow;
  }
  return 0;  // global and const addresses are generic ones
}

bool cvta(Decoder& d) {
  if (d.type().bits != 64) return false;
  const uint64_t window = window_of(d);
  d.instruction.displacement = static_cast<int64_t>(d.has("to") ? -window : window);
  d.instruction.arg = {d.destination(0, true), d.source(1, true)};
  d.instruction.run = [](Warp& warp, const Instruction& in, LaneMask lanes) {
    const Row<uint64_t> a = warp.load<uint64_t>(in.arg[1]);
    Lanes<uint64_t> result;
    for (int lane = 0; lane < kLanes; ++lane)
      result[lane] = a[lane] + static_cast<uint64_t>(in.displacement);
    warp.store(in.arg[0], lanes, result);
    return Flow::kNext;
  };
  return true;
}

bool isspacep(Decoder& d) {
  d.instruction.displacement = static_cast<int64_t>(window_of(d));
  d.instruction.arg = {d.predicate(0), d.source(1, true)};
  d.instruction.run = [](Warp& warp, const Instruction& in, LaneMask lanes) {
    const Row<uint64_t> a = warp.load<uint64_t>(in.arg[1]);
    const auto window = static_cast<uint64_t>(in.displacement);
    LaneMask result = 0;
    for (int lane = 0; lane < kLanes; ++lane) {
      const bool inside =
          window != 0 ? a[lane] - window < kWindowBytes
                      : a[lane] - kSharedWindow >= kParamWindow + kWindowBytes - kSharedWindow;
      result |= static_cast<LaneMask>(inside) << lane;
    }
    warp.set_predicate(in.arg[0], lanes, result);
    return Flow::kNext;
  };
  return true;
}

}  // namespace

void add_moves(Opcodes& opcodes) {
  opcodes["mov"].push_back(mov);
  opcodes["selp"].push_back(selp);
  opcodes["cvta"].push_back(cvta);
  opcodes["isspacep"].push_back(isspacep);
}

}  // namespace ptxvm
