// SPDX-License-Identifier: BSD-3-Clause
#pragma once

#include <memory>
#include <string>

#include "module.h"
#include "program.h"

namespace ptxvm {

// `name` is a kernel of `module`. The program keeps pointers into the module's variables.
std::unique_ptr<Program> parse_kernel(const Module& module, const std::string& name);
// The same of another text.
std::unique_ptr<Program> parse_kernel(const Module& module, const std::string& name,
                                      const KernelText& text);

}  // namespace ptxvm
