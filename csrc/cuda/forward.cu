// SPDX-License-Identifier: BSD-3-Clause
//
// Forward calls, cut into launches: see launch.h. Kernels are instantiated in files of their own.
#include "launch.h"
#include "sm80/forward_launch.h"
#include "sm90/forward_launch.h"

namespace ring_attention::cuda {
namespace {

using sm80::TileFor;

// With a softcap all devices take the small ones' tile: what tanh costs is not saved by a longer
// ring, and these kernels take the compiler longest.
TileFor tile_for(const ForwardParams& p, const Device& device) {
  if (p.heads / p.kv_heads * p.q_len <= sm80::kFewRows) return TileFor::kFewRows;
  const bool large_smem = device.smem_optin_bytes >= sm80::kLargeSmemBytes;
  return large_smem && p.softcap == 0.0 ? TileFor::kLargeSmem : TileFor::kSmallSmem;
}

// Calls visitor(tile, launch) with the tile that serves a call, and its launcher.
template <typename Visitor>
cudaError_t visit_kernel(const ForwardParams& p, const Device& device, const Visitor& visitor) {
  const TileFor use = tile_for(p, device);
  return visit_head_dims(p, [&]<typename Dims>(Dims) {
    const auto visit = [&]<typename Elem>(Elem) {
      if (use == TileFor::kLargeSmem && device.hopper) {
        const sm90::ForwardShape shape = sm90::forward_shape<Dims::kQk, Dims::kV>();
        const TileSize tile = {.rows = shape.rows, .keys = shape.keys, .blocks = 1};
        return visitor(tile, sm90::launch_forward<Elem, Dims>);
      }
      const sm80::ForwardShape shape = sm80::forward_shape<Dims::kQk, Dims::kV>(use);
      const TileSize tile = {.rows = shape.rows(), .keys = shape.keys, .blocks = shape.blocks};
      return visitor(tile, [use](const ForwardCall& call, cudaStream_t stream) {
        return sm80::launch_forward<Elem, Dims>(call, use, stream);
      });
    };
    switch (p.dtype) {
      case DType::kBFloat16:
        return visit(BFloat16{});
      case DType::kFloat16:
        return visit(Float16{});
      case DType::kFloat32: {
        constexpr int kWide = Dims::kQk > Dims::kV ? Dims::kQk : Dims::kV;
        constexpr int kDim = kWide <= 64 ? 64 : kWide <= 128 ? 128 : 256;
        using Tile = sm80::Fp32Tile<kDim>;
        const TileSize tile = {.rows = Tile::kRows, .keys = Tile::kKeys, .blocks = 2};
        return visitor(tile, [](const ForwardCall& call, cudaStream_t stream) {
          return sm80::launch_forward_fp32<kDim>(call, stream);
        });
      }
      default:
        return cudaErrorNotSupported;
    }
  });
}

// Whether rows of 16-bit elements lie on 16 bytes, as they are read.
bool on_16_bytes(const void* data, const Strides& stride, int64_t batch, int64_t heads,
                 int64_t rows) {
  const auto whole = [](int64_t size, int64_t elements) { return size <= 1 || elements % 8 == 0; };
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && whole(batch, stride.batch) &&
         whole(heads, stride.head) && whole(rows, stride.row);
}

bool aligned(const ForwardParams& p) {
  bool result = reinterpret_cast<uintptr_t>(p.acc) % 8 == 0;  // read and written by pairs
  if (p.dtype == DType::kFloat32) return result;
  result = result && on_16_bytes(p.q, p.q_stride, p.batch, p.heads, p.q_len);
  for (int64_t i = 0; i < p.num_blocks; ++i) {
    const KVBlock& block = p.blocks[i];
    if (block.k_len == 0) continue;
    result = result && on_16_bytes(block.k, block.k_stride, p.batch, p.kv_heads, block.k_len) &&
             on_16_bytes(block.v, block.v_stride, p.batch, p.kv_heads, block.k_len);
  }
  return result;
}

int64_t launches(const ForwardParams& p) {
  return std::max<int64_t>(divide_up(p.num_blocks, kMaxBlocks), 1);
}

// Several launches that end in an output carry a state from one to the next. The caller's is not
// written then, and there may be none.
bool carries_own_state(const ForwardParams& p) { return p.last && launches(p) > 1; }

int64_t own_state_bytes(const ForwardParams& p) {
  return carries_own_state(p) ? round_up(ForwardParts::state_bytes(p), 16) : 0;
}

// The params of launch i of n.
ForwardParams launch_params(const ForwardParams& p, int64_t i, int64_t n, void* workspace) {
  ForwardParams part = p;
  part.first = p.first && i == 0;
  part.last = p.last && i + 1 == n;
  if (!part.first) part.sinks = nullptr;
  if (!carries_own_state(p)) return part;
  // Launch 0 reads the caller's state and would write its own: a copy makes them one.
  const int64_t rows = p.batch * p.heads * p.q_len;
  auto* acc = static_cast<float*>(workspace);
  part.acc = acc;
  part.m = acc + rows * p.v_head_dim;
  part.l = acc + rows * (p.v_head_dim + 1);
  return part;
}

cudaError_t copy_state(const ForwardParams& from, const ForwardParams& to, cudaStream_t stream) {
  const auto rows = static_cast<size_t>(from.batch * from.heads * from.q_len);
  const auto copy = [&](void* target, const void* source, size_t width) {
    return cudaMemcpyAsync(target, source, rows * width * sizeof(float), cudaMemcpyDeviceToDevice,
                           stream);
  };
  cudaError_t error = copy(to.acc, from.acc, static_cast<size_t>(from.v_head_dim));
  if (error == cudaSuccess) error = copy(to.m, from.m, 1);
  if (error == cudaSuccess) error = copy(to.l, from.l, 1);
  return error;
}

}  // namespace

int64_t forward_workspace_bytes(const ForwardParams& p, const Device& device) {
  int64_t bytes = 0;
  visit_kernel(p, device, [&](const TileSize& tile, const auto&) {
    for (int64_t i = 0; i < launches(p); ++i) {
      const ForwardCall call = ForwardCall::of(p, i * kMaxBlocks, tile);
      bytes = std::max(bytes, call.parts.workspace_bytes(p));
    }
    return cudaSuccess;
  });
  return round_up(own_state_bytes(p) + bytes, 16);
}

cudaError_t forward(const ForwardParams& p, void* workspace, const Device& device,
                    cudaStream_t stream) {
  if (p.batch * p.heads * p.q_len == 0) return cudaSuccess;
  if (!aligned(p)) return cudaErrorMisalignedAddress;
  return visit_kernel(p, device, [&](const TileSize& tile, const auto& launch) {
    const int64_t n = launches(p);
    for (int64_t i = 0; i < n; ++i) {
      const ForwardParams params = launch_params(p, i, n, workspace);
      ForwardCall call = ForwardCall::of(params, i * kMaxBlocks, tile);
      if (call.parts.count > 1) {
        call.parts.place(static_cast<char*>(workspace) + own_state_bytes(p), params);
      }
      cudaError_t error = cudaSuccess;
      if (i == 0 && !p.first && carries_own_state(p)) error = copy_state(p, params, stream);
      if (error == cudaSuccess) error = launch(call, stream);
      if (error == cudaSuccess && call.parts.count > 1) error = join_parts(call, stream);
      if (error != cudaSuccess) return error;
    }
    return cudaSuccess;
  });
}

}  // namespace ring_attention::cuda
