// The instructions that encoders have and decoders lack, and the states that a step ends with.
#include "pass.h"

#include <algorithm>
#include <cstring>

namespace deepseek {

// Adds a row of each table that there is: the position's, and the token type's.
void Program::add_tables(const Pass& pass, const Instruction& in, int token) const {
  int width = buffers_[in.out].width;
  float* out = buffer(in.out) + size_t(token) * width;
  auto add = [&](int table, int row) {
    if (table < 0) return;
    const float* from = vectors_[table] + size_t(row) * width;
    for (int i = 0; i < width; ++i) out[i] += from[i];
  };
  add(in.positions, pass.step.positions[token]);
  add(in.types, pass.step.types ? pass.step.types[token] : 0);
}

// Whether tokens have a row in the tables.
void Program::check_tables(const Step& step) const {
  auto check = [&](const Instruction& in, int table, const int32_t* numbers, const char* what) {
    if (table < 0 || !numbers) return;
    int rows = vector_counts_[table] / buffers_[in.out].width;
    for (int i = 0; i < step.count; ++i)
      if (numbers[i] < 0 || numbers[i] >= rows) throw std::invalid_argument(what);
  };
  for (const Instruction& in : instructions_) {
    if (in.op != Op::embed) continue;
    check(in, in.positions, step.positions, "position outside the table of positions");
    check(in, in.types, step.types, "token type outside the table of types");
  }
}

void Program::layer_norm(const Pass& pass, const Instruction& in, int thread) {
  auto [start, stop] = share(rows_of(pass, in), pool_.size(), thread);
  int from_width = buffers_[in.in].width, width = buffers_[in.out].width;
  for (int r = start; r < stop; ++r)
    kernels_.layer_norm(buffer(in.in) + size_t(source_of(pass, in, r)) * from_width, vectors_[in.norm],
                        vectors_[in.bias], shape_.norm_eps, buffer(in.out) + size_t(r) * width, width);
}

int Program::states_width() const {
  for (const Instruction& in : instructions_)
    if (in.is_head) return buffers_[in.in].width;
  return 0;
}

// The input of the head, normed, in place of what the head makes of it.
void Program::put_states(const Pass& pass, const Instruction& head, int thread) const {
  auto [start, stop] = share(rows_of(pass, head), pool_.size(), thread);
  int width = buffers_[head.in].width;
  for (int r = start; r < stop; ++r) {
    const float* from = buffer(head.in) + size_t(source_of(pass, head, r)) * width;
    float* to = pass.step.logits + size_t(r) * width;
    if (head.norm >= 0) kernels_.rms_norm(from, vectors_[head.norm], shape_.norm_eps, to, width);
    else std::memcpy(to, from, size_t(width) * sizeof(float));
  }
}

}  // namespace deepseek
