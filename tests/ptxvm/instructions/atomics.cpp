// SPDX-License-Identifier: BSD-3-Clause
//
// atom and red.
#include <algorithm>

#include "../memory_access.h"
#include "handlers.h"

namespace ptxvm {
namespace {

// arg: destination, address, operand, second operand of cas.
template <typename T, bool kReturns, typename F>
Flow run_atomic(Warp& warp, const Instruction& in, LaneMask lanes) {
  constexpr bool kWide = sizeof(T) == 8;
  const Lanes<uint64_t> address = addresses(warp, in, 1);
  for_lanes(lanes, [&](int lane) {
    uint8_t* at = access_memory(warp, in.space, address[lane], sizeof(T), lane, Use::kAtomic);
    T old, operand, second;
    std::memcpy(&old, at, sizeof(T));
    const uint64_t first_bits = warp.lane_value(in.arg[2], lane, kWide);
    const uint64_t second_bits = warp.lane_value(in.arg[3], lane, kWide);
    std::memcpy(&operand, &first_bits, sizeof(T));
    std::memcpy(&second, &second_bits, sizeof(T));
    const T updated = F{}(old, operand, second);
    std::memcpy(at, &updated, sizeof(T));
    if (!kReturns) return;
    uint64_t result = 0;
    std::memcpy(&result, &old, sizeof(T));
    warp.set_lane_value(in.arg[0], lane, kWide, result);
  });
  return Flow::kNext;
}

template <typename T, typename F>
bool atomic(Decoder& d, F) {
  const bool returns = d.word(0) == "atom";
  const size_t first = returns ? 1 : 0;
  constexpr bool kWide = sizeof(T) == 8;
  d.instruction.space = Space::kGeneric;
  if (d.has("global")) d.instruction.space = Space::kGlobal;
  for (std::string_view word : d.words())
    if (word.starts_with("shared")) d.instruction.space = Space::kShared;
  d.instruction.arg[0] = returns ? d.destination(0, kWide) : 0;
  d.address(first, 1);
  d.instruction.arg[2] = d.source(first + 1, kWide);
  d.instruction.arg[3] = d.has("cas") ? d.source(first + 2, kWide) : d.instruction.arg[2];
  d.instruction.run = returns ? run_atomic<T, true, F> : run_atomic<T, false, F>;
  return true;
}

template <typename T>
struct PackedSum {
  uint32_t operator()(uint32_t a, uint32_t b, uint32_t) const {
    uint32_t sum = 0;
    for (int shift : {0, 16})
      sum |= uint32_t{from_float<T>(to_float(T{static_cast<uint16_t>(a >> shift)}) +
                                    to_float(T{static_cast<uint16_t>(b >> shift)}))
                          .bits}
             << shift;
    return sum;
  }
};

bool integer_atomic(Decoder& d) {
  const Type type = d.type();
  if (type.bits < 32) return false;
  return with_integer(type, [&](auto zero) {
    using T = decltype(zero);
    using U = std::make_unsigned_t<T>;
    if (d.has("add")) return atomic<T>(d, [](T a, T b, T) { return T(U(a) + U(b)); });
    if (d.has("min")) return atomic<T>(d, [](T a, T b, T) { return std::min(a, b); });
    if (d.has("max")) return atomic<T>(d, [](T a, T b, T) { return std::max(a, b); });
    if (d.has("and")) return atomic<T>(d, [](T a, T b, T) { return T(a & b); });
    if (d.has("or")) return atomic<T>(d, [](T a, T b, T) { return T(a | b); });
    if (d.has("xor")) return atomic<T>(d, [](T a, T b, T) { return T(a ^ b); });
    if (d.has("exch")) return atomic<T>(d, [](T, T b, T) { return b; });
    if (d.has("cas")) return atomic<T>(d, [](T a, T b, T c) { return a == b ? c : a; });
    if (d.has("inc")) return atomic<T>(d, [](T a, T b, T) { return a >= b ? T(0) : T(a + 1); });
    if (d.has("dec"))
      return atomic<T>(d, [](T a, T b, T) { return a == 0 || a > b ? b : T(a - 1); });
    return false;
  });
}

bool atom(Decoder& d) {
  for (const char* vector : {"v2", "v4", "v8"})
    if (d.has(vector)) return false;
  const Type type = d.type();
  if (type.integer()) return integer_atomic(d);
  if (!d.has("add")) return false;
  if (type == Type{Kind::kFloat, 32})
    return atomic<float>(d, [](float a, float b, float) { return a + b; });
  if (type == Type{Kind::kFloat, 64})
    return atomic<double>(d, [](double a, double b, double) { return a + b; });
  if (type == Type{Kind::kHalf, 16, true}) return atomic<uint32_t>(d, PackedSum<Half>{});
  if (type == Type{Kind::kBFloat16, 16, true}) return atomic<uint32_t>(d, PackedSum<BFloat16>{});
  return false;
}

}  // namespace

void add_atomics(Opcodes& opcodes) {
  for (const char* name : {"atom", "red"}) opcodes[name].push_back(atom);
}

}  // namespace ptxvm
