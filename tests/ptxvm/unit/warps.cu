// SPDX-License-Identifier: BSD-3-Clause
//
// Memory, atomics, and what lanes and warps do together, with known answers.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>

#include "cases.h"

namespace {

using unit::Buffer;
using unit::expect_equal;

template <typename T>
std::vector<T> counted(size_t count, T first = 0) {
  std::vector<T> result(count);
  std::iota(result.begin(), result.end(), first);
  return result;
}

__device__ unsigned shared_address(const void* p) {
  return static_cast<unsigned>(__cvta_generic_to_shared(p));
}

void launched() { unit::expect(cudaGetLastError() == cudaSuccess, "launch failed"); }

// ---- Memory

__global__ void vectors(const float4* in, float2* out) {
  const float4 v = in[threadIdx.x];
  out[2 * threadIdx.x] = {v.w, v.z};
  out[2 * threadIdx.x + 1] = {v.y, v.x};
}

CASE(ld_st_vectors) {
  Buffer<float> in(counted<float>(128)), out(128);
  vectors<<<1, 32>>>(reinterpret_cast<float4*>(in.data()), reinterpret_cast<float2*>(out.data()));
  launched();
  for (int i = 0; i < 128; ++i)
    expect_equal(out.values()[i], float(i / 4 * 4 + 3 - i % 4), "element " + std::to_string(i));
}

__global__ void narrow(const int8_t* s8, const uint8_t* u8, const int16_t* s16, int64_t* out,
                       uint8_t* copy) {
  const int i = threadIdx.x;
  out[i] = int64_t(s8[i]) * 1000000 + int(u8[i]) * 1000 + s16[i];
  copy[i] = u8[i];
}

CASE(ld_st_narrow) {
  std::vector<int8_t> a(32);
  std::vector<uint8_t> b(32);
  std::vector<int16_t> c(32);
  for (int i = 0; i < 32; ++i)
    a[i] = int8_t(i * 9 - 140), b[i] = uint8_t(i * 9), c[i] = int16_t(i * 31 - 500);
  Buffer<int8_t> da(a);
  Buffer<uint8_t> db(b), copy(32);
  Buffer<int16_t> dc(c);
  Buffer<int64_t> out(32);
  narrow<<<1, 32>>>(da.data(), db.data(), dc.data(), out.data(), copy.data());
  launched();
  for (int i = 0; i < 32; ++i) {
    expect_equal(out.values()[i], int64_t(a[i]) * 1000000 + b[i] * 1000 + c[i], "sum");
    expect_equal(copy.values()[i], b[i], "copy");
  }
}

__global__ void wide_registers(const int* in, int* out, long long* extended) {
  long long value;
  asm volatile("ld.global.s32 %0, [%1];" : "=l"(value) : "l"(in + threadIdx.x));
  extended[threadIdx.x] = value;
  asm volatile("st.global.u32 [%0], %1;" ::"l"(out + threadIdx.x), "l"(value) : "memory");
}

CASE(ld_st_registers_wider_than_the_type) {
  Buffer<int> in(counted<int>(32, -7)), out(32);
  Buffer<long long> extended(32);
  wide_registers<<<1, 32>>>(in.data(), out.data(), extended.data());
  launched();
  for (int i = 0; i < 32; ++i) {
    expect_equal(out.values()[i], i - 7, "stored");
    expect_equal(extended.values()[i], static_cast<long long>(i - 7), "loaded");
  }
}

__constant__ int table[8] = {3, 1, 4, 1, 5, 9, 2, 6};
__device__ float scale = 0.5f;

struct Parameters {
  const int* in[3];
  int offsets[4];
};

// Constant and global variables, indexed parameters, an array in local memory, generic pointers.
__global__ void spaces(const __grid_constant__ Parameters p, float* out, int which) {
  __shared__ int shared[32];
  int local[8];
  for (int i = 0; i < 8; ++i) local[(i + which) % 8] = table[i] + p.offsets[(i + which) % 4];
  shared[threadIdx.x] = p.in[threadIdx.x % 3][threadIdx.x];
  __syncthreads();
  const int* generic = threadIdx.x % 2 ? local : shared;
  out[threadIdx.x] = scale * float(generic[threadIdx.x % 8]);
}

CASE(address_spaces) {
  Buffer<int> in(counted<int>(32, 100));
  Buffer<float> out(32);
  const Parameters p{{in.data(), in.data(), in.data()}, {10, 20, 30, 40}};
  spaces<<<1, 32>>>(p, out.data(), 3);
  launched();
  const int digits[8] = {3, 1, 4, 1, 5, 9, 2, 6};
  for (int i = 0; i < 32; ++i) {
    const int at = (i % 8 + 5) % 8;
    const int wanted = i % 2 ? digits[at] + p.offsets[(at + 3) % 4] : 100 + i % 8;
    expect_equal(out.values()[i], 0.5f * float(wanted), "lane " + std::to_string(i));
  }
}

__global__ void atomics(int* counters, float* sum, unsigned* old) {
  __shared__ int histogram[4];
  if (threadIdx.x < 4) histogram[threadIdx.x] = 0;
  __syncthreads();
  atomicAdd(&histogram[threadIdx.x % 4], 1);
  __syncthreads();
  if (threadIdx.x < 4) atomicAdd(&counters[threadIdx.x], histogram[threadIdx.x]);
  atomicMax(&counters[4], int(threadIdx.x + blockIdx.x));
  atomicMin(&counters[5], -int(threadIdx.x));
  atomicOr(&counters[6], 1 << threadIdx.x % 32);
  atomicAdd(sum, 0.5f);
  old[blockIdx.x * blockDim.x + threadIdx.x] =
      atomicInc(reinterpret_cast<unsigned*>(&counters[7]), 1000);
  atomicCAS(&counters[8], 0, 42);
}

CASE(atomics_in_shared_and_global_memory) {
  Buffer<int> counters(std::vector<int>(9, 0));
  Buffer<float> sum(std::vector<float>(1, 0));
  Buffer<unsigned> old(192);
  atomics<<<3, 64>>>(counters.data(), sum.data(), old.data());
  launched();
  const std::vector<int> c = counters.values();
  for (int i = 0; i < 4; ++i) expect_equal(c[i], 48, "histogram");
  expect_equal(c[4], 65, "max");
  expect_equal(c[5], -63, "min");
  expect_equal(c[6], -1, "or");
  expect_equal(c[7], 192, "inc");
  expect_equal(c[8], 42, "cas");
  expect_equal(sum.values()[0], 96.0f, "sum");
  std::vector<unsigned> seen = old.values();
  std::sort(seen.begin(), seen.end());
  for (unsigned i = 0; i < 192; ++i) expect_equal(seen[i], i, "old value");
}

// ---- Warps

__global__ void shuffles(const int* in, int* out) {
  const int v = in[threadIdx.x];
  const int results[] = {__shfl_sync(~0u, v, 5),      __shfl_sync(~0u, v, threadIdx.x + 1, 8),
                         __shfl_up_sync(~0u, v, 3),   __shfl_up_sync(~0u, v, 3, 16),
                         __shfl_down_sync(~0u, v, 7), __shfl_down_sync(~0u, v, 2, 4),
                         __shfl_xor_sync(~0u, v, 1),  __shfl_xor_sync(~0u, v, 10, 16)};
  for (int i = 0; i < 8; ++i) out[i * 32 + threadIdx.x] = results[i];
}

CASE(shfl) {
  Buffer<int> in(counted<int>(32, 1000)), out(256);
  shuffles<<<1, 32>>>(in.data(), out.data());
  launched();
  for (int l = 0; l < 32; ++l) {
    const int sources[] = {5,
                           l / 8 * 8 + (l + 1) % 8,
                           l < 3 ? l : l - 3,
                           l % 16 < 3 ? l : l - 3,
                           l > 24 ? l : l + 7,
                           l % 4 > 1 ? l : l + 2,
                           l ^ 1,
                           l ^ 10};
    for (int i = 0; i < 8; ++i)
      expect_equal(out.values()[i * 32 + l], 1000 + sources[i],
                   "mode " + std::to_string(i) + " lane " + std::to_string(l));
  }
}

__global__ void votes(unsigned* out) {
  const int l = threadIdx.x;
  out[l] = __ballot_sync(~0u, l % 3 == 0);
  out[32 + l] =
      __any_sync(~0u, l == 31) + 2 * __all_sync(~0u, l < 32) + 4 * __all_sync(~0u, l != 3);
  out[64 + l] = __match_any_sync(~0u, l / 5);
  out[96 + l] = __reduce_add_sync(~0u, unsigned(l)) + __reduce_max_sync(~0u, unsigned(l * 1000));
  out[160 + l] = 100 * __reduce_max_sync(~0u, l - 16) + __reduce_min_sync(~0u, l - 16);
  out[128 + l] = 0;
  if (l < 11) out[128 + l] = __activemask();
}

CASE(vote_match_redux) {
  Buffer<unsigned> out(192);
  votes<<<1, 32>>>(out.data());
  launched();
  for (unsigned l = 0; l < 32; ++l) {
    expect_equal(out.values()[l], 0x49249249u, "ballot");
    expect_equal(out.values()[32 + l], 3u, "any, all");
    expect_equal(out.values()[64 + l], (l / 5 == 6 ? 3u : 31u) << (l / 5 * 5), "match");
    expect_equal(out.values()[96 + l], 496u + 31000u, "redux");
    expect_equal(out.values()[160 + l], 1500u - 16u, "redux of signed numbers");
    expect_equal(out.values()[128 + l], l < 11 ? 0x7ffu : 0u, "activemask");
  }
}

// Loops of different lengths, and a meeting of lanes that took different branches.
__global__ void divergence(int* out) {
  __shared__ int shared[32];
  int steps = 0;
  for (int n = threadIdx.x + 1; n != 1; n = n % 2 ? 3 * n + 1 : n / 2) ++steps;
  if (threadIdx.x % 2) {
    shared[threadIdx.x] = steps;
    __syncwarp();
    steps += 1000 * shared[threadIdx.x - 1];
  } else {
    shared[threadIdx.x] = steps;
    __syncwarp();
    steps += 1000 * shared[threadIdx.x + 1];
  }
  out[threadIdx.x] = steps;
}

CASE(divergence_and_syncwarp) {
  Buffer<int> out(32);
  divergence<<<1, 32>>>(out.data());
  launched();
  const auto collatz = [](int n) {
    int steps = 0;
    for (; n != 1; n = n % 2 ? 3 * n + 1 : n / 2) ++steps;
    return steps;
  };
  for (int l = 0; l < 32; ++l)
    expect_equal(out.values()[l], collatz(l + 1) + 1000 * collatz((l ^ 1) + 1),
                 "lane " + std::to_string(l));
}

// ---- Barriers

__global__ void counting(int* out) {
  const int n = __syncthreads_count(threadIdx.x % 3 == 0);
  const int all = __syncthreads_and(threadIdx.x < 96), any = __syncthreads_or(threadIdx.x == 77);
  out[threadIdx.x] = n + 100 * (all != 0) + 1000 * (any != 0);
}

CASE(bar_red) {
  Buffer<int> out(96);
  counting<<<1, 96>>>(out.data());
  launched();
  for (int v : out.values()) expect_equal(v, 1132, "count");
}

// Warps 0 and 1 fill, warps 2 and 3 use, through named barriers; some warps leave early.
__global__ void producers(int* out) {
  __shared__ int buffer[64];
  const int warp = threadIdx.x / 32;
  if (warp == 4) return;
  for (int round = 0; round < 3; ++round) {
    if (warp < 2) {
      if (round > 0) asm volatile("bar.sync 2, 128;" ::: "memory");
      buffer[threadIdx.x] = round * 100 + threadIdx.x;
      asm volatile("bar.arrive 1, 128;" ::: "memory");
    } else {
      asm volatile("bar.sync 1, 128;" ::: "memory");
      out[round * 64 + threadIdx.x - 64] = buffer[127 - threadIdx.x];
      if (round < 2) asm volatile("bar.arrive 2, 128;" ::: "memory");
    }
  }
  __syncthreads();
}

CASE(named_barriers) {
  Buffer<int> out(192);
  producers<<<1, 160>>>(out.data());
  launched();
  for (int i = 0; i < 192; ++i)
    expect_equal(out.values()[i], i / 64 * 100 + 63 - i % 64, "element");
}

// ---- Asynchronous copies

template <int kBytes>
__device__ void copy_async(void* to, const void* from, int bytes) {
  if constexpr (kBytes == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)),
                 "l"(from), "r"(bytes)
                 : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(to)),
                 "l"(from), "n"(kBytes), "r"(bytes)
                 : "memory");
}

// Three groups in flight; what lies past the end arrives as zeros.
template <int kBytes>
__global__ void copies(const char* in, char* out, int valid) {
  __shared__ __align__(16) char stage[3][32 * kBytes];
  for (int s = 0; s < 3; ++s) {
    const int at = (s * 32 + threadIdx.x) * kBytes;
    copy_async<kBytes>(stage[s] + threadIdx.x * kBytes, in + (at < valid ? at : 0),
                       max(0, min(kBytes, valid - at)));
    asm volatile("cp.async.commit_group;");
  }
  for (int s = 0; s < 3; ++s) {
    if (s == 0) asm volatile("cp.async.wait_group 2;" ::: "memory");
    if (s == 1) asm volatile("cp.async.wait_group 1;" ::: "memory");
    if (s == 2) asm volatile("cp.async.wait_all;" ::: "memory");
    __syncwarp();
    for (int i = 0; i < kBytes; i += 4)
      *reinterpret_cast<int*>(out + (s * 32 + threadIdx.x) * kBytes + i) =
          *reinterpret_cast<int*>(stage[s] + (31 - threadIdx.x) * kBytes + i);
  }
}

template <int kBytes>
void check_copies() {
  std::vector<char> bytes(96 * kBytes);
  for (size_t i = 0; i < bytes.size(); ++i) bytes[i] = char(i * 7 + 1);
  const int valid = 80 * kBytes - 3;
  Buffer<char> in(bytes), out(bytes.size());
  copies<kBytes><<<1, 32>>>(in.data(), out.data(), valid);
  launched();
  for (int s = 0; s < 3; ++s)
    for (int l = 0; l < 32; ++l)
      for (int i = 0; i < kBytes; ++i) {
        const int from = (s * 32 + 31 - l) * kBytes + i;
        expect_equal(int(out.values()[(s * 32 + l) * kBytes + i]),
                     from < valid ? int(bytes[from]) : 0, "byte " + std::to_string(from));
      }
}

CASE(cp_async_16) { check_copies<16>(); }
CASE(cp_async_8) { check_copies<8>(); }
CASE(cp_async_4) { check_copies<4>(); }

// ---- Matrices

// ldmatrix of 8 x 8 matrices that lie one after the other; the element is its own number.
template <int kCount, bool kTransposed>
__global__ void load_matrices(unsigned* out) {
  __shared__ __align__(16) uint16_t matrices[4 * 64];
  for (int i = threadIdx.x; i < 256; i += 32) matrices[i] = i;
  __syncwarp();
  const unsigned at = shared_address(matrices + threadIdx.x * 8);
  unsigned r[4] = {};
  if constexpr (kCount == 1 && !kTransposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];" : "=r"(r[0]) : "r"(at));
  if constexpr (kCount == 2 && !kTransposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(at));
  if constexpr (kCount == 2 && kTransposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(at));
  if constexpr (kCount == 4 && !kTransposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(at));
  if constexpr (kCount == 4 && kTransposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(at));
  for (int i = 0; i < kCount; ++i) out[i * 32 + threadIdx.x] = r[i];
}

template <int kCount, bool kTransposed>
void check_matrices() {
  Buffer<unsigned> out(32 * kCount);
  load_matrices<kCount, kTransposed><<<1, 32>>>(out.data());
  launched();
  for (unsigned i = 0; i < kCount; ++i)
    for (unsigned l = 0; l < 32; ++l) {
      const unsigned row = l / 4, column = l % 4 * 2;
      const unsigned low = 64 * i + (kTransposed ? column * 8 + row : row * 8 + column);
      expect_equal(out.values()[i * 32 + l], low | (low + (kTransposed ? 8 : 1)) << 16, "register");
    }
}

CASE(ldmatrix_x1) { check_matrices<1, false>(); }
CASE(ldmatrix_x2) { check_matrices<2, false>(); }
CASE(ldmatrix_x2_trans) { check_matrices<2, true>(); }
CASE(ldmatrix_x4) { check_matrices<4, false>(); }
CASE(ldmatrix_x4_trans) { check_matrices<4, true>(); }

// The fragments are gathered element by element, as the PTX manual's tables have them.
template <typename T, int K, bool kSwapped = false>
__global__ void multiply(const T* a, const T* b, const float* c, float* d) {
  const int g = threadIdx.x / 4, t = threadIdx.x % 4;
  unsigned fa[4] = {}, fb[2] = {};
  const auto pair = [](T low, T high) {
    return unsigned(*reinterpret_cast<uint16_t*>(&low)) |
           unsigned(*reinterpret_cast<uint16_t*>(&high)) << 16;
  };
  for (int i = 0; i < K / 4; ++i) {
    const T* row = a + (g + i % 2 * 8) * K + t * 2 + i / 2 * 8;
    fa[i] = pair(row[0], row[1]);
  }
  for (int i = 0; i < K / 8; ++i)
    fb[i] = pair(b[(t * 2 + i * 8) * 8 + g], b[(t * 2 + i * 8 + 1) * 8 + g]);
  if (kSwapped) {
    const unsigned first = fa[1];
    fa[1] = fa[2];
    fa[2] = first;
  }
  float r[4];
  for (int i = 0; i < 4; ++i) r[i] = c[(g + i / 2 * 8) * 8 + t * 2 + i % 2];
#define MMA16(type)                                                                   \
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." type "." type                 \
               ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
               : "+f"(r[0]), "+f"(r[1]), "+f"(r[2]), "+f"(r[3])                       \
               : "r"(fa[0]), "r"(fa[1]), "r"(fa[2]), "r"(fa[3]), "r"(fb[0]), "r"(fb[1]))
#define MMA8(type)                                                        \
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32." type "." type      \
               ".f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};" \
               : "+f"(r[0]), "+f"(r[1]), "+f"(r[2]), "+f"(r[3])           \
               : "r"(fa[0]), "r"(fa[1]), "r"(fb[0]))
  if constexpr (K == 16 && std::is_same_v<T, __half>) MMA16("f16");
  if constexpr (K == 16 && !std::is_same_v<T, __half>) MMA16("bf16");
  if constexpr (K == 8 && std::is_same_v<T, __half>) MMA8("f16");
  if constexpr (K == 8 && !std::is_same_v<T, __half>) MMA8("bf16");
  for (int i = 0; i < 4; ++i) d[(g + i / 2 * 8) * 8 + t * 2 + i % 2] = r[i];
}

template <typename T, int K, bool kSwapped = false>
void check_multiply() {
  std::vector<T> a(16 * K), b(K * 8);
  std::vector<float> c(128);
  for (size_t i = 0; i < a.size(); ++i) a[i] = T(float(int(i * 37 % 101) - 50) / 16);
  for (size_t i = 0; i < b.size(); ++i) b[i] = T(float(int(i * 53 % 97) - 48) / 32);
  for (size_t i = 0; i < c.size(); ++i) c[i] = float(i) / 8;
  Buffer<T> da(a), db(b);
  Buffer<float> dc(c), out(128);
  multiply<T, K, kSwapped><<<1, 32>>>(da.data(), db.data(), dc.data(), out.data());
  launched();
  for (int r = 0; r < 16; ++r)
    for (int n = 0; n < 8; ++n) {
      double sum = c[r * 8 + n];
      for (int k = 0; k < K; ++k) sum += double(float(a[r * K + k])) * double(float(b[k * 8 + n]));
      expect_equal(out.values()[r * 8 + n], float(sum),
                   "element " + std::to_string(r) + ", " + std::to_string(n));
    }
}

CASE(mma_m16n8k16_f16) { check_multiply<__half, 16>(); }
CASE(mma_m16n8k16_bf16) { check_multiply<__nv_bfloat16, 16>(); }
CASE(mma_m16n8k8_f16) { check_multiply<__half, 8>(); }
BUG(swapped_mma_registers, unit::kWrongValues) { check_multiply<__half, 16, true>(); }
CASE(mma_m16n8k8_bf16) { check_multiply<__nv_bfloat16, 8>(); }

}  // namespace
