// SPDX-License-Identifier: BSD-3-Clause
#include "program.h"

namespace ptxvm {

std::string Program::place_of(size_t instruction) const {
  const SourceLine& line = lines[instruction];
  const auto name = [&](uint32_t file, uint32_t number) {
    return (file < files.size() ? files[file] : "?") + ":" + std::to_string(number);
  };
  if (line.line == 0) return "line unknown, compile with -lineinfo";
  std::string text = name(line.file, line.line);
  if (line.inlined_line != 0)
    text += " (inlined at " + name(line.inlined_file, line.inlined_line) + ")";
  return text;
}

}  // namespace ptxvm
