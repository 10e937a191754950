// SPDX-License-Identifier: BSD-3-Clause
//
// wgmma, setmaxnreg and fence.proxy.async, of sm_90a. See Note [wgmma]; shared-memory descriptors
// and fragments as in the PTX manual, 9.7.15.
#ifdef __x86_64__
#include <immintrin.h>
#endif

#include <algorithm>
#include <utility>

#include "../block.h"
#include "../launch.h"
#include "../memory_access.h"
#include "handlers.h"
//
#include "../columns.h"

namespace ptxvm {
namespace {

// Instruction::immediate of wgmma.mma_async.
enum : int32_t { kMMajorA = 1, kNMajorB = 2, kNegated = 4 };

// A matrix in shared memory: `rows` of M or N by 16 of K.
struct Descriptor {
  uint32_t start, leading, stride;  // bytes
  uint32_t width;                   // of the swizzle in bytes; 16: none
};

Descriptor decode_descriptor(uint64_t bits) {
  if ((bits & 0x3ff1'c000'c000'c000) != 0)
    throw Fault("wgmma: bits of a descriptor that mean nothing");
  if ((bits >> 49 & 7) != 0) throw Fault("wgmma: a descriptor's base offset is not supported");
  constexpr uint32_t widths[] = {16, 128, 64, 32};
  const auto field = [&](int at) { return static_cast<uint32_t>(bits >> at & 0x3fff) * 16; };
  const Descriptor result{field(0), field(16), field(32), widths[bits >> 62]};
  if (result.width != 16 && result.start / result.width % 8 != 0)
    throw Fault("wgmma: a descriptor starts " + std::to_string(result.start % (8 * result.width)) +
                " bytes into the swizzle's pattern of " + std::to_string(8 * result.width));
  return result;
}

// The matrix in pieces of 8 elements, 16 for each 8 rows: K-major: row by row K 0 to 7, then
// K 8 to 15; MN-major: K by K 8 rows.
std::vector<uint32_t> pieces_of(Warp& warp, uint64_t bits, uint32_t rows, bool mn_major) {
  const Descriptor d = decode_descriptor(bits);
  const uint32_t within = d.start % d.width, width = d.width;
  if (within != 0 && within + (mn_major ? rows * 2 : 32) > width)
    throw Fault("wgmma: a descriptor's matrix leaves the bytes of the swizzle's width");
  const bool swizzled = width != 16;
  const uint32_t next_half = !swizzled ? d.leading : mn_major ? d.stride : 16;  // 8 further in K
  std::vector<uint32_t> pieces;
  pieces.reserve(2 * rows);
  for (uint32_t row = 0; row < rows; row += 8) {
    uint32_t begin = d.start;
    if (mn_major && swizzled)
      begin += row / (width / 2) * d.leading + row % (width / 2) * 2;
    else
      begin += row / 8 * d.stride;
    for (uint32_t i = 0; i < 16; ++i) {
      uint32_t at = begin + i % 8 * width + i / 8 * next_half;
      at ^= (at >> 7 & (width / 16 - 1)) << 4;
      pieces.push_back(shared_address(warp, at, 16, -1) - kSharedBegin);
    }
  }
  return pieces;
}

// Columns 0, 2, 4, 6, 1, 3, 5, 7: those of a D register lie side by side.
constexpr int place_of_column(int column) { return column % 2 * 4 + column / 2; }

template <typename T>
void load_piece(Warp& warp, uint32_t offset, float (&values)[8]) {
  uint16_t bits[8];
  std::memcpy(bits, warp.block.shared(offset + kSharedBegin), 16);
  for (int i = 0; i < 8; ++i) values[i] = to_float(T{bits[i]});
}

// B's 16 x 8 block.
template <typename T>
void load_b(Warp& warp, const uint32_t* pieces, bool n_major, float (&b)[16][8]) {
  for (int i = 0; i < 16; ++i) {
    float values[8];
    load_piece<T>(warp, pieces[i], values);
    for (int j = 0; j < 8; ++j) {
      if (n_major)
        b[i][place_of_column(j)] = values[j];
      else
        b[i / 8 * 8 + j][place_of_column(i % 8)] = values[j];
    }
  }
}

// The warp's 16 rows of A, K by K.
template <typename T>
void load_a(Warp& warp, const Product& product, float (&a)[16][16]) {
  const Instruction& in = *product.instruction;
  if (product.a.empty()) {
    for (int i = 0; i < 4; ++i) {
      const uint32_t* row = &in.registers[in.registers.size() - 4];
      const auto pairs = warp.load<uint32_t>(row[i]);
      for (int lane = 0; lane < kLanes; ++lane) {
        float* to = &a[i / 2 * 8 + lane % 4 * 2][i % 2 * 8 + lane / 4];
        to[0] = to_float(T{static_cast<uint16_t>(pairs[lane])});
        to[16] = to_float(T{static_cast<uint16_t>(pairs[lane] >> 16)});
      }
    }
    return;
  }
  for (int half = 0; half < 2; ++half)
    for (int i = 0; i < 16; ++i) {
      float values[8];
      load_piece<T>(warp, product.a[static_cast<size_t>(16 * (warp.id % 4 * 2 + half) + i)],
                    values);
      for (int j = 0; j < 8; ++j) {
        if ((in.immediate & kMMajorA) != 0)
          a[i][8 * half + j] = values[j];
        else
          a[i / 8 * 8 + j][8 * half + i % 8] = values[j];
      }
    }
}

// D [16, N] = A [16, 16] B [16, N], or added to D. Sums as in mma.sync, K by K.
template <typename T>
void multiply(Warp& warp, const Product& product) {
  const Instruction& in = *product.instruction;
  float a[16][16];
  load_a<T>(warp, product, a);
  if ((in.immediate & kNegated) != 0)
    for (auto& column : a)
      for (float& value : column) value = -value;
  for (size_t block = 0; block < product.b.size() / 16; ++block) {
    alignas(32) float b[16][8];
    load_b<T>(warp, &product.b[16 * block], (in.immediate & kNMajorB) != 0, b);
    for (int half = 0; half < 2; ++half) {
      // Row r of these 8 is in lanes 4 r to 4 r + 3.
      uint8_t* even = warp.row(in.registers[4 * block + 2 * half]);
      uint8_t* odd = warp.row(in.registers[4 * block + 2 * half + 1]);
      Columns sum[8]{};
      if (product.step.accumulates)
        for (int r = 0; r < 8; ++r) {
          std::memcpy(&sum[r], even + 16 * r, 16);
          std::memcpy(reinterpret_cast<uint8_t*>(&sum[r]) + 16, odd + 16 * r, 16);
        }
      for (int k = 0; k < 16; ++k)
        for (int r = 0; r < 8; ++r)
          sum[r] = multiply_add(a[k][8 * half + r], reinterpret_cast<Columns&>(b[k]), sum[r]);
      for (int r = 0; r < 8; ++r) {
        std::memcpy(even + 16 * r, &sum[r], 16);
        std::memcpy(odd + 16 * r, reinterpret_cast<uint8_t*>(&sum[r]) + 16, 16);
      }
    }
  }
}

uint64_t uniform_descriptor(Warp& warp, uint32_t row) {
  const uint64_t value = warp.lane_value(row, 0, true);
  for (int lane = 1; lane < kLanes; ++lane)
    if (warp.lane_value(row, lane, true) != value)
      throw Fault("wgmma: lanes differ in a descriptor", lane);
  return value;
}

// arg: A's descriptor (if not in registers), B's, scale-d; elements: N / 8.
template <typename T>
Flow run_mma_async(Warp& warp, const Instruction& in, LaneMask lanes) {
  warp.require_whole_warp(lanes, "wgmma.mma_async");
  const bool a_in_registers = in.registers.size() != size_t{4} * in.elements;
  Product product{&in, multiply<T>, {warp.pc()}, {}, {}};
  const LaneMask accumulates = warp.predicate(in.arg[2]);
  if (accumulates != 0 && accumulates != kAllLanes) throw Fault("wgmma: lanes differ in scale-d");
  product.step.accumulates = accumulates != 0;
  product.step.b = uniform_descriptor(warp, in.arg[1]);
  product.b = pieces_of(warp, product.step.b, 8u * in.elements, (in.immediate & kNMajorB) != 0);
  if (!a_in_registers) {
    product.step.a = uniform_descriptor(warp, in.arg[0]);
    product.a = pieces_of(warp, product.step.a, 64, (in.immediate & kMMajorA) != 0);
  }
  warp.block.agree(warp, product.step);
  warp.products.issue(std::move(product), warp.block.launch.program.watched_uses[warp.pc()]);
  ++warp.block.launch.statistics.wgmma;
  return Flow::kNext;
}

bool mma_async(Decoder& d) {
  // The types of D, A, B.
  const Type f32{Kind::kFloat, 32}, a = d.type(1);
  if (d.words().size() != 8 || d.type(2) != f32 || d.type(0) != a || a.packed) return false;
  const std::string_view shape = d.word(4);
  if (!shape.starts_with("m64n") || !shape.ends_with("k16")) return false;
  uint64_t n;
  if (!parse_number(shape.substr(4, shape.size() - 7), false, n) || n % 8 != 0 || n < 8 || n > 256)
    return false;
  const bool a_in_registers = d.is_vector(1);
  if (d.operand_count() != (a_in_registers ? 7 : 8)) d.unsupported("count of operands");
  Instruction& in = d.instruction;
  in.elements = static_cast<uint8_t>(n / 8);
  in.registers = d.destinations(0);
  if (in.registers.size() != n / 2) d.unsupported("count of registers");
  if (a_in_registers) {
    const std::vector<uint32_t> rows = d.sources(1);
    if (rows.size() != 4) d.unsupported("count of registers");
    in.registers.insert(in.registers.end(), rows.begin(), rows.end());
  }
  in.arg = {a_in_registers ? 0 : d.source(1, true), d.source(2, true), d.predicate(3)};
  int64_t sign = 1;
  for (size_t i : {4, 5}) {
    if (d.number(i) != 1 && d.number(i) != -1) d.unsupported("scales are 1 or -1");
    sign *= d.number(i);
  }
  for (size_t i = 6; i < d.operand_count(); ++i)
    if (d.number(i) != 0 && d.number(i) != 1) d.unsupported("transpositions are 0 or 1");
  in.immediate = (!a_in_registers && d.number(6) != 0 ? kMMajorA : 0) |
                 (d.number(a_in_registers ? 6 : 7) != 0 ? kNMajorB : 0) | (sign < 0 ? kNegated : 0);
  if (a.kind == Kind::kHalf)
    in.run = run_mma_async<Half>;
  else if (a.kind == Kind::kBFloat16)
    in.run = run_mma_async<BFloat16>;
  else
    return false;
  return true;
}

// wgmma.fence, commit_group, wait_group: what all warps of the warpgroup execute.
template <typename F>
Flow run_together(Warp& warp, const Instruction& in, LaneMask lanes) {
  warp.require_whole_warp(lanes, "wgmma");
  warp.block.agree(warp, {warp.pc()});
  F{}(warp.products, static_cast<uint32_t>(in.immediate));
  return Flow::kNext;
}

template <typename F>
bool together(Decoder& d, F) {
  d.instruction.run = run_together<F>;
  return true;
}

bool wgmma(Decoder& d) {
  if (d.word(2) != "sync" || d.word(3) != "aligned") return false;
  const std::string_view what = d.word(1);
  if (what == "mma_async") return mma_async(d);
  if (d.words().size() != 4) return false;
  if (what == "fence")
    return together(d, [](ProductsInFlight& products, uint32_t) { products.fence(); });
  if (what == "commit_group")
    return together(d, [](ProductsInFlight& products, uint32_t) { products.commit(); });
  if (what != "wait_group") return false;
  d.instruction.immediate = static_cast<int32_t>(d.number(0));
  return together(d, [](ProductsInFlight& products, uint32_t n) { products.wait(n); });
}

// immediate: registers; elements: whether these are more.
Flow run_setmaxnreg(Warp& warp, const Instruction& in, LaneMask lanes) {
  warp.require_whole_warp(lanes, "setmaxnreg");
  if (!warp.block.set_registers(warp, static_cast<uint32_t>(in.immediate), in.elements != 0))
    return warp.await(lanes, Warp::kRegisters);
  warp.block.agree(warp, {warp.pc()});
  return Flow::kNext;
}

bool setmaxnreg(Decoder& d) {
  const bool more = d.word(1) == "inc";
  if (d.words().size() != 5 || (!more && d.word(1) != "dec") || d.word(2) != "sync" ||
      d.word(3) != "aligned" || d.word(4) != "u32")
    return false;
  d.instruction.immediate = static_cast<int32_t>(d.number(0));
  d.instruction.elements = more ? 1 : 0;
  d.instruction.run = run_setmaxnreg;
  return true;
}

// By all lanes that there are: one by fewer orders nothing here, which is stricter than the device.
bool fence_proxy(Decoder& d) {
  if (d.word(1) != "proxy" || d.word(2) != "async" || d.words().size() > 4) return false;
  if (d.words().size() == 4 && d.word(3) != "shared::cta") return false;
  d.instruction.run = [](Warp& warp, const Instruction&, LaneMask lanes) {
    if (lanes == warp.alive()) warp.clock.fence_proxies();
    return Flow::kNext;
  };
  return true;
}

}  // namespace

void add_warpgroup(Opcodes& opcodes) {
  opcodes["wgmma"].push_back(wgmma);
  opcodes["setmaxnreg"].push_back(setmaxnreg);
  opcodes["fence"].push_back(fence_proxy);
}

}  // namespace ptxvm
