// SPDX-License-Identifier: BSD-3-Clause
//
// wgmma with known answers. The host lays matrices out as CUTLASS's canonical layouts have them (by
// rows and units of 16 bytes, not by swizzled addresses) and multiplies in double; all values are
// small whole numbers, so that every order of sums gives the same. unit/gpu runs these cases on a
// GPU.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>
#include <cstring>

#include "cases.h"

namespace {

using unit::Buffer;
using unit::expect_equal;

// ---- One or two products of 16 K, of any N: D is kept in registers of the PTX text, so that one
// macro serves them all. EACH_n(X, separator): X(0) to X(n - 1).

#define EACH_1(X, S) X(0)
#define EACH_2(X, S) EACH_1(X, S) S X(1)
#define EACH_3(X, S) EACH_2(X, S) S X(2)
#define EACH_4(X, S) EACH_3(X, S) S X(3)
#define EACH_5(X, S) EACH_4(X, S) S X(4)
#define EACH_6(X, S) EACH_5(X, S) S X(5)
#define EACH_7(X, S) EACH_6(X, S) S X(6)
#define EACH_8(X, S) EACH_7(X, S) S X(7)
#define EACH_9(X, S) EACH_8(X, S) S X(8)
#define EACH_10(X, S) EACH_9(X, S) S X(9)
#define EACH_11(X, S) EACH_10(X, S) S X(10)
#define EACH_12(X, S) EACH_11(X, S) S X(11)
#define EACH_13(X, S) EACH_12(X, S) S X(12)
#define EACH_14(X, S) EACH_13(X, S) S X(13)
#define EACH_15(X, S) EACH_14(X, S) S X(14)
#define EACH_16(X, S) EACH_15(X, S) S X(15)
#define EACH_17(X, S) EACH_16(X, S) S X(16)
#define EACH_18(X, S) EACH_17(X, S) S X(17)
#define EACH_19(X, S) EACH_18(X, S) S X(18)
#define EACH_20(X, S) EACH_19(X, S) S X(19)
#define EACH_21(X, S) EACH_20(X, S) S X(20)
#define EACH_22(X, S) EACH_21(X, S) S X(21)
#define EACH_23(X, S) EACH_22(X, S) S X(22)
#define EACH_24(X, S) EACH_23(X, S) S X(23)
#define EACH_25(X, S) EACH_24(X, S) S X(24)
#define EACH_26(X, S) EACH_25(X, S) S X(25)
#define EACH_27(X, S) EACH_26(X, S) S X(26)
#define EACH_28(X, S) EACH_27(X, S) S X(27)
#define EACH_29(X, S) EACH_28(X, S) S X(28)
#define EACH_30(X, S) EACH_29(X, S) S X(29)
#define EACH_31(X, S) EACH_30(X, S) S X(30)
#define EACH_32(X, S) EACH_31(X, S) S X(31)

#define QUAD(j) "d" #j "_0, d" #j "_1, d" #j "_2, d" #j "_3"
#define DECLARE(j) ".reg .f32 d" #j "_<4>;\n"
#define LOAD(j) "ld.global.v4.f32 {" QUAD(j) "}, [at]; add.u64 at, at, 2048;\n"
#define STORE(j) "st.global.v4.f32 [at], {" QUAD(j) "}; add.u64 at, at, 2048;\n"

struct Operands {
  uint64_t a[2], b[2];  // descriptors, the second pair for K 16 to 31
  uint32_t fragment[8];
};

// d: [N / 8][128][4], the thread's registers.
#define PRODUCTS(blocks, n, type, a0, a1, rest) \
  asm volatile(                                                                              \
      "{ .reg .pred accumulate; .reg .u64 at;\n" EACH_##blocks(DECLARE, )                    \
      "mov.u64 at, %0;\n" EACH_##blocks(LOAD, )                                              \
      "setp.ne.b32 accumulate, %1, 0;\n"                                                     \
      "wgmma.fence.sync.aligned;\n"                                                          \
      "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type " {" EACH_##blocks(    \
          QUAD, ", ") "}, " a0 ", %4, accumulate, " rest                                     \
      ";\n"                                                                                  \
      "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type " {" EACH_##blocks(    \
          QUAD, ", ") "}, " a1 ", %5, 1, " rest                                              \
      ";\n"                                                                                  \
      "wgmma.commit_group.sync.aligned;\n"                                                   \
      "wgmma.wait_group.sync.aligned 0;\n"                                                   \
      "mov.u64 at, %0;\n" EACH_##blocks(STORE, ) "}" ::"l"(d),                               \
      "r"(accumulate), "l"(o.a[0]), "l"(o.a[1]), "l"(o.b[0]), "l"(o.b[1]), "r"(o.fragment[0]), \
      "r"(o.fragment[1]), "r"(o.fragment[2]), "r"(o.fragment[3]), "r"(o.fragment[4]),        \
      "r"(o.fragment[5]), "r"(o.fragment[6]), "r"(o.fragment[7])                             \
      : "memory")

// The immediates: scales of A and B, transpositions.
enum class Form {
  kDescriptor,
  kRegisters,
  kTransposedA,
  kTransposedB,
  kTransposed,
  kNegated,
  kRegistersKMajor
};

#define FORM(blocks, n, type, form, a0, a1, rest) \
  if constexpr (kForm == Form::form) PRODUCTS(blocks, n, type, a0, a1, rest)
#define FORMS_OF(blocks, n, type)                                                           \
  FORM(blocks, n, type, kDescriptor, "%2", "%3", "1, 1, 0, 0");                             \
  FORM(blocks, n, type, kRegisters, "{%6, %7, %8, %9}", "{%10, %11, %12, %13}", "1, 1, 1"); \
  FORM(blocks, n, type, kRegistersKMajor, "{%6, %7, %8, %9}", "{%10, %11, %12, %13}",       \
       "-1, -1, 0");                                                                        \
  FORM(blocks, n, type, kTransposedA, "%2", "%3", "1, 1, 1, 0");                            \
  FORM(blocks, n, type, kTransposedB, "%2", "%3", "1, 1, 0, 1");                            \
  FORM(blocks, n, type, kTransposed, "%2", "%3", "1, -1, 1, 1");                            \
  FORM(blocks, n, type, kNegated, "%2", "%3", "-1, 1, 0, 0")

template <typename T, int kBlocks, Form kForm>
__device__ void multiply(float* d, const Operands& o, int accumulate) {
  constexpr bool kHalf = std::is_same_v<T, __half>;
#define OF_BLOCKS(blocks, n)                   \
  if constexpr (kBlocks == blocks && kHalf) {  \
    FORMS_OF(blocks, n, "f16");                \
  }                                            \
  if constexpr (kBlocks == blocks && !kHalf) { \
    FORMS_OF(blocks, n, "bf16");               \
  }
  OF_BLOCKS(1, 8)
  OF_BLOCKS(2, 16)
  OF_BLOCKS(3, 24)
  OF_BLOCKS(4, 32)
  OF_BLOCKS(5, 40)
  OF_BLOCKS(6, 48)
  OF_BLOCKS(7, 56)
  OF_BLOCKS(8, 64)
  OF_BLOCKS(9, 72)
  OF_BLOCKS(10, 80)
  OF_BLOCKS(11, 88)
  OF_BLOCKS(12, 96)
  OF_BLOCKS(13, 104)
  OF_BLOCKS(14, 112)
  OF_BLOCKS(15, 120)
  OF_BLOCKS(16, 128)
  OF_BLOCKS(17, 136)
  OF_BLOCKS(18, 144)
  OF_BLOCKS(19, 152)
  OF_BLOCKS(20, 160)
  OF_BLOCKS(21, 168)
  OF_BLOCKS(22, 176)
  OF_BLOCKS(23, 184)
  OF_BLOCKS(24, 192)
  OF_BLOCKS(25, 200)
  OF_BLOCKS(26, 208)
  OF_BLOCKS(27, 216)
  OF_BLOCKS(28, 224)
  OF_BLOCKS(29, 232)
  OF_BLOCKS(30, 240)
  OF_BLOCKS(31, 248)
  OF_BLOCKS(32, 256)
}

struct Shapes {
  uint64_t a_bits, b_bits;    // of the descriptors, but for their starts
  uint32_t a_bytes, b_bytes;  // of the images
  uint32_t a_step, b_step;    // bytes from the first 16 K to the next
};

// images: A's and B's, as they lie in shared memory, both at multiples of 1024 bytes.
template <typename T, int kBlocks, Form kForm>
__global__ void products(const uint4* images, const uint4* fragments, Shapes s, float* d,
                         int accumulate) {
  extern __shared__ __align__(1024) uint4 stage[];
  for (uint32_t i = threadIdx.x; i < (s.a_bytes + s.b_bytes) / 16; i += 128) stage[i] = images[i];
  asm volatile("fence.proxy.async;" ::: "memory");
  __syncthreads();
  const auto base = static_cast<uint32_t>(__cvta_generic_to_shared(stage));
  Operands o;
  for (int k = 0; k < 2; ++k) {
    o.a[k] = s.a_bits | (base + k * s.a_step) >> 4;
    o.b[k] = s.b_bits | (base + s.a_bytes + k * s.b_step) >> 4;
    const uint4 four = fragments[k * 128 + threadIdx.x];
    o.fragment[4 * k] = four.x, o.fragment[4 * k + 1] = four.y;
    o.fragment[4 * k + 2] = four.z, o.fragment[4 * k + 3] = four.w;
  }
  multiply<T, kBlocks, kForm>(d + threadIdx.x * 4, o, accumulate);
}

// ---- What lies where

struct Layout {
  uint32_t width;  // of the swizzle in bytes; 16: none
  bool mn_major;
};

// How rows of 16-byte units are permuted within an atom of 8 rows of `width` bytes.
uint32_t swizzled(uint32_t width, uint32_t row, uint32_t unit) {
  return width == 128  ? unit ^ row
         : width == 64 ? unit ^ row / 2
         : width == 32 ? unit ^ row / 4
                       : unit;
}

// A matrix of rows (M or N) by 32 K in atoms: K-major ones have 8 rows of M or N and width / 2 of
// K, MN-major ones 8 of K and width / 2 of M or N.
struct Image {
  Layout layout;
  uint32_t rows;
  uint32_t atom() const { return 8 * layout.width; }
  uint32_t across() const { return layout.width / 2; }  // elements of an atom's row
  uint32_t atoms_along() const { return layout.mn_major ? 4 : rows / 8; }
  uint32_t atoms_across() const {
    return ((layout.mn_major ? rows : 32) + across() - 1) / across();
  }
  // The canonical layouts leave free how far apart atoms are: one more than needed.
  uint32_t stride_across() const { return atom() * (atoms_along() + 1); }
  uint32_t bytes() const { return (stride_across() * atoms_across() + 1023) / 1024 * 1024; }

  uint32_t at(uint32_t row, uint32_t k) const {
    const uint32_t along = layout.mn_major ? k : row, over = layout.mn_major ? row : k;
    const uint32_t unit = over % across() / 8;
    return over / across() * stride_across() + along / 8 * atom() + along % 8 * layout.width +
           swizzled(layout.width, along % 8, unit) * 16 + over % 8 * 2;
  }
  uint64_t descriptor() const {
    uint64_t leading = stride_across(), stride = atom();
    // No swizzle: LBO always steps along K, SBO along M or N.
    if (layout.width == 16 && layout.mn_major) std::swap(leading, stride);
    if (layout.width != 16 && !layout.mn_major) leading = 16;  // not used, by convention 1
    const uint64_t swizzle = layout.width == 128  ? 1
                             : layout.width == 64 ? 2
                             : layout.width == 32 ? 3
                                                  : 0;
    return leading >> 4 << 16 | stride >> 4 << 32 | swizzle << 62;
  }
  uint32_t step() const {
    if (layout.mn_major) return 2 * atom();
    return 16 / across() * stride_across() + 16 % across() * 2;
  }
};

float value_of_a(uint32_t m, uint32_t k) { return float((m * 7 + k * 13 + m * k) % 9) - 4; }
float value_of_b(uint32_t k, uint32_t n) { return float((k * 11 + n * 5 + n * k * 3) % 11) - 5; }
float value_of_d(uint32_t m, uint32_t n) { return float((m * 3 + n * 17) % 64); }

template <typename T>
uint16_t bits_of(float value) {
  const T rounded(value);
  uint16_t bits;
  std::memcpy(&bits, &rounded, 2);
  return bits;
}

template <typename T, int kBlocks, Form kForm>
void check_products(Layout a_layout, Layout b_layout, bool accumulate = true, float sign = 1) {
  const uint32_t n_end = 8 * kBlocks;
  const Image a{a_layout, 64}, b{b_layout, n_end};
  std::vector<uint16_t> images((a.bytes() + b.bytes()) / 2, 0x7fff);  // NaN between the atoms
  for (uint32_t k = 0; k < 32; ++k) {
    for (uint32_t m = 0; m < 64; ++m) images[a.at(m, k) / 2] = bits_of<T>(value_of_a(m, k));
    for (uint32_t n = 0; n < n_end; ++n)
      images[(a.bytes() + b.at(n, k)) / 2] = bits_of<T>(value_of_b(k, n));
  }
  // Thread t has rows t / 4 % 8 (and 8 more) of its warp's 16, K and columns 2 (t % 4) and 1 more.
  std::vector<uint16_t> fragments(2 * 128 * 8);
  std::vector<float> d(kBlocks * 128 * 4);
  const auto row_of = [](uint32_t t) { return t / 32 * 16 + t % 32 / 4; };
  for (uint32_t t = 0; t < 128; ++t) {
    for (uint32_t i = 0; i < 16; ++i)
      fragments[(i / 8 * 128 + t) * 8 + i % 8] = bits_of<T>(
          value_of_a(row_of(t) + i / 2 % 2 * 8, i / 8 * 16 + i / 4 % 2 * 8 + t % 4 * 2 + i % 2));
    for (uint32_t j = 0; j < kBlocks; ++j)
      for (uint32_t i = 0; i < 4; ++i)
        d[(j * 128 + t) * 4 + i] =
            accumulate ? value_of_d(row_of(t) + i / 2 * 8, j * 8 + t % 4 * 2 + i % 2) : NAN;
  }
  Buffer<uint16_t> d_images(images), d_fragments(fragments);
  Buffer<float> d_d(d);
  const Shapes shapes{a.descriptor(), b.descriptor(), a.bytes(), b.bytes(), a.step(), b.step()};
  const auto kernel = products<T, kBlocks, kForm>;
  const int bytes = static_cast<int>(a.bytes() + b.bytes());
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  kernel<<<1, 128, bytes>>>(reinterpret_cast<uint4*>(d_images.data()),
                            reinterpret_cast<uint4*>(d_fragments.data()), shapes, d_d.data(),
                            accumulate);
  unit::expect(cudaGetLastError() == cudaSuccess, "launch failed");
  const std::vector<float> got = d_d.values();
  for (uint32_t t = 0; t < 128; ++t)
    for (uint32_t j = 0; j < kBlocks; ++j)
      for (uint32_t i = 0; i < 4; ++i) {
        const uint32_t m = row_of(t) + i / 2 * 8, n = j * 8 + t % 4 * 2 + i % 2;
        double sum = accumulate ? value_of_d(m, n) : 0;
        for (uint32_t k = 0; k < 32; ++k) sum += double{sign} * value_of_a(m, k) * value_of_b(k, n);
        expect_equal(got[(j * 128 + t) * 4 + i], float(sum),
                     "N " + std::to_string(n_end) + ", row " + std::to_string(m) + ", column " +
                         std::to_string(n));
      }
}

constexpr Layout kWide{128, false}, kWideMN{128, true};

template <typename T, int... kIndex>
void check_all_shapes(std::integer_sequence<int, kIndex...>) {
  (check_products<T, kIndex + 1, Form::kDescriptor>(kWide, kWide, kIndex % 2 == 0), ...);
  (check_products<T, kIndex + 1, Form::kRegisters>(kWide, kWideMN, kIndex % 2 != 0), ...);
}

CASE(wgmma_bf16_all_shapes) {
  check_all_shapes<__nv_bfloat16>(std::make_integer_sequence<int, 32>());
}
CASE(wgmma_f16_all_shapes) { check_all_shapes<__half>(std::make_integer_sequence<int, 32>()); }

template <typename T>
void check_layouts() {
  for (uint32_t a : {16, 32, 64, 128})
    for (uint32_t b : {16, 32, 64, 128}) {
      check_products<T, 16, Form::kDescriptor>({a, false}, {b, false});
      check_products<T, 16, Form::kTransposedA>({a, true}, {b, false});
      check_products<T, 16, Form::kTransposedB>({a, false}, {b, true});
      check_products<T, 16, Form::kTransposed>({a, true}, {b, true}, false, -1);
    }
}

CASE(wgmma_bf16_layouts) { check_layouts<__nv_bfloat16>(); }
CASE(wgmma_f16_layouts) { check_layouts<__half>(); }
CASE(wgmma_scales) {
  check_products<__half, 16, Form::kNegated>(kWide, kWide, true, -1);
  check_products<__half, 16, Form::kRegistersKMajor>(kWide, kWide, true, 1);
}

}  // namespace
