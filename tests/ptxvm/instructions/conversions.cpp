// SPDX-License-Identifier: BSD-3-Clause
//
// cvt: between all integers and floating formats.
#include <cmath>
#include <limits>
#include <type_traits>

#include "handlers.h"

namespace ptxvm {
namespace {

enum Rounding : int32_t { kNearest, kZero, kDown, kUp };
constexpr int32_t kRoundingBits = 3, kSaturate = 4, kFlush = 8, kRelu = 16, kToInteger = 32;

template <typename T>
constexpr bool kIsInteger = std::is_integral_v<T>;

double round_to_integer(double x, int32_t rounding) {
  switch (rounding) {
    case kZero:
      return std::trunc(x);
    case kDown:
      return std::floor(x);
    case kUp:
      return std::ceil(x);
    default:
      return std::nearbyint(x);
  }
}

template <typename To>
To clamp_to(double x) {  // x is whole or NaN
  using Limits = std::numeric_limits<To>;
  if (std::isnan(x)) return 0;
  if (x <= static_cast<double>(Limits::min())) return Limits::min();
  if (x >= static_cast<double>(Limits::max())) return Limits::max();
  return static_cast<To>(x);
}

template <typename To, typename From>
To integer_to_integer(From x, int32_t flags) {
  if ((flags & kSaturate) == 0) return static_cast<To>(x);
  using Limits = std::numeric_limits<To>;
  const auto wide = static_cast<__int128>(x);
  if (wide < static_cast<__int128>(Limits::min())) return Limits::min();
  if (wide > static_cast<__int128>(Limits::max())) return Limits::max();
  return static_cast<To>(x);
}

template <typename T>
double to_double(T x) {
  if constexpr (std::is_same_v<T, double>)
    return x;
  else
    return static_cast<double>(to_float(x));
}

// Rounds to nearest only; other directions are refused, except to an integer's value.
template <typename To, typename From>
To to_floating(From x, int32_t flags) {
  if constexpr (std::is_same_v<To, double>) {
    double value;
    if constexpr (kIsInteger<From>)
      value = static_cast<double>(x);
    else
      value = to_double(x);
    return flags & kToInteger ? round_to_integer(value, flags & kRoundingBits) : value;
  } else {
    float value;
    if constexpr (kIsInteger<From> || std::is_same_v<From, double>)
      value = static_cast<float>(x);
    else
      value = to_float(x);
    if (flags & kFlush) value = flush(value);
    if (flags & kToInteger)
      value = static_cast<float>(round_to_integer(value, flags & kRoundingBits));
    if (flags & kSaturate) value = value > 0 ? std::fmin(value, 1.0f) : 0.0f;
    if (flags & kRelu) value = value > 0 || value != value ? value : 0.0f;
    return from_float<To>(value);
  }
}

template <typename To, typename From>
To convert(From x, int32_t flags) {
  if constexpr (kIsInteger<To> && kIsInteger<From>)
    return integer_to_integer<To>(x, flags);
  else if constexpr (kIsInteger<To>)
    return clamp_to<To>(round_to_integer(to_double(x), flags & kRoundingBits));
  else
    return to_floating<To>(x, flags);
}

template <typename To, typename From>
Flow run_convert(Warp& warp, const Instruction& in, LaneMask lanes) {
  const Row<From> from = warp.load<From>(in.arg[1]);
  Lanes<To> to;
  for (int lane = 0; lane < kLanes; ++lane) to[lane] = convert<To>(from[lane], in.immediate);
  warp.store(in.arg[0], lanes, to);
  return Flow::kNext;
}

// Registers of 64 bits for types of fewer: the low bits count; results are extended.
template <typename To, typename From>
Flow run_convert_wide(Warp& warp, const Instruction& in, LaneMask lanes) {
  for_lanes(lanes, [&](int lane) {
    const uint64_t source = warp.lane_value(in.arg[1], lane, in.wide_source);
    From from;
    std::memcpy(&from, &source, sizeof from);
    const To to = convert<To>(from, in.immediate);
    uint64_t result = 0;
    if constexpr (kIsInteger<To>)
      result = static_cast<uint64_t>(to);
    else
      std::memcpy(&result, &to, sizeof to);
    warp.set_lane_value(in.arg[0], lane, in.wide_destination, result);
  });
  return Flow::kNext;
}

template <typename F>
bool with_type(Type type, F&& f) {
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

int32_t flags_of(const Decoder& d) {
  int32_t flags = d.has("rz") || d.has("rzi")   ? kZero
                  : d.has("rm") || d.has("rmi") ? kDown
                  : d.has("rp") || d.has("rpi") ? kUp
                                                : kNearest;
  if (d.has("rni") || d.has("rzi") || d.has("rmi") || d.has("rpi")) flags |= kToInteger;
  if (d.has("sat")) flags |= kSaturate;
  if (d.has("ftz")) flags |= kFlush;
  if (d.has("relu")) flags |= kRelu;
  return flags;
}

// cvt.rn.bf16x2.f32 d, a, b: a is the upper half.
template <typename T>
Flow run_pack(Warp& warp, const Instruction& in, LaneMask lanes) {
  const Row<float> high = warp.load<float>(in.arg[1]), low = warp.load<float>(in.arg[2]);
  Lanes<uint32_t> result;
  for (int lane = 0; lane < kLanes; ++lane)
    result[lane] = uint32_t{to_floating<T>(high[lane], in.immediate).bits} << 16 |
                   to_floating<T>(low[lane], in.immediate).bits;
  warp.store(in.arg[0], lanes, result);
  return Flow::kNext;
}

// cvt.rna.tf32.f32: to nearest with ties away from zero, 10 bits of mantissa.
bool tf32(Decoder& d) {
  return unary<uint32_t>(
      d, [](uint32_t a) { return (a & 0x7f800000) == 0x7f800000 ? a : (a + 0x1000) & ~0x1fffu; });
}

bool cvt(Decoder& d) {
  if (d.has("rna") && d.has("tf32")) return tf32(d);
  const Type to = d.type(1), from = d.type(0);
  const bool whole = d.has("rni") || d.has("rzi") || d.has("rmi") || d.has("rpi");
  // Directed rounding to floating formats is not modelled.
  if (!to.integer() && !whole && (d.has("rz") || d.has("rm") || d.has("rp"))) return false;
  d.instruction.immediate = flags_of(d);
  if (to.packed) {
    if (d.operand_count() != 3 || from != Type{Kind::kFloat, 32}) return false;
    d.instruction.arg = {d.destination(0), d.source(1), d.source(2)};
    d.instruction.run = to.kind == Kind::kHalf ? run_pack<Half> : run_pack<BFloat16>;
    return true;
  }
  if (d.operand_count() != 2 || from.packed) return false;
  return with_type(to, [&](auto t) {
    return with_type(from, [&](auto f) {
      const bool to_wide = d.is_wide(0, sizeof t == 8), from_wide = d.is_wide(1, sizeof f == 8);
      d.instruction.wide_destination = to_wide;
      d.instruction.wide_source = from_wide;
      d.instruction.arg = {d.destination(0, to_wide), d.source(1, from_wide)};
      const bool as_typed = to_wide == (sizeof t == 8) && from_wide == (sizeof f == 8);
      d.instruction.run = as_typed ? run_convert<decltype(t), decltype(f)>
                                   : run_convert_wide<decltype(t), decltype(f)>;
      return true;
    });
  });
}

}  // namespace

void add_conversions(Opcodes& opcodes) { opcodes["cvt"].push_back(cvt); }

}  // namespace ptxvm
