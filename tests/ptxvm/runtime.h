// SPDX-License-Identifier: BSD-3-Clause
#pragma once

namespace ptxvm {

class Machine;

// Reads the PTX of all objects that have registered theirs since the last time.
void load_registered_modules(Machine& machine);

}  // namespace ptxvm
