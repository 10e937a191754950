// SPDX-License-Identifier: BSD-3-Clause
//
// Logic, shifts, bit fields, permutation of bytes.
#include <algorithm>
#include <bit>

#include "handlers.h"

namespace ptxvm {
namespace {

template <typename F>
bool predicate_logic(Decoder& d, F) {
  d.instruction.arg = {d.predicate(0), d.predicate(1),
                       d.operand_count() > 2 ? d.predicate(2) : d.predicate(1)};
  d.instruction.run = [](Warp& warp, const Instruction& in, LaneMask lanes) {
    warp.set_predicate(in.arg[0], lanes, F{}(warp.predicate(in.arg[1]), warp.predicate(in.arg[2])));
    return Flow::kNext;
  };
  return true;
}

template <typename F>
bool logic(Decoder& d, F f) {
  if (d.type().kind == Kind::kPredicate) return predicate_logic(d, f);
  return with_bits(d.type(), [&](auto zero) { return binary<decltype(zero)>(d, f); });
}

bool logic_and(Decoder& d) {
  return logic(d, [](auto a, auto b) { return a & b; });
}

bool logic_or(Decoder& d) {
  return logic(d, [](auto a, auto b) { return a | b; });
}

bool logic_xor(Decoder& d) {
  return logic(d, [](auto a, auto b) { return a ^ b; });
}

bool logic_not(Decoder& d) {
  if (d.type().kind == Kind::kPredicate)
    return predicate_logic(d, [](LaneMask a, LaneMask) { return ~a; });
  return with_bits(d.type(),
                   [&](auto zero) { return unary<decltype(zero)>(d, [](auto a) { return ~a; }); });
}

bool cnot(Decoder& d) {
  return with_bits(
      d.type(), [&](auto zero) { return unary<decltype(zero)>(d, [](auto a) { return a == 0; }); });
}

uint32_t look_up(uint32_t a, uint32_t b, uint32_t c, int table) {
  uint32_t result = 0;
  for (int i = 0; i < 8; ++i)
    if (table >> i & 1) result |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
  return result;
}

Flow run_lop3(Warp& warp, const Instruction& in, LaneMask lanes) {
  const auto a = warp.load<uint32_t>(in.arg[1]), b = warp.load<uint32_t>(in.arg[2]),
             c = warp.load<uint32_t>(in.arg[3]);
  Lanes<uint32_t> result;
  for (int lane = 0; lane < kLanes; ++lane)
    result[lane] = look_up(a[lane], b[lane], c[lane], in.immediate);
  warp.store(in.arg[0], lanes, result);
  return Flow::kNext;
}

bool lop3(Decoder& d) {
  if (d.type().bits != 32 || d.words().size() != 2) return false;
  d.instruction.arg = {d.destination(0), d.source(1), d.source(2), d.source(3)};
  d.instruction.immediate = static_cast<int32_t>(d.number(4));
  d.instruction.run = run_lop3;
  return true;
}

// The count is 32 bits wide whatever the type is; too large a count shifts everything out.
template <typename T, typename F>
Flow run_shift(Warp& warp, const Instruction& in, LaneMask lanes) {
  const Row<T> a = warp.load<T>(in.arg[1]);
  const Row<uint32_t> count = warp.load<uint32_t>(in.arg[2]);
  Lanes<T> result;
  for (int lane = 0; lane < kLanes; ++lane)
    result[lane] = static_cast<T>(F{}(a[lane], count[lane]));
  warp.store(in.arg[0], lanes, result);
  return Flow::kNext;
}

template <typename T, typename F>
bool shift(Decoder& d, F) {
  d.instruction.arg = {d.destination(0, sizeof(T) == 8), d.source(1, sizeof(T) == 8), d.source(2)};
  d.instruction.run = run_shift<T, F>;
  return true;
}

bool shl(Decoder& d) {
  return with_bits(d.type(), [&](auto zero) {
    using T = decltype(zero);
    return shift<T>(d, [](T a, uint32_t n) { return n < 8 * sizeof(T) ? T(a << n) : T(0); });
  });
}

bool shr(Decoder& d) {
  return with_integer(d.type(), [&](auto zero) {
    using T = decltype(zero);
    constexpr uint32_t kBits = 8 * sizeof(T);
    return shift<T>(d, [](T a, uint32_t n) {
      return n < kBits ? T(a >> n) : T(std::is_signed_v<T> && a < 0 ? -1 : 0);
    });
  });
}

bool shf(Decoder& d) {
  const bool left = d.word(1) == "l", clamp = d.has("clamp");
  if (d.type().bits != 32) return false;
  using U = uint32_t;
  if (left && clamp)
    return ternary<U>(d, [](U low, U high, U n) {
      return U(((uint64_t{high} << 32 | low) << std::min(n, 32u)) >> 32);
    });
  if (left)
    return ternary<U>(
        d, [](U low, U high, U n) { return U(((uint64_t{high} << 32 | low) << (n & 31)) >> 32); });
  if (clamp)
    return ternary<U>(
        d, [](U low, U high, U n) { return U((uint64_t{high} << 32 | low) >> std::min(n, 32u)); });
  return ternary<U>(d,
                    [](U low, U high, U n) { return U((uint64_t{high} << 32 | low) >> (n & 31)); });
}

bool prmt(Decoder& d) {
  if (d.words().size() != 2 || d.type().bits != 32) return false;
  return ternary<uint32_t>(d, [](uint32_t a, uint32_t b, uint32_t selector) {
    const uint64_t bytes = uint64_t{b} << 32 | a;
    uint32_t result = 0;
    for (int i = 0; i < 4; ++i) {
      const uint32_t choice = selector >> (4 * i) & 15;
      uint32_t byte = static_cast<uint32_t>(bytes >> (8 * (choice & 7))) & 0xff;
      if (choice & 8) byte = byte & 0x80 ? 0xff : 0;  // its sign, spread
      result |= byte << (8 * i);
    }
    return result;
  });
}

template <typename T>
T extract_field(T a, uint32_t position, uint32_t length) {
  constexpr uint32_t kBits = 8 * sizeof(T);
  position &= 0xff;
  length &= 0xff;
  if (length == 0) return 0;
  const uint32_t sign_at = std::min(position + length - 1, kBits - 1);
  const bool sign = std::is_signed_v<T> && (a >> sign_at & 1) != 0;
  using U = std::make_unsigned_t<T>;
  U field = position < kBits ? U(U(a) >> position) : U(0);
  const uint32_t kept = std::min(length, position < kBits ? kBits - position : 0);
  if (kept < kBits) {
    const U mask = (U(1) << kept) - 1;
    field = sign ? U(field | ~mask) : U(field & mask);
  }
  return T(field);
}

template <typename T>
Flow run_bfe(Warp& warp, const Instruction& in, LaneMask lanes) {
  const Row<T> a = warp.load<T>(in.arg[1]);
  const auto position = warp.load<uint32_t>(in.arg[2]), length = warp.load<uint32_t>(in.arg[3]);
  Lanes<T> result;
  for (int lane = 0; lane < kLanes; ++lane)
    result[lane] = extract_field(a[lane], position[lane], length[lane]);
  warp.store(in.arg[0], lanes, result);
  return Flow::kNext;
}

bool bfe(Decoder& d) {
  return with_integer(d.type(), [&](auto zero) {
    using T = decltype(zero);
    if constexpr (sizeof(T) < 4) return false;
    d.instruction.arg = {d.destination(0, sizeof(T) == 8), d.source(1, sizeof(T) == 8), d.source(2),
                         d.source(3)};
    d.instruction.run = run_bfe<T>;
    return true;
  });
}

template <typename T>
Flow run_bfi(Warp& warp, const Instruction& in, LaneMask lanes) {
  constexpr uint32_t kBits = 8 * sizeof(T);
  const Row<T> a = warp.load<T>(in.arg[1]), b = warp.load<T>(in.arg[2]);
  const auto position = warp.load<uint32_t>(in.arg[3]), length = warp.load<uint32_t>(in.arg[4]);
  Lanes<T> result;
  for (int lane = 0; lane < kLanes; ++lane) {
    const uint32_t at = position[lane] & 0xff;
    const uint32_t count = at < kBits ? std::min(length[lane] & 0xff, kBits - at) : 0;
    const T ones = count == 0 ? T(0) : T(~T(0)) >> (kBits - count);
    const T mask = count == 0 ? T(0) : T(ones << at);
    result[lane] = count == 0 ? b[lane] : T((b[lane] & ~mask) | (T(a[lane] << at) & mask));
  }
  warp.store(in.arg[0], lanes, result);
  return Flow::kNext;
}

bool bfi(Decoder& d) {
  return with_bits(d.type(), [&](auto zero) {
    using T = decltype(zero);
    constexpr bool kWide = sizeof(T) == 8;
    if constexpr (sizeof(T) < 4) return false;
    d.instruction.arg = {d.destination(0, kWide), d.source(1, kWide), d.source(2, kWide),
                         d.source(3), d.source(4)};
    d.instruction.run = run_bfi<T>;
    return true;
  });
}

bool popc(Decoder& d) {
  return with_bits(d.type(), [&](auto zero) {
    return unary<decltype(zero), uint32_t>(d, [](auto a) { return std::popcount(a); });
  });
}

bool clz(Decoder& d) {
  return with_bits(d.type(), [&](auto zero) {
    return unary<decltype(zero), uint32_t>(d, [](auto a) { return std::countl_zero(a); });
  });
}

bool brev(Decoder& d) {
  return with_bits(d.type(), [&](auto zero) {
    using T = decltype(zero);
    return unary<T>(d, [](T a) {
      T result = 0;
      for (size_t i = 0; i < 8 * sizeof(T); ++i) result = T(result << 1 | (a >> i & 1));
      return result;
    });
  });
}

// The position of the most significant bit that is not the sign, or all ones.
bool bfind(Decoder& d) {
  if (d.has("shiftamt")) return false;
  return with_integer(d.type(), [&](auto zero) {
    using T = decltype(zero);
    if constexpr (sizeof(T) < 4) return false;
    return unary<T, uint32_t>(d, [](T a) {
      using U = std::make_unsigned_t<T>;
      const U bits = a < 0 ? U(~a) : U(a);
      return bits == 0 ? ~0u : uint32_t(8 * sizeof(T) - 1 - std::countl_zero(bits));
    });
  });
}

}  // namespace

void add_bits(Opcodes& opcodes) {
  opcodes["and"].push_back(logic_and);
  opcodes["or"].push_back(logic_or);
  opcodes["xor"].push_back(logic_xor);
  opcodes["not"].push_back(logic_not);
  opcodes["cnot"].push_back(cnot);
  opcodes["lop3"].push_back(lop3);
  opcodes["shl"].push_back(shl);
  opcodes["shr"].push_back(shr);
  opcodes["shf"].push_back(shf);
  opcodes["prmt"].push_back(prmt);
  opcodes["bfe"].push_back(bfe);
  opcodes["bfi"].push_back(bfi);
  opcodes["popc"].push_back(popc);
  opcodes["clz"].push_back(clz);
  opcodes["brev"].push_back(brev);
  opcodes["bfind"].push_back(bfind);
}

}  // namespace ptxvm
