// What this processor has, and the kernels made for it.
#pragma once

#include <string>
#include <vector>

#include "types.h"

namespace deepseek {

// Names of the instruction sets that were built and that this processor runs, best last.
std::vector<std::string> usable_isas();

// Kernels that run here and are never chosen: instructions that this processor may lack, emulated.
std::vector<std::string> emulated_isas();

// Kernels of an instruction set by name; null when it was not built or does not run here.
const Kernels* kernels_of(const std::string& name);

}  // namespace deepseek
