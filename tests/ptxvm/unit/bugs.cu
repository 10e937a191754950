// SPDX-License-Identifier: BSD-3-Clause
//
// Kernels with one bug each, and the report they must cause, whatever the schedule; beside them
// what looks similar and is right.
#include "../vm.h"
#include "cases.h"

namespace {

using unit::Buffer;

__device__ unsigned shared_address(const void* p) {
  return static_cast<unsigned>(__cvta_generic_to_shared(p));
}

__device__ void copy_async(void* to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from)
               : "memory");
}

std::vector<float> ones(size_t count) { return std::vector<float>(count, 1.0f); }

// Reverses 128 numbers through shared memory, twice.
enum class Lacks { kNothing, kFirstBarrier, kSecondBarrier };
template <Lacks kLacks>
__global__ void reverse(const float* in, float* out) {
  __shared__ float buffer[128];
  for (int round = 0; round < 2; ++round) {
    buffer[threadIdx.x] = in[threadIdx.x + round];
    if (kLacks != Lacks::kFirstBarrier) __syncthreads();
    out[round * 128 + threadIdx.x] = buffer[127 - threadIdx.x];
    if (kLacks != Lacks::kSecondBarrier) __syncthreads();
  }
}

template <Lacks kLacks>
void run_reverse() {
  Buffer<float> in(ones(129)), out(256);
  reverse<kLacks><<<2 - 1, 128>>>(in.data(), out.data());
}

CASE(reverse_is_right) { run_reverse<Lacks::kNothing>(); }
BUG(removed_syncthreads_after_store, "shared memory") { run_reverse<Lacks::kFirstBarrier>(); }
BUG(removed_syncthreads_after_load, "race in shared memory: ") {
  run_reverse<Lacks::kSecondBarrier>();
}

// A row of 16 bytes per thread arrives by cp.async and is read by a neighbour.
enum class Wait { kRight, kNone, kNoBarrier, kOneTooFew, kOwnOnly };
template <Wait kWait>
__global__ void pipeline(const float4* in, float4* out) {
  __shared__ float4 stage[2][32];
  for (int s = 0; s < 2; ++s) {
    copy_async(&stage[s][threadIdx.x], in + s * 32 + threadIdx.x);
    asm volatile("cp.async.commit_group;");
  }
  if (kWait == Wait::kOneTooFew) asm volatile("cp.async.wait_group 1;" ::: "memory");
  if (kWait == Wait::kRight || kWait == Wait::kNoBarrier || kWait == Wait::kOwnOnly)
    asm volatile("cp.async.wait_group 0;" ::: "memory");
  if (kWait != Wait::kNoBarrier && kWait != Wait::kOwnOnly) __syncwarp();
  for (int s = 0; s < 2; ++s)
    out[s * 32 + threadIdx.x] = stage[s][kWait == Wait::kOwnOnly ? threadIdx.x : threadIdx.x ^ 1];
  asm volatile("cp.async.wait_all;" ::: "memory");
}

template <Wait kWait>
void run_pipeline() {
  Buffer<float> in(ones(256)), out(256);
  pipeline<kWait>
      <<<1, 32>>>(reinterpret_cast<float4*>(in.data()), reinterpret_cast<float4*>(out.data()));
}

CASE(pipeline_is_right) { run_pipeline<Wait::kRight>(); }
CASE(own_copies_need_no_barrier) { run_pipeline<Wait::kOwnOnly>(); }
BUG(missing_cp_async_wait, "cp.async in flight, not waited for") { run_pipeline<Wait::kNone>(); }
BUG(cp_async_wait_leaves_one_group, "cp.async in flight, not waited for") {
  run_pipeline<Wait::kOneTooFew>();
}
BUG(cp_async_without_syncwarp, "of the same warp wrote, no __syncwarp") {
  run_pipeline<Wait::kNoBarrier>();
}

__global__ void leave_copy(const float4* in) {
  __shared__ float4 stage[32];
  copy_async(&stage[threadIdx.x], in + threadIdx.x);
}

BUG(exit_with_copy_in_flight, "exit with a cp.async not waited for") {
  Buffer<float> in(ones(128));
  leave_copy<<<1, 32>>>(reinterpret_cast<float4*>(in.data()));
}

// ---- Addresses

__global__ void add_one(float* data, int offset) { data[int(threadIdx.x) + offset] += 1; }

CASE(within_bounds) {
  Buffer<float> data(ones(32));
  add_one<<<1, 32>>>(data.data(), 0);
}
BUG(past_the_end, "4 bytes, 4 bytes past the end of registered memory") {
  Buffer<float> data(ones(32));
  add_one<<<1, 32>>>(data.data(), 1);
}
BUG(before_the_begin, "before registered memory") {
  Buffer<float> data(ones(32));
  add_one<<<1, 32>>>(data.data(), -1);
}
BUG(far_away, "far from registered memory") { add_one<<<1, 32>>>(nullptr, 64); }
BUG(store_to_read_only_memory, "read-only memory") {
  static float data[32];
  const ptxvm::Memory memory(data, sizeof data, false);
  add_one<<<1, 32>>>(data, 0);
}

__global__ void load_vector(const float* in, float4* out) {
  out[threadIdx.x] = *reinterpret_cast<const float4*>(in + threadIdx.x * 4);
}
BUG(misaligned_vector, "misaligned address") {
  Buffer<float> in(ones(132)), out(128);
  load_vector<<<1, 32>>>(in.data() + 1, reinterpret_cast<float4*>(out.data()));
}

__global__ void shared_past_the_end(float* out, int i) {
  extern __shared__ float buffer[];
  buffer[threadIdx.x + i] = 1;
  out[threadIdx.x] = buffer[threadIdx.x + i];
}
BUG(shared_memory_past_the_end, "shared memory out of bounds") {
  Buffer<float> out(32);
  shared_past_the_end<<<1, 32, 128>>>(out.data(), 1);
}

__global__ void unwritten(float* out) {
  __shared__ float buffer[64];
  buffer[threadIdx.x] = 1;
  __syncthreads();
  out[threadIdx.x] = buffer[threadIdx.x + 1];
}
BUG(uninitialised_shared_memory, "uninitialised shared memory") {
  Buffer<float> out(32);
  unwritten<<<1, 32>>>(out.data());
}

BUG(too_much_shared_memory, "more than cudaFuncAttributeMaxDynamicSharedMemorySize") {
  Buffer<float> out(32);
  shared_past_the_end<<<1, 32, 64 * 1024>>>(out.data(), 0);
}

// ---- Blocks

__global__ void write_row(float* row, int stride) {
  row[blockIdx.x * stride + threadIdx.x] = float(blockIdx.x);
}

CASE(blocks_own_their_rows) {
  Buffer<float> rows(128);
  write_row<<<4, 32>>>(rows.data(), 32);
}
BUG(two_blocks_own_one_row, "race in global memory: store over what block") {
  Buffer<float> rows(128);
  write_row<<<4, 32>>>(rows.data(), 16);
}

__global__ void halves(uint16_t* out) { out[blockIdx.x * 33 + threadIdx.x] = 1; }
CASE(neighbouring_16_bit_elements) {
  Buffer<uint16_t> out(33 * 4);
  halves<<<4, 33>>>(out.data());
}

template <bool kBarrier>
__global__ void through_global_memory(float* data, float* out) {
  data[threadIdx.x] = 1;
  if (kBarrier) __syncthreads();
  out[threadIdx.x] = data[127 - threadIdx.x];
}
CASE(global_memory_with_a_barrier) {
  Buffer<float> data(128), out(128);
  through_global_memory<true><<<1, 128>>>(data.data(), out.data());
}
BUG(global_write_and_read_without_a_barrier, "race in global memory") {
  Buffer<float> data(128), out(128);
  through_global_memory<false><<<1, 128>>>(data.data(), out.data());
}

__global__ void overwrite_input(float* data) {
  const float next = data[blockIdx.x + 1];
  if (threadIdx.x == 0) data[blockIdx.x] = next;
}
BUG(block_overwrites_what_another_reads, "race in global memory") {
  Buffer<float> data(ones(5));
  overwrite_input<<<4, 32>>>(data.data());
}

// The last block to finish sums what the others left.
template <bool kFence>
__global__ void last_block_reduces(float* partial, unsigned* finished, float* sum) {
  __shared__ bool last;
  if (threadIdx.x == 0) {
    partial[blockIdx.x] = 1;
    if (kFence) __threadfence();
    last = atomicAdd(finished, 1) == gridDim.x - 1;
  }
  __syncthreads();
  if (!last || threadIdx.x != 0) return;
  float total = 0;
  for (unsigned i = 0; i < gridDim.x; ++i) total += partial[i];
  *sum = total;
}
template <bool kFence>
void run_last_block() {
  Buffer<float> partial(4), sum(1);
  Buffer<unsigned> finished(std::vector<unsigned>(1, 0));
  last_block_reduces<kFence><<<4, 32>>>(partial.data(), finished.data(), sum.data());
}
BUG(last_block_reduction_without_a_fence,
    "blocks may communicate only through the end of a kernel") {
  run_last_block<false>();
}
// Our rule is stricter than the device's: a fence does not help.
BUG(last_block_reduction, "blocks may communicate only through the end of a kernel") {
  run_last_block<true>();
}

__global__ void atomic_and_not(float* sum) {
  if (blockIdx.x == 0)
    *sum = 1;
  else
    atomicAdd(sum, 1.0f);
}
BUG(atomics_beside_ordinary_stores, "race in global memory") {
  Buffer<float> sum(ones(1));
  atomic_and_not<<<2, 1>>>(sum.data());
}

// ---- Warps and barriers

template <int kSource>
__global__ void shuffle_half(int* out) {
  if (threadIdx.x < 16) out[threadIdx.x] = __shfl_sync(0xffff, int(threadIdx.x), kSource);
}
CASE(shuffle_among_active_lanes) {
  Buffer<int> out(16);
  shuffle_half<3><<<1, 32>>>(out.data());
}
BUG(shuffle_from_an_inactive_lane, "shfl.sync reads from inactive lane 20") {
  Buffer<int> out(16);
  shuffle_half<20><<<1, 32>>>(out.data());
}

__global__ void shuffle_named_but_absent(int* out) {
  if (threadIdx.x < 16) {
    out[threadIdx.x] = __shfl_xor_sync(~0u, int(threadIdx.x), 1);
  } else {
    out[threadIdx.x] = __ballot_sync(~0u, threadIdx.x == 20);
  }
}
BUG(mask_names_lanes_elsewhere, "which is not here") {
  Buffer<int> out(32);
  shuffle_named_but_absent<<<1, 32>>>(out.data());
}

__global__ void divergent(int* out) {
  if (threadIdx.x < 40) asm volatile("bar.sync 0;" ::: "memory");
  out[threadIdx.x] = 1;
}
BUG(divergent_barrier, "divergent barrier") {
  Buffer<int> out(64);
  divergent<<<1, 64>>>(out.data());
}

// One lane takes a longer way, which the compiler may put behind the barrier in the text.
__global__ void lane_on_another_way(const volatile int* in, int* out) {
  asm volatile(
      "{ .reg .pred first, both; .reg .u32 lane; .reg .b32 value; .reg .u64 at;"
      "  mov.u32 lane, %%tid.x; setp.eq.u32 first, lane, 0; @first bra LONGER;"
      "MEET: bar.red.and.pred both, 0, first; selp.b32 value, 1, 2, both; bra DONE;"
      "LONGER: ld.global.b32 value, [%0]; bra MEET;"
      "DONE: mul.wide.u32 at, lane, 4; add.u64 at, at, %1; st.global.b32 [at], value; }" ::"l"(in),
      "l"(out)
      : "memory");
}
CASE(lanes_meet_at_a_barrier) {
  Buffer<int> in(1), out(64);
  lane_on_another_way<<<1, 64>>>(in.data(), out.data());
  for (int value : out.values()) unit::expect_equal(value, 2, "vote");
}

__global__ void wait_for_too_many(int* out) {
  if (threadIdx.x < 32) asm volatile("bar.sync 1, 96;" ::: "memory");
  if (threadIdx.x >= 32) asm volatile("bar.sync 2, 96;" ::: "memory");
  out[threadIdx.x] = 1;
}
BUG(deadlock_at_named_barriers, "deadlock") {
  Buffer<int> out(64);
  wait_for_too_many<<<1, 64>>>(out.data());
}

__global__ void spin(volatile int* flag) {
  while (*flag == 0) {
  }
}
BUG(livelock, "livelock") {
  ptxvm::Checks checks = ptxvm::checks();
  checks.instruction_limit = 100000;
  const ptxvm::Checks before = ptxvm::checks();
  ptxvm::set_checks(checks);
  Buffer<int> flag(std::vector<int>(1, 0));
  spin<<<1, 32>>>(flag.data());
  ptxvm::set_checks(before);
}

__global__ void lanes_exchange(int* out) {
  __shared__ int buffer[32];
  buffer[threadIdx.x] = threadIdx.x;
  out[threadIdx.x] = buffer[threadIdx.x ^ 1];
}
BUG(lanes_exchange_without_syncwarp, "of the same warp wrote, no __syncwarp") {
  Buffer<int> out(32);
  lanes_exchange<<<1, 32>>>(out.data());
}

__global__ void unknown_instruction(int* out) {
  int r = 0;
  if (*out == 7) asm volatile("{ .reg .pred p; add.cc.u32 %0, %0, 1; }" : "+r"(r));
  *out = r;
}
CASE(unknown_instruction_never_executed) {
  Buffer<int> out(std::vector<int>(1, 6));
  unknown_instruction<<<1, 1>>>(out.data());
}
BUG(unknown_instruction_executed, "executes what the virtual GPU does not know") {
  Buffer<int> out(std::vector<int>(1, 7));
  unknown_instruction<<<1, 1>>>(out.data());
}

// ---- Bank conflicts

template <int kStride>
__global__ void strided(float* out) {
  __shared__ volatile float buffer[32 * kStride];
  buffer[threadIdx.x * kStride] = 1;
  out[threadIdx.x] = buffer[threadIdx.x * kStride];
}
template <int kStride>
uint64_t conflicts() {
  Buffer<float> out(32);
  const ptxvm::Checks before = ptxvm::checks();
  ptxvm::Checks checks = before;
  checks.bank_conflicts = true;
  ptxvm::set_checks(checks);
  ptxvm::reset_statistics();
  strided<kStride><<<1, 32>>>(out.data());
  ptxvm::set_checks(before);
  const ptxvm::Statistics statistics = ptxvm::statistics().begin()->second;
  unit::expect_equal(statistics.shared_passes, uint64_t{2}, "passes");
  return statistics.bank_conflicts;
}
CASE(bank_conflicts) {
  unit::expect_equal(conflicts<1>(), uint64_t{0}, "stride 1");
  unit::expect_equal(conflicts<3>(), uint64_t{0}, "stride 3");
  unit::expect_equal(conflicts<2>(), uint64_t{2}, "stride 2");
  unit::expect_equal(conflicts<32>(), uint64_t{62}, "stride 32");
}

}  // namespace
