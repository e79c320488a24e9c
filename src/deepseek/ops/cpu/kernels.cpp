// Compiled once for every instruction set, with DEEPSEEK_ISA naming it.
#include <type_traits>

#include "peak.h"
#include "../attention/cpu/pages.h"
#include "../attention/cpu/choice.h"
#include "../attention/cpu/tiled.h"
#include "../linear/cpu/activations.h"
#include "../linear/cpu/low_rank.h"
#include "../linear/cpu/packing.h"
#include "../linear/cpu/products.h"
#include "../sampling/cpu/masses.h"
#if defined(DEEPSEEK_AMX) || defined(DEEPSEEK_AMX_EMULATED)
#include "../linear/cpu/tile_products.h"
#define DEEPSEEK_LINEAR tile_linear
#define DEEPSEEK_SWIGLU tile_swiglu
#define DEEPSEEK_HAS_TILES true
#else
#define DEEPSEEK_LINEAR linear
#define DEEPSEEK_SWIGLU swiglu_by<linear>
#define DEEPSEEK_HAS_TILES false
#endif

#define DEEPSEEK_JOIN(a, b) a##b
#define DEEPSEEK_NAME(isa) DEEPSEEK_JOIN(kernels_, isa)
#define DEEPSEEK_TEXT(isa) #isa
#define DEEPSEEK_QUOTE(isa) DEEPSEEK_TEXT(isa)

namespace deepseek {

extern const Kernels DEEPSEEK_NAME(DEEPSEEK_ISA);
const Kernels DEEPSEEK_NAME(DEEPSEEK_ISA) = {
    .name = DEEPSEEK_QUOTE(DEEPSEEK_ISA),
    .row_bytes = row_bytes,
    .prepare = prepare,
    .linear = DEEPSEEK_LINEAR,
    .swiglu = DEEPSEEK_SWIGLU,
    .activate = activate,
    .rms_norm = ::rms_norm,
    .layer_norm = ::layer_norm,
    .silu_mul = silu_mul,
    .low_rank_down = low_rank_down,
    .low_rank_up = low_rank_up,
    .store_kv = store_kv,
    .rope = ::rope,
    .load_queries = load_queries,
    .attend_span = attend_span,
    .page_scores = page_scores,
    .visitor_scores = visitor_scores,
    .page_summary = page_summary,
    .summary_scores = summary_scores,
    .choose_pages = choose_pages,
    .add_page = add_page,
    .page_means = page_means,
    .gather_means = gather_means,
    .turn_back = turn_back,
    .attend_scratch_bytes = kAttendScratch,
    .has_tiles = DEEPSEEK_HAS_TILES,
    .tiled_scratch_bytes = tiled_scratch_bytes,
    .tiled_pack = tiled_pack,
    .tiled_load = tiled_load,
    .tiled_forward = tiled_forward,
    .tiled_backward = tiled_backward,
    .tiled_peaks = tiled_peaks,
    .tiled_store = tiled_store,
    .tiled_dot = tiled_dot,
    .tiled_sum = tiled_sum,
    .merge = ::merge,
    .pack_panel = pack_panel,
    .block_largest = block_largest,
    .weigh = weigh,
    .peak_products = peak_products,
    .read_once = read_once,
};

}  // namespace deepseek
