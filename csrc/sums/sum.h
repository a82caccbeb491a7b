// A sum of few values in one call: the steps that an algorithm took once, kernels and exchanges, taken again for other
// values in the same places. The algorithm stays what is written in src/narrowcast/collectives.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "kernels/kernels.h"
#include "mesh/mesh.h"

namespace narrowcast {

// The tensors of a call, which a step's addresses may be relative to.
enum class Base : int { none = 0, x = 1, y = 2, residue = 3 };

struct Address {
  Base base;
  uintptr_t offset;
};

struct Values {
  Address address;
  Dtype dtype;
  ptrdiff_t stride;  // values from row to row
};

struct Bytes {
  Address address;
  ptrdiff_t stride;  // bytes from row to row
};

enum class Action { encode, encode_with_residue, exchange, recode, decode_sum };

struct Step {
  Action action;
  const Format* format = nullptr;
  const Format* reduced = nullptr;  // recode
  size_t num_tokens = 0, num_features = 0;
  Values values = {}, residue = {};  // encoded, or what is decoded into
  Bytes payload = {};                // written by encode and recode; of the first rank for decode_sum
  Bytes payloads = {};               // recode: of the first rank
  size_t source = 0, num_ranks = 0;  // encode: whose; decode_sum: the first one
  ptrdiff_t rank_stride = 0;
  std::unique_ptr<Operation> operation;  // exchange
};

class Sum {
 public:
  explicit Sum(Mesh& mesh) : mesh_(mesh) {}

  void add(Step step) { steps_.push_back(std::move(step)); }
  void add_exchange(const std::vector<Buffer>& sends, const std::vector<Buffer>& recvs);

  // Begin anew, with the tensors of this call. Exchange i travels under `tag` + 2 i.
  void begin(const uintptr_t bases[4], int64_t* stats, uint64_t tag);
  // Go on until all steps are done, an exchange fails, or Python should look for signals.
  Outcome proceed(const Kernels& kernels, Clock::duration patience);
  // The exchanges that the engine may still be at, to be kept until they are over.
  std::vector<std::unique_ptr<Operation>> abandon();

 private:
  void run(const Kernels& kernels, const Step& step) const;
  void* at(const Address& address) const { return reinterpret_cast<void*>(bases_[int(address.base)] + address.offset); }
  Rows rows(const Values& values, const Step& step) const {
    return {at(values.address), values.dtype, values.stride, step.num_tokens, step.num_features};
  }
  Payload payload(const Bytes& bytes) const { return {static_cast<uint8_t*>(at(bytes.address)), bytes.stride}; }

  Mesh& mesh_;
  std::vector<Step> steps_;
  size_t next_ = 0;
  bool under_way_ = false;  // the exchange at next_
  uintptr_t bases_[4] = {};
  int64_t* stats_ = nullptr;
  uint64_t tag_ = 0;
  Clock::time_point deadline_;
};

}  // namespace narrowcast
