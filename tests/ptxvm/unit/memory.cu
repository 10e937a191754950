// SPDX-License-Identifier: BSD-3-Clause
//
// Loads and stores of the widths and types that our kernels use and no calibrator executes.
#include "cases.h"

namespace {

using unit::Buffer;

__device__ unsigned shared_address(const void* p) {
  return static_cast<unsigned>(__cvta_generic_to_shared(p));
}

// Four words of each thread go through shared memory, written in one way and read in another.
enum class Way { kQuadBits, kQuadUnsigned, kPairs, kLongs, kWords };

template <Way kWrite, Way kRead>
__global__ void through_shared(const uint32_t* in, uint32_t* out) {
  __shared__ alignas(16) uint32_t stage[4 * 32];
  uint32_t a[4], b[4];
  const unsigned at = shared_address(stage + 4 * threadIdx.x);
  if (kWrite == Way::kPairs)
    asm volatile("ld.global.v2.u32 {%0, %1}, [%4]; ld.global.v2.u32 {%2, %3}, [%4+8];"
                 : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3])
                 : "l"(in + 4 * threadIdx.x));
  else
    asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3])
                 : "l"(in + 4 * threadIdx.x));
  const uint64_t low = uint64_t{a[1]} << 32 | a[0], high = uint64_t{a[3]} << 32 | a[2];
  if (kWrite == Way::kQuadBits)
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(at), "r"(a[0]), "r"(a[1]),
                 "r"(a[2]), "r"(a[3])
                 : "memory");
  if (kWrite == Way::kQuadUnsigned)
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(at), "r"(a[0]), "r"(a[1]),
                 "r"(a[2]), "r"(a[3])
                 : "memory");
  if (kWrite == Way::kPairs)
    asm volatile("st.shared.v2.u32 [%0], {%1, %2}; st.shared.v2.u32 [%0+8], {%3, %4};" ::"r"(at),
                 "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3])
                 : "memory");
  if (kWrite == Way::kLongs)
    asm volatile("st.shared.u64 [%0], %1; st.shared.u64 [%0+8], %2;" ::"r"(at), "l"(low), "l"(high)
                 : "memory");
  if (kWrite == Way::kWords)
    for (int i = 0; i < 4; ++i)
      asm volatile("st.shared.b32 [%0], %1;" ::"r"(at + 4 * i), "r"(a[i]) : "memory");
  if (kRead == Way::kQuadBits)
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(b[0]), "=r"(b[1]), "=r"(b[2]), "=r"(b[3])
                 : "r"(at)
                 : "memory");
  if (kRead == Way::kQuadUnsigned) {
    float x[4];
    asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(x[0]), "=f"(x[1]), "=f"(x[2]), "=f"(x[3])
                 : "r"(at)
                 : "memory");
    for (int i = 0; i < 4; ++i) b[i] = __float_as_uint(x[i]);
  }
  if (kRead == Way::kPairs) {
    float x[4];
    asm volatile("ld.shared.v2.f32 {%0, %1}, [%4]; ld.shared.v2.f32 {%2, %3}, [%4+8];"
                 : "=f"(x[0]), "=f"(x[1]), "=f"(x[2]), "=f"(x[3])
                 : "r"(at)
                 : "memory");
    for (int i = 0; i < 4; ++i) b[i] = __float_as_uint(x[i]);
  }
  if (kRead == Way::kLongs) {
    uint64_t x, y;
    asm volatile("ld.shared.u64 %0, [%2]; ld.shared.u64 %1, [%2+8];"
                 : "=l"(x), "=l"(y)
                 : "r"(at)
                 : "memory");
    b[0] = uint32_t(x), b[1] = uint32_t(x >> 32), b[2] = uint32_t(y), b[3] = uint32_t(y >> 32);
  }
  asm volatile("prefetch.global.L2 [%0];" ::"l"(in));  // changes nothing
  asm volatile("st.global.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(out + 4 * threadIdx.x),
               "f"(__uint_as_float(b[0])), "f"(__uint_as_float(b[1])), "f"(__uint_as_float(b[2])),
               "f"(__uint_as_float(b[3]))
               : "memory");
}

template <Way kWrite, Way kRead>
void check() {
  std::vector<uint32_t> words(128);
  for (size_t i = 0; i < words.size(); ++i) words[i] = 0x3c00abcdu + 0x01010101u * uint32_t(i);
  Buffer<uint32_t> in(words), out(128);
  through_shared<kWrite, kRead><<<1, 32>>>(in.data(), out.data());
  const std::vector<uint32_t> got = out.values();
  for (size_t i = 0; i < words.size(); ++i) unit::expect_equal(got[i], words[i], "word");
}

CASE(shared_v4_b32) { check<Way::kQuadBits, Way::kQuadBits>(); }
CASE(shared_v4_u32_as_pairs) { check<Way::kQuadUnsigned, Way::kPairs>(); }
CASE(shared_v2_u32_as_u64) { check<Way::kPairs, Way::kLongs>(); }
CASE(shared_u64_as_v4) { check<Way::kLongs, Way::kQuadBits>(); }
CASE(shared_v4_u32_as_f32) { check<Way::kQuadUnsigned, Way::kQuadUnsigned>(); }
CASE(shared_b32_as_u64) { check<Way::kWords, Way::kLongs>(); }

__global__ void load_global(const float* floats, const int* numbers, float* out) {
  float x, y, generic;
  int64_t number;
  asm volatile("ld.global.v2.f32 {%0, %1}, [%2];"
               : "=f"(x), "=f"(y)
               : "l"(floats + 2 * threadIdx.x));
  asm volatile("ld.global.nc.s32 %0, [%1];" : "=l"(number) : "l"(numbers + threadIdx.x));
  asm volatile("ld.f32 %0, [%1];" : "=f"(generic) : "l"(floats + threadIdx.x));
  out[threadIdx.x] = x - 2 * y + 4 * generic + 1000 * float(number);
}
CASE(ld_global_pairs_signed_and_generic) {
  std::vector<float> floats(64);
  std::vector<int> numbers(32);
  for (int i = 0; i < 64; ++i) floats[i] = float(i);
  for (int i = 0; i < 32; ++i) numbers[i] = i - 16;
  Buffer<float> in(floats), out(32);
  Buffer<int> signs(numbers);
  load_global<<<1, 32>>>(in.data(), signs.data(), out.data());
  for (int i = 0; i < 32; ++i)
    unit::expect_equal(out.values()[i], float(2 * i - 2 * (2 * i + 1) + 4 * i + 1000 * (i - 16)),
                       "lane");
}

// Apart from one another, or the compiler loads them together.
struct alignas(16) Parameters {
  float2 pair;
  int64_t gap;
  uint2 words;
  int64_t second_gap;
  uchar2 bytes;
  short third_gap;
  int number;
  bool flag;
  float alone;
};

// ld.param.v2.f32, .v2.u32, .v2.u8, .u8, .s32 and .f32.
__global__ void parameters(const __grid_constant__ Parameters p, int64_t* out) {
  out[0] = p.flag, out[1] = p.number;
  out[2] = int64_t(p.pair.x * 100 + p.pair.y), out[3] = p.bytes.x * 1000 + p.bytes.y;
  out[4] = int64_t{p.words.x} * 1000 + p.words.y, out[5] = int64_t(p.alone);
}
CASE(kernel_parameters) {
  Buffer<int64_t> out(6);
  Parameters p{};
  p.pair = make_float2(3, 4), p.words = make_uint2(4000000000u, 8), p.bytes = make_uchar2(200, 9);
  p.number = -7, p.flag = true, p.alone = 12;
  parameters<<<1, 1>>>(p, out.data());
  const int64_t wanted[] = {1, -7, 304, 200009, 4000000000008, 12};
  for (int i = 0; i < 6; ++i) unit::expect_equal(out.values()[i], wanted[i], "parameter");
}

}  // namespace
