// The Python face of the kernels: arrays cross as pointers, nothing here knows torch.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/unique_ptr.h>
#include <nanobind/stl/vector.h>

#if defined(__GLIBC__)
#include <malloc.h>
#endif

#include "isa.h"
#include "limits.h"
#include "program.h"
#include "tiled_attention.h"
#include "../sampling/cpu/sample.h"

namespace nb = nanobind;
using namespace deepseek;

namespace {

template <typename T>
using Array = nb::ndarray<T, nb::c_contig, nb::device::cpu>;

Kind kind_of(const std::string& name) {
  if (name == "float32") return Kind::f32;
  if (name == "bfloat16") return Kind::bf16;
  if (name == "int8") return Kind::int8;
  if (name == "int4") return Kind::int4;
  throw std::invalid_argument("unknown storage: " + name);
}

const Kernels& kernels_named(const std::string& isa) {
  const Kernels* kernels = kernels_of(isa);
  if (!kernels) throw std::invalid_argument("instruction set is not usable here: " + isa);
  return *kernels;
}

Instruction instruction_of(const nb::dict& d) {
  Instruction in;
  std::string op = nb::cast<std::string>(d["op"]);
  in.op = op == "embed"    ? Op::embed
          : op == "linear" ? Op::linear
          : op == "swiglu" ? Op::swiglu
          : op == "attend" ? Op::attend
          : op == "copy"   ? Op::copy
          : op == "layer_norm" ? Op::layer_norm
                           : Op::experts;
  auto number = [&](const char* name, int other) {
    return d.contains(name) ? nb::cast<int>(d[name]) : other;
  };
  in.in = number("input", 0), in.out = number("output", 0), in.norm = number("norm", -1);
  if (d.contains("weights")) in.weights = nb::cast<std::vector<int>>(d["weights"]);
  in.bias = number("bias", -1), in.positions = number("positions", -1), in.types = number("types", -1);
  in.is_head = number("is_head", 0), in.activation = Activation(number("activation", 0));
  in.adds = number("adds", 0), in.rows = RowSet(number("selected", 0));
  if (d.contains("closes_below")) in.closes_below = nb::cast<float>(d["closes_below"]);
  in.gates = number("gates", -1);
  in.layer = number("layer", 0), in.q_norm = number("q_norm", -1), in.k_norm = number("k_norm", -1);
  in.window = number("window", 0), in.is_routed = number("is_routed", 0), in.routes = number("routes", 0);
  in.balance = number("balance", -1), in.num_active = number("num_active", 0);
  in.num_groups = number("num_groups", 1), in.num_active_groups = number("num_active_groups", 1);
  in.normalizes = number("normalizes", 0);
  if (d.contains("scale")) in.scale = nb::cast<float>(d["scale"]);
  return in;
}

std::unique_ptr<Program> make_program(const std::string& isa, const nb::dict& shape,
                                      const std::vector<std::pair<int, size_t>>& buffers,
                                      const nb::list& instructions, int max_tokens, int threads) {
  Shape s;
  s.heads = nb::cast<int>(shape["heads"]), s.kv_heads = nb::cast<int>(shape["kv_heads"]);
  s.head_dim = nb::cast<int>(shape["head_dim"]), s.layers = nb::cast<int>(shape["layers"]);
  s.vocab = nb::cast<int>(shape["vocab"]), s.norm_eps = nb::cast<float>(shape["norm_eps"]);
  s.outputs = shape.contains("outputs") ? nb::cast<int>(shape["outputs"]) : s.vocab;
  if (shape.contains("is_causal")) s.is_causal = nb::cast<bool>(shape["is_causal"]);
  s.rope_factor = nb::cast<float>(shape["rope_factor"]);
  s.score_scale = nb::cast<float>(shape["score_scale"]);
  s.inverse_frequencies = nb::cast<std::vector<float>>(shape["inverse_frequencies"]);
  if (shape.contains("route")) {
    nb::dict route = nb::cast<nb::dict>(shape["route"]);
    s.route = {nb::cast<int>(route["refresh"]), nb::cast<int>(route["first_pages"]),
               nb::cast<int>(route["recent_pages"]), nb::cast<std::vector<int32_t>>(route["budget"]), nb::cast<float>(route["least_share"]),
               nb::cast<bool>(route["has_means"]), nb::cast<bool>(route["has_summaries"])};
    if (s.route.refresh < 1 || kPage % s.route.refresh || s.route.recent_pages < 1 || s.route.budget.empty())
      throw std::invalid_argument("a route must share choices within a page and see the own one");
    if (s.heads / s.kv_heads > kMaxQueries / kPage)
      throw std::invalid_argument("too many query heads share a KV head for routed attention");
    for (int32_t pages : s.route.budget)
      if (pages < s.route.first_pages + s.route.recent_pages)
        throw std::invalid_argument("a route's budget must hold what is always seen");
  }
  std::vector<Buffer> plan;
  for (auto [width, offset] : buffers) plan.push_back({width, offset});
  std::vector<Instruction> listed;
  for (nb::handle item : instructions) listed.push_back(instruction_of(nb::cast<nb::dict>(item)));
  return std::make_unique<Program>(kernels_named(isa), s, plan, listed, max_tokens, threads);
}

// `source`: [n, k] rows of float32 or of 16-bit patterns; `dtype` says which of the two 16-bit types.
int add_weight(Program& program, const std::string& kind, int group, bool rotated, uintptr_t source,
               const std::string& dtype, int n, int k, ptrdiff_t stride,
               std::optional<Array<const float>> bias) {
  Kind from = dtype == "float32" ? Kind::f32 : dtype == "bfloat16" ? Kind::bf16 : Kind::int8;
  nb::gil_scoped_release release;
  return program.add_weight(kind_of(kind), group, rotated, n, k, (const void*)source, from, stride,
                            bias ? bias->data() : nullptr);
}

// `group` 0 is a whole row. `codes` [n, k]; `scale` and `least` [n, groups] are patterns of half floats, `least`
// for int4 alone.
int add_codes(Program& program, const std::string& kind, int group, bool rotated, Array<const uint8_t> codes,
              Array<const uint16_t> scale, Array<const uint16_t> least, std::optional<Array<const float>> bias,
              float input_scale) {
  Kind to = kind_of(kind);
  if (to != Kind::int8 && to != Kind::int4) throw std::invalid_argument("codes are int8 or int4");
  bool is_row = to == Kind::int8 && group == 0;
  if (codes.ndim() != 2 || scale.ndim() != 2 || (!is_row && (group < 32 || group > kMaxGroup || group % 32)))
    throw std::invalid_argument("codes must be [n, k] in groups of a multiple of 32, at most 192");
  if (rotated && (to != Kind::int8 || group % kRotation || codes.shape(1) % kRotation))
    throw std::invalid_argument("rotated codes are int8 [n, k], k and group multiples of 64");
  size_t n = codes.shape(0), k = codes.shape(1), groups = is_row ? 1 : (k + group - 1) / group;
  if (scale.shape(0) != n || scale.shape(1) != groups || (to == Kind::int4 && least.size() != n * groups) ||
      (bias && bias->size() != n))
    throw std::invalid_argument("scale and least must be [n, groups], the bias [n]");
  nb::gil_scoped_release release;
  return program.add_codes(to, group, rotated, input_scale, int(n), int(k), codes.data(), scale.data(), least.data(),
                           bias ? bias->data() : nullptr);
}

int add_room(Program& program, const std::string& kind, int group, bool rotated, int n, int k,
             std::optional<Array<const float>> bias, float input_scale) {
  return program.add_room(kind_of(kind), group, rotated, input_scale, n, k, bias ? bias->data() : nullptr);
}

// The packed bytes of a weight, in place.
std::pair<uintptr_t, size_t> packed(const Program& program, size_t index) {
  const Weight& w = program.weights().at(index);
  return {(uintptr_t)w.data, w.bytes()};
}

void run(Program& program, KvPages& pages, Array<const int32_t> tokens,
         Array<const int32_t> positions, Array<const int32_t> rows, Array<const int32_t> table,
         Array<const int32_t> selected, Array<float> logits, std::optional<Array<const int32_t>> adapters,
         std::optional<Array<const int32_t>> types, bool states) {
  if (types && types->size() != tokens.size())
    throw std::invalid_argument("tokens and types must have one length");
  if (states && !program.states_width()) throw std::invalid_argument("a program without a head has no states");
  if (adapters && adapters->size() != tokens.size())
    throw std::invalid_argument("tokens and adapters must have one length");
  if (positions.size() != tokens.size() || rows.size() != tokens.size() || table.ndim() != 2)
    throw std::invalid_argument("tokens, positions and rows must have one length");
  int width = states ? program.states_width() : program.shape().outputs;
  if (logits.size() < selected.size() * size_t(width))
    throw std::invalid_argument("logits must hold a row for each selected token");
  Step step;
  step.count = int(tokens.size());
  step.tokens = tokens.data(), step.positions = positions.data(), step.rows = rows.data();
  step.page_table = table.data(), step.pages_per_row = int(table.shape(1));
  for (int i = 0; i < step.count; ++i)
    if (rows.data()[i] >= int(table.shape(0))) throw std::invalid_argument("row outside the page table");
  step.selected = selected.data(), step.num_selected = int(selected.size());
  step.logits = logits.data();
  step.adapters = adapters ? adapters->data() : nullptr;
  step.types = types ? types->data() : nullptr, step.is_states = states;
  nb::gil_scoped_release release;
  program.run(step, pages);
}

std::pair<int, int> weight_shape(const Program& program, size_t index) {
  const Weight& w = program.weights().at(index);
  return {w.n, w.k};
}

// Of each weight that is adapted: its number, down [rank, k], up [n, rank], scale.
using GivenMatrix = std::tuple<int, Array<const float>, Array<const float>, float>;

int add_adapter(Program& program, const std::vector<GivenMatrix>& matrices) {
  std::vector<GivenLowRank> given;
  for (const auto& [weight, down, up, scale] : matrices) {
    const Weight& w = program.weights().at(size_t(weight));
    if (down.ndim() != 2 || up.ndim() != 2 || down.shape(0) != up.shape(1) || int(down.shape(1)) != w.k ||
        int(up.shape(0)) != w.n)
      throw std::invalid_argument("an adapter's matrices must be [rank, k] and [n, rank] beside a weight [n, k]");
    given.push_back({weight, int(down.shape(0)), scale, down.data(), up.data()});
  }
  nb::gil_scoped_release release;
  return program.add_adapter(given);
}

void turn_back(Program& program, KvPages& pages, Array<const int32_t> numbers, int positions) {
  nb::gil_scoped_release release;
  program.turn_back(pages, numbers.data(), int(numbers.size()), positions);
}

std::vector<int> largest(const std::string& isa, Array<const float> logits) {
  const Kernels& kernels = kernels_named(isa);
  std::vector<int> places;
  int count = int(logits.shape(logits.ndim() - 1));
  for (size_t row = 0; row < logits.size() / count; ++row)
    places.push_back(largest_place(kernels, logits.data() + row * count, count));
  return places;
}

// [(log of the sum of exp(logit), entropy in nats)] of rows of logits.
std::vector<std::pair<float, float>> certainty(const std::string& isa, Array<const float> logits) {
  const Kernels& kernels = kernels_named(isa);
  std::vector<std::pair<float, float>> found;
  int count = int(logits.shape(logits.ndim() - 1));
  for (size_t row = 0; row < logits.size() / count; ++row) {
    Certainty c = certainty_of(kernels, logits.data() + row * count, count);
    found.push_back({c.log_sum, c.entropy});
  }
  return found;
}

// Arrays whose first two dimensions are 1 where they are shared.
template <typename T>
Shared<T> shared(const nb::dict& given, const char* name) {
  Shared<T> found;
  if (!given.contains(name)) return found;
  auto array = nb::cast<Array<const T>>(given[name]);
  if (array.ndim() < 2) throw std::invalid_argument(std::string(name) + " must have two dimensions or more");
  size_t inner = array.ndim() > 2 ? array.size() / std::max<size_t>(1, array.shape(0) * array.shape(1)) : array.shape(1);
  size_t head = array.ndim() > 2 ? array.shape(1) * inner : inner;
  found.data = array.data();
  found.row = array.shape(0) > 1 ? ptrdiff_t(head) : 0;
  found.head = array.ndim() > 2 && array.shape(1) > 1 ? ptrdiff_t(inner) : 0;
  found.block = array.ndim() > 2 && array.shape(2) > 1 ? 1 : 0;
  return found;
}

// The arrays stay with the caller, who keeps them until the call is over; see ops/attention/tiled.py.
void tiled(TiledAttention& attention, const nb::dict& given, TiledPass pass) {
  TiledCall c;
  auto number = [&](const char* name) { return nb::cast<int>(given[name]); };
  auto address = [&](const char* name) { return given.contains(name) ? (void*)nb::cast<uintptr_t>(given[name]) : nullptr; };
  c.source = kind_of(nb::cast<std::string>(given["dtype"]));
  c.rows = number("rows"), c.heads = number("heads"), c.kv_heads = number("kv_heads"), c.queries = number("queries");
  c.dim = number("dim"), c.value_dim = number("value_dim"), c.slots = number("slots"), c.block = number("block");
  c.query_size = number("query_size"), c.mean_from = number("mean_from"), c.width = number("width");
  c.first = number("first"), c.scale = nb::cast<float>(given["scale"]), c.is_causal = nb::cast<bool>(given["is_causal"]);
  auto starts = nb::cast<Array<const int32_t>>(given["query_start"]), lengths = nb::cast<Array<const int32_t>>(given["key_length"]);
  c.query_start = starts.data(), c.key_length = lengths.data();
  c.indices = shared<int32_t>(given, "indices"), c.counts = shared<int32_t>(given, "counts");
  c.skip = shared<uint8_t>(given, "skip"), c.reach = shared<int32_t>(given, "reach");
  c.bias = shared<float>(given, "bias");
  c.slopes = (const float*)address("slopes"), c.place = (const float*)address("place");
  c.query = address("queries_at"), c.key = address("keys_at"), c.value = address("values_at");
  TiledResult r{address("out"), (float*)address("lse"), address("gradient"), (const float*)address("lse_gradient"),
                address("to_queries"), address("to_keys"), address("to_values")};
  nb::gil_scoped_release release;
  attention.run(pass, c, r);
}

int choose(const std::string& isa, Array<float> logits, double temperature, int top_k, double top_p, double min_p,
           float repetition, float frequency, float presence,
           std::optional<Array<const uint8_t>> seen, std::optional<Array<const float>> counts,
           double uniform) {
  if ((seen && seen->size() != logits.size()) || (counts && counts->size() != logits.size()))
    throw std::invalid_argument("logits, seen and counts must have one length");
  Choice choice{temperature, top_p, min_p, top_k, repetition, frequency, presence};
  return choose_token(kernels_named(isa), logits.data(), int(logits.size()), choice, seen ? seen->data() : nullptr,
                      counts ? counts->data() : nullptr, uniform);
}

}  // namespace

NB_MODULE(_cpu, m) {
  m.doc() = "Packed products, attention over pages, and the flat step of a decoder.";
  m.attr("layout") = kLayout;
  // Gives memory that was freed back to the system, where the allocator can.
  m.def("release_freed", [] {
#if defined(__GLIBC__)
    malloc_trim(0);
#endif
  });
  m.def("usable_isas", &usable_isas);
  m.def("emulated_isas", &emulated_isas);
  nb::class_<KvPages>(m, "KvPages")
      .def("__init__",
           [](KvPages* self, const std::string& kind, const Program& program, int num_pages) {
             new (self) KvPages(kind_of(kind), program.shape(), num_pages);
           })
      .def("copy", &KvPages::copy)
      .def_ro("num_pages", &KvPages::num_pages)
      .def("mean_chosen", &KvPages::mean_chosen)
      .def_prop_ro("num_bytes", &KvPages::bytes);
  nb::class_<Program>(m, "Program")
      .def("add_weight", &add_weight, nb::arg("kind"), nb::arg("group"), nb::arg("rotated"),
           nb::arg("source"), nb::arg("dtype"), nb::arg("n"), nb::arg("k"), nb::arg("stride"),
           nb::arg("bias").none())
      .def("add_codes", &add_codes, nb::arg("kind"), nb::arg("group"), nb::arg("rotated"), nb::arg("codes"),
           nb::arg("scale"), nb::arg("least"), nb::arg("bias").none(), nb::arg("input_scale") = 0.0f)
      .def("add_room", &add_room, nb::arg("kind"), nb::arg("group"), nb::arg("rotated"), nb::arg("n"),
           nb::arg("k"), nb::arg("bias").none(), nb::arg("input_scale") = 0.0f)
      .def("packed", &packed)
      .def("weight_shape", &weight_shape)
      .def("add_vector",
           [](Program& p, Array<const float> v) { return p.add_vector(v.data(), int(v.size())); })
      .def("start", &Program::start)
      .def("run", &run, nb::arg("pages"), nb::arg("tokens"), nb::arg("positions"), nb::arg("rows"), nb::arg("table"),
           nb::arg("selected"), nb::arg("logits"), nb::arg("adapters") = nb::none(),
           nb::arg("types") = nb::none(), nb::arg("states") = false)
      .def("add_adapter", &add_adapter, nb::arg("matrices"))
      .def("drop_adapter", &Program::drop_adapter, nb::arg("number"))
      .def_prop_ro("adapter_bytes", &Program::adapter_bytes)
      .def("turn_back", &turn_back)
      .def_rw("is_timed", &Program::is_timed)
      .def_ro("seconds", &Program::seconds)
      .def_prop_ro("threads", &Program::threads)
      .def_prop_ro("max_tokens", &Program::max_tokens)
      .def_prop_ro("weight_bytes", &Program::weight_bytes)
      .def_prop_ro("gated_heads", &Program::gated_heads)
      .def_prop_ro("plan_bytes", &Program::plan_bytes);
  nb::class_<TiledAttention>(m, "TiledAttention")
      .def("__init__",
           [](TiledAttention* self, const std::string& isa, int threads) {
             new (self) TiledAttention(kernels_named(isa), threads);
           })
      .def("forward", [](TiledAttention& self, const nb::dict& given) { tiled(self, given, TiledPass::forward); })
      .def("backward", [](TiledAttention& self, const nb::dict& given) { tiled(self, given, TiledPass::backward); })
      .def("peaks", [](TiledAttention& self, const nb::dict& given) { tiled(self, given, TiledPass::peaks); });
  m.def("largest", &largest, nb::arg("isa"), nb::arg("logits"));
  m.def("certainty", &certainty, nb::arg("isa"), nb::arg("logits"));
  m.def("choose", &choose, nb::arg("isa"), nb::arg("logits"), nb::arg("temperature"), nb::arg("top_k"),
        nb::arg("top_p"), nb::arg("min_p"), nb::arg("repetition"), nb::arg("frequency"),
        nb::arg("presence"), nb::arg("seen").none(), nb::arg("counts").none(), nb::arg("uniform"));
  m.def("make_program", &make_program);
  m.def("measure_products", [](const std::string& isa, const std::string& kind, int threads) {
    nb::gil_scoped_release release;
    return measure_products(kernels_named(isa), kind_of(kind), threads);
  });
  m.def("measure_bandwidth", [](const std::string& isa, size_t bytes, int threads) {
    nb::gil_scoped_release release;
    return measure_bandwidth(kernels_named(isa), bytes, threads);
  });
}
