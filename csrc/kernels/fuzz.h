// What the parts of the fuzzer share: dice, and buffers that end with their last byte.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <random>

namespace narrowcast {

inline std::mt19937 generator;

inline size_t below(size_t end) { return generator() % end; }
inline bool coin() { return below(2); }

// Exactly as long as it says, unlike a std::vector.
template <class T>
struct Buffer {
  explicit Buffer(size_t size) : size(size), data(new T[size]) {}

  size_t size;
  std::unique_ptr<T[]> data;
};

template <class T>
Buffer<T> random_bytes(size_t size) {
  Buffer<T> buffer(size);
  auto* bytes = reinterpret_cast<uint8_t*>(buffer.data.get());
  for (size_t i = 0; i < size * sizeof(T); ++i) bytes[i] = uint8_t(generator());
  return buffer;
}

// A product with weights in few bits, and one with BF16, by all paths; exits where their bits differ (weights/fuzz.cpp).
void run_products();

}  // namespace narrowcast
