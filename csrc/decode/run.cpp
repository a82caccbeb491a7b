#include "run.h"

#include <vector>

#include "kernels/paths.h"
#include "kernels/threads.h"

namespace narrowcast {

void attend(const Attention& a) {
  const Kernels* path = selected_kernels();
  const size_t num_units = a.num_units(), rows = a.rows();
  const bool in_pieces = a.num_pieces() > 1;
  thread_local std::vector<float> partials;
  if (in_pieces) partials.resize(num_units * rows * a.partial_size());
  float* shared = partials.data();
  const size_t nbytes =
      2 * a.num_sequences * a.num_kv_heads * a.context * a.head_dim * (a.dtype == Dtype::fp32 ? 4 : 2);
  const size_t effort = nbytes * (rows + 3) / 4;  // of one row reading is most, of others arithmetic
  for_rows(num_units, effort, a.scratch_size(), 0, [&](size_t begin, size_t end, const Scratch& scratch) {
    path->attend(a, scratch.values, shared, begin, end);
  });
  if (in_pieces) path->join(a, shared, 0, a.num_sequences * a.num_kv_heads);
}

void norm(const RmsNorm& n) {
  const Kernels* path = selected_kernels();
  for_rows(n.num_rows, n.num_rows * n.num_values * (n.dtype == Dtype::fp32 ? 4 : 2), 0, 0,
           [&](size_t begin, size_t end, const Scratch&) { path->norm(n, begin, end); });
}

void combine(const Combination& c) { selected_kernels()->combine(c, 0, c.out.num_rows); }

void look_up(const Function& f) {
  for (size_t row = 0; row < f.x.num_rows; ++row) {
    const auto* from = static_cast<const uint16_t*>(f.x.row(row));
    auto* to = static_cast<uint16_t*>(f.out.row(row));
    for (size_t i = 0; i < f.x.num_values; ++i) to[i] = f.table[from[i]];
  }
}

}  // namespace narrowcast
