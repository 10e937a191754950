// SPDX-License-Identifier: BSD-3-Clause
//
// The list of unit cases: a name, what to run, and which fault the virtual GPU must report.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstdio>
#include <stdexcept>
#include <string>
#include <vector>

namespace unit {

struct Case {
  std::string name;
  void (*run)();  // throws, or leaves a launch's fault behind
  // Part of the expected report, or several, | between, of which it must have one; "": none.
  std::string fault;
};

std::vector<Case>& cases();

struct Register {
  Register(const char* name, void (*run)(), const char* fault = "") {
    cases().push_back({name, run, fault});
  }
};

// In place of a fault: nothing is reported, but the results must come out wrong.
constexpr char kWrongValues[] = "wrong values";

// CASE(name) { body }: must pass.  BUG(name, "part of the report") { body }: must be reported.
#define CASE(name) BUG(name, "")
#define BUG(name, fault)                                                  \
  static void case_##name();                                              \
  static const unit::Register register_##name(#name, case_##name, fault); \
  static void case_##name()

inline void expect(bool holds, const std::string& what) {
  if (!holds) throw std::runtime_error(what);
}

template <typename T>
void expect_equal(T got, T wanted, const std::string& where) {
  if (got == wanted || (got != got && wanted != wanted)) return;
  throw std::runtime_error(where + ": got " + std::to_string(got) + ", expected " +
                           std::to_string(wanted));
}

// Device memory with the values of a vector.
template <typename T>
class Buffer {
 public:
  explicit Buffer(size_t count) : count_(count) {
    cudaMalloc(reinterpret_cast<void**>(&data_), count * sizeof(T));
  }
  explicit Buffer(const std::vector<T>& values) : Buffer(values.size()) {
    cudaMemcpy(data_, values.data(), count_ * sizeof(T), cudaMemcpyHostToDevice);
  }
  ~Buffer() { cudaFree(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  T* data() const { return data_; }
  std::vector<T> values() const {
    std::vector<T> result(count_);
    cudaMemcpy(result.data(), data_, count_ * sizeof(T), cudaMemcpyDeviceToHost);
    return result;
  }

 private:
  size_t count_;
  T* data_;
};

}  // namespace unit
