// SPDX-License-Identifier: BSD-3-Clause
//
// unit: lists the cases.  unit SEED...: runs them all with each seed, a line per case.
// unit --reports: what is reported of each bug.  unit --forms: the instruction forms that the cases
// which must pass have executed.
#include <algorithm>
#include <cstdlib>
#include <iostream>

#include "../mutation.h"
#include "../vm.h"
#include "cases.h"

namespace unit {

std::vector<Case>& cases() {
  static std::vector<Case> list;
  return list;
}

bool has_one_of(const std::string& error, const std::string& parts) {
  for (size_t begin = 0; begin <= parts.size();) {
    const size_t end = std::min(parts.find('|', begin), parts.size());
    if (error.find(parts.substr(begin, end - begin)) != error.npos) return true;
    begin = end + 1;
  }
  return false;
}

// "" if all is well.
std::string verdict(const Case& unit_case) {
  ptxvm::clear_error();
  cudaGetLastError();
  try {
    unit_case.run();
  } catch (const std::exception& problem) {
    const std::string what = problem.what();
    if (unit_case.fault.empty()) return what + "; " + ptxvm::last_error();
    if (unit_case.fault == kWrongValues) return what.find("expected") != what.npos ? "" : what;
  }
  const std::string error = ptxvm::last_error();
  if (unit_case.fault.empty()) return error;
  if (error.empty()) return "nothing was reported, expected: " + unit_case.fault;
  if (!has_one_of(error, unit_case.fault)) return "reported something else: " + error;
  if (error.starts_with("launch of ")) return "";  // refused: there is no place to name
  for (const char* part : {"kernel ", ".cu:", "block (", "warp "})
    if (error.find(part) == error.npos)
      return "the report lacks '" + std::string(part) + "': " + error;
  return "";
}

std::string in_one_line(std::string text) {
  for (char& c : text)
    if (c == '\n') c = ' ';
  return text;
}

void print_reports() {
  for (const Case& unit_case : cases()) {
    if (unit_case.fault.empty()) continue;
    const std::string problem = verdict(unit_case), report = ptxvm::last_error();
    const std::string what = unit_case.fault == kWrongValues ? kWrongValues : report;
    std::cout << unit_case.name << '\t' << in_one_line(problem.empty() ? what : problem) << '\n';
  }
}

void print_forms() {
  for (const Case& unit_case : cases())
    if (unit_case.fault.empty()) verdict(unit_case);
  std::cout << ptxvm_executed_forms();
}

}  // namespace unit

int main(int count, char** arguments) {
  const std::string_view wish = count > 1 ? arguments[1] : "";
  if (wish == "--reports") return unit::print_reports(), 0;
  if (wish == "--forms") return unit::print_forms(), 0;
  int failures = 0;
  for (const unit::Case& unit_case : unit::cases()) {
    if (count == 1) {
      std::cout << unit_case.name << '\t' << unit_case.fault << '\n';
      continue;
    }
    std::string problem;
    for (int i = 1; i < count && problem.empty(); ++i) {
      ptxvm::set_seed(std::strtoull(arguments[i], nullptr, 10));
      problem = unit::verdict(unit_case);
      if (!problem.empty()) problem = "seed " + std::string(arguments[i]) + ": " + problem;
    }
    std::cout << unit_case.name << '\t' << (problem.empty() ? "ok" : unit::in_one_line(problem))
              << '\n';
    failures += !problem.empty();
  }
  return failures != 0;
}
