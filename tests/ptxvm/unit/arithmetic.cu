// SPDX-License-Identifier: BSD-3-Clause
//
// Instructions of one lane: each form against the same operation in C++, on values that hurt.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>

#include "cases.h"

namespace {

constexpr int kValues = 32;

template <typename T>
std::vector<T> values() {
  std::vector<T> result;
  if constexpr (std::is_floating_point_v<T>) {
    const T list[] = {
        0,        -T(0),    1,        -1,       T(0.5),   T(-2.5),   T(3.25),     T(1e-3),
        T(7),     T(-7),    T(100),   T(1e5),   T(-1e5),  T(0.1),    T(1.5),      T(2.5),
        T(65504), T(1e30),  T(-1e30), T(1e-30), T(1e-40), T(-1e-40), T(INFINITY), T(-INFINITY),
        T(NAN),   T(127.5), T(255.5), T(-0.7),  T(4e9),   T(-4e9),   T(12.345),   T(-126)};
    result.assign(list, list + kValues);
  } else {
    for (int i = 0; i < kValues; ++i)
      result.push_back(i < 12   ? T(i - 4)
                       : i < 16 ? T(std::numeric_limits<T>::max() - (i - 12))
                       : i < 20 ? T(std::numeric_limits<T>::min() + (i - 16))
                                : T(0x9e3779b97f4a7c15ull * (i + 1) >> (i % 7)));
  }
  return result;
}

template <typename T>
bool same(T a, T b) {
  return std::memcmp(&a, &b, sizeof a) == 0 || a == b || (a != a && b != b);
}

template <typename T>
std::string text(T value) {
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  return std::to_string(value) + " (bits " + std::to_string(bits) + ")";
}

// All pairs of the values: thread i of block j has a = values[i], b = values[i + j], c = values[j].
template <typename T, typename C, typename R, typename Kernel, typename Expected>
void check(Kernel kernel, Expected expected, double tolerance) {
  const std::vector<T> a = values<T>();
  const std::vector<C> c = values<C>();
  unit::Buffer<T> inputs(a);
  unit::Buffer<C> thirds(c);
  unit::Buffer<R> results(kValues * kValues);
  kernel<<<kValues, kValues>>>(inputs.data(), thirds.data(), results.data());
  unit::expect(cudaGetLastError() == cudaSuccess, "launch failed");
  const std::vector<R> got = results.values();
  for (int j = 0; j < kValues; ++j)
    for (int i = 0; i < kValues; ++i) {
      const T x = a[i], y = a[(i + j) % kValues];
      const R wanted = expected(x, y, c[j]), value = got[j * kValues + i];
      const bool near = tolerance > 0 && std::abs(double(value) - double(wanted)) <=
                                             tolerance * std::abs(double(wanted));
      if (!near && !same(value, wanted))
        throw std::runtime_error(text(x) + ", " + text(y) + ", " + text(c[j]) + " gave " +
                                 text(value) + ", expected " + text(wanted));
    }
}

// FORM(name, instruction, constraints of result and operands, types of result, a and b, c, C++).
#define FORM_NEAR(name, instruction, r, t, u, R, T, C, tolerance, expression)           \
  __global__ void kernel_##name(const T* in, const C* third, R* out) {                  \
    const T a = in[threadIdx.x], b = in[(threadIdx.x + blockIdx.x) % kValues];          \
    const C c = third[blockIdx.x];                                                      \
    R d = 0;                                                                            \
    asm volatile("{ .reg .pred p, q; " instruction " }" : "+" r(d) : t(a), t(b), u(c)); \
    out[blockIdx.x * kValues + threadIdx.x] = d;                                        \
  }                                                                                     \
  CASE(name) {                                                                          \
    check<T, C, R>(                                                                     \
        kernel_##name,                                                                  \
        [](T a, T b, C c) -> R {                                                        \
          (void)a, (void)b, (void)c;                                                    \
          return expression;                                                            \
        },                                                                              \
        tolerance);                                                                     \
  }
#define FORM(name, instruction, r, t, u, R, T, C, expression) \
  FORM_NEAR(name, instruction, r, t, u, R, T, C, 0.0, expression)
#define INT(name, instruction, T, expression) \
  FORM(name, instruction, "r", "r", "r", T, T, T, static_cast<T>(expression))
#define LONG(name, instruction, T, expression) \
  FORM(name, instruction, "l", "l", "l", T, T, T, static_cast<T>(expression))
#define FLOAT(name, instruction, tolerance, expression) \
  FORM_NEAR(name, instruction, "f", "f", "f", float, float, float, tolerance, expression)

using s32 = int32_t;
using u32 = uint32_t;
using s64 = int64_t;
using u64 = uint64_t;

s64 quotient(s64 a, s64 b) { return b == 0 ? -1 : a / b; }
float flushed(float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x; }

INT(add_s32, "add.s32 %0, %1, %2;", u32, a + b)
INT(sub_s32, "sub.s32 %0, %1, %2;", u32, a - b)
INT(mul_lo_s32, "mul.lo.s32 %0, %1, %2;", u32, a* b)
INT(mul_hi_s32, "mul.hi.s32 %0, %1, %2;", s32, (s64(a) * b) >> 32)
INT(mul_hi_u32, "mul.hi.u32 %0, %1, %2;", u32, (u64(a) * b) >> 32)
INT(mad_lo_s32, "mad.lo.s32 %0, %1, %2, %3;", u32, a* b + c)
INT(mad_hi_u32, "mad.hi.u32 %0, %1, %2, %3;", u32, ((u64(a) * b) >> 32) + c)
INT(div_s32, "div.s32 %0, %1, %2;", s32, quotient(a, b))
INT(rem_s32, "rem.s32 %0, %1, %2;", s32, b == 0 ? a : s64(a) % b)
INT(div_u32, "div.u32 %0, %1, %2;", u32, b == 0 ? ~0u : a / b)
INT(rem_u32, "rem.u32 %0, %1, %2;", u32, b == 0 ? a : a % b)
INT(min_s32, "min.s32 %0, %1, %2;", s32, std::min(a, b))
INT(max_u32, "max.u32 %0, %1, %2;", u32, std::max(a, b))
INT(neg_s32, "neg.s32 %0, %1;", u32, 0u - a)
INT(abs_s32, "abs.s32 %0, %1;", s32, a < 0 ? 0u - u32(a) : u32(a))
INT(sad_s32, "sad.s32 %0, %1, %2, %3;", s32, u32(c) + u32(a < b ? s64(b) - a : s64(a) - b))
INT(mul24_lo_u32, "mul24.lo.u32 %0, %1, %2;", u32, (a & 0xffffff) * (b & 0xffffff))
FORM(mul_wide_s32, "mul.wide.s32 %0, %1, %2;", "l", "r", "r", s64, s32, s32, s64(a) * b)
FORM(mul_wide_u32, "mul.wide.u32 %0, %1, %2;", "l", "r", "r", u64, u32, u32, u64(a) * b)
FORM(mad_wide_s32, "mad.wide.s32 %0, %1, %2, %3;", "l", "r", "l", u64, s32, u64,
     u64(s64(a) * b) + c)
FORM(mul_wide_u16, "mul.wide.u16 %0, %1, %2;", "r", "h", "h", u32, uint16_t, uint16_t, u32(a) * b)
FORM(add_s16, "add.s16 %0, %1, %2;", "h", "h", "h", uint16_t, uint16_t, uint16_t, uint16_t(a + b))
FORM(min_s16, "min.s16 %0, %1, %2;", "h", "h", "h", int16_t, int16_t, int16_t, std::min(a, b))
LONG(add_s64, "add.s64 %0, %1, %2;", u64, a + b)
LONG(sub_s64, "sub.s64 %0, %1, %2;", u64, a - b)
LONG(mul_lo_s64, "mul.lo.s64 %0, %1, %2;", u64, a* b)
LONG(mul_hi_u64, "mul.hi.u64 %0, %1, %2;", u64, (static_cast<unsigned __int128>(a) * b) >> 64)
LONG(mul_hi_s64, "mul.hi.s64 %0, %1, %2;", s64, (static_cast<__int128>(a) * b) >> 64)
LONG(mad_lo_s64, "mad.lo.s64 %0, %1, %2, %3;", u64, a* b + c)
LONG(div_u64, "div.u64 %0, %1, %2;", u64, b == 0 ? ~0ull : a / b)
LONG(rem_u64, "rem.u64 %0, %1, %2;", u64, b == 0 ? a : a % b)
LONG(min_s64, "min.s64 %0, %1, %2;", s64, std::min(a, b))

INT(and_b32, "and.b32 %0, %1, %2;", u32, a& b)
INT(or_b32, "or.b32 %0, %1, %2;", u32, a | b)
INT(xor_b32, "xor.b32 %0, %1, %2;", u32, a ^ b)
INT(not_b32, "not.b32 %0, %1;", u32, ~a)
LONG(and_b64, "and.b64 %0, %1, %2;", u64, a& b)
INT(lop3_0xe8, "lop3.b32 %0, %1, %2, %3, 0xe8;", u32, (a & b) | (a & c) | (b & c))
INT(lop3_0x96, "lop3.b32 %0, %1, %2, %3, 0x96;", u32, a ^ b ^ c)
INT(shl_b32, "shl.b32 %0, %1, %2;", u32, b > 31 ? 0 : a << b)
FORM(shr_u16, "shr.u16 %0, %1, %3;", "h", "h", "r", uint16_t, uint16_t, u32,
     uint16_t(c > 15 ? 0 : a >> c))
INT(shr_u32, "shr.u32 %0, %1, %2;", u32, b > 31 ? 0 : a >> b)
INT(shr_s32, "shr.s32 %0, %1, %2;", s32, a >> std::min<u32>(u32(b), 31))
FORM(shl_b64, "shl.b64 %0, %1, %3;", "l", "l", "r", u64, u64, u32, c > 63 ? 0 : a << c)
FORM(shr_s64, "shr.s64 %0, %1, %3;", "l", "l", "r", s64, s64, u32, a >> std::min(c, 63u))
INT(shf_l_wrap, "shf.l.wrap.b32 %0, %1, %2, %3;", u32, ((u64(b) << 32 | a) << (c & 31)) >> 32)
INT(shf_r_wrap, "shf.r.wrap.b32 %0, %1, %2, %3;", u32, (u64(b) << 32 | a) >> (c & 31))
INT(shf_r_clamp, "shf.r.clamp.b32 %0, %1, %2, %3;", u32, (u64(b) << 32 | a) >> std::min(c, 32u))
INT(prmt, "prmt.b32 %0, %1, %2, 0x7531;", u32,
    (a >> 8 & 0xff) | (a >> 24) << 8 | (b >> 8 & 0xff) << 16 | (b >> 24) << 24)
INT(prmt_sign, "prmt.b32 %0, %1, %2, 0x888b;", u32,
    (a >> 31 ? 0xffu : 0u) | (a & 0x80 ? 0xffffff00u : 0u))
INT(bfe_u32, "bfe.u32 %0, %1, 5, 9;", u32, a >> 5 & 0x1ff)
INT(bfe_s32, "bfe.s32 %0, %1, 5, 9;", s32, s32(u32(a) << 18) >> 23)
INT(bfe_s32_past_the_end, "bfe.s32 %0, %1, 28, 9;", s32, a >> 28)
INT(bfi_b32, "bfi.b32 %0, %1, %2, 4, 8;", u32, (b & ~0xff0u) | (a & 0xff) << 4)
INT(popc_b32, "popc.b32 %0, %1;", u32, std::popcount(a))
INT(clz_b32, "clz.b32 %0, %1;", u32, std::countl_zero(a))
INT(bfind_u32, "bfind.u32 %0, %1;", u32, a == 0 ? ~0u : 31 - std::countl_zero(a))
FORM(popc_b64, "popc.b64 %0, %1;", "r", "l", "l", u32, u64, u64, std::popcount(a))
INT(brev_b32, "brev.b32 %0, %1;", u32, [](u32 x) {
  u32 r = 0;
  for (int i = 0; i < 32; ++i) r |= (x >> i & 1) << (31 - i);
  return r;
}(a))

INT(setp_lt_s32, "setp.lt.s32 p, %1, %2; selp.s32 %0, 1, 0, p;", s32, a < b)
INT(setp_hs_u32, "setp.hs.u32 p, %1, %2; selp.b32 %0, %1, %2, p;", u32, a >= b ? a : b)
INT(setp_and, "setp.eq.s32 q, %1, %3; setp.gt.and.s32 p, %1, %2, !q; selp.s32 %0, 1, 0, p;", s32,
    a > b && a != c)
INT(setp_two, "setp.ge.s32 p|q, %1, %2; selp.s32 %0, 1, 0, p; @q add.s32 %0, %0, 2;", s32,
    a >= b ? 1 : 2)
INT(set_s32, "set.le.u32.s32 %0, %1, %2;", s32, a <= b ? -1 : 0)
INT(slct_s32, "slct.b32.s32 %0, %1, %2, %3;", s32, c >= 0 ? a : b)
INT(guarded, "setp.ne.s32 p, %1, %2; mov.b32 %0, %3; @!p mov.b32 %0, 77;", s32, a != b ? c : 77)
FORM(setp_lt_f32, "setp.lt.f32 p, %1, %2; selp.s32 %0, 1, 0, p;", "r", "f", "f", s32, float, float,
     a < b)
FORM(setp_geu_f32, "setp.geu.f32 p, %1, %2; selp.s32 %0, 1, 0, p;", "r", "f", "f", s32, float,
     float, !(a < b))
FORM(setp_ne_f32, "setp.ne.f32 p, %1, %2; selp.s32 %0, 1, 0, p;", "r", "f", "f", s32, float, float,
     a<b || a> b)
FORM(setp_nan_f32, "setp.nan.f32 p, %1, %2; selp.s32 %0, 1, 0, p;", "r", "f", "f", s32, float,
     float, a != a || b != b)
FORM(setp_eq_s64, "setp.eq.s64 p, %1, %3; selp.s32 %0, 1, 0, p;", "r", "l", "l", s32, s64, s64,
     a == c)
FORM(mov_pack, "mov.b64 %0, {%1, %2};", "l", "r", "r", u64, u32, u32, u64(b) << 32 | a)
FORM(mov_unpack, "{ .reg .b32 x; mov.b64 {x, %0}, %1; add.u32 %0, %0, x; }", "r", "l", "l", u32,
     u64, u64, u32(a) + u32(a >> 32))

FLOAT(add_f32, "add.f32 %0, %1, %2;", 0, a + b)
FLOAT(sub_f32, "sub.f32 %0, %1, %2;", 0, a - b)
FLOAT(mul_f32, "mul.f32 %0, %1, %2;", 0, a* b)
FLOAT(mul_ftz_f32, "mul.ftz.f32 %0, %1, %2;", 0, flushed(flushed(a) * flushed(b)))
FLOAT(fma_f32, "fma.rn.f32 %0, %1, %2, %3;", 0, std::fma(a, b, c))
FLOAT(div_f32, "div.rn.f32 %0, %1, %2;", 0, a / b)
FLOAT(min_f32, "min.f32 %0, %1, %2;", 0, std::fmin(a, b))
FLOAT(max_f32, "max.f32 %0, %1, %2;", 0, std::fmax(a, b))
FLOAT(min_nan_f32, "min.NaN.f32 %0, %1, %2;", 0, a != a || b != b ? NAN : std::fmin(a, b))
FLOAT(max_nan_f32, "max.NaN.f32 %0, %1, %2;", 0, a != a || b != b ? NAN : std::fmax(a, b))
FLOAT(neg_f32, "neg.f32 %0, %1;", 0, -a)
FLOAT(abs_f32, "abs.f32 %0, %1;", 0, std::fabs(a))
FLOAT(rcp_f32, "rcp.rn.f32 %0, %1;", 0, 1 / a)
FLOAT(sqrt_f32, "sqrt.rn.f32 %0, %1;", 0, std::sqrt(a))
FLOAT(ex2_f32, "ex2.approx.f32 %0, %1;", 2.4e-7, std::exp2(a))
FLOAT(ex2_ftz_f32, "ex2.approx.ftz.f32 %0, %1;", 2.4e-7, flushed(std::exp2(flushed(a))))
FLOAT(lg2_f32, "lg2.approx.f32 %0, %1;", 2.4e-7, std::log2(a))
FLOAT(rsqrt_f32, "rsqrt.approx.f32 %0, %1;", 2.4e-7, 1 / std::sqrt(a))
FLOAT(tanh_f32, "tanh.approx.f32 %0, %1;", 5e-4, std::tanh(a))
FLOAT(copysign_f32, "copysign.f32 %0, %1, %2;", 0, std::copysign(b, a))
FLOAT(cvt_rni_f32, "cvt.rni.f32.f32 %0, %1;", 0, std::nearbyint(a))
FLOAT(cvt_rmi_f32, "cvt.rmi.f32.f32 %0, %1;", 0, std::floor(a))
FORM(add_f64, "add.f64 %0, %1, %2;", "d", "d", "d", double, double, double, a + b)
FORM(fma_f64, "fma.rn.f64 %0, %1, %2, %3;", "d", "d", "d", double, double, double,
     std::fma(a, b, c))

s32 to_s32(double x) {
  return x != x ? 0 : x >= 2147483647.0 ? 2147483647 : x <= -2147483648.0 ? INT32_MIN : s32(x);
}
FORM(cvt_rzi_s32_f32, "cvt.rzi.s32.f32 %0, %1;", "r", "f", "f", s32, float, float,
     to_s32(std::trunc(double(a))))
FORM(cvt_rni_s32_f32, "cvt.rni.s32.f32 %0, %1;", "r", "f", "f", s32, float, float,
     to_s32(std::nearbyint(double(a))))
FORM(cvt_rpi_s32_f32, "cvt.rpi.s32.f32 %0, %1;", "r", "f", "f", s32, float, float,
     to_s32(std::ceil(double(a))))
FORM(cvt_f32_s32, "cvt.rn.f32.s32 %0, %1;", "f", "r", "r", float, s32, s32, float(a))
FORM(cvt_f32_u32, "cvt.rn.f32.u32 %0, %1;", "f", "r", "r", float, u32, u32, float(a))
FORM(cvt_f32_s64, "cvt.rn.f32.s64 %0, %1;", "f", "l", "l", float, s64, s64, float(a))
FORM(cvt_f64_f32, "cvt.f64.f32 %0, %1;", "d", "f", "f", double, float, float, double(a))
FORM(cvt_f32_f64, "cvt.rn.f32.f64 %0, %1;", "f", "d", "d", float, double, double, float(a))
FORM(cvt_s64_s32, "cvt.s64.s32 %0, %1;", "l", "r", "r", s64, s32, s32, s64(a))
FORM(cvt_u64_u32, "cvt.u64.u32 %0, %1;", "l", "r", "r", u64, u32, u32, u64(a))
FORM(cvt_u32_u64, "cvt.u32.u64 %0, %1;", "r", "l", "l", u32, u64, u64, u32(a))
// Registers wider than the type.
FORM(cvt_s64_s32_wide_source, "cvt.s64.s32 %0, %1;", "l", "l", "l", s64, s64, s64, s64(s32(a)))
FORM(cvt_u32_u32_wide_source, "cvt.u32.u16 %0, %1;", "r", "l", "l", u32, u64, u64, u32(uint16_t(a)))
FORM(cvt_s32_s16_wide_destination, "cvt.s32.s16 %0, %1;", "l", "h", "h", s64, int16_t, int16_t,
     s64(a))
FORM(cvt_f32_s32_wide_source, "cvt.rn.f32.s32 %0, %1;", "f", "l", "l", float, s64, s64,
     float(s32(a)))
FORM(cvt_s32_s8, "cvt.s32.s8 %0, %1;", "r", "r", "r", s32, u32, u32, int8_t(a))
FORM(cvt_u16_u32, "cvt.u16.u32 %0, %1;", "h", "r", "r", uint16_t, u32, u32, uint16_t(a))
FORM(cvt_sat_u8_s32, "cvt.sat.u8.s32 %0, %1;", "r", "r", "r", u32, s32, s32,
     u32(std::clamp(a, 0, 255)))

// 16-bit formats against CUDA's own conversions in host code.
using bf16 = __nv_bfloat16;
template <typename T>
uint16_t bits(T x) {
  uint16_t result;
  std::memcpy(&result, &x, 2);
  return float(x) != float(x) ? 0x7fff : result;
}
float from_half(u32 x) {
  __half h;
  const uint16_t low = uint16_t(x);
  std::memcpy(&h, &low, 2);
  return __half2float(h);
}
float from_bf16(u32 x) { return std::bit_cast<float>(x << 16); }
template <typename F>
u32 each(u32 a, u32 b, F f) {
  return f(a & 0xffff, b & 0xffff) | u32(f(a >> 16, b >> 16)) << 16;
}

FORM(cvt_bf16x2_f32, "cvt.rn.bf16x2.f32 %0, %1, %2;", "r", "f", "f", u32, float, float,
     u32(bits(__float2bfloat16_rn(a))) << 16 | bits(__float2bfloat16_rn(b)))
FORM(cvt_f16x2_f32, "cvt.rn.f16x2.f32 %0, %1, %2;", "r", "f", "f", u32, float, float,
     u32(bits(__float2half_rn(a))) << 16 | bits(__float2half_rn(b)))
FORM(cvt_bf16_f32, "cvt.rn.bf16.f32 %0, %1;", "h", "f", "f", uint16_t, float, float,
     bits(__float2bfloat16_rn(a)))
FORM(cvt_f16_f32, "cvt.rn.f16.f32 %0, %1;", "h", "f", "f", uint16_t, float, float,
     bits(__float2half_rn(a)))
FORM(cvt_f32_f16, "cvt.f32.f16 %0, %1;", "f", "h", "h", float, uint16_t, uint16_t, from_half(a))
INT(add_f16x2, "add.f16x2 %0, %1, %2;", u32,
    each(a, b, [](u32 x, u32 y) { return bits(__float2half_rn(from_half(x) + from_half(y))); }))
INT(mul_f16x2, "mul.f16x2 %0, %1, %2;", u32,
    each(a, b, [](u32 x, u32 y) { return bits(__float2half_rn(from_half(x) * from_half(y))); }))
INT(fma_bf16x2, "fma.rn.bf16x2 %0, %1, %2, %1;", u32, each(a, b, [](u32 x, u32 y) {
      return bits(__float2bfloat16_rn(float(double(from_bf16(x)) * from_bf16(y) + from_bf16(x))));
    }))
INT(max_bf16x2, "max.bf16x2 %0, %1, %2;", u32, each(a, b, [](u32 x, u32 y) {
      return bits(__float2bfloat16_rn(std::fmax(from_bf16(x), from_bf16(y))));
    }))

// ---- Forms that our kernels have and that no calibrator executes.

INT(min_u32, "min.u32 %0, %1, %2;", u32, std::min(a, b))
LONG(div_s64, "div.s64 %0, %1, %2;", s64, b == -1 ? 0 - u64(a) : quotient(a, b))
LONG(rem_s64, "rem.s64 %0, %1, %2;", s64, b == 0 ? a : b == -1 ? 0 : a % b)
LONG(max_s64, "max.s64 %0, %1, %2;", s64, std::max(a, b))
LONG(neg_s64, "neg.s64 %0, %1;", u64, 0 - a)
LONG(not_b64, "not.b64 %0, %1;", u64, ~a)
LONG(or_b64, "or.b64 %0, %1, %2;", u64, a | b)
LONG(selp_b64, "setp.gt.s64 p, %1, %2; selp.b64 %0, %1, %3, p;", s64, a > b ? a : c)
LONG(setp_ge_s64, "setp.ge.s64 p, %1, %2; selp.b64 %0, 1, 0, p;", s64, a >= b)
LONG(setp_le_s64, "setp.le.s64 p, %1, %2; selp.b64 %0, 1, 0, p;", s64, a <= b)
LONG(setp_lt_s64, "setp.lt.s64 p, %1, %2; selp.b64 %0, 1, 0, p;", s64, a < b)
LONG(setp_ne_s64, "setp.ne.s64 p, %1, %2; selp.b64 %0, 1, 0, p;", s64, a != b)
LONG(setp_lt_u64, "setp.lt.u64 p, %1, %2; selp.b64 %0, 1, 0, p;", u64, a < b)
FORM(and_b16, "and.b16 %0, %1, %2;", "h", "h", "h", uint16_t, uint16_t, uint16_t, uint16_t(a& b))
FORM(setp_eq_s16, "setp.eq.s16 p, %1, %2; selp.s32 %0, 1, 0, p;", "r", "h", "h", s32, int16_t,
     int16_t, a == b)
FORM(setp_ne_s16, "setp.ne.s16 p, %1, %2; selp.s32 %0, 1, 0, p;", "r", "h", "h", s32, int16_t,
     int16_t, a != b)
FORM(setp_gt_s16, "setp.gt.s16 p, %1, %2; selp.s32 %0, 1, 0, p;", "r", "h", "h", s32, int16_t,
     int16_t, a > b)
INT(predicates_and_or,
    "setp.le.s32 p, %1, %2; setp.gt.s32 q, %1, %3; and.pred p, p, q;"
    "setp.eq.s32 q, %2, %3; or.pred p, p, q; selp.s32 %0, 1, 0, p;",
    s32, (a <= b && a > c) || b == c)
FLOAT(add_rn_f32, "add.rn.f32 %0, %1, %2;", 0.0, a + b)
FLOAT(sub_rn_f32, "sub.rn.f32 %0, %1, %2;", 0.0, a - b)
FLOAT(mul_rn_f32, "mul.rn.f32 %0, %1, %2;", 0.0, a* b)
FLOAT(rcp_approx_ftz_f32, "rcp.approx.ftz.f32 %0, %1;", 2e-7, flushed(1 / flushed(a)))
FLOAT(selp_f32, "setp.gt.f32 p, %1, %2; selp.f32 %0, %1, %3, p;", 0.0, a > b ? a : c)
FORM(setp_eq_f32, "setp.eq.f32 p, %1, %2; selp.s32 %0, 1, 0, p;", "r", "f", "f", s32, float, float,
     a == b)
FORM(setp_neu_f32, "setp.neu.f32 p, %1, %2; selp.s32 %0, 1, 0, p;", "r", "f", "f", s32, float,
     float, !(a == b))
FORM(mul_f64, "mul.f64 %0, %1, %2;", "d", "d", "d", double, double, double, a* b)
FORM(sub_f64, "sub.f64 %0, %1, %2;", "d", "d", "d", double, double, double, a - b)

}  // namespace
