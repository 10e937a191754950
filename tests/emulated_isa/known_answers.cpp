// SPDX-License-Identifier: BSD-3-Clause
//
// The emulated intrinsics, asked for what Intel's manual says of rounding, NaN, denormals, masks
// and order. known_answers: prints what differs. known_answers FAULT: does what a processor
// refuses. Compiled without RA_EMULATED it asks the processor instead.
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <bit>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <string_view>

#include "../../csrc/cpu/instructions.h"

#pragma GCC push_options
RA_TARGET("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c,amx-tile,amx-bf16")

namespace ring_attention::cpu {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr float kTiny = 0x1p-149f;  // the smallest denormal

int checks = 0, failures = 0;

void expect_bits(const char* what, int lane, uint32_t got, uint32_t wanted) {
  ++checks;
  if (got == wanted) return;
  ++failures;
  std::printf("%s[%d]: expected %#x, got %#x\n", what, lane, wanted, got);
}

// All NaNs are one, but for the rounding to bf16, which keeps their bits.
void expect(const char* what, int lane, float got, float wanted) {
  if (got != got && wanted != wanted) return expect_bits(what, lane, 0, 0);
  expect_bits(what, lane, std::bit_cast<uint32_t>(got), std::bit_cast<uint32_t>(wanted));
}

template <typename T>
struct Lanes {
  T lane[64 / sizeof(T)] = {};
};
// 0, 1, 2... from `first`.
template <typename T>
Lanes<T> numbered(T first) {
  Lanes<T> x;
  for (T& lane : x.lane) lane = first++;
  return x;
}
__m512 floats(std::initializer_list<float> values) {
  Lanes<float> x;
  std::copy(values.begin(), values.end(), x.lane);
  return _mm512_loadu_ps(x.lane);
}
__m512 vector(const Lanes<float>& x) { return _mm512_loadu_ps(x.lane); }
template <typename T>
__m512i integers(const Lanes<T>& x) {
  return _mm512_loadu_si512(x.lane);
}
Lanes<float> lanes(__m512 x) {
  Lanes<float> result;
  _mm512_storeu_ps(result.lane, x);
  return result;
}
template <typename T = uint32_t>
Lanes<T> lanes(__m512i x) {
  Lanes<T> result;
  _mm512_storeu_si512(result.lane, x);
  return result;
}
Lanes<uint16_t> lanes(__m256i x) {
  Lanes<uint16_t> result;
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(result.lane), x);
  return result;
}
void expect(const char* what, __m512 x, std::initializer_list<float> wanted) {
  const Lanes<float> got = lanes(x);
  int i = 0;
  for (const float value : wanted) expect(what, i, got.lane[i], value), ++i;
}
template <typename T>
void expect_lanes(const char* what, const Lanes<T>& got, std::initializer_list<uint32_t> wanted) {
  int i = 0;
  for (const uint32_t value : wanted)
    expect_bits(what, i, static_cast<uint32_t>(got.lane[i]), value), ++i;
}

// --- vectors ----------------------------------------------------------------------------------

void arithmetic() {
  const __m512 a = floats({3, 1 + 0x1p-12f, kNaN, 1, -0.0f, kTiny});
  const __m512 b = floats({5, 1 + 0x1p-12f, 1, kNaN, 0.0f, 0.5f});
  const __m512 c = floats({7, -1, 1, 1, -0.0f, 0});
  expect("add", _mm512_add_ps(a, b), {8, 2 + 0x1p-11f, kNaN, kNaN, 0, 0.5f});
  expect("sub", _mm512_sub_ps(a, b), {-2, 0, kNaN, kNaN, -0.0f, -0.5f});
  expect("mul", _mm512_mul_ps(a, b), {15, 1 + 0x1p-11f, kNaN, kNaN, -0.0f, 0});  // ties to even
  expect("fmadd", _mm512_fmadd_ps(a, b, c), {22, 0x1p-11f + 0x1p-24f, kNaN, kNaN, -0.0f, 0});
  expect("fmsub", _mm512_fmsub_ps(a, b, c), {8, 2 + 0x1p-11f, kNaN, kNaN, 0, 0});
  expect("fnmadd", _mm512_fnmadd_ps(a, b, c), {-8, -2 - 0x1p-11f, kNaN, kNaN, 0, -0.0f});
  // The second operand where either is NaN or both are zero.
  expect("min", _mm512_min_ps(a, b), {3, 1 + 0x1p-12f, 1, kNaN, 0, kTiny});
  expect("max", _mm512_max_ps(a, b), {5, 1 + 0x1p-12f, 1, kNaN, 0, 0.5f});
  const __m512 ends = vector(numbered(0.0f));
  expect("add, last lane", 15, lanes(_mm512_add_ps(ends, ends)).lane[15], 30);
  expect("set1", _mm512_set1_ps(2), {2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2});
  expect("setzero", _mm512_setzero_ps(), {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0});
}

void comparisons() {
  const __m512 a = floats({1, 2, 1, kNaN, 1, -0.0f, -kInf}),
               b = floats({2, 1, 1, 1, kNaN, 0, kInf});
  const auto compare = [&](const char* what, __mmask16 got, uint32_t wanted) {
    expect_bits(what, 0, got, wanted);
  };
  // Lanes 7 to 15 are equal.
  compare("less", _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), 0b1000001);
  compare("not less", _mm512_cmp_ps_mask(a, b, _CMP_NLT_UQ), 0xff80 | 0b0111110);
  compare("at least", _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ), 0xff80 | 0b0100110);
  compare("unordered", _mm512_cmp_ps_mask(a, b, _CMP_UNORD_Q), 0b0011000);
  compare("masked", _mm512_mask_cmp_ps_mask(0x4042, a, b, _CMP_LT_OQ), 0b1000000);
  compare("last lane", _mm512_cmp_ps_mask(vector(numbered(0.0f)), _mm512_set1_ps(15), _CMP_GE_OQ),
          0x8000);
}

// The end of a page that no other follows.
char* end_of_memory() {
  const int64_t page = sysconf(_SC_PAGESIZE);
  void* pages = mmap(nullptr, 2 * page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  char* end = static_cast<char*>(pages) + page;
  mprotect(end, page, PROT_NONE);
  return end;
}

void masks() {
  const __m512 a = vector(numbered(0.0f)), b = vector(numbered(100.0f));
  expect("blend", _mm512_mask_blend_ps(0x8005, a, b),
         {100, 1, 102, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 115});
  const __m512i other = integers(numbered<uint32_t>(0)), bits = _mm512_set1_epi32(0x100);
  expect_lanes("masked or", lanes(_mm512_mask_or_epi32(other, 0x8001, bits, _mm512_set1_epi32(1))),
               {0x101, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 0x101});
  expect("masked scalef", _mm512_maskz_scalef_ps(0b1010, _mm512_set1_ps(1), _mm512_set1_ps(1)),
         {0, 2, 0, 2, 0});

  char* end = end_of_memory();
  std::memcpy(end - 4, "\1\2\3\4", 4);
  expect_lanes("masked load", lanes(_mm256_maskz_loadu_epi16(0b11, end - 4)), {0x201, 0x403, 0, 0});
  expect_lanes("masked load", lanes(_mm256_maskz_loadu_epi16(0b10, end - 4)), {0, 0x403, 0, 0});
  _mm512_mask_storeu_epi32(end - 8, 0b10, _mm512_set1_epi32(7));
  uint32_t stored[2];
  std::memcpy(stored, end - 8, sizeof stored);
  expect_bits("masked store", 0, stored[0], 0);
  expect_bits("masked store", 1, stored[1], 7);
}

void integer_lanes() {
  const __m512i x = _mm512_set1_epi32(static_cast<int>(0x80000003));
  expect_bits("slli", 0, lanes(_mm512_slli_epi32(x, 31)).lane[15], 0x80000000);
  expect_bits("slli", 1, lanes(_mm512_slli_epi32(x, 32)).lane[15], 0);
  expect_bits("srli", 0, lanes(_mm512_srli_epi32(x, 31)).lane[15], 1);  // no sign
  expect_bits("add", 0, lanes(_mm512_add_epi32(x, x)).lane[15], 6);     // no carry
  expect_bits("and", 0, lanes(_mm512_and_epi32(x, _mm512_set1_epi32(6))).lane[15], 2);
  expect_bits("or", 0, lanes(_mm512_or_si512(x, _mm512_set1_epi32(6))).lane[15], 0x80000007);
  const auto wide = numbered<uint32_t>(0xfff8);
  expect_lanes(
      "narrowed", lanes(_mm512_cvtepi32_epi16(integers(wide))),
      {0xfff8, 0xfff9, 0xfffa, 0xfffb, 0xfffc, 0xfffd, 0xfffe, 0xffff, 0, 1, 2, 3, 4, 5, 6, 7});
  const __m256i narrow = _mm512_cvtepi32_epi16(integers(wide));
  expect_lanes(
      "widened", lanes(_mm512_cvtepu16_epi32(narrow)),
      {0xfff8, 0xfff9, 0xfffa, 0xfffb, 0xfffc, 0xfffd, 0xfffe, 0xffff, 0, 1, 2, 3, 4, 5, 6, 7});
}

void orders() {
  const __m512 a = vector(numbered(0.0f)), b = vector(numbered(16.0f));
  expect("unpacklo", _mm512_unpacklo_ps(a, b),
         {0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29});
  expect("unpackhi", _mm512_unpackhi_ps(a, b),
         {2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31});
  const __m512d x = _mm512_castps_pd(a), y = _mm512_castps_pd(b);
  expect("unpacklo_pd", _mm512_castpd_ps(_mm512_unpacklo_pd(x, y)),
         {0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29});
  expect("unpackhi_pd", _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)),
         {2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31});
  expect("shuffle", _mm512_shuffle_f32x4(a, b, 0x88),
         {0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27});
  expect("shuffle", _mm512_shuffle_f32x4(a, b, 0xdd),
         {4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31});
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24,
                                         8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  const __m512i halves = integers(numbered<uint16_t>(100));
  expect_lanes("permutexvar", lanes<uint16_t>(_mm512_permutexvar_epi16(order, halves)),
               {100, 116, 101, 117, 102, 118, 103, 119, 104, 120, 105, 121, 106, 122, 107, 123,
                108, 124, 109, 125, 110, 126, 111, 127, 112, 128, 113, 129, 114, 130, 115, 131});
  const __m512i beyond = integers(numbered<uint16_t>(65504 + 31));  // 31, then 0
  expect_lanes("permutexvar, 5 bits", lanes<uint16_t>(_mm512_permutexvar_epi16(beyond, halves)),
               {131, 100});
  expect_lanes("low half", lanes(_mm512_castsi512_si256(halves)), {100, 101});
  expect_lanes("high half", lanes(_mm512_extracti64x4_epi64(halves, 1)), {116, 117});
}

void roundings() {
  expect("roundscale",
         _mm512_roundscale_ps(floats({0.5f, 1.5f, 2.5f, -0.5f, -1.5f, 0x1p23f + 1, 0x1p22f + 0.5f,
                                      -kInf, kNaN, kTiny, 0x1.fffffep-2f, -3.7f}),
                              0),
         {0, 2, 2, -0.0f, -2, 0x1p23f + 1, 0x1p22f, -kInf, kNaN, 0, 0, -4});
  expect("reduce",
         _mm512_reduce_ps(floats({0.5f, 1.5f, -0.5f, -1e-9f, kInf, -kInf, kNaN, 0x1p99f, -0x1p99f,
                                  -0.0f, 0, -3.75f, 0x1p23f + 1, kTiny, -kTiny, -0.1f}),
                          _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC),
         {0.5f, 0.5f, 0.5f, 0x1.fffffep-1f, 0, 0, kNaN, -0.0f, -0.0f, -0.0f, -0.0f, 0.25f, -0.0f,
          kTiny, 0x1.fffffep-1f, 0x1.ccccccp-1f});

  const auto scalef = [](const char* what, std::initializer_list<float> x,
                         std::initializer_list<float> y, std::initializer_list<float> wanted) {
    expect(what, _mm512_scalef_ps(floats(x), floats(y)), wanted);
  };
  scalef("scalef, floor", {1.5f, 1.5f, 1.5f, -3}, {3.7f, -3.2f, -0.5f, 0.99f},
         {12, 0.09375f, 0.75f, -3});
  scalef("scalef, large", {1.5f, 1, -1, 1, 1, 0x1p127f, kTiny},
         {127, 128, 1e30f, -1e30f, 500, -276, 276},
         {0x1.8p127f, kInf, -kInf, 0, kInf, kTiny, 0x1p127f});
  // Denormal results are rounded once: ties to even.
  scalef("scalef, denormal", {1, 1.5f, 1, 1 + 0x1p-23f, -1, -1.5f, 0x1p-126f, 0x1.fffffep-126f},
         {-149, -149, -150, -150, -151, -150, -1, -1},
         {kTiny, 2 * kTiny, 0, kTiny, -0.0f, -kTiny, 0x1p-127f, 0x1p-126f});
  const float signaling = std::numeric_limits<float>::signaling_NaN();
  scalef(
      "scalef, special",
      {kNaN, kNaN, kNaN, signaling, kInf, kInf, -kInf, 0, 0, -0.0f, 1, -1, 1, -1, 1, kInf},
      {kInf, -kInf, 1, kInf, kInf, -kInf, 3, kInf, -kInf, 5, kInf, kInf, -kInf, -kInf, kNaN, kNaN},
      {kInf, 0, kNaN, kNaN, kInf, kNaN, -kInf, kNaN, 0, -0.0f, kInf, -kInf, 0, -0.0f, kNaN, kNaN});
}

void reciprocals() {
  expect("rcp14",
         _mm512_rcp14_ps(floats({2, -0.25f, 0, -0.0f, kInf, -kInf, kNaN, 0x1p126f, 0x1p-128f, 1})),
         {0.5f, -4, kInf, -kInf, 0, -0.0f, kNaN, 0x1p-126f, kInf, 1});
  const float scales[] = {0x1p-30f, -0x1p90f, 0x1p-126f, 0x1p126f};
  double largest = 0;
  for (int i = 0; i < 4096; ++i) {
    Lanes<float> x;
    for (int j = 0; j < 16; ++j) x.lane[j] = (1 + (16 * i + j) * 0x1p-16f) * scales[i % 4];
    const Lanes<float> inverse = lanes(_mm512_rcp14_ps(vector(x)));
    for (int j = 0; j < 16; ++j) {
      const double error = double{x.lane[j]} * inverse.lane[j] - 1;
      largest = std::max(largest, error < 0 ? -error : error);
    }
  }
  ++checks;
  if (largest < 0x1p-14) return;
  ++failures;
  std::printf("rcp14: expected errors below 2^-14, got %g\n", largest);
}

// What the next instructions' answers do not need, so that the compiler cannot work them out.
float hidden(float x) {
  asm("" : "+x"(x));
  return x;
}

void sixteen_bits() {
  // 1 + 2^-11 is half way up from 1, 1 + 3 * 2^-11 half way to the next but one.
  const __m512 x =
      floats({1 + 0x1p-11f, 1 + 0x1.8p-10f, 65519, 65520, -0x1p-25f, 0x1.8p-24f, kInf, 3});
  const __m256i halves = _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT);
  expect_lanes("to fp16", lanes(halves),
               {0x3c00, 0x3c02, 0x7bff, 0x7c00, 0x8000, 2, 0x7c00, 0x4200});
  expect("from fp16", _mm512_cvtph_ps(halves),
         {1, 1 + 0x1p-9f, 65504, kInf, -0.0f, 0x1p-23f, kInf, 3, 0});
  const Lanes<float> last = lanes(_mm512_cvtph_ps(_mm512_cvtps_ph(vector(numbered(1.0f)), 0)));
  expect("fp16, last lane", 15, last.lane[15], 16);

  Lanes<uint32_t> bits = {{0x3f808000, 0x3f818000, 0x3f808001, 0x3f80ffff, 0x00400000, 0x80012345,
                           0x007fffff, 0x00800000, 0x7f7fffff, 0x7f7f7fff, 0xff800000, 0x7f800001,
                           0xffc12345, 0x7fffffff, 0, 0x80000000}};
  const __m512 a = _mm512_castsi512_ps(integers(bits)), b = vector(numbered(1.0f));
  const __m512i low = (__m512i)_mm512_cvtne2ps_pbh(b, a), high = (__m512i)_mm512_cvtne2ps_pbh(a, b);
  const std::initializer_list<uint32_t> wanted = {0x3f80, 0x3f82, 0x3f81, 0x3f81, 0,      0x8000,
                                                  0,      0x0080, 0x7f80, 0x7f7f, 0xff80, 0x7fc0,
                                                  0xffc1, 0x7fff, 0,      0x8000};
  expect_lanes("to bf16, second operand", lanes(_mm512_castsi512_si256(low)), wanted);
  expect_lanes("to bf16, first operand", lanes(_mm512_extracti64x4_epi64(high, 1)), wanted);
  expect_lanes("to bf16, order", lanes(_mm512_castsi512_si256(high)), {0x3f80, 0x4000, 0x4040});
}

// --- products of pairs ------------------------------------------------------------------------

uint32_t bf16(float x) { return std::bit_cast<uint32_t>(x) >> 16; }
uint32_t pair(float even, float odd) { return bf16(odd) << 16 | bf16(even); }

struct PairProduct {
  const char* what;
  float sum, even[2], odd[2], wanted;
};

void dot_products() {
  const PairProduct cases[] = {
      {"odd elements come first", 1, {0x1p-30f, 1}, {-1, 1}, 0x1p-30f},
      {"each sum is rounded", 0x1p24f, {1, 1}, {1, 1}, 0x1p24f},
      {"ties go to even", 0x1p24f + 2, {0, 0}, {1, 1}, 0x1p24f + 4},
      {"products are not rounded", -0x1p127f, {0, 0}, {0x1p64f, 0x1p64f}, 0x1p127f},
      {"a denormal sum is zero", kTiny, {0, 1}, {0, 1}, 0},
      {"a denormal sum is zero", 0x1p-127f, {0, 0}, {0x1p-63f, 0x1p-63f}, 0x1p-126f},
      {"a denormal element is zero", 0, {0x1p-127f, 0x1p127f}, {1, 0x1p-130f}, 0},
      {"a denormal result is zero", 0, {0, 1}, {-0x1p-63f, 0x1p-64f}, 0},
      {"a denormal result is zero", 0, {-0x1p-63f, 0x1p-64f}, {0, 1}, -0.0f},
      {"a denormal between is zero", 0, {0x1p-63f, 0x1p-64f}, {0x1p-63f, 0x1p-64f}, 0},
      {"infinity times zero", 1, {kInf, 0}, {1, 1}, kNaN},
      {"too large", 0, {0x1p127f, 2}, {1, 1}, kInf},
  };
  const unsigned control = _mm_getcsr();
  for (const PairProduct& x : cases) {
    const __m512 a =
        _mm512_castsi512_ps(_mm512_set1_epi32(static_cast<int>(pair(x.even[0], x.odd[0]))));
    const __m512 b =
        _mm512_castsi512_ps(_mm512_set1_epi32(static_cast<int>(pair(x.even[1], x.odd[1]))));
    const Lanes<float> got =
        lanes(_mm512_dpbf16_ps(_mm512_set1_ps(x.sum), (__m512bh)a, (__m512bh)b));
    for (int i = 0; i < 16; ++i) expect(x.what, i, got.lane[i], x.wanted);
  }
  expect_bits("control word", 0, _mm_getcsr() & 0xffc0, control & 0xffc0);
  expect("denormals as usual", 0, hidden(0x1p-126f) * 0.5f, 0x1p-127f);

  Lanes<uint32_t> units;
  for (int i = 0; i < 16; ++i) units.lane[i] = pair(static_cast<float>(i), static_cast<float>(-i));
  const __m512 a = _mm512_castsi512_ps(integers(units));
  const Lanes<float> squares =
      lanes(_mm512_dpbf16_ps(vector(numbered(1.0f)), (__m512bh)a, (__m512bh)a));
  for (int i = 0; i < 16; ++i)
    expect("lanes", i, squares.lane[i], static_cast<float>(1 + i + 2 * i * i));
}

// --- tiles ------------------------------------------------------------------------------------

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};

  void shape(int tile, int r, int bytes) {
    rows[tile] = static_cast<uint8_t>(r);
    row_bytes[tile] = static_cast<uint16_t>(bytes);
  }
  void load() const {
    asm volatile("" ::: "memory");
    _tile_loadconfig(this);
  }
};

// A [3][4 pairs] times B [4 pairs][13], with rows that are apart.
void tile_shapes() {
  TileConfig config;
  config.shape(0, 3, 52), config.shape(1, 3, 16), config.shape(2, 4, 52);
  config.load();
  uint32_t a[3][7], b[4][15];
  float c[4][17], expected[4][17];
  const auto left = [](int m, int k) { return static_cast<float>(3 * m - k + 1); };
  const auto right = [](int k, int n) { return static_cast<float>(k * n - 5); };
  for (auto& row : a)
    for (uint32_t& x : row) x = pair(kNaN, kNaN);
  for (auto& row : b)
    for (uint32_t& x : row) x = pair(kNaN, kNaN);
  for (int k = 0; k < 4; ++k) {
    for (int m = 0; m < 3; ++m) a[m][k] = pair(left(m, 2 * k), left(m, 2 * k + 1));
    for (int n = 0; n < 13; ++n) b[k][n] = pair(right(2 * k, n), right(2 * k + 1, n));
  }
  for (int m = 0; m < 4; ++m) {
    for (int n = 0; n < 17; ++n) {
      c[m][n] = expected[m][n] = static_cast<float>(m - n);
      for (int k = 0; k < 8 && m < 3 && n < 13; ++k) expected[m][n] += left(m, k) * right(k, n);
    }
  }
  asm volatile("" ::: "memory");
  _tile_loadd(0, c, sizeof c[0]);
  _tile_loadd(1, a, sizeof a[0]);
  _tile_loadd(2, b, sizeof b[0]);
  _tile_dpbf16ps(0, 1, 2);
  _tile_stored(0, c, sizeof c[0]);
  asm volatile("" ::: "memory");
  for (int m = 0; m < 4; ++m) {
    for (int n = 0; n < 17; ++n) expect("tile product", 17 * m + n, c[m][n], expected[m][n]);
  }
  _tile_zero(0);
  _tile_stored(0, c, sizeof c[0]);
  asm volatile("" ::: "memory");
  expect("tile zero", 0, c[2][4], 0);
  expect("tile zero, beyond", 0, c[2][13], -11);
  _tile_loadd(0, expected, sizeof expected[0]);
  config.load();
  _tile_stored(0, c, sizeof c[0]);
  asm volatile("" ::: "memory");
  expect("a new configuration clears", 0, c[1][1], 0);
  float* last = reinterpret_cast<float*>(end_of_memory()) - 3 * 13;  // c as large as the tile
  _tile_loadd(0, last, 52);
  _tile_stored(0, last, 52);
  _tile_release();
}

// One sum over several pairs.
void tile_sum(const char* what, float sum, std::initializer_list<uint32_t> a,
              std::initializer_list<uint32_t> b, float wanted) {
  const int pairs = static_cast<int>(a.size());
  TileConfig config;
  config.shape(5, 1, 4), config.shape(6, 1, 4 * pairs), config.shape(7, pairs, 4);
  config.load();
  _tile_loadd(5, &sum, 4);
  _tile_loadd(6, a.begin(), 64);
  _tile_loadd(7, b.begin(), 4);
  _tile_dpbf16ps(5, 6, 7);
  _tile_stored(5, &sum, 4);
  asm volatile("" ::: "memory");
  _tile_release();
  expect(what, 0, sum, wanted);
}

void tile_sums() {
  const uint32_t one = pair(1, 1);
  tile_sum("from zero, then added", 0x1p24f, {one}, {one}, 0x1p24f + 2);
  tile_sum("in order", 0, {pair(0x1p24f, 0), pair(1, 0), pair(-0x1p24f, 0)}, {one, one, one}, 0);
  tile_sum("even and odd apart", 0, {pair(0x1p24f, 1), pair(-0x1p24f, 1)}, {one, one}, 2);
  tile_sum("a denormal sum is zero", kTiny, {0}, {0}, 0);
  tile_sum("a denormal result is zero", 0, {pair(0x1p-63f, 0)}, {pair(0x1p-64f, 0)}, 0);
  tile_sum("a denormal element is zero", 1, {pair(0x1p-127f, 0)}, {pair(0x1p127f, 0)}, 1);
  tile_sum("infinity times zero", 0, {pair(kInf, 0)}, {pair(0, 0)}, kNaN);
  expect("denormals as usual, again", 0, hidden(0x1p-126f) * 0.5f, 0x1p-127f);
}

#ifdef RA_EMULATED
// What ends the process.
void fault(std::string_view name) {
  TileConfig config;
  config.shape(0, 16, 64), config.shape(1, 16, 32), config.shape(2, 16, 64);
  if (name == "palette") config.palette = 2;
  if (name == "rows") config.rows[0] = 17;
  if (name == "ninth") config.shape(8, 1, 4);
  config.load();
  if (name == "released") _tile_release();
  if (name == "no-rows") _tile_zero(3);
  if (name == "product") _tile_dpbf16ps(0, 1, 2);
  if (name == "same") _tile_dpbf16ps(0, 0, 2);
  _tile_zero(0);
}
#endif

}  // namespace
}  // namespace ring_attention::cpu
#pragma GCC pop_options

int main([[maybe_unused]] int count, [[maybe_unused]] char** arguments) {
  using namespace ring_attention::cpu;
  syscall(SYS_arch_prctl, 0x1023, 18);  // a processor's tiles, see isa_amx.cpp
#ifdef RA_EMULATED
  if (count > 1) return fault(arguments[1]), 0;
#endif
  arithmetic();
  comparisons();
  masks();
  integer_lanes();
  orders();
  roundings();
  reciprocals();
  sixteen_bits();
  dot_products();
  tile_shapes();
  tile_sums();
  std::printf("%d checks, %d failed\n", checks, failures);
  return failures != 0;
}
