// SPDX-License-Identifier: BSD-3-Clause
//
// Handlers made of a function of one lane's values. It is applied to all lanes, also to those that
// are not concerned, and so must be defined for all values.
#pragma once

#include <cmath>
#include <utility>

#include "../decoder.h"
#include "../formats.h"
#include "../warp.h"
//
#include "../simd.h"

namespace ptxvm {

template <typename T, typename R, typename F>
Flow run_unary(Warp& warp, const Instruction& in, LaneMask lanes) {
  const Row<T> a = warp.load<T>(in.arg[1]);
  Lanes<R> result;
  for (int lane = 0; lane < kLanes; ++lane) result[lane] = static_cast<R>(F{}(a[lane]));
  warp.store(in.arg[0], lanes, result);
  return Flow::kNext;
}

template <typename T, typename R, typename F>
Flow run_binary(Warp& warp, const Instruction& in, LaneMask lanes) {
  const Row<T> a = warp.load<T>(in.arg[1]), b = warp.load<T>(in.arg[2]);
  Lanes<R> result;
  for (int lane = 0; lane < kLanes; ++lane) result[lane] = static_cast<R>(F{}(a[lane], b[lane]));
  warp.store(in.arg[0], lanes, result);
  return Flow::kNext;
}

// The third operand is of the result's type.
template <typename T, typename R, typename F>
Flow run_ternary(Warp& warp, const Instruction& in, LaneMask lanes) {
  const Row<T> a = warp.load<T>(in.arg[1]), b = warp.load<T>(in.arg[2]);
  const Row<R> c = warp.load<R>(in.arg[3]);
  Lanes<R> result;
  for (int lane = 0; lane < kLanes; ++lane)
    result[lane] = static_cast<R>(F{}(a[lane], b[lane], c[lane]));
  warp.store(in.arg[0], lanes, result);
  return Flow::kNext;
}

// unary<float>([](float a) { return -a; }): decodes the operands and sets the handler. The
// operands are 64-bit registers or constants where T is.
template <typename T, typename R = T, typename F>
bool unary(Decoder& d, F) {
  d.instruction.arg = {d.destination(0, sizeof(R) == 8), d.source(1, sizeof(T) == 8)};
  d.instruction.run = run_unary<T, R, F>;
  return true;
}

template <typename T, typename R = T, typename F>
bool binary(Decoder& d, F) {
  d.instruction.arg = {d.destination(0, sizeof(R) == 8), d.source(1, sizeof(T) == 8),
                       d.source(2, sizeof(T) == 8)};
  d.instruction.run = run_binary<T, R, F>;
  return true;
}

template <typename T, typename R = T, typename F>
bool ternary(Decoder& d, F) {
  d.instruction.arg = {d.destination(0, sizeof(R) == 8), d.source(1, sizeof(T) == 8),
                       d.source(2, sizeof(T) == 8), d.source(3, sizeof(R) == 8)};
  d.instruction.run = run_ternary<T, R, F>;
  return true;
}

// Calls f with a value of the C++ type; signedness counts.
template <typename F>
bool with_integer(Type type, F&& f) {
  if (!type.integer()) return false;
  switch (type.bits) {
    case 8:
      return type.is_signed() ? f(int8_t{}) : f(uint8_t{});
    case 16:
      return type.is_signed() ? f(int16_t{}) : f(uint16_t{});
    case 32:
      return type.is_signed() ? f(int32_t{}) : f(uint32_t{});
    case 64:
      return type.is_signed() ? f(int64_t{}) : f(uint64_t{});
  }
  return false;
}

// Without regard to sign.
template <typename F>
bool with_bits(Type type, F&& f) {
  switch (type.bits) {
    case 16:
      return f(uint16_t{});
    case 32:
      return f(uint32_t{});
    case 64:
      return f(uint64_t{});
  }
  return false;
}

}  // namespace ptxvm
