// SPDX-License-Identifier: BSD-3-Clause
#include "watch.h"

#include <unordered_map>
#include <unordered_set>

namespace ptxvm {

void watch(Program& program, const std::vector<InstructionUses>& code) {
  program.watched_uses.assign(code.size(), {});
  std::unordered_map<uint32_t, uint32_t> index;  // by row
  std::unordered_set<uint32_t> written;
  for (const InstructionUses& one : code)
    for (const RegisterUse& use : one.uses) {
      if (use.written) written.insert(use.row);
      if (one.wgmma && index.try_emplace(use.row, index.size()).second)
        program.watched.emplace_back(use.name);
    }
  if (index.empty()) return;
  // Of a copy: what it copies from, unless that is a constant.
  const auto source = [&](const InstructionUses& one) -> const RegisterUse* {
    if (!one.copy) return nullptr;
    const RegisterUse& from = one.uses[one.uses[0].written ? 1 : 0];
    return written.contains(from.row) ? &from : nullptr;
  };
  for (size_t known = 0; known != index.size();) {
    known = index.size();
    for (const InstructionUses& one : code) {
      const RegisterUse* from = source(one);
      if (from == nullptr || !index.contains(one.uses[from == &one.uses[0] ? 1 : 0].row)) continue;
      if (index.try_emplace(from->row, index.size()).second)
        program.watched.emplace_back(from->name);
    }
  }
  for (size_t i = 0; i < code.size(); ++i) {
    std::vector<WatchedUse>& uses = program.watched_uses[i];
    if (code[i].wgmma) {
      for (uint32_t row : program.code[i].registers)
        uses.push_back({WatchedUse::kRead, index.at(row)});
      continue;
    }
    const RegisterUse* from = source(code[i]);
    for (const RegisterUse& use : code[i].uses) {
      if (!index.contains(use.row)) continue;
      WatchedUse watched{use.written ? WatchedUse::kWrite : WatchedUse::kRead, index[use.row]};
      if (use.written && from != nullptr && index.contains(from->row))
        watched.kind = WatchedUse::kCopy, watched.from = index[from->row];
      uses.push_back(watched);
    }
    program.code[i].watched = !uses.empty();
  }
}

}  // namespace ptxvm
