// SPDX-License-Identifier: BSD-3-Clause
//
// Mutants of a kernel: one instruction of its PTX is changed. Tests that are worth something
// notice, by wrong values or by a fault. What an instruction may suffer: it is deleted; a number in
// it grows by 1 or 16; two of its source registers are swapped; its guard is negated; its
// comparison or its operation becomes a related one (lt and le, add and sub, min and max, ...).
#pragma once

#include <cstdint>
#include <string>

// For ctypes, as tests/ptxvm/mutants.py uses it. Kernels go by their mangled names; texts live
// until the next call, and are empty if there is no such kernel.
extern "C" {
#pragma GCC visibility push(default)
// Those that objects have registered: a line "mangled name, tab, C++ name" for each.
const char* ptxvm_kernels();
// A line "times executed, tab, file:line, tab, text" for each instruction, in order. Counted since
// the kernel was restored, while it ran as compiled.
const char* ptxvm_instructions(const char* kernel);
// From now on the kernel runs with this instruction changed, in a way drawn by the seed. Returns
// what it has become, "nothing" if it is deleted, "" if the mutant is none that can be run.
const char* ptxvm_mutate(const char* kernel, uint64_t instruction, uint64_t seed);
// The kernel runs as compiled again.
void ptxvm_restore(const char* kernel);
// The opcodes that any kernel has executed as compiled, with all their words, one a line.
const char* ptxvm_executed_forms();
// Instructions that the kernel has executed, as it is now, since it became so; without those that
// ask an mbarrier whether a phase has ended.
uint64_t ptxvm_executed(const char* kernel);
// Blocks that execute more are ended as a livelock: mutants may never end.
void ptxvm_limit_instructions(uint64_t of_a_block);
#pragma GCC visibility pop
}
