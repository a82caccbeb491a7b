// What Python sees of weights in few bits: matrices, and what is done with them besides products (schedule.cpp).
#include <nanobind/nanobind.h>

#include <sys/mman.h>

#include "kernels/paths.h"
#include "weights/product.h"

namespace nb = nanobind;

namespace narrowcast {
namespace {

template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

PackedMatrix make_packed(int kind, uintptr_t blocks, size_t row_stride, size_t num_rows, size_t group_size,
                         bool bf16_scales, float scale) {
  return {static_cast<WeightKind>(kind), at<const uint8_t>(blocks), row_stride, num_rows, group_size, bf16_scales, scale};
}

void dequantize_packed(const PackedMatrix& matrix, size_t first_row, size_t num_rows, size_t first_column,
                       size_t num_columns, uintptr_t out, size_t num_threads) {
  nb::gil_scoped_release release;
  dequantize(*selected_kernels()->weights, matrix, {first_row, num_rows, first_column, num_columns},
             at<uint16_t>(out), num_threads);
}

void look_up_packed(const PackedMatrix& matrix, uintptr_t rows, size_t num_rows, size_t num_columns, uintptr_t out) {
  nb::gil_scoped_release release;
  look_up(matrix, at<const int64_t>(rows), num_rows, num_columns, at<float>(out));
}

uint64_t read_at(uintptr_t address, size_t nbytes, size_t num_threads) {
  nb::gil_scoped_release release;
  return read_memory(*selected_kernels()->weights, at<const uint8_t>(address), nbytes, num_threads);
}

// Ask for pages of 2 MB, in which a core reads memory faster than in those of 4 KB.
void use_huge_pages(uintptr_t address, size_t nbytes) {
  constexpr uintptr_t kPage = 1 << 21;
  const uintptr_t first = (address + kPage - 1) & ~(kPage - 1), end = (address + nbytes) & ~(kPage - 1);
#ifdef MADV_HUGEPAGE
  if (first < end) madvise(at<void>(first), end - first, MADV_HUGEPAGE);  // a wish: none is as well
#endif
}

}  // namespace
}  // namespace narrowcast

void bind_weights(nb::module_& m) {
  using namespace narrowcast;
  nb::class_<PackedMatrix>(m, "PackedMatrix");
  m.def("packed", &make_packed);
  m.def("dequantize_packed", &dequantize_packed);
  m.def("look_up_packed", &look_up_packed);
  m.def("use_huge_pages", &use_huge_pages);
  m.def("read_memory", &read_at);
}
