// A model as a flat list of instructions over a static memory plan, run in one call per step.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <memory>
#include <stdexcept>
#include <utility>
#include <vector>

#include "adapters.h"
#include "memory.h"
#include "pool.h"
#include "types.h"

namespace deepseek {

enum class Op : int { embed = 0, linear = 1, swiglu = 2, attend = 3, experts = 4, copy = 5, layer_norm = 6 };

// Rows of an instruction: those of all tokens; of all tokens' those whose logits were asked for, side
// by side in the output; or rows that were picked so before.
enum class RowSet : int { all = 0, pick = 1, picked = 2 };

// `in` and `out` are buffers of the plan; -1 for `out` means the step's logits.
struct Instruction {
  Op op = Op::linear;
  int in = 0, out = 0;
  int norm = -1;                   // RMS norm of the input: index of a vector, -1 for none
  int bias = -1;                   // layer_norm: what is added behind `norm`, which is its weight
  int positions = -1, types = -1;  // embed: tables of a row for each position and token type, -1 for none
  std::vector<int> weights;        // swiglu: gate, up; experts: gate, up, down of each in turn
  bool adds = false;               // add to `out` in place of setting it
  bool is_head = false;            // the first of those that make the step's output of its last states
  Activation activation = Activation::none;  // linear: of its outputs
  RowSet rows = RowSet::all;
  float closes_below = -1.0f;      // linear: where not negative, outputs x become gates 2 / (1 + e^-x), 0 below it
  // attend
  int gates = -1;                  // buffer of a factor for each head's output; one of 0 is not computed
  int layer = 0, q_norm = -1, k_norm = -1, window = 0;  // window in slots, 0 for none
  bool is_routed = false;          // sees the pages that are chosen for it, of a program with a route
  // experts
  int routes = 0;                  // buffer of the router's logits
  int balance = -1;                // vector added to the scores to choose by; sigmoid scores have it
  int num_active = 0, num_groups = 1, num_active_groups = 1;
  bool normalizes = false;
  float scale = 1.0f;
};

struct Buffer {
  int width = 0;         // floats of a row
  size_t offset = 0;     // floats of a row before this buffer in the plan
};

// How routed attention chooses pages. The choice of a token is that of the first of its group of
// `refresh` tokens, with the query that this one had.
struct Route {
  int refresh = 0;                     // slots that share a choice, a divisor of kPage; 0: no route
  int first_pages = 0, recent_pages = 0;  // always seen; the own page is a recent one
  std::vector<int32_t> budget;         // pages seen by a query in each page; the last for all behind
  float least_share = -INFINITY;       // of those between first and recent, its logarithm
  bool has_means = false;              // pages that are not seen count by the means of their keys and values
  bool has_summaries = false;          // pages are judged by their summaries first: only the best are scored
  int most() const { return refresh ? *std::max_element(budget.begin(), budget.end()) : 0; }
  int budget_at(int page) const { return budget[std::min<size_t>(page, budget.size() - 1)]; }
};

struct Shape {
  int heads = 0, kv_heads = 0, head_dim = 0, layers = 0, vocab = 0;
  int outputs = 0;          // of a selected token: the vocabulary, or what an encoder's head gives
  bool is_causal = true;    // a token sees those before it; or else all of its row, which is one step's
  float norm_eps = 1e-6f, rope_factor = 1.0f, score_scale = 0.0f;
  std::vector<float> inverse_frequencies;  // [head_dim / 2]; empty: heads are not rotated
  Route route;
};

// One step: tokens of one or several sequences, those of a sequence side by side and in order.
struct Step {
  int count = 0;
  const int32_t* tokens = nullptr;
  const int32_t* positions = nullptr;
  const int32_t* rows = nullptr;         // sequence of each token: a row of the page table
  const int32_t* page_table = nullptr;   // [rows][pages_per_row]
  int pages_per_row = 0;
  const int32_t* selected = nullptr;     // tokens whose logits are wanted
  int num_selected = 0;
  float* logits = nullptr;               // [num_selected][outputs], or [num_selected][width of the states]
  bool is_states = false;                // the output is the states that the head would read, normed
  const int32_t* types = nullptr;        // token type of each token; null: all are of type 0
  const int32_t* adapters = nullptr;     // number of each token's adapter, -1 for none; null: none has one
};

class KvPages {
 public:
  KvPages(Kind kind, const Shape& shape, int num_pages);
  PageLayout layout;
  int num_pages;
  size_t bytes() const { return memory_.bytes(); }
  uint8_t* layer(int index) const { return memory_.data() + size_t(index) * num_pages * layout.page_bytes; }
  // The newest choice of a KV head's queries in a page: one more than the group of slots it is for, 0 for
  // none; how many pages, and their places in the row.
  struct Choice { int32_t group, count; int32_t pages[1]; };
  Choice& choice(int layer, int page, int kv_head) {
    size_t place = (size_t(layer) * num_pages + page) * layout.kv_heads + kv_head;
    return *(Choice*)(choices_.data() + place * choice_bytes_);
  }
  int most_chosen() const { return most_chosen_; }
  bool has_means() const { return has_means_; }
  bool has_summaries() const { return has_summaries_; }
  double mean_chosen();  // pages that the newest choices hold, on average
  // Mean key and mean value of a KV head in a full page.
  uint8_t* mean(int layer, int page, int kv_head) {
    return means_.data() + ((size_t(layer) * num_pages + page) * layout.kv_heads + kv_head) * layout.mean_bytes;
  }
  // What stands for the keys of a KV head in a full page.
  uint8_t* summary(int layer, int page, int kv_head) {
    return summaries_.data() + ((size_t(layer) * num_pages + page) * layout.kv_heads + kv_head) * layout.summary_bytes;
  }
  void copy(int target, int source);

 private:
  int layers_, most_chosen_;
  bool has_means_, has_summaries_;
  size_t choice_bytes_ = 0;
  Memory memory_, choices_, means_, summaries_;
};

// The experts that the tokens of a step go to. Slot token * active + i is the token's i-th expert; the
// slots of one expert have neighbouring places.
struct Routing {
  std::vector<int> expert, place, slot_at;  // of each slot; slot of each place
  std::vector<float> share;                 // of each slot: weight of the expert's output
  std::vector<int> first;                   // first place of each expert, and the end
  std::vector<int> busy;                    // experts that have a slot

  // Groups `count` slots by expert, those of one expert in the order of slots.
  void sort(int count, int num_experts);
};

class Program {
 public:
  Program(const Kernels& kernels, Shape shape, std::vector<Buffer> buffers,
          std::vector<Instruction> instructions, int max_tokens, int threads);

  // Weights are packed as they are added; `source` is not needed afterwards.
  int add_weight(Kind kind, int group, bool rotated, int n, int k, const void* source,
                 Kind source_kind, ptrdiff_t stride, const float* bias);
  // Packs codes [n][k] as they are, with a scale for every row and group and, of int4, a least value; those of
  // a rotated weight are of its channels behind the rotation.
  int add_codes(Kind kind, int group, bool rotated, float input_scale, int n, int k, const uint8_t* codes, const uint16_t* scale,
                const uint16_t* least, const float* bias);
  // Room for weights that were packed before: the caller fills it.
  int add_room(Kind kind, int group, bool rotated, float input_scale, int n, int k, const float* bias);
  int add_vector(const float* values, int count);
  void start();  // after the last weight

  // Adapters come and go at any time, from any thread: a step that has begun keeps those of its tokens.
  int add_adapter(const std::vector<GivenLowRank>& matrices);
  void drop_adapter(int number) { adapters_.drop(number); }
  size_t adapter_bytes() const { return adapters_.bytes(); }

  void run(const Step& step, KvPages& pages);
  // Moves full pages to positions that lie `positions` earlier.
  void turn_back(KvPages& pages, const int32_t* numbers, int count, int positions);

  int threads() const { return pool_.size(); }
  int max_tokens() const { return max_tokens_; }
  size_t weight_bytes() const;
  size_t plan_bytes() const { return states_.bytes() + scratch_.bytes(); }
  // Heads of tokens that had a gate since the program was made, and those of them that were closed.
  std::pair<int64_t, int64_t> gated_heads() const { return {gates_, closed_}; }
  const Shape& shape() const { return shape_; }
  const Kernels& kernels() const { return kernels_; }
  void embed_row(const Weight& w, int row, float* out) const;
  int states_width() const;  // of the states that the head reads; 0 where there is no head
  const std::vector<Weight>& weights() const { return weights_; }
  // Seconds spent in each instruction, on thread 0, since the program was made.
  std::vector<double> seconds;
  bool is_timed = false;

 private:
  struct Run { int start, count, row; };  // tokens of one sequence
  // Tokens that share a choice, its pages, those visited, and those that it is made from.
  struct Group { int start, stop, count, seen, candidates; };
  struct States {                         // see PageStates
    std::vector<float> sums, bound, mass;
    void reset(int rows, int dim);
    void clear(int first, int count, int dim);
    PageStates view() { return {sums.data(), bound.data(), mass.data()}; }
  };
  struct RouteMemory {                    // of a thread
    std::vector<Group> groups;
    std::vector<int32_t> chosen;          // [groups][most pages]
    std::vector<int32_t> visitors, first_visitor;  // groups that see a page, page after page; [pages + 1]
    std::vector<int32_t> rows, own_rows;  // with a page: those that see all of it, those that lie in it
    std::vector<uint64_t> shown, unseen;  // slots of a page that rows see; pages that groups do not, by bits
    std::vector<int32_t> mean_table;
    std::vector<uint8_t*> means, summaries;  // of the pages of a row
    Memory mean_pages;                    // pages of this thread, whose slots are the means of pages
    std::vector<Query> queries;
    std::vector<float> scores, recent, found, best, scratch, totals;
    std::vector<int32_t> places;          // among candidates; of pages
    States all, segment;
  };
  struct Pass;
  struct AttendMemory;

  int rows_of(const Pass& pass, const Instruction& in) const;
  int source_of(const Pass& pass, const Instruction& in, int row) const;
  float* buffer(int index) const { return (float*)states_.data() + buffers_[index].offset * max_tokens_; }
  void check(const Step& step, const KvPages& pages) const;
  void work(Pass& pass, int thread);
  void prepare_step(Pass& pass, int thread);
  void copy(Pass& pass, const Instruction& in, int thread);
  void embed(Pass& pass, const Instruction& in, int thread);
  void linear(Pass& pass, const Instruction& in, int index, int thread);
  template <typename F>
  void share_rows(int rows, std::atomic<int>& counter, int thread, F f) const;
  void finish_panel(const Instruction& in, int start, int stop, int first, int columns, float* out, ptrdiff_t stride);
  void become_gates(const Instruction& in, int start, int stop, int first, int last);
  float gate_of(const Instruction& in, int token, int head) const;
  bool is_closed(const Instruction& in, int token, int head) const { return gate_of(in, token, head) == 0; }
  void adapted_swiglu(const Pass& pass, const Instruction& in, const Inputs& x, int start, int stop, int panel,
                      float* tiles, float* out, ptrdiff_t stride) const;
  void experts(Pass& pass, const Instruction& in, int index, int thread);
  void attend(Pass& pass, const Instruction& in, int index, int thread);
  void attend_block(Pass& pass, const Instruction& in, const Run& run, int kv_head, int start,
                    int stop, int thread);
  void attend_pages(const Attend& a, int count, int low, int high, const AttendMemory& m) const;
  float* query_of(const Instruction& in, int token, int head) const;
  int open_heads(const Instruction& in, int token, int first, int count, int* heads) const;
  void write_out(const Instruction& in, int token, int head, const float* sums, float total) const;
  Attend attend_of(const Pass& pass, const Instruction& in, const Run& run, int kv_head) const;
  void plan_blocks(Pass& pass) const;
  // encoder.cpp: what encoders have beside these, and states as the output
  void add_tables(const Pass& pass, const Instruction& in, int token) const;
  void check_tables(const Step& step) const;
  void layer_norm(const Pass& pass, const Instruction& in, int thread);
  void put_states(const Pass& pass, const Instruction& head, int thread) const;
  // adapters.cpp: what adapters add to products
  bool can_adapt(int weight) const;
  void plan_adapters(Pass& pass);
  bool is_adapted(const Pass& pass, const Instruction& in) const;
  float* adapted_input(const Pass& pass, const Instruction& in, int row, int thread) const;
  float* low_rank_of(int row, int place) const;
  void prepare_adapted(const Pass& pass, const Instruction& in, int thread) const;
  void project_down(const Pass& pass, const Instruction& in, int thread) const;
  void project_up(const Pass& pass, const Instruction& in, int place, int panel, int start, int stop, float* out,
                  ptrdiff_t stride) const;
  // route.cpp: attention of single tokens, and to chosen pages
  void attend_tokens(Pass& pass, const Instruction& in, int index, int thread);
  void attend_token(Pass& pass, const Instruction& in, const Run& run, int kv_head, int part, int thread);
  std::pair<int, int> parts_of(Pass& pass, const Instruction& in, const Run& run, int kv_head) const;
  float* state_of(const Pass& pass, const Run& run, int head) const;
  void merge_parts(Pass& pass, const Instruction& in, const Run& run, int head);
  void rope_queries(Pass& pass, const Instruction& in, int token, const int* heads, int count, int low, int high,
                    const AttendMemory& m) const;
  void plan_routes(Pass& pass);
  int dense_tokens(const Pass& pass, const Run& run) const;
  bool is_routed(const Pass& pass, const Instruction& in, const Run& run) const;
  KvPages::Choice& choice_at(Pass& pass, const Instruction& in, const Run& run, int kv_head, int position) const;
  bool is_chosen(Pass& pass, const Instruction& in, const Run& run, int kv_head, int position) const;
  int choose(int position, float* scores, ptrdiff_t stride, float least_share, int32_t* chosen, int thread);
  int choose_among(int count, int position, float* scores, ptrdiff_t stride, float least_share, int32_t* chosen,
                   int thread);
  int choose_again(int count, int position, const float* guesses, ptrdiff_t stride, const float* found, int32_t* chosen,
                   int thread);
  // Of the pages that a token chose, those before its recent ones.
  int older_of(int chosen) const { return std::max(0, chosen - shape_.route.recent_pages); }
  void guess_scores(Pass& pass, const Instruction& in, const Run& run, int kv_head, int count, int first, int last,
                    float* out, int thread);
  void keep_choice(KvPages::Choice& choice, int position, const int32_t* chosen, int count) const;
  void choose_groups(Pass& pass, const Instruction& in, const Run& run, int kv_head, int start, int stop,
                     int thread);
  void choose_by_keys(Pass& pass, const Instruction& in, const Run& run, int kv_head, int first, int thread);
  void choose_by_summaries(Pass& pass, const Instruction& in, const Run& run, int kv_head, int first, int thread);
  void score_candidates(const Attend& a, int first, int pages, int thread);
  void route_block(Pass& pass, const Instruction& in, const Run& run, int kv_head, int start, int stop,
                   int thread);
  void score_token(Pass& pass, const Instruction& in, const Run& run, int kv_head, int chunk, int thread);
  int choose_scored(Pass& pass, const Instruction& in, const Run& run, int kv_head, float* guesses, int32_t* chosen,
                    int thread);
  void choose_for_token(Pass& pass, const Instruction& in, const Run& run, int kv_head, int thread);
  void sort_visitors(RouteMemory& m, int pages) const;
  void add_means(Pass& pass, const Instruction& in, const Run& run, int kv_head, int start, int stop, int thread);
  void merge_segment(RouteMemory& m, int first, int count) const;
  void keep_of_full(KvPages& pages, const Instruction& in, int page, int kv_head) const;
  bool keeps_of_full() const { return shape_.route.has_means || shape_.route.has_summaries; }
  int find_unseen(const int32_t* chosen, int count, int own, uint64_t* bits) const;
  Attend mean_pages_of(Pass& pass, const Instruction& in, const Run& run, int kv_head, int count, RouteMemory& m);
  void add_segment(Pass& pass, const Instruction& in, const Run& run, int kv_head, int segment, int thread);
  float* scores_of(const Pass& pass, const Run& run, int kv_head) const;
  void rope_head(const Pass& pass, int token, float* head, int norm) const;
  void store_token(Pass& pass, const Instruction& in, int token, int kv_head);
  Inputs inputs_for(const Weight& w, int slot) const;
  float* product_scratch(int thread) const;
  void* attend_scratch(int thread) const;
  uint8_t* thread_scratch(int thread) const { return scratch_.data() + thread_offset_ + thread * thread_bytes_; }

  const Kernels& kernels_;
  Shape shape_;
  std::vector<Buffer> buffers_;
  std::vector<Instruction> instructions_;
  int max_tokens_;
  Pool pool_;
  std::vector<Memory> arenas_;
  size_t arena_used_ = 0;
  std::vector<Weight> weights_;
  std::vector<const float*> vectors_;
  std::vector<int> vector_counts_;
  Memory states_, scratch_, partials_, scores_;
  std::vector<RouteMemory> routes_;
  size_t inputs_bytes_ = 0, thread_offset_ = 0, thread_bytes_ = 0, input_row_bytes_ = 0;
  int max_groups_ = 0, input_rows_ = 0;
  Routing routing_;
  Memory expert_states_;  // hidden, then output, of each place of the routing
  AdapterTable adapters_;
  Memory adapted_inputs_, low_rank_;  // of the rows of a step: normed inputs; down x of each weight
  size_t adapted_width_ = 0, low_rank_width_ = 0, low_rank_places_ = 0;
  std::vector<float> cosines_, sines_;  // [max_tokens][head_dim / 2]
  std::unique_ptr<std::atomic<int>[]> counters_;
  std::atomic<int64_t> gates_{0}, closed_{0};

  uint8_t* allocate(size_t bytes);
  Weight new_weight(Kind kind, int group, bool rotated, int n, int k, const float* bias);
};

}  // namespace deepseek
