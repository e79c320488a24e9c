// The limits of this machine, measured: what a benchmark's figures are shares of.
#pragma once

#include "types.h"

namespace deepseek {

// Multiply-adds a second of a storage's instructions on `threads` threads together.
double measure_products(const Kernels& kernels, Kind kind, int threads);

// Bytes a second that `threads` threads read from memory together; `bytes` is what they read.
double measure_bandwidth(const Kernels& kernels, size_t bytes, int threads);

}  // namespace deepseek
