// SPDX-License-Identifier: BSD-3-Clause
#include "machine.h"

#ifdef __GLIBC__
#include <malloc.h>
#endif

#include <cstring>
#include <stdexcept>

#include "parser.h"

namespace ptxvm {

Machine::Machine() {
#ifdef __GLIBC__
  // A launch takes some megabytes for its registers and races, and the next one takes them again:
  // they are not to go back to the system in between.
  mallopt(M_MMAP_THRESHOLD, 32 << 20);  // the most it may be
  mallopt(M_TRIM_THRESHOLD, 512 << 20);
#endif
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma"))
    throw std::runtime_error("ptxvm: the virtual GPU needs a CPU with AVX2 and FMA");
#endif
}

Machine& Machine::instance() {
  // Never destroyed: kernels may be registered and launched by other static objects.
  static Machine* machine = new Machine;
  return *machine;
}

void Machine::load(const std::string& ptx) {
  modules_.push_back(std::make_unique<Module>(parse_module(ptx)));
  const Module& module = *modules_.back();
  for (const auto& [name, kernel] : module.kernels) module_of_[name] = &module;
  for (const auto& [name, bytes] : module.variables)
    memory.add(reinterpret_cast<uint64_t>(bytes->data()), bytes->size(), true);
}

const Module& Machine::module_of(const std::string& kernel) const { return *module_of_.at(kernel); }

std::vector<std::string> Machine::kernels() const {
  std::vector<std::string> names;
  for (const auto& [name, module] : module_of_) names.push_back(name);
  return names;
}

const Program& Machine::program(const std::string& kernel) {
  std::unique_ptr<Program>& program = programs_[kernel];
  if (program == nullptr) program = parse_kernel(*module_of_.at(kernel), kernel);
  return *program;
}

const Program& Machine::runs_as(const std::string& kernel) {
  const auto replaced = replaced_.find(kernel);
  const bool as_compiled = replaced == replaced_.end() || replaced->second == nullptr;
  return as_compiled ? program(kernel) : *replaced->second;
}

void Machine::replace(const std::string& kernel, std::unique_ptr<Program> program) {
  replaced_[kernel] = std::move(program);
}

std::vector<uint8_t>* Machine::variable(const std::string& name) {
  for (const auto& module : modules_)
    if (const auto entry = module->variables.find(name); entry != module->variables.end())
      return entry->second.get();
  return nullptr;
}

void Machine::launch(const std::string& kernel, Index3 grid, Index3 block,
                     uint32_t dynamic_shared_bytes, void** arguments) {
  const Program& code = runs_as(kernel);
  std::vector<uint8_t> parameters(code.parameter_bytes);
  for (size_t i = 0; i < code.parameters.size(); ++i)
    std::memcpy(parameters.data() + code.parameters[i].offset, arguments[i],
                code.parameters[i].bytes);
  const int threads = static_cast<int>(block.count());
  Launch launch{.program = code,
                .grid = grid,
                .block_size = block,
                .dynamic_shared_bytes = dynamic_shared_bytes,
                .parameters = std::move(parameters),
                .checks = checks,
                .memory = memory,
                .races = races_,
                .statistics = statistics[kernel],
                .random = std::mt19937_64(seed),
                .threads_per_block = threads,
                .warps_per_block = (threads + kLanes - 1) / kLanes};
  launch.run();
}

namespace {

template <typename F>
auto locked(F&& f) {
  Machine& machine = Machine::instance();
  const std::lock_guard lock(machine.mutex);
  return f(machine);
}

}  // namespace

void set_seed(uint64_t seed) {
  locked([&](Machine& m) { m.seed = seed; });
}

void set_device(const Device& device) {
  locked([&](Machine& m) { m.device = device; });
}

void set_checks(const Checks& checks) {
  locked([&](Machine& m) { m.checks = checks; });
}

const Checks& checks() { return Machine::instance().checks; }

void register_memory(const void* begin, size_t bytes, bool writable) {
  locked([&](Machine& m) { m.memory.add(reinterpret_cast<uint64_t>(begin), bytes, writable); });
}

void unregister_memory(const void* begin, size_t bytes) {
  locked([&](Machine& m) { m.memory.remove(reinterpret_cast<uint64_t>(begin), bytes); });
}

std::string last_error() {
  return locked([](Machine& m) { return m.error; });
}

void clear_error() {
  locked([](Machine& m) { m.error.clear(); });
}

std::map<std::string, Statistics> statistics() {
  return locked([](Machine& m) { return m.statistics; });
}

void reset_statistics() {
  locked([](Machine& m) { m.statistics.clear(); });
}

}  // namespace ptxvm
