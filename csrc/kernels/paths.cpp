#include "paths.h"

#include <atomic>

namespace narrowcast {
namespace {

std::atomic<const Kernels*> selected{runnable_kernels().back()};

}  // namespace

const Kernels* selected_kernels() { return selected; }

void select_kernels(const Kernels* kernels) { selected = kernels; }

std::vector<const Kernels*> runnable_kernels() {
  std::vector<const Kernels*> found = {&portable_kernels};
#ifdef NARROWCAST_HAS_avx2
  if (__builtin_cpu_supports("x86-64-v3")) found.push_back(&avx2_kernels);
#endif
#ifdef NARROWCAST_HAS_avx512
  if (__builtin_cpu_supports("x86-64-v4")) found.push_back(&avx512_kernels);
#endif
#ifdef NARROWCAST_HAS_avx512_bf16
  if (__builtin_cpu_supports("x86-64-v4") && __builtin_cpu_supports("avx512bf16") &&
      __builtin_cpu_supports("avx512vnni")) {
    found.push_back(&avx512_bf16_kernels);
  }
#endif
  return found;
}

}  // namespace narrowcast
