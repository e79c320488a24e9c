// The nouns that kernels, packing and the program share. No instruction set is assumed here.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../sampling/cpu/sample.h"

namespace deepseek {

// Output columns of a panel of packed weights: three 512-bit vectors of float32.
constexpr int kPanel = 48;
// Slots of a KV page, as in deepseek.ops.attention.PAGE_SIZE.
constexpr int kPage = 64;
// Slots whose attention is computed on its own and then merged, in order: the unit of parallel
// decoding. It is fixed, so that the result does not depend on threads, batch or chunking.
constexpr int kSpan = 256;
// Mean keys of clusters that stand for the keys of a page, and how much of a cluster's radius counts.
constexpr int kSummary = 16;
constexpr float kSpread = 0.5f;
// Queries that are loaded together, at most.
constexpr int kMaxQueries = 1024;
// Channels that are rotated together before int8 quantization.
constexpr int kRotation = 64;
// Channels of a scale, at most, unless it is that of a whole row; and those, whose sums fit 32 bits.
constexpr int kMaxGroup = 192;
constexpr int kMaxRow = 65536;
// Ranks of an adapter that are computed together, and at most.
constexpr int kRankBlock = 4;
constexpr int kMaxRank = 256;
// Raised whenever the bytes of a packed weight change: files of them are kept between runs.
constexpr int kLayout = 1;

enum class Kind : int { f32 = 0, bf16 = 1, int8 = 2, int4 = 3 };

// A weight [n, k], packed once. Panel p holds columns 48 p ... of the output; its width is 48, or
// what is left rounded up to 16. Inside a panel of width w:
//   f32   float      [k][w]
//   bf16  uint16     [k / 2][w][2]
//   int8  uint8 [k / 4][w][4]                   value + 128
//         half  scale [groups, made even][w]    so that every vector of it all is aligned
//   int4  per group: uint8 [group / 8][w][4]    low nibble: quad 2 i, high nibble: quad 2 i + 1
//                    half  scale [w], half least [w]      weight = scale * nibble + least
// k is padded to a multiple of `group` (f32: 1, bf16: 2, int8: at least 64 where it is rotated, or one group
// of all of it, padded to 64) with weights
// that are zero, or that meet inputs which are.
struct Weight {
  Kind kind = Kind::f32;
  int n = 0, k = 0, k_padded = 0, group = 1;
  bool rotated = false;
  float input_scale = 0;        // of every input, integers only; 0: each row and group its own
  uint8_t* data = nullptr;
  const float* bias = nullptr;  // [columns padded to panels] or null
  size_t column_bytes = 0;      // bytes of one column of a panel, scales included

  int panels() const { return (n + kPanel - 1) / kPanel; }
  int width(int panel) const {
    int left = n - panel * kPanel;
    return left >= kPanel ? kPanel : (left + 15) / 16 * 16;
  }
  uint8_t* panel(int index) const { return data + size_t(index) * kPanel * column_bytes; }
  int groups() const { return k_padded / group; }
  int columns() const { return (panels() - 1) * kPanel + width(panels() - 1); }
  size_t bytes() const { return size_t(columns()) * column_bytes; }
};

// Rows of inputs in the form a weight's kernel reads.
//   f32   float  [k]
//   bf16  uint16 [k]
//   int8  int8   [k]   (two int16 halves of each quad where there is no VNNI), a scale per group
//                      and the term -128 * sum, int32
//   int4  int8   [k]   a scale per group and the term scale * sum, float
struct Inputs {
  uint8_t* data = nullptr;
  float* scale = nullptr;
  void* term = nullptr;
  size_t row_bytes = 0;
  int groups = 0;
};

enum class Store : int { set = 0, add = 1 };

// Of the outputs of a product; gelu_tanh is transformers' gelu_new.
enum class Activation : int { none = 0, gelu = 1, gelu_tanh = 2, relu = 3, tanh = 4 };

// What an adapter adds to the product of a weight [n, k]: scale * up (down x), in float32.
// Source: Hu et al., "LoRA" (2106.09685), section 4.1; up and down are their B and A.
struct LowRank {
  int rank = 0;                 // 0: nothing
  int k_padded = 0;             // to whole vectors, with zeros
  float scale = 1.0f;
  const float* down = nullptr;  // [rank_padded][k_padded]
  const float* up = nullptr;    // panel after panel [rank][kPanel]

  int rank_padded() const { return (rank + kRankBlock - 1) / kRankBlock * kRankBlock; }
};

// Keys and values of one KV head in one page, by the type they are stored in:
//   f32   keys float  [dim][64],           values float  [64][dim]
//   bf16  keys uint16 [dim / 2][64][2],    values uint16 [32][dim][2]
//   int8  keys uint8  [dim / 4][64][4],    values int8   [16][dim][4], float key scale [64],
//         float value scale [64]; keys are rotated and hold value + 128
//   int8 where there is no integer product of quads: [dim / 2][64][2] and [32][dim][2], int8
// dim is padded to a multiple of 16. Of a head whose dim is a multiple of 64 the channels that turn fast come
// first, their first members and then their second ones, and the slow half behind them in the same way.
struct PageLayout {
  Kind kind = Kind::bf16;
  int kv_heads = 0, dim = 0, dim_padded = 0;
  int scored_from = 0;  // the channel from which on keys are scored, where pages are chosen
  size_t value_offset = 0, key_scale_offset = 0, value_scale_offset = 0;
  size_t head_bytes = 0, page_bytes = 0;
  size_t summary_bytes = 0;  // kSummary keys of the scored channels, as a page holds them; their scales; their radii
  size_t mean_bytes = 0;  // a key and a value of a KV head side by side, and two scales
};

// Whether a rotated head is put in the order of its angles.
constexpr bool turns_in_order(int dim) { return dim % 64 == 0; }

// Queries of one KV head over the pages of one row.
struct Attend {
  const PageLayout* layout = nullptr;
  const uint8_t* pages = nullptr;  // of the layer
  const int32_t* table = nullptr;  // pages of the row
  int kv_head = 0;
  float scale = 1.0f;
  float bias = 0.0f;  // of all scores, as a power of two
};

// One query vector with what it may see: slots low ... high - 1.
struct Query {
  const float* vector;
  int low, high;
};

// Softmax states that pages are added to: weights are powers of two of scores less a bound that is
// nearly their largest.
struct PageStates {
  float* sums;   // [count][dim_padded]
  float* bound;  // [count]
  float* mass;   // [count][kMassLanes], whose sum is the denominator
};
constexpr int kMassLanes = 16;
constexpr float kNoBound = -1e30f;

// Groups of `width` loaded queries that meet pages of the past: group g is the queries g * width and behind.
struct Visitors {
  const int32_t* page = nullptr;    // [pages], places in the table
  const int32_t* first = nullptr;   // [pages + 1], of the groups that meet a page, among `groups`
  const int32_t* groups = nullptr;
  int pages = 0, width = 1;
};

// Attention with gradients, see attention/cpu/tiled.h. Dimensions and a page's slots are padded to multiples of 32.
// Numbers are float32, or bfloat16 where an instruction set has tiles. Kept "across" for the products that run
// over channels: float [dim][slots], bfloat16 [dim / 2][slots][2]; "along" for those over slots: float
// [slots][dim], bfloat16 [slots / 2][dim][2].
constexpr int kTiledRows = 256;  // that meet a page together
constexpr int kTiledPad = 32;

// A page of keys, and the rows of a unit that see some of it.
struct TiledPage {
  int dim = 0, value_dim = 0, width = 0;
  float scale = 1.0f;        // of scores, as powers of two
  float slope_scale = 1.0f;  // of their gradients
  const void *keys_across = nullptr, *values_along = nullptr;    // forward
  const void *values_across = nullptr, *keys_along = nullptr;    // backward, beside keys_across
  const float* bias = nullptr;     // [width] of its slots, as powers of two
  const float* place = nullptr;    // [width], where its slots stand
  const float* slopes = nullptr;   // [rows of the unit], of the distance, as powers of two
  const float* own = nullptr;      // [rows of the unit], their slots
  int count = 0;
  bool is_run = false;             // rows follow one another in the unit
  const int32_t* rows = nullptr;
  const uint32_t* shown = nullptr; // [count][width / 32], bits of the slots that a row sees; null for all
  float* to_keys = nullptr;        // [dim][width] gradients
  float* to_values = nullptr;      // [value_dim][width]
};

// Neighbouring queries of a KV head, `pitch` rows with those that fill up.
struct TiledUnit {
  Kind kind = Kind::f32;
  int pitch = 0;
  void *queries = nullptr, *queries_across = nullptr;      // [pitch][dim], and as bfloat16 [dim][pitch]
  void *gradients = nullptr, *gradients_across = nullptr;  // of the outputs
  float *top = nullptr, *mass = nullptr, *sums = nullptr;  // forward: [pitch], [pitch][value_dim]
  float *lse = nullptr, *delta = nullptr;                  // backward: [pitch], the first as powers of two
  float* to_queries = nullptr;                             // [pitch][dim]
};

constexpr int kSwigluRows = 32;  // whose gates and ups are near together

struct Kernels {
  const char* name;
  // Inputs ------------------------------------------------------------------------------------
  size_t (*row_bytes)(const Weight& w);
  // Norm (skipped when `norm` is null), rotation and quantization of one row into `row` of `to`.
  void (*prepare)(const Weight& w, const float* x, const float* norm, float eps, const Inputs& to,
                  int row, float* scratch);
  // Products ----------------------------------------------------------------------------------
  void (*linear)(const Weight& w, const Inputs& x, int row_start, int row_stop, int panel,
                 float* out, ptrdiff_t stride, Store store);
  // silu(gate) * up of rows in the columns of one panel; `scratch` holds 2 * kSwigluRows * kPanel floats.
  void (*swiglu)(const Weight& gate, const Weight& up, const Inputs& x, int row_start, int row_stop, int panel,
                 float* scratch, float* out, ptrdiff_t stride);
  void (*activate)(Activation kind, float* x, int count);
  void (*rms_norm)(const float* x, const float* weight, float eps, float* out, int count);
  void (*layer_norm)(const float* x, const float* weight, const float* bias, float eps, float* out, int count);
  void (*silu_mul)(const float* gate, const float* up, float* out, int count);
  // hidden[i] = scale * down x[i] of `count` rows, in kRankBlock ranks from `rank` on.
  void (*low_rank_down)(const LowRank& a, const float* const* x, float* const* hidden, int count, int rank);
  // out[i] += up hidden[i] of `count` rows, in the first `columns` columns of a panel.
  void (*low_rank_up)(const LowRank& a, const float* const* hidden, float* const* out, int count, int panel,
                      int columns);
  // Attention ---------------------------------------------------------------------------------
  void (*store_kv)(const PageLayout& layout, uint8_t* page, int kv_head, int slot,
                   const float* key, const float* value);
  // Rotation of queries and keys by their angles, half-split; the head is normed first where
  // `norm` is not null.
  void (*rope)(float* head, int dim, const float* cosines, const float* sines, const float* norm,
               float eps);
  // Puts queries into `scratch` as `attend_span` reads them, once for all spans.
  void (*load_queries)(const PageLayout& layout, const Query* queries, int count, void* scratch);
  // Softmax-weighted values of the `count` loaded queries over the slots start ... stop - 1 (within one
  // span each) into sums [count][dim_padded], largest scores and denominators [count].
  void (*attend_span)(const Attend& a, const Query* queries, int count, int start, int stop, float* sums,
                      float* largest, float* total, void* scratch);
  // Largest score of each of the `count` loaded queries with the keys that it sees in each of the pages
  // first ... last - 1, into out [count][stride] from column `first` on; -infinity where it sees none.
  void (*page_scores)(const Attend& a, const Query* queries, int count, int first, int last, float* out,
                      ptrdiff_t stride, void* scratch);
  // The same of groups of loaded queries with pages all of whose keys they see: [groups as visitors list them][width].
  void (*visitor_scores)(const Attend& a, const Visitors& visitors, float* out, void* scratch);
  // Mean keys of the clusters of a full page, of the scored channels, and their radii.
  void (*page_summary)(const PageLayout& layout, const uint8_t* page, int kv_head, uint8_t* summary);
  // As page_scores, by the summaries of pages in place of their keys; all queries see all of them.
  void (*summary_scores)(const Attend& a, uint8_t* const* summaries, int count, int first, int last, float* out,
                         ptrdiff_t stride, void* scratch);
  // Places of the pages to see, ascending, into `chosen`; see choice.h.
  int (*choose_pages)(float* scores, ptrdiff_t stride, int count, int pages, int first_pages,
                      int recent_pages, int budget, float least_share, int32_t* chosen, float* scratch);
  // Adds the page a.table[0] to the states of `count` loaded queries, those of the places in `rows`: of
  // each the slots whose bits are set in its `shown`. A new state is all zeros but its bound, kNoBound.
  void (*add_page)(const Attend& a, const uint64_t* shown, const int32_t* rows, int count,
                   const PageStates& states, void* scratch);
  // Mean key and mean value of a page that is full, layout.mean_bytes of them.
  void (*page_means)(const PageLayout& layout, const uint8_t* page, int kv_head, uint8_t* mean);
  // Puts up to kPage means into the first slots of a page.
  void (*gather_means)(const PageLayout& layout, uint8_t* const* means, int count, uint8_t* page, int kv_head);
  // Turns the keys of a full page back by angles, so that they stand at earlier positions.
  void (*turn_back)(const PageLayout& layout, uint8_t* page, int kv_head, const float* cosines, const float* sines);
  size_t attend_scratch_bytes;
  // Attention with gradients: whether bfloat16 is multiplied as it is; up to `width` rows as products read
  // them, whose scratch holds width * padded floats; the rows of a unit; a page.
  bool has_tiles;
  size_t (*tiled_scratch_bytes)(int dim, int value_dim, int width);
  void (*tiled_pack)(Kind kind, Kind source, const void* from, int count, int dim, int padded, int width, void* across,
                     void* along, void* scratch);
  void (*tiled_load)(Kind kind, Kind source, const void* const* from, int count, int dim, int padded, int filled,
                     void* rows, void* across);
  void (*tiled_forward)(const TiledPage& page, const TiledUnit& unit, void* scratch);
  void (*tiled_backward)(const TiledPage& page, const TiledUnit& unit, void* scratch);
  // The largest score with a page's keys, into `top` of the rows that see some of it.
  void (*tiled_peaks)(const TiledPage& page, const TiledUnit& unit, void* scratch);
  // Rows of `padded` floats times their factors (or 1), as rows of `dim` numbers; the product of two rows; sums
  // [padded][width] of several gradients of a page, as rows [width][padded].
  void (*tiled_store)(Kind source, const float* from, int padded, const float* factors, int count, int dim,
                      void* const* to);
  float (*tiled_dot)(Kind source, const void* a, const void* b, int dim);
  void (*tiled_sum)(const float* const* parts, int count, int padded, int width, float* rows);
  void (*merge)(float* sums, float* largest, float* total, const float* sums_next,
                const float* largest_next, const float* total_next, int count, int dim);
  // Packing -----------------------------------------------------------------------------------
  void (*pack_panel)(Weight& w, const void* source, Kind source_kind, ptrdiff_t source_stride,
                     int panel, float* scratch);
  // Sampling, see sample.h ----------------------------------------------------------------------
  // Largest value of each block of kSampleBlock; NaN where it has one.
  void (*block_largest)(const float* x, int count, float* largest);
  // Weights exp((x - most) * inverse) of all values, and their sum in each block.
  Mass (*weigh)(const float* x, int count, float most, float inverse, float* weights, float* sums);
  // Limits, see peak.h ------------------------------------------------------------------------
  double (*peak_products)(Kind kind, int rounds, float* numbers);
  float (*read_once)(const float* from, size_t count);
};

}  // namespace deepseek
