// SPDX-License-Identifier: BSD-3-Clause
//
// Backward calls, cut into launches: see launch.h. Kernels are instantiated in files of their own.
#include "backward_rows.cuh"
#include "launch.h"
#include "sm80/backward_launch.h"
#include "sm90/backward_launch.h"

namespace ring_attention::cuda {
namespace {

// What a launch is cut into: rows that stay with a block, and query rows that pass by at a time.
struct BackwardTileSize {
  int rows, stream;
};

// Calls visitor(tile, launch) with the tiles that serve a call, and its launcher.
template <typename Visitor>
cudaError_t visit_kernels(const BackwardParams& p, const Device& device, const Visitor& visitor) {
  return visit_head_dims(p, [&]<typename Dims>(Dims) {
    const bool large = sm80::takes_large_tiles(device.smem_optin_bytes, Dims::kQk, Dims::kV);
    const auto visit = [&]<typename Elem>(Elem) {
      constexpr int kBytes = sizeof(Elem);
      if constexpr (kBytes == 2) {
        if (device.hopper && p.softcap == 0.0) {
          constexpr sm90::BackwardShape kShape = sm90::backward_shape(Dims::kQk, Dims::kV);
          return visitor(BackwardTileSize{kShape.rows, kShape.queries},
                         sm90::launch_backward<Elem, Dims>);
        }
      }
      const bool atomic_dq = !p.deterministic && sm80::has_atomic_dq(kBytes, Dims::kQk, Dims::kV);
      const sm80::BackwardTiles tiles = sm80::backward_tiles(kBytes, Dims::kQk, Dims::kV, large);
      return visitor(BackwardTileSize{tiles.rows(), tiles.stream},
                     [&](BackwardCall call, cudaStream_t stream) {
                       call.atomic_dq = atomic_dq;
                       return sm80::launch_backward<Elem, Dims>(call, large, stream);
                     });
    };
    switch (p.dtype) {
      case DType::kBFloat16:
        return visit(BFloat16{});
      case DType::kFloat16:
        return visit(Float16{});
      case DType::kFloat32:
        return visit(Float32{});
      default:
        return cudaErrorNotSupported;
    }
  });
}

constexpr int64_t kWantedBlocks = 216;  // two for each multiprocessor of an A100
constexpr int64_t kLeastTiles = 4;      // passing tiles, to make up for sums written and read again

Strides in_bytes(const Strides& stride, int64_t element_bytes) {
  return {stride.batch * element_bytes, stride.head * element_bytes, stride.row * element_bytes};
}

// Whether the rows of a tensor lie on 16 bytes, as they are read. Strides in bytes.
bool on_16_bytes(const void* data, const Strides& stride, int64_t batch, int64_t heads,
                 int64_t rows) {
  const auto whole = [](int64_t size, int64_t bytes) { return size <= 1 || bytes % 16 == 0; };
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && whole(batch, stride.batch) &&
         whole(heads, stride.head) && whole(rows, stride.row);
}

// Gradients are read and written by pairs.
bool on_8_bytes(const void* gradient) { return reinterpret_cast<uintptr_t>(gradient) % 8 == 0; }

bool aligned(const BackwardCall& call) {
  bool result = on_16_bytes(call.q, call.q_stride, call.batch, call.heads, call.q_len) &&
                on_16_bytes(call.dout, call.dout_stride, call.batch, call.heads, call.q_len) &&
                on_8_bytes(call.dq);
  for (int i = 0; i < call.blocks.count; ++i) {
    const KVBlock& b = call.blocks.block[i];
    if (b.k_len == 0) continue;
    result = result && on_16_bytes(b.k, b.k_stride, call.batch, call.kv_heads, b.k_len) &&
             on_16_bytes(b.v, b.v_stride, call.batch, call.kv_heads, b.k_len) && on_8_bytes(b.dk) &&
             on_8_bytes(b.dv);
  }
  return result;
}

int64_t key_count(const KVBlocks& blocks) {
  int64_t keys = 0;
  for (int i = 0; i < blocks.count; ++i) keys += blocks.block[i].k_len;
  return keys;
}

// Note [parts]: as many as it takes to have kWantedBlocks, as long as each has kLeastTiles.
void set_parts(BackwardCall& call, const BackwardTileSize& tile) {
  int64_t key_tiles = 0, passing_keys = 0;
  for (int i = 0; i < call.blocks.count; ++i) {
    key_tiles += divide_up(call.blocks.block[i].k_len, tile.rows);
    passing_keys += divide_up(call.blocks.block[i].k_len, tile.stream);
  }
  const int64_t group = call.heads / call.kv_heads;
  const auto wanted = [](int64_t blocks) { return std::max<int64_t>(kWantedBlocks / blocks, 1); };
  const auto parts_of = [](int64_t passing) { return std::max<int64_t>(passing / kLeastTiles, 1); };
  const int64_t dq_blocks = call.batch * call.heads * divide_up(call.q_len, tile.rows);
  call.dq_parts = static_cast<int>(std::min(wanted(dq_blocks), parts_of(passing_keys)));
  const int64_t keys_blocks = std::max<int64_t>(call.batch * call.kv_heads * key_tiles, 1);
  const int64_t passing_rows = divide_up(call.q_len, tile.stream);
  call.head_parts = static_cast<int>(std::min(wanted(keys_blocks), group));
  call.row_parts =
      static_cast<int>(std::min(wanted(keys_blocks * call.head_parts), parts_of(passing_rows)));
}

// One launch: up to kMaxBlocks blocks from `first_block` on. Without workspace, to learn its size.
struct Launch {
  BackwardCall call;
  int64_t workspace_bytes = 0;

  Launch(const BackwardParams& p, int64_t first_block, const BackwardTileSize& tile,
         void* workspace) {
    const int64_t element_bytes = p.dtype == DType::kFloat32 ? 4 : 2;
    call = {.q = static_cast<const char*>(p.q),
            .dout = static_cast<const char*>(p.dout),
            .q_stride = in_bytes(p.q_stride, element_bytes),
            .dout_stride = in_bytes(p.dout_stride, element_bytes),
            .blocks = KVBlocks::of(p, first_block),
            .batch = p.batch,
            .heads = static_cast<int>(p.heads),
            .kv_heads = static_cast<int>(p.kv_heads),
            .q_len = static_cast<int>(p.q_len),
            .padded = static_cast<int>(round_up(p.q_len, 128)),
            .stream = tile.stream,
            .head_dim = static_cast<int>(p.head_dim),
            .v_head_dim = static_cast<int>(p.v_head_dim),
            .score = ScoreScale::of(p.scale, p.softcap),
            .scale = static_cast<float>(p.scale),
            .softcap = p.softcap != 0.0,
            .dq = static_cast<float*>(p.dq),
            .lse = static_cast<const float*>(p.lse),
            .delta = static_cast<const float*>(p.delta)};
    for (int i = 0; i < call.blocks.count; ++i) {
      KVBlock& block = call.blocks.block[i];
      block.k_stride = in_bytes(block.k_stride, element_bytes);
      block.v_stride = in_bytes(block.v_stride, element_bytes);
      call.first_run[i + 1] = call.first_run[i] + static_cast<int>(block.intervals);
    }
    set_parts(call, tile);
    const int64_t rows = call.batch * call.padded, runs = call.first_run[call.blocks.count];
    place(call.row_lse, rows * call.heads, workspace);
    place(call.row_lse_low, rows * call.heads, workspace);
    place(call.minus_delta, rows * call.heads, workspace);
    place(call.intervals, rows * runs, workspace);
    place(call.ranges, call.batch * runs * call.tiles(), workspace);
    place(call.groups, call.batch * runs * call.tile_groups(), workspace);
    const int64_t keys_parts = call.head_parts * call.row_parts;
    const int64_t keys = key_count(call.blocks) * call.batch * call.kv_heads;
    const int64_t dq = call.batch * call.heads * call.q_len * call.head_dim;
    place(call.partial,
          std::max(call.dq_parts > 1 ? call.dq_parts * dq : 0,
                   keys_parts > 1 ? keys_parts * keys * (call.head_dim + call.v_head_dim) : 0),
          workspace);
  }

  cudaError_t describe_rows(cudaStream_t stream) const {
    const int64_t rows = call.batch * call.heads * call.padded;
    const cudaError_t error =
        start(row_stats, divide_up(rows, kRowThreads), kRowThreads, 0, stream, call);
    if (error != cudaSuccess) return error;
    const int64_t groups = call.first_run[call.blocks.count] * call.batch * call.tile_groups();
    return start(key_ranges, groups, kGroupThreads, 0, stream, call);
  }

 private:
  template <typename T>
  void place(T*& array, int64_t count, void* workspace) {
    array = reinterpret_cast<T*>(static_cast<char*>(workspace) + workspace_bytes);
    workspace_bytes += round_up(count * static_cast<int64_t>(sizeof(T)), 16);
  }
};

cudaError_t add_parts_to(float* to, const float* partial, int parts, int64_t stride, int64_t count,
                         cudaStream_t stream) {
  return start(add_parts, divide_up(count, kRowThreads), kRowThreads, 0, stream, to, partial, parts,
               stride, count);
}

}  // namespace

cudaError_t add_dq_parts(const BackwardCall& call, cudaStream_t stream) {
  if (call.dq_parts == 1) return cudaSuccess;
  const int64_t count = call.batch * call.heads * call.q_len * call.head_dim;
  return add_parts_to(call.dq, call.partial, call.dq_parts, count, count, stream);
}

cudaError_t add_keys_parts(const BackwardCall& call, cudaStream_t stream) {
  const int parts = call.head_parts * call.row_parts;
  if (parts == 1) return cudaSuccess;
  const int64_t heads = call.batch * call.kv_heads, keys = key_count(call.blocks) * heads;
  const int64_t stride = keys * (call.head_dim + call.v_head_dim);
  const float* dk = call.partial;
  const float* dv = call.partial + keys * call.head_dim;
  for (int i = 0; i < call.blocks.count; ++i) {
    const KVBlock& block = call.blocks.block[i];
    const int64_t dk_count = block.k_len * heads * call.head_dim;
    const int64_t dv_count = block.k_len * heads * call.v_head_dim;
    cudaError_t error =
        add_parts_to(static_cast<float*>(block.dk), dk, parts, stride, dk_count, stream);
    if (error == cudaSuccess) {
      error = add_parts_to(static_cast<float*>(block.dv), dv, parts, stride, dv_count, stream);
    }
    if (error != cudaSuccess) return error;
    dk += dk_count, dv += dv_count;
  }
  return cudaSuccess;
}

int64_t backward_workspace_bytes(const BackwardParams& p, const Device& device) {
  int64_t bytes = 0;
  if (p.batch * p.heads * p.q_len == 0) return bytes;
  visit_kernels(p, device, [&](const BackwardTileSize& tile, const auto&) {
    for (int64_t i = 0; i < p.num_blocks; i += kMaxBlocks) {
      bytes = std::max(bytes, Launch(p, i, tile, nullptr).workspace_bytes);
    }
    return cudaSuccess;
  });
  return bytes;
}

cudaError_t backward(const BackwardParams& p, void* workspace, const Device& device,
                     cudaStream_t stream) {
  if (p.batch * p.heads * p.q_len == 0) return cudaSuccess;
  return visit_kernels(p, device, [&](const BackwardTileSize& tile, const auto& launch) {
    for (int64_t i = 0; i < p.num_blocks; i += kMaxBlocks) {  // before anything is written
      const Launch one(p, i, tile, workspace);
      if (!aligned(one.call)) return cudaErrorMisalignedAddress;
    }
    for (int64_t i = 0; i < p.num_blocks; i += kMaxBlocks) {
      const Launch one(p, i, tile, workspace);
      cudaError_t error = one.describe_rows(stream);
      if (error == cudaSuccess) error = launch(one.call, stream);
      if (error != cudaSuccess) return error;
    }
    return cudaSuccess;
  });
}

}  // namespace ring_attention::cuda
