// SPDX-License-Identifier: BSD-3-Clause
//
// AMX: bf16 products in tiles of 16 x 16 sums over 32 elements. Everything between the products is
// AVX-512; the other element types are the AVX-512 row's.
#include "isa.h"

#ifdef RA_X86
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>

#include "elements.h"
#include "instructions.h"
#include "key_parts.h"
#include "pair_schedule.h"
#include "problem.h"

#pragma GCC push_options
// g++ 12 takes the undefined operands inside its own intrinsics for mistakes.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
RA_TARGET("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c,amx-tile,amx-bf16")
#include "backward.inl"
#include "forward.inl"
#include "peak.inl"
#include "simd_avx512_bf16.h"

namespace ring_attention::cpu {
namespace {

// Tile registers 0-3 are sums, 4 and 5 rows of A, 6 and 7 lanes of B, all 16 rows of 64 bytes.
struct TileSession {
  TileSession() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    asm volatile("" ::: "memory");
    _tile_loadconfig(&config);
  }
  ~TileSession() { _tile_release(); }
  TileSession(const TileSession&) = delete;
  TileSession& operator=(const TileSession&) = delete;
};

struct AmxArch : BFloat16Pairs {
  static constexpr int kKeyStep = 32, kDepthStep = 32, kWidthStep = 32;
  static constexpr bool kTransposeColumns = true, kOwnProduct = true;
  static constexpr int kMaxVecs = 2;
  static constexpr int tile_rows(int) { return 32; }
  static constexpr int64_t kMaxKeyBlock = 256, kMaxPanel = 128;
  static constexpr TileShape forward_shape(int64_t dim) {
    return {.panel = dim <= 128 ? 128 : 64, .key_block = 256, .panels = 4, .least_panels = 4};
  }
  static constexpr TileShape backward_shape(int64_t dim) {
    if (dim <= 128) return {.panel = 128, .key_block = 128, .panels = 4, .pass = 1, .stripe = 32};
    return {.panel = 64, .key_block = 128, .panels = 4, .pass = 2, .stripe = 32};
  }
  using Session = TileSession;

  // The tile registers += A[32][units] B[units][32], four tiles in flight.
  static RA_INLINE void multiply_tiles(int64_t units, Operand<Unit> a, const Unit* b,
                                       int64_t b_row) {
    const int64_t a_bytes = a.row * 4, b_bytes = b_row * 4;
    const Unit* a_low = a.data + 16 * a.row;
    for (int64_t k = 0; k < units; k += 16) {
      _tile_loadd(4, a.data + k, a_bytes);
      _tile_loadd(6, b + k * b_row, b_bytes);
      _tile_loadd(7, b + k * b_row + 16, b_bytes);
      _tile_loadd(5, a_low + k, a_bytes);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  static RA_INLINE void store_tiles(float* c, int64_t c_row) {
    float* c_low = c + 16 * c_row;
    _tile_stored(0, c, c_row * 4);
    _tile_stored(1, c + 16, c_row * 4);
    _tile_stored(2, c_low, c_row * 4);
    _tile_stored(3, c_low + 16, c_row * 4);
  }

  // Products and visits are interleaved: while the tile unit forms the next 32 x 32 sums, the
  // vector units work on these. All extents are multiples of 32 elements: scratch is padded, and
  // so are key blocks. The intrinsics do not tell the compiler that they touch memory: barriers do.
  template <typename Visit>
  static RA_INLINE void own_tiles(int64_t rows, int64_t width, int64_t units, Operand<Unit> a,
                                  Lanes<Unit> b, const Visit& visit) {
    alignas(64) float sums[2][32 * 32];
    const int64_t columns = width / 32, tiles = divide_up(rows, 32) * columns;
    asm volatile("" ::: "memory");
    for (int64_t t = 0; t <= tiles; ++t) {
      if (t < tiles) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        multiply_tiles(units, a.at(t / columns * 32, 0), b.at(t % columns * 32), b.row);
        store_tiles(sums[t % 2], 32);
        asm volatile("" ::: "memory");
      }
      if (t == 0) continue;
      const int64_t i = (t - 1) / columns * 32, j = (t - 1) % columns * 32;
      for (int64_t r = 0; r < 32; r += kVisitRows) {
        V sum[kVisitRows][2];
#pragma GCC unroll 16
        for (int s = 0; s < kVisitRows; ++s) {
          sum[s][0] = V::load(sums[(t - 1) % 2] + (r + s) * 32);
          sum[s][1] = V::load(sums[(t - 1) % 2] + (r + s) * 32 + 16);
        }
        visit(sum, i + r, j);
      }
    }
  }
  static constexpr int kVisitRows = 8;
};

__attribute__((noinline)) void tile_loop(int steps) {
  for (int step = 0; step < steps; ++step) {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
}

}  // namespace

namespace amx {

void forward(const ForwardParams& params, const Parallel& parallel) {
  if (params.dtype != DType::kBFloat16) return avx512::forward(params, parallel);
  Forward<AmxArch>::run(params, parallel);
}

void backward(const BackwardParams& params, const Parallel& parallel) {
  if (params.dtype != DType::kBFloat16) return avx512::backward(params, parallel);
  Backward<AmxArch>::run(params, parallel);
}

double peak_flops(DType dtype, double seconds) {
  if (dtype != DType::kBFloat16) return avx512::peak_flops(dtype, seconds);
  const TileSession session;
  _tile_zero(4);
  _tile_zero(5);
  _tile_zero(6);
  _tile_zero(7);
  constexpr int kSteps = 40000;
  return best_rate(2.0 * 16 * 16 * 32 * 4 * kSteps, seconds, [] { tile_loop(kSteps); });
}

}  // namespace amx
}  // namespace ring_attention::cpu
#pragma GCC pop_options

namespace ring_attention::cpu::amx {
namespace {

// Linux gives a process the tile registers only when it asks.
bool permitted() {
#ifdef __linux__
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_...
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

// CPUID leaf 7: bf16 products and tiles. g++ 12 has no __builtin_cpu_supports for them.
bool has_tiles() {
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 22 & 1) != 0 && (d >> 24 & 1) != 0;
}

}  // namespace

bool supported() {
  static const bool usable = has_tiles() && avx512_bf16::supported() && permitted();
  return usable;
}

}  // namespace ring_attention::cpu::amx
#endif
