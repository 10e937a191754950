// SPDX-License-Identifier: BSD-3-Clause
//
// The table of instruction sets and the choice among them. Run-time values become types in the
// isa_*.cpp it points at, nowhere else.
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "isa.h"
#include "kernels.h"
#ifdef RA_PTXVM
#include "isa_ptx.h"
#endif

namespace ring_attention::cpu {
namespace {

bool always() { return true; }
[[maybe_unused]] bool never() { return false; }

#ifdef RA_PTXVM
constexpr Isa on_virtual_gpu(const char* name) {
  return {name, ptx::supported, ptx::recommended, ptx::forward, ptx::backward,     ptx::peak_flops,
          16,   ptx::combine,   ptx::finish,      ptx::delta,   ptx::sink_gradient};
}
#endif

constexpr Isa kIsas[] = {
#if defined(RA_PTXVM)
    on_virtual_gpu("ptx-sm80"),
    on_virtual_gpu(ptx::kHopper),
#elif defined(RA_EMULATED)
    // Where AVX2 is: it does what these rows' instructions would, see instructions.h.
    {"amx", avx2::supported, never, amx::forward, amx::backward, amx::peak_flops},
    {"avx512_bf16", avx2::supported, never, avx512_bf16::forward, avx512_bf16::backward,
     avx512_bf16::peak_flops},
    {"avx512", avx2::supported, never, avx512::forward, avx512::backward, avx512::peak_flops},
#elif defined(RA_X86)
    {"amx", amx::supported, always, amx::forward, amx::backward, amx::peak_flops},
    {"avx512_bf16", avx512_bf16::supported, avx512_bf16::recommended, avx512_bf16::forward,
     avx512_bf16::backward, avx512_bf16::peak_flops},
    {"avx512", avx512::supported, always, avx512::forward, avx512::backward, avx512::peak_flops},
    {"avx2", avx2::supported, always, avx2::forward, avx2::backward, avx2::peak_flops},
#endif
    {"scalar", scalar::supported, always, scalar::forward, scalar::backward, scalar::peak_flops},
};

const Isa& choose() {
  const char* variable = std::getenv("RING_ATTENTION_CPU");
  const std::string wanted = variable == nullptr ? "" : variable;
  std::string names;
  for (const Isa& isa : kIsas) {
    if (!isa.supported()) continue;
    if (wanted.empty() ? isa.recommended() : wanted == isa.name) return isa;
    names += (names.empty() ? "" : ", ") + std::string(isa.name);
  }
  throw std::invalid_argument("ring_attention: expected RING_ATTENTION_CPU to be one of " + names +
                              " (what this machine supports), got '" + wanted +
                              "'; unset it to have the best one chosen");
}

}  // namespace

std::span<const Isa> isas() { return kIsas; }

const Isa& isa() {
  static const Isa& chosen = choose();
  return chosen;
}

}  // namespace ring_attention::cpu
