// SPDX-License-Identifier: BSD-3-Clause
//
// The intrinsics of AMX that the kernels use, see intrinsics.h: a thread's eight tile registers,
// and what the processor would refuse (a signal there) ends the process.
#pragma once

#include "intrinsics.h"

// The compiler's are macros.
#undef _tile_loadconfig
#undef _tile_release
#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps

#pragma GCC push_options
RA_TARGET_EMULATED

namespace ring_attention::cpu {
namespace emulated {

constexpr int kTiles = 8, kTileRows = 16, kTileRowBytes = 64;

// What lies beyond a tile's rows and row_bytes is zero.
struct TileRegister {
  alignas(64) uint8_t row[kTileRows][kTileRowBytes];
  int rows, row_bytes;
};
struct TileRegisters {
  bool configured;
  TileRegister tile[kTiles];
};
inline thread_local TileRegisters tile_registers = {};

inline TileRegister& tile(int number) {
  if (!tile_registers.configured) stop("a tile register was used without _tile_loadconfig");
  if (number < 0 || number >= kTiles) stop("expected tile registers 0 to 7");
  TileRegister& found = tile_registers.tile[number];
  if (found.rows == 0 || found.row_bytes == 0) stop("a tile register was used that has no rows");
  return found;
}

inline void _tile_release() { tile_registers = {}; }

inline void _tile_loadconfig(const void* from) {
  struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
  } config;
  static_assert(sizeof config == 64);
  std::memcpy(&config, from, sizeof config);
  _tile_release();
  if (config.palette == 0) return;
  if (config.palette != 1) stop("expected palette 0 or 1");
  if (config.start_row != 0) stop("expected 0 as the row to go on with");
  for (const uint8_t byte : config.reserved) {
    if (byte != 0) stop("expected zero in the reserved bytes of a tile configuration");
  }
  for (int t = 0; t < 16; ++t) {
    const int rows = config.rows[t], row_bytes = config.row_bytes[t];
    if (t >= kTiles && (rows != 0 || row_bytes != 0)) stop("expected 8 tile registers at most");
    if (rows > kTileRows || row_bytes > kTileRowBytes) stop("expected at most 16 rows of 64 bytes");
    if (t >= kTiles) continue;
    tile_registers.tile[t].rows = rows;
    tile_registers.tile[t].row_bytes = row_bytes;
  }
  tile_registers.configured = true;
}

inline void _tile_zero(int to) { std::memset(tile(to).row, 0, sizeof tile(to).row); }

inline void _tile_loadd(int to, const void* from, int64_t stride) {
  TileRegister& x = tile(to);
  _tile_zero(to);
  for (int i = 0; i < x.rows; ++i) {
    std::memcpy(x.row[i], static_cast<const char*>(from) + i * stride, x.row_bytes);
  }
}

inline void _tile_stored(int from, void* to, int64_t stride) {
  const TileRegister& x = tile(from);
  for (int i = 0; i < x.rows; ++i) {
    std::memcpy(static_cast<char*>(to) + i * stride, x.row[i], x.row_bytes);
  }
}

// c[m][n] += sum over k of a[m][k] b[k][n], all pairs of bf16: even and odd elements are summed
// apart from zero, by multiply-adds, then added to one another and that to c. Every step rounds to
// nearest and flushes denormals.
inline void _tile_dpbf16ps(int to, int left, int right) {
  TileRegister& c = tile(to);
  const TileRegister &a = tile(left), &b = tile(right);
  if (to == left || to == right || left == right) stop("expected three tile registers");
  if (a.row_bytes % 4 != 0 || b.row_bytes % 4 != 0) stop("expected tile rows of 4-byte units");
  if (a.rows != c.rows || b.row_bytes != c.row_bytes || b.rows != a.row_bytes / 4) {
    stop("expected c [m][n], a [m][k] and b [k][n] in _tile_dpbf16ps");
  }
  // Control words hold for what is loaded after they are set, and stored before they are set back.
  const auto control = [](unsigned word) { asm volatile("ldmxcsr %0" : : "m"(word) : "memory"); };
  const unsigned usual = _mm_getcsr();
  control(kFlushDenormals);
  for (int m = 0; m < c.rows; ++m) {
    __m512 even = _mm512_setzero_ps(), odd = _mm512_setzero_ps();
    for (int k = 0; k < b.rows; ++k) {
      int32_t pair;
      std::memcpy(&pair, a.row[m] + 4 * k, sizeof pair);
      const __m256i x = _mm256_set1_epi32(pair);
      const __m512i y = _mm512_loadu_si512(b.row[k]);
      even.low = _mm256_fmadd_ps(even_bf16(x), even_bf16(y.low), even.low);
      even.high = _mm256_fmadd_ps(even_bf16(x), even_bf16(y.high), even.high);
      odd.low = _mm256_fmadd_ps(odd_bf16(x), odd_bf16(y.low), odd.low);
      odd.high = _mm256_fmadd_ps(odd_bf16(x), odd_bf16(y.high), odd.high);
    }
    float row[16];
    std::memcpy(row, c.row[m], sizeof row);
    _mm512_storeu_ps(row, _mm512_add_ps(_mm512_loadu_ps(row), _mm512_add_ps(even, odd)));
    std::memcpy(c.row[m], row, c.row_bytes);
  }
  control(usual);
}

}  // namespace emulated
}  // namespace ring_attention::cpu
#pragma GCC pop_options
