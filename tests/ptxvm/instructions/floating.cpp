// SPDX-License-Identifier: BSD-3-Clause
//
// Arithmetic of float and double, and the approximations of the special function unit, which are
// computed to about the last place here.
#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "handlers.h"

namespace ptxvm {
namespace {

// f32 with or without .ftz, or f64, rounded to nearest. f gets a value of the type and a function
// that flushes if the instruction does.
struct Flush {
  float operator()(float x) const { return flush(x); }
};
struct Keep {
  template <typename T>
  T operator()(T x) const {
    return x;
  }
};

template <typename F>
bool with_floating(Decoder& d, F&& f) {
  for (const char* rounding : {"rz", "rm", "rp", "sat"})
    if (d.has(rounding)) return false;
  if (d.type() == Type{Kind::kFloat, 64}) return f(double{}, Keep{});
  if (d.type() != Type{Kind::kFloat, 32}) return false;
  return d.has("ftz") ? f(float{}, Flush{}) : f(float{}, Keep{});
}

bool add(Decoder& d) {
  return with_floating(d, [&](auto zero, auto z) {
    using T = decltype(zero);
    return binary<T>(d, [](T a, T b) {
      decltype(z) z;
      return z(z(a) + z(b));
    });
  });
}

bool sub(Decoder& d) {
  return with_floating(d, [&](auto zero, auto z) {
    using T = decltype(zero);
    return binary<T>(d, [](T a, T b) {
      decltype(z) z;
      return z(z(a) - z(b));
    });
  });
}

bool mul(Decoder& d) {
  return with_floating(d, [&](auto zero, auto z) {
    using T = decltype(zero);
    return binary<T>(d, [](T a, T b) {
      decltype(z) z;
      return z(z(a) * z(b));
    });
  });
}

bool fma(Decoder& d) {
  return with_floating(d, [&](auto zero, auto z) {
    using T = decltype(zero);
    return ternary<T>(d, [](T a, T b, T c) {
      decltype(z) z;
      return z(std::fma(z(a), z(b), z(c)));
    });
  });
}

bool div(Decoder& d) {
  return with_floating(d, [&](auto zero, auto z) {
    using T = decltype(zero);
    return binary<T>(d, [](T a, T b) {
      decltype(z) z;
      return z(z(a) / z(b));
    });
  });
}

// One NaN is ignored, unless the instruction says .NaN; +0 is greater than -0.
template <typename T>
T lesser(T a, T b) {
  return a < b || (a == b && std::signbit(a)) || b != b ? a : b;
}

bool min(Decoder& d) {
  if (d.operand_count() != 3 || d.has("xorsign")) return false;
  return with_floating(d, [&](auto zero, auto z) {
    using T = decltype(zero);
    if (d.has("NaN"))
      return binary<T>(d, [](T a, T b) {
        decltype(z) z;
        return a != a ? a : b != b ? b : lesser(z(a), z(b));
      });
    return binary<T>(d, [](T a, T b) {
      decltype(z) z;
      return lesser(z(a), z(b));
    });
  });
}

bool max(Decoder& d) {
  if (d.operand_count() != 3 || d.has("xorsign")) return false;
  return with_floating(d, [&](auto zero, auto z) {
    using T = decltype(zero);
    if (d.has("NaN"))
      return binary<T>(d, [](T a, T b) {
        decltype(z) z;
        return a != a ? a : b != b ? b : -lesser(z(-a), z(-b));
      });
    return binary<T>(d, [](T a, T b) {
      decltype(z) z;
      return -lesser(z(-a), z(-b));
    });
  });
}

bool neg(Decoder& d) {
  return with_floating(d, [&](auto zero, auto z) {
    return unary<decltype(zero)>(d, [](decltype(zero) a) {
      decltype(z) z;
      return -z(a);
    });
  });
}

bool abs(Decoder& d) {
  return with_floating(d, [&](auto zero, auto z) {
    return unary<decltype(zero)>(d, [](decltype(zero) a) {
      decltype(z) z;
      return std::fabs(z(a));
    });
  });
}

bool copysign(Decoder& d) {
  return with_floating(d, [&](auto zero, auto) {
    using T = decltype(zero);
    return binary<T>(d, [](T sign, T a) { return std::copysign(a, sign); });
  });
}

bool rcp(Decoder& d) {
  return with_floating(d, [&](auto zero, auto z) {
    using T = decltype(zero);
    return unary<T>(d, [](T a) {
      decltype(z) z;
      return z(T(1) / z(a));
    });
  });
}

bool sqrt(Decoder& d) {
  return with_floating(d, [&](auto zero, auto z) {
    return unary<decltype(zero)>(d, [](decltype(zero) a) {
      decltype(z) z;
      return z(std::sqrt(z(a)));
    });
  });
}

bool rsqrt(Decoder& d) {
  return with_floating(d, [&](auto zero, auto z) {
    using T = decltype(zero);
    return unary<T>(d, [](T a) {
      decltype(z) z;
      return z(T(1) / std::sqrt(z(a)));
    });
  });
}

// 2^x by its Taylor series around the nearest integer, in double: better than half a unit in the
// last place of a float, and without branches, so that compilers vectorise it.
float exp2_of(float x) {
  constexpr double kLn2 = 0.69314718055994530942, kShift = 0x1.8p52;
  const double clamped = x < -200.0f ? -200.0 : x > 200.0f ? 200.0 : double{x};
  const double shifted = clamped + kShift;  // its low bits are the nearest integer
  const double r = (clamped - (shifted - kShift)) * kLn2;
  double p = 1.0 / 40320;
  for (double c : {1.0 / 5040, 1.0 / 720, 1.0 / 120, 1.0 / 24, 1.0 / 6, 0.5, 1.0, 1.0})
    p = p * r + c;
  const uint64_t exponent = std::bit_cast<uint64_t>(shifted) << 52;
  return static_cast<float>(std::bit_cast<double>(std::bit_cast<uint64_t>(p) + exponent));
}

bool single(const Decoder& d) { return d.type() == Type{Kind::kFloat, 32}; }

bool ex2(Decoder& d) {
  if (!single(d)) return false;
  return with_floating(d, [&](auto, auto z) {
    return unary<float>(d, [](float a) {
      decltype(z) z;
      return a != a ? a : z(exp2_of(z(a)));
    });
  });
}

bool lg2(Decoder& d) {
  if (!single(d)) return false;
  return with_floating(d, [&](auto, auto z) {
    return unary<float>(d, [](float a) {
      decltype(z) z;
      return z(std::log2(z(a)));
    });
  });
}

bool sin(Decoder& d) {
  return single(d) && unary<float>(d, [](float a) { return std::sin(a); });
}

bool cos(Decoder& d) {
  return single(d) && unary<float>(d, [](float a) { return std::cos(a); });
}

// The device's error is about 2^-11 of the result; so is ours, lest a kernel relies on better.
bool tanh(Decoder& d) {
  return single(d) && unary<float>(d, [](float a) { return std::tanh(a) * (1 + 0x1p-11f); });
}

Flow run_testp(Warp& warp, const Instruction& in, LaneMask lanes) {
  const Row<float> a = warp.load<float>(in.arg[1]);
  LaneMask result = 0;
  for (int lane = 0; lane < kLanes; ++lane) {
    const int kind = std::fpclassify(a[lane]);
    const bool holds = in.immediate == 0   ? kind != FP_NAN && kind != FP_INFINITE
                       : in.immediate == 1 ? kind == FP_INFINITE
                       : in.immediate == 2 ? kind != FP_NAN
                       : in.immediate == 3 ? kind == FP_NAN
                       : in.immediate == 4 ? kind == FP_NORMAL
                                           : kind == FP_SUBNORMAL;
    result |= static_cast<LaneMask>(holds) << lane;
  }
  warp.set_predicate(in.arg[0], lanes, result);
  return Flow::kNext;
}

bool testp(Decoder& d) {
  constexpr const char* kTests[] = {"finite",     "infinite", "number",
                                    "notanumber", "normal",   "subnormal"};
  const auto test = std::find(std::begin(kTests), std::end(kTests), d.word(1));
  if (!single(d) || test == std::end(kTests)) return false;
  d.instruction.arg = {d.predicate(0), d.source(1)};
  d.instruction.immediate = static_cast<int32_t>(test - kTests);
  d.instruction.run = run_testp;
  return true;
}

}  // namespace

void add_floating(Opcodes& opcodes) {
  opcodes["add"].push_back(add);
  opcodes["sub"].push_back(sub);
  opcodes["mul"].push_back(mul);
  opcodes["fma"].push_back(fma);
  opcodes["mad"].push_back(fma);
  opcodes["div"].push_back(div);
  opcodes["min"].push_back(min);
  opcodes["max"].push_back(max);
  opcodes["neg"].push_back(neg);
  opcodes["abs"].push_back(abs);
  opcodes["copysign"].push_back(copysign);
  opcodes["rcp"].push_back(rcp);
  opcodes["sqrt"].push_back(sqrt);
  opcodes["rsqrt"].push_back(rsqrt);
  opcodes["ex2"].push_back(ex2);
  opcodes["lg2"].push_back(lg2);
  opcodes["sin"].push_back(sin);
  opcodes["cos"].push_back(cos);
  opcodes["tanh"].push_back(tanh);
  opcodes["testp"].push_back(testp);
}

}  // namespace ptxvm
