// What Python sees of the kernels: formats, and three calls that take addresses.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <mutex>
#include <string>
#include <vector>

#include "kernels/kernels.h"
#include "kernels/paths.h"
#include "kernels/threads.h"

namespace nb = nanobind;

namespace narrowcast {
namespace {

template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

Format make_cast(int dtype) {
  Format format = {};
  format.kind = Kind::cast;
  format.dtype = static_cast<Dtype>(dtype);
  return format;
}

Format make_feature(int num_bits, size_t num_features, uintptr_t scale, uintptr_t reciprocal, uintptr_t outliers,
                    size_t num_outliers, uintptr_t holes, uintptr_t fillers, size_t num_holes, bool tame,
                    int guard_bits, size_t guard_group_size) {
  Format format = {};
  format.kind = Kind::feature;
  format.num_bits = num_bits;
  format.num_features = num_features;
  format.scale = at<const float>(scale);
  format.reciprocal = at<const float>(reciprocal);
  format.outliers = at<const int64_t>(outliers);
  format.num_outliers = num_outliers;
  format.holes = at<const int64_t>(holes);
  format.fillers = at<const int64_t>(fillers);
  format.num_holes = num_holes;
  format.tame = tame;
  format.guard_bits = guard_bits;
  format.guard_group_size = guard_group_size;
  return format;
}

Format make_group(int num_bits, size_t group_size, bool symmetric, bool spikes) {
  Format format = {};
  format.kind = Kind::group;
  format.num_bits = num_bits;
  format.group_size = group_size;
  format.symmetric = symmetric;
  format.spikes = spikes;
  return format;
}

Format make_minifloat(int num_bits, int mantissa_bits, int smallest_exponent, int largest_code, int scale_format,
                      size_t block_size) {
  Format format = {};
  format.kind = Kind::minifloat;
  format.element = {num_bits, mantissa_bits, smallest_exponent, largest_code};
  format.scale_format = static_cast<ScaleFormat>(scale_format);
  format.group_size = block_size;
  return format;
}

Format make_allocated(size_t num_features, size_t num_blocks, size_t num_escapes, size_t row_nbytes,
                      bool same_order, uintptr_t scale, uintptr_t reciprocal, uintptr_t order, uintptr_t slots,
                      uintptr_t widths, uintptr_t token_scale, uintptr_t token_reciprocal, uintptr_t scale_edges,
                      uintptr_t levels, uintptr_t by_subset, uintptr_t edges, uintptr_t bisected, uintptr_t nearest,
                      uintptr_t up_to) {
  Format format = {};
  format.kind = Kind::allocated;
  format.num_features = num_features;
  format.num_blocks = num_blocks;
  format.num_escapes = num_escapes;
  format.row_nbytes = row_nbytes;
  format.scale = at<const float>(scale);
  format.reciprocal = at<const float>(reciprocal);
  format.same_order = same_order;
  format.order = at<const uint16_t>(order);
  format.slots = at<const uint16_t>(slots);
  format.widths = at<const uint8_t>(widths);
  format.tables = {at<const float>(token_scale), at<const float>(token_reciprocal), at<const float>(scale_edges),
                   at<const float>(levels),      at<const float>(by_subset),        at<const float>(edges),
                   at<const float>(bisected),    at<const float>(nearest),          at<const uint16_t>(up_to)};
  return format;
}

// Counts of several threads, added to a tensor of three.
class Total {
 public:
  explicit Total(uintptr_t stats) : stats_(at<int64_t>(stats)) {}

  void add(const Counts& counts) {
    if (!stats_) return;
    std::lock_guard<std::mutex> lock(mutex_);
    stats_[0] += counts.saturated;
    stats_[1] += counts.non_finite;
    stats_[2] += counts.guarded;
  }

 private:
  std::mutex mutex_;
  int64_t* stats_;
};

void encode(const Format& format, uintptr_t x, int dtype, size_t num_tokens, size_t num_features, ptrdiff_t stride,
            size_t source, uintptr_t out, ptrdiff_t out_stride, uintptr_t stats) {
  nb::gil_scoped_release release;
  const Rows rows = {at<void>(x), static_cast<Dtype>(dtype), stride, num_tokens, num_features};
  const Payload payload = {at<uint8_t>(out), out_stride};
  const Kernels* path = selected_kernels();
  Total total(stats);
  for_rows(num_tokens, num_tokens * num_features * 2, num_features, 1,
           [&](size_t begin, size_t end, const Scratch& scratch) {
             Counts counts;
             path->encode(format, rows, source, payload, counts, scratch, begin, end);
             total.add(counts);
           });
}

void encode_with_residue(const Format& format, uintptr_t x, int dtype, size_t num_tokens, size_t num_features,
                         ptrdiff_t stride, uintptr_t residue, ptrdiff_t residue_stride, size_t source, uintptr_t out,
                         ptrdiff_t out_stride, uintptr_t stats) {
  nb::gil_scoped_release release;
  const Rows rows = {at<void>(x), static_cast<Dtype>(dtype), stride, num_tokens, num_features};
  const Rows lost = {at<void>(residue), Dtype::fp32, residue_stride, num_tokens, num_features};
  const Payload payload = {at<uint8_t>(out), out_stride};
  const Kernels* path = selected_kernels();
  Total total(stats);
  for_rows(num_tokens, num_tokens * num_features * 4, num_features, 1,
           [&](size_t begin, size_t end, const Scratch& scratch) {
             Counts counts;
             path->encode_with_residue(format, rows, lost, source, payload, counts, scratch, begin, end);
             total.add(counts);
           });
}

void decode_sum(const Format& format, uintptr_t payloads, size_t num_ranks, ptrdiff_t rank_stride,
                ptrdiff_t token_stride, size_t first_source, uintptr_t out, int dtype, size_t num_tokens,
                size_t num_features, ptrdiff_t stride) {
  nb::gil_scoped_release release;
  const Payloads from = {{at<uint8_t>(payloads), token_stride}, rank_stride, num_ranks, first_source};
  const Rows rows = {at<void>(out), static_cast<Dtype>(dtype), stride, num_tokens, num_features};
  const Kernels* path = selected_kernels();
  for_rows(num_tokens, num_tokens * num_features * num_ranks, num_features, num_ranks,
           [&](size_t begin, size_t end, const Scratch& scratch) {
             path->decode_sum(format, from, rows, scratch, begin, end);
           });
}

void recode(const Format& partial, uintptr_t payloads, size_t num_ranks, ptrdiff_t rank_stride,
            ptrdiff_t token_stride, const Format& reduced, size_t num_tokens, size_t num_features, uintptr_t out,
            ptrdiff_t out_stride, uintptr_t stats) {
  nb::gil_scoped_release release;
  const Payloads from = {{at<uint8_t>(payloads), token_stride}, rank_stride, num_ranks, 0};
  const Payload payload = {at<uint8_t>(out), out_stride};
  const Kernels* path = selected_kernels();
  Total total(stats);
  for_rows(num_tokens, num_tokens * num_features * (num_ranks + 1), num_features, num_ranks,
           [&](size_t begin, size_t end, const Scratch& scratch) {
             Counts counts;
             path->recode(partial, from, reduced, num_features, payload, counts, scratch, begin, end);
             total.add(counts);
           });
}

std::vector<std::string> paths() {
  std::vector<std::string> names;
  for (const Kernels* path : runnable_kernels()) names.push_back(path->name);
  return names;
}

void use_path(const std::string& name) {
  for (const Kernels* path : runnable_kernels()) {
    if (name == path->name) {
      select_kernels(path);
      return;
    }
  }
  throw nb::value_error("this machine cannot run that path");
}

}  // namespace
}  // namespace narrowcast

void bind_kernels(nb::module_& m) {
  using namespace narrowcast;
  nb::class_<Format>(m, "Format");
  m.def("cast", &make_cast);
  m.def("feature", &make_feature);
  m.def("group", &make_group);
  m.def("minifloat", &make_minifloat);
  m.def("allocated", &make_allocated);
  m.def("encode", &encode);
  m.def("encode_with_residue", &encode_with_residue);
  m.def("decode_sum", &decode_sum);
  m.def("recode", &recode);
  m.def("limit_threads", &limit_threads);
  m.def("paths", &paths);
  m.def("path", [] { return std::string(selected_kernels()->name); });
  m.def("use_path", &use_path);
}
