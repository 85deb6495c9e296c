// From a byte of codes to the two values it stands for: one lookup in shared memory for two weights.
//
// The table has 256 lines of 128 bytes, a line for each byte. A line holds the same entry once for
// every lane (or half warp, if it is of 8 bytes), each in banks of its own, so that lanes that look
// up different bytes never conflict. With a codebook for each row, a line holds an entry a row.
#pragma once

#include <string.h>

#include "cuda/common.h"
#include "cuda/ptx.h"

namespace lowrank_cuda {

constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
constexpr int kLine = 128;
constexpr int kTableBytes = 256 * kLine;

// The two values in one register, rounded to the dtype of x, as tensor cores take them.
template <class T>
struct Pair16 {
  using Entry = uint32_t;
  static constexpr bool kNormalized = true;  // float16 would overflow, or lose small values
  __device__ static uint32_t make(float even, float odd) {
    T raw[2];
    from_float(even, raw);
    from_float(odd, raw + 1);
    uint16_t bits[2];
    memcpy(bits, raw, 4);
    return uint32_t(bits[1]) << 16 | bits[0];
  }
};

struct Pair32 {
  using Entry = float2;
  static constexpr bool kNormalized = false;
  __device__ static float2 make(float even, float odd) { return make_float2(even, odd); }
};

// The codebooks of a thread block's rows, divided by powers of two where `kNormalized`.
template <int ROWS>
struct Codebooks {
  alignas(16) float values[ROWS][16];
  float units[ROWS];  // what they were divided by

  // By all threads. Sixteen lanes share a row; rows beyond N repeat the last. If all rows have one
  // codebook, it is only in the first.
  template <class Pair>
  __device__ void load(const Weight& w, int64_t n0) {
    static_assert(ROWS % 2 == 0, "whole warps");
    const int used = w.codebook_stride ? 16 * ROWS : 32;
#pragma unroll 1
    for (int i = threadIdx.x; i < used; i += kThreads) {
      const int row = i / 16;
      const int64_t n = n0 + row < w.N ? n0 + row : w.N - 1;
      const float value = w.codebook[n * w.codebook_stride + i % 16];
      float unit = 1.0f, inverse = 1.0f;
      if (Pair::kNormalized) {
        uint32_t exponent = largest_of(magnitude_bits(value), 16) >> 23;
        exponent = exponent == 0 || exponent == 255 ? 127 : exponent == 254 ? 253 : exponent;
        unit = __uint_as_float(exponent << 23);
        inverse = __uint_as_float((254 - exponent) << 23);
      }
      values[row][i % 16] = value * inverse;
      units[row] = unit;
    }
  }
};

template <class Pair, int ROWS>
struct Table {
  using Entry = typename Pair::Entry;
  static constexpr int kSlots = kLine / int(sizeof(Entry));  // entries in a line
  static constexpr int kParts = kThreads / kSlots;
  static_assert(kSlots % ROWS == 0, "a line has room for every row");

  alignas(kLine) char bytes[kTableBytes];

  // By all threads: a warp writes whole lines.
  __device__ void make(const Codebooks<ROWS>& books, bool per_row) {
    const int slot = threadIdx.x % kSlots, row = per_row ? slot / (kSlots / ROWS) : 0;
    float odd[16];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float4 four = reinterpret_cast<const float4*>(books.values[row])[i];
      odd[4 * i] = four.x;
      odd[4 * i + 1] = four.y;
      odd[4 * i + 2] = four.z;
      odd[4 * i + 3] = four.w;
    }
    for (int high = threadIdx.x / kSlots; high < 16; high += kParts) {
      const float even = books.values[row][high];
      char* const lines = bytes + high * 16 * kLine + slot * int(sizeof(Entry));
#pragma unroll
      for (int low = 0; low < 16; ++low) {
        *reinterpret_cast<Entry*>(lines + low * kLine) = Pair::make(even, odd[low]);
      }
    }
  }

  // Where the entries are that this lane looks up for a row of the thread block: in line 0.
  __device__ SharedAddress place(int row, bool per_row) const {
    constexpr int copies = kSlots / ROWS;
    const int lane = threadIdx.x % 32;
    const int slot = per_row ? row * copies + lane % copies : lane % kSlots;
    return shared_address(bytes) + SharedAddress(slot * int(sizeof(Entry)));
  }

  // The entry of byte number BYTE of `codes`: a permutation, a multiply-add and the load.
  template <int BYTE>
  __device__ static Entry look_up(uint32_t codes, SharedAddress place) {
    Entry entry;
    load_shared(place + __byte_perm(codes, 0, 0x4440 + BYTE) * kLine, &entry);
    return entry;
  }
};

}  // namespace lowrank_cuda
