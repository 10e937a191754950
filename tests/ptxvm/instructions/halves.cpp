// SPDX-License-Identifier: BSD-3-Clause
//
// Arithmetic of f16 and bf16, alone or two in a register: in float, rounded once. (fma: in double,
// since float would round its sum.)
#include "handlers.h"

namespace ptxvm {
namespace {

template <typename T, bool kPacked, int kOperands, typename F>
Flow run_halves(Warp& warp, const Instruction& in, LaneMask lanes) {
  Row<uint32_t> operands[3]{};
  Lanes<uint32_t> result;
  for (int i = 0; i < kOperands; ++i) operands[i] = warp.load<uint32_t>(in.arg[i + 1]);
  for (int lane = 0; lane < kLanes; ++lane) {
    uint32_t both = 0;
    for (int half = 0; half < (kPacked ? 2 : 1); ++half) {
      float values[3]{};
      for (int i = 0; i < kOperands; ++i)
        values[i] = to_float(T{static_cast<uint16_t>(operands[i][lane] >> (16 * half))});
      both |= uint32_t{from_float<T>(F{}(values[0], values[1], values[2])).bits} << (16 * half);
    }
    result[lane] = both;
  }
  warp.store(in.arg[0], lanes, result);
  return Flow::kNext;
}

template <int kOperands, typename F>
bool halves(Decoder& d, F) {
  const Type type = d.type();
  if ((type.kind != Kind::kHalf && type.kind != Kind::kBFloat16) || d.has("sat") || d.has("relu") ||
      d.has("xorsign"))
    return false;
  d.instruction.arg[0] = d.destination(0);
  for (int i = 0; i < kOperands; ++i) d.instruction.arg[i + 1] = d.source(i + 1);
  if (type.kind == Kind::kHalf)
    d.instruction.run =
        type.packed ? run_halves<Half, true, kOperands, F> : run_halves<Half, false, kOperands, F>;
  else
    d.instruction.run = type.packed ? run_halves<BFloat16, true, kOperands, F>
                                    : run_halves<BFloat16, false, kOperands, F>;
  return true;
}

bool add(Decoder& d) {
  return halves<2>(d, [](float a, float b, float) { return a + b; });
}

bool sub(Decoder& d) {
  return halves<2>(d, [](float a, float b, float) { return a - b; });
}

bool mul(Decoder& d) {
  return halves<2>(d, [](float a, float b, float) { return a * b; });
}

bool fma(Decoder& d) {
  return halves<3>(d, [](float a, float b, float c) {
    return static_cast<float>(static_cast<double>(a) * b + c);
  });
}

bool min(Decoder& d) {
  if (d.has("NaN"))
    return halves<2>(d, [](float a, float b, float) {
      return a != a ? a : b != b || b < a ? b : a;
    });
  return halves<2>(d, [](float a, float b, float) { return a < b || b != b ? a : b; });
}

bool max(Decoder& d) {
  if (d.has("NaN"))
    return halves<2>(d, [](float a, float b, float) {
      return a != a ? a : b != b || b > a ? b : a;
    });
  return halves<2>(d, [](float a, float b, float) { return a > b || b != b ? a : b; });
}

bool neg(Decoder& d) {
  return halves<1>(d, [](float a, float, float) { return -a; });
}

bool abs(Decoder& d) {
  return halves<1>(d, [](float a, float, float) { return std::fabs(a); });
}

bool ex2(Decoder& d) {
  return halves<1>(d, [](float a, float, float) { return std::exp2(a); });
}

bool tanh(Decoder& d) {
  return halves<1>(d, [](float a, float, float) { return std::tanh(a); });
}

}  // namespace

void add_halves(Opcodes& opcodes) {
  opcodes["add"].push_back(add);
  opcodes["sub"].push_back(sub);
  opcodes["mul"].push_back(mul);
  opcodes["fma"].push_back(fma);
  opcodes["min"].push_back(min);
  opcodes["max"].push_back(max);
  opcodes["neg"].push_back(neg);
  opcodes["abs"].push_back(abs);
  opcodes["ex2"].push_back(ex2);
  opcodes["tanh"].push_back(tanh);
}

}  // namespace ptxvm
