// Packing of codes: planes of 8, 4, 2 or 1 bits, pieces a plane's length apart in one byte (ops.py, docs/formats.md).
#pragma once

#include "vec.h"

namespace narrowcast {
namespace NARROWCAST_PATH {

constexpr size_t packed_plane_nbytes(size_t num_codes, int width) { return (num_codes * width + 7) / 8; }

static inline size_t packed_nbytes(size_t num_codes, int num_bits) {
  size_t nbytes = 0;
  for (int width = 8; width; width /= 2) nbytes += num_bits & width ? packed_plane_nbytes(num_codes, width) : 0;
  return nbytes;
}

// Bits [low, low + width) of every code. `codes` are zero for 64 bytes beyond num_codes.
template <int low, int width>
NARROWCAST_INLINE uint8_t* pack_plane(const uint8_t* codes, size_t num_codes, uint8_t* out) {
  constexpr int kPerByte = 8 / width;
  constexpr uint8_t kMask = uint8_t((1 << width) - 1);
  const size_t nbytes = packed_plane_nbytes(num_codes, width);
  for (size_t first = 0; first < nbytes; first += kVectorBytes) {
    Bytes packed = {};
#pragma GCC unroll 8
    for (int place = 0; place < kPerByte; ++place) {
      const Bytes piece = load_vector<Bytes>(codes + place * nbytes + first) >> low & kMask;
      packed |= piece << place * width;
    }
    if (first + kVectorBytes <= nbytes) store_vector(out + first, packed);
    else store_part(out + first, packed, nbytes - first);
  }
  return out + nbytes;
}

// The first plane writes codes, the others add their bits. May write 64 bytes beyond num_codes.
template <int low, int width>
NARROWCAST_INLINE const uint8_t* unpack_plane(const uint8_t* packed, size_t num_codes, uint8_t* codes) {
  constexpr int kPerByte = 8 / width;
  constexpr uint8_t kMask = uint8_t((1 << width) - 1);
  const size_t nbytes = packed_plane_nbytes(num_codes, width);
  for (int place = 0; place < kPerByte; ++place) {  // ascending: what runs over the end of a place is written again
    for (size_t first = 0; first < nbytes; first += kVectorBytes) {
      const bool whole = first + kVectorBytes <= nbytes;
      const Bytes bytes =
          whole ? load_vector<Bytes>(packed + first) : load_part<Bytes>(packed + first, nbytes - first);
      const Bytes piece = (bytes >> place * width & kMask) << low;
      uint8_t* to = codes + place * nbytes + first;
      store_vector(to, low ? piece | load_vector<Bytes>(to) : piece);
    }
  }
  return packed + nbytes;
}

static inline void pack(const uint8_t* codes, size_t num_codes, int num_bits, uint8_t* out) {
  switch (num_bits) {
    case 1: pack_plane<0, 1>(codes, num_codes, out); return;
    case 2: pack_plane<0, 2>(codes, num_codes, out); return;
    case 3: pack_plane<2, 1>(codes, num_codes, pack_plane<0, 2>(codes, num_codes, out)); return;
    case 4: pack_plane<0, 4>(codes, num_codes, out); return;
    case 5: pack_plane<4, 1>(codes, num_codes, pack_plane<0, 4>(codes, num_codes, out)); return;
    case 6: pack_plane<4, 2>(codes, num_codes, pack_plane<0, 4>(codes, num_codes, out)); return;
    case 7:
      out = pack_plane<4, 2>(codes, num_codes, pack_plane<0, 4>(codes, num_codes, out));
      pack_plane<6, 1>(codes, num_codes, out);
      return;
    default: memcpy(out, codes, num_codes); return;
  }
}

static inline void unpack(const uint8_t* packed, size_t num_codes, int num_bits, uint8_t* codes) {
  switch (num_bits) {
    case 1: unpack_plane<0, 1>(packed, num_codes, codes); return;
    case 2: unpack_plane<0, 2>(packed, num_codes, codes); return;
    case 3: unpack_plane<2, 1>(unpack_plane<0, 2>(packed, num_codes, codes), num_codes, codes); return;
    case 4: unpack_plane<0, 4>(packed, num_codes, codes); return;
    case 5: unpack_plane<4, 1>(unpack_plane<0, 4>(packed, num_codes, codes), num_codes, codes); return;
    case 6: unpack_plane<4, 2>(unpack_plane<0, 4>(packed, num_codes, codes), num_codes, codes); return;
    case 7:
      packed = unpack_plane<4, 2>(unpack_plane<0, 4>(packed, num_codes, codes), num_codes, codes);
      unpack_plane<6, 1>(packed, num_codes, codes);
      return;
    default: memcpy(codes, packed, num_codes); return;
  }
}

}  // namespace NARROWCAST_PATH
}  // namespace narrowcast
