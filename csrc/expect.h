// SPDX-License-Identifier: BSD-3-Clause
//
// What the operators check before a kernel sees a pointer: whatever memory safety needs.
// User-facing checks are in ring_attention/checks.py. Errors name operator, argument, expectation,
// value and remedy.
#pragma once

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wunused-parameter"  // in torch's headers
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#pragma GCC diagnostic pop

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <ostream>
#include <sstream>
#include <stdexcept>
#include <utility>
#include <vector>

#include "params.h"

namespace ring_attention {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;
using OptionalTensor = std::optional<Tensor>;

// An argument as messages name it: "q", or "k[2]" for an entry of a list.
struct Arg {
  const Tensor& tensor;
  const char* name;
  int64_t index = -1;
};

inline std::ostream& operator<<(std::ostream& stream, const Arg& arg) {
  stream << arg.name;
  if (arg.index >= 0) stream << '[' << arg.index << ']';
  return stream;
}

struct Shape {
  const int64_t* sizes;
  size_t dims;
};

inline std::ostream& operator<<(std::ostream& stream, const Shape& shape) {
  stream << '[';
  for (size_t i = 0; i < shape.dims; ++i) stream << (i ? ", " : "") << shape.sizes[i];
  return stream << ']';
}

inline Shape shape_of(const Tensor& tensor) {
  return {tensor.sizes().data(), static_cast<size_t>(tensor.dim())};
}

inline ScalarType state_dtype(ScalarType dtype) {
  return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}
inline ScalarType state_dtype(const Tensor& q) { return state_dtype(q.scalar_type()); }

// The checks of one call: all of its tensors have to be where its first one is. `alignment`: of
// what kernels address in whole vectors, in bytes, see Note [alignment] in arguments.h.
class Expect {
 public:
  Expect(const char* op, const Tensor& first, int64_t alignment)
      : op_(op), device_(first.device()), alignment_(alignment) {}

  template <typename... Parts>
  void operator()(bool ok, const Parts&... parts) const {
    if (ok) return;
    std::ostringstream message;
    message << "ring_attention." << op_ << ": expected ";
    (message << ... << parts);
    throw std::runtime_error(message.str());
  }

  void dtype(const Arg& arg, ScalarType dtype, const char* remedy) const {
    (*this)(arg.tensor.scalar_type() == dtype, arg, ".dtype == ", toString(dtype), ", got ",
            toString(arg.tensor.scalar_type()), "; ", remedy);
  }

  void here(const Arg& arg) const {
    (*this)(arg.tensor.device() == device_, arg,
            " on the device of the others, got another; move all inputs to one device");
  }

  void shape(const Arg& arg, std::initializer_list<int64_t> sizes, const char* meaning) const {
    const Shape got = shape_of(arg.tensor);
    (*this)(got.dims == sizes.size() && std::equal(sizes.begin(), sizes.end(), got.sizes), arg,
            ".shape == ", Shape{sizes.begin(), sizes.size()}, ", got ", got, "; it is ", meaning);
  }

  void head_dim(const Arg& arg) const {
    const int64_t dim = arg.tensor.size(3);
    (*this)(16 <= dim && dim <= 256 && dim % 8 == 0, arg,
            ".shape[3] in 16, 24, ..., 256 (steps of 8), got ", dim, "; pad the heads with zeros");
  }

  void bhsd(const Arg& arg) const {
    (*this)(arg.tensor.dim() == 4, arg,
            " to have 4 dimensions [batch, heads, length, head_dim], got shape ",
            shape_of(arg.tensor), "; reshape it");
    here(arg);
  }

  // A buffer the kernels address as one dense array.
  void dense(const Arg& arg, ScalarType type, std::initializer_list<int64_t> sizes,
             const char* meaning) const {
    here(arg);
    dtype(arg, type, "states, lse, delta and gradients are float32 (float64 for float64)");
    shape(arg, sizes, meaning);
    (*this)(arg.tensor.is_contiguous(), arg, " contiguous, got strides ",
            Shape{arg.tensor.strides().data(), sizes.size()}, "; pass a contiguous tensor");
    if (sizes.size() < 4) return;  // a value per row, not a vector
    const auto address = reinterpret_cast<uintptr_t>(arg.tensor.const_data_ptr());
    (*this)(alignment_ == 0 || address % static_cast<uintptr_t>(alignment_) == 0, arg,
            " aligned to ", alignment_, " bytes, got address ", address,
            "; pass the start of an allocation");
  }

  // A written tensor: no copy can stand in for it, and no two of its elements may share memory.
  void writable_rows(const Arg& arg) const {
    const Shape strides{arg.tensor.strides().data(), 4};
    std::vector<std::pair<int64_t, int64_t>> dims;  // (stride, size), innermost first
    for (int d = 0; d < 4; ++d) {
      if (arg.tensor.size(d) > 1) dims.emplace_back(arg.tensor.stride(d), arg.tensor.size(d));
    }
    std::sort(dims.begin(), dims.end());
    int64_t extent = 1;
    bool disjoint = arg.tensor.numel() == 0 || arg.tensor.stride(3) == 1;
    for (const auto& [stride, size] : dims) {
      disjoint = disjoint && stride >= extent;
      extent = std::max(extent, stride * size);
    }
    (*this)(disjoint, arg, " with rows of their own, last dimension contiguous, got strides ",
            strides, "; pass memory that is not expanded or transposed in the last dimension");
  }

  // Two accumulators in the same memory would be a race between blocks.
  void disjoint(const Tensors& dk, const Tensors& dv) const {
    std::vector<std::pair<uintptr_t, uintptr_t>> ranges;
    for (const Tensors* list : {&dk, &dv}) {
      for (const Tensor& grad : *list) {
        const auto begin = reinterpret_cast<uintptr_t>(grad.const_data_ptr());
        const auto bytes = static_cast<uintptr_t>(grad.numel()) * grad.element_size();
        if (bytes > 0) ranges.emplace_back(begin, begin + bytes);
      }
    }
    std::sort(ranges.begin(), ranges.end());
    for (size_t i = 1; i < ranges.size(); ++i) {
      (*this)(ranges[i - 1].second <= ranges[i].first,
              "dk and dv that do not overlap, got two in the same memory; give each block its own");
    }
  }

  void same_length(const Tensors& a, const char* a_name, const Tensors& b,
                   const char* b_name) const {
    (*this)(a.size() == b.size(), "len(", b_name, ") == len(", a_name, "), got ", b.size(), " and ",
            a.size(), "; each block has one entry in every list");
  }

  DType kernel_dtype(const Arg& arg) const {
    switch (arg.tensor.scalar_type()) {
      case ScalarType::Float:
        return DType::kFloat32;
      case ScalarType::BFloat16:
        return DType::kBFloat16;
      case ScalarType::Half:
        return DType::kFloat16;
      case ScalarType::Double:
        return DType::kFloat64;
      default:
        (*this)(false, arg, ".dtype float32, bfloat16, float16 or float64, got ",
                toString(arg.tensor.scalar_type()), "; cast it");
        return DType::kFloat32;
    }
  }

 private:
  const char* op_;
  torch::stable::Device device_;
  int64_t alignment_;
};

}  // namespace ring_attention
