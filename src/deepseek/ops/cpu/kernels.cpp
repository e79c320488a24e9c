// Compiled once for every instruction set, with DEEPSEEK_ISA naming it.
#include <type_traits>

#include "../attention/cpu/pages.h"
#include "../linear/cpu/packing.h"
#include "../linear/cpu/products.h"

#define DEEPSEEK_JOIN(a, b) a##b
#define DEEPSEEK_NAME(isa) DEEPSEEK_JOIN(kernels_, isa)
#define DEEPSEEK_TEXT(isa) #isa
#define DEEPSEEK_QUOTE(isa) DEEPSEEK_TEXT(isa)

namespace deepseek {

extern const Kernels DEEPSEEK_NAME(DEEPSEEK_ISA);
const Kernels DEEPSEEK_NAME(DEEPSEEK_ISA) = {
    DEEPSEEK_QUOTE(DEEPSEEK_ISA), row_bytes,    prepare,  linear,         silu_mul, ::rms_norm,
    store_kv,                     attend_span,  kAttendScratch, ::merge,  pack_panel,
};

}  // namespace deepseek
