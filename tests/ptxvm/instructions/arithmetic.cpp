// SPDX-License-Identifier: BSD-3-Clause
//
// Integer arithmetic.
#include <algorithm>
#include <type_traits>

#include "handlers.h"

namespace ptxvm {
namespace {

// Twice as wide as T, of the same signedness.
template <typename T>
using Wide = std::conditional_t<
    sizeof(T) == 8, std::conditional_t<std::is_signed_v<T>, __int128, unsigned __int128>,
    std::conditional_t<sizeof(T) == 4, std::conditional_t<std::is_signed_v<T>, int64_t, uint64_t>,
                       std::conditional_t<std::is_signed_v<T>, int32_t, uint32_t>>>;

template <typename T>
using Unsigned = std::make_unsigned_t<T>;

template <typename T>
T wrapped_product(T a, T b) {
  return static_cast<T>(uint64_t(Unsigned<T>(a)) * uint64_t(Unsigned<T>(b)));
}

template <typename T>
T wrapped_sum(T a, T b) {
  return static_cast<T>(uint64_t(Unsigned<T>(a)) + uint64_t(Unsigned<T>(b)));
}

bool add(Decoder& d) {
  if (!d.type().integer() || d.has("cc") || d.has("sat")) return false;
  return with_bits(d.type(), [&](auto zero) {
    using T = decltype(zero);
    return binary<T>(d, [](T a, T b) { return T(a + b); });
  });
}

bool sub(Decoder& d) {
  if (!d.type().integer() || d.has("cc") || d.has("sat")) return false;
  return with_bits(d.type(), [&](auto zero) {
    using T = decltype(zero);
    return binary<T>(d, [](T a, T b) { return T(a - b); });
  });
}

bool mul(Decoder& d) {
  return with_integer(d.type(), [&](auto zero) {
    using T = decltype(zero);
    using W = Wide<T>;
    if (d.has("lo")) return binary<T>(d, [](T a, T b) { return wrapped_product(a, b); });
    if (d.has("hi"))
      return binary<T>(d, [](T a, T b) { return T((W(a) * W(b)) >> (8 * sizeof(T))); });
    if constexpr (sizeof(T) == 2 || sizeof(T) == 4)
      if (d.has("wide")) return binary<T, W>(d, [](T a, T b) { return wrapped_product<W>(a, b); });
    return false;
  });
}

bool mad(Decoder& d) {
  if (d.has("cc") || d.has("sat")) return false;
  return with_integer(d.type(), [&](auto zero) {
    using T = decltype(zero);
    using W = Wide<T>;
    if (d.has("lo"))
      return ternary<T>(d, [](T a, T b, T c) { return wrapped_sum(wrapped_product(a, b), c); });
    if (d.has("hi"))
      return ternary<T>(
          d, [](T a, T b, T c) { return wrapped_sum(T((W(a) * W(b)) >> (8 * sizeof(T))), c); });
    if constexpr (sizeof(T) == 2 || sizeof(T) == 4)
      if (d.has("wide"))
        return ternary<T, W>(
            d, [](T a, T b, W c) { return wrapped_sum(wrapped_product<W>(a, b), c); });
    return false;
  });
}

// mul24 and mad24: products of the low 24 bits.
bool mul24(Decoder& d) {
  if (!d.has("lo")) return false;
  if (d.type() == Type{Kind::kSigned, 32})
    return binary<uint32_t>(d, [](uint32_t a, uint32_t b) {
      return static_cast<uint32_t>(int64_t(int32_t(a << 8) >> 8) * (int32_t(b << 8) >> 8));
    });
  return binary<uint32_t>(d,
                          [](uint32_t a, uint32_t b) { return (a & 0xffffff) * (b & 0xffffff); });
}

bool mad24(Decoder& d) {
  if (!d.has("lo") || d.has("sat")) return false;
  if (d.type() == Type{Kind::kSigned, 32})
    return ternary<uint32_t>(d, [](uint32_t a, uint32_t b, uint32_t c) {
      return static_cast<uint32_t>(int64_t(int32_t(a << 8) >> 8) * (int32_t(b << 8) >> 8)) + c;
    });
  return ternary<uint32_t>(
      d, [](uint32_t a, uint32_t b, uint32_t c) { return (a & 0xffffff) * (b & 0xffffff) + c; });
}

// The device defines no quotient by zero; here it has all bits set.
bool div(Decoder& d) {
  return with_integer(d.type(), [&](auto zero) {
    using T = decltype(zero);
    return binary<T>(d, [](T a, T b) {
      if (b == 0) return T(-1);
      if (std::is_signed_v<T> && b == T(-1)) return T(0 - uint64_t(a));
      return T(a / b);
    });
  });
}

bool rem(Decoder& d) {
  return with_integer(d.type(), [&](auto zero) {
    using T = decltype(zero);
    return binary<T>(d, [](T a, T b) {
      if (b == 0) return a;
      if (std::is_signed_v<T> && b == T(-1)) return T(0);
      return T(a % b);
    });
  });
}

bool min(Decoder& d) {
  return with_integer(d.type(), [&](auto zero) {
    using T = decltype(zero);
    return binary<T>(d, [](T a, T b) { return std::min(a, b); });
  });
}

bool max(Decoder& d) {
  return with_integer(d.type(), [&](auto zero) {
    using T = decltype(zero);
    return binary<T>(d, [](T a, T b) { return std::max(a, b); });
  });
}

bool neg(Decoder& d) {
  return with_integer(d.type(), [&](auto zero) {
    using T = decltype(zero);
    return unary<T>(d, [](T a) { return T(0 - uint64_t(a)); });
  });
}

bool abs(Decoder& d) {
  return with_integer(d.type(), [&](auto zero) {
    using T = decltype(zero);
    return unary<T>(d, [](T a) { return a < 0 ? T(0 - uint64_t(a)) : a; });
  });
}

bool sad(Decoder& d) {
  return with_integer(d.type(), [&](auto zero) {
    using T = decltype(zero);
    return ternary<T>(d, [](T a, T b, T c) {
      return wrapped_sum(c, T(a < b ? uint64_t(b) - uint64_t(a) : uint64_t(a) - uint64_t(b)));
    });
  });
}

}  // namespace

void add_arithmetic(Opcodes& opcodes) {
  opcodes["add"].push_back(add);
  opcodes["sub"].push_back(sub);
  opcodes["mul"].push_back(mul);
  opcodes["mad"].push_back(mad);
  opcodes["mul24"].push_back(mul24);
  opcodes["mad24"].push_back(mad24);
  opcodes["div"].push_back(div);
  opcodes["rem"].push_back(rem);
  opcodes["min"].push_back(min);
  opcodes["max"].push_back(max);
  opcodes["neg"].push_back(neg);
  opcodes["abs"].push_back(abs);
  opcodes["sad"].push_back(sad);
}

}  // namespace ptxvm
