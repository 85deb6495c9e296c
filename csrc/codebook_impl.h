// Quantize, dequantize and multiply, once for every instruction set: a vector_*.h comes before it.
//
// All three walk a row block by block, 32 weights (16 packed bytes) at a time. A row's packed bytes
// are padded to 32 weights; what is decoded from the padding is cut off or meets zeros of x.
#pragma once

#include <stdlib.h>

#include "kernels.h"

namespace {

using lowrank::CodebookWeight;
using lowrank::Rectangle;

constexpr int CHUNK = 32;
constexpr int VECTORS = CHUNK / W;
constexpr int MAX_BLOCK = 4096;
constexpr int64_t WORTH_THREADS = 1 << 15;  // weights; below it, waking threads costs more
constexpr int64_t WORTH_STREAMING = 1 << 24;  // bytes; above it, no cache keeps them for the reader

inline int64_t padded(int64_t K) { return (K + CHUNK - 1) / CHUNK * CHUNK; }
inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

inline const float* codebook_of(const CodebookWeight& w, int64_t n) {
  return w.codebook + (w.codebook_rows == 1 ? 0 : 16 * n);
}

// Rows are read once and in order; the hardware's prefetcher stops at each page, this does not.
constexpr int64_t AHEAD = 4096;
inline void prefetch(const void* at, int64_t bytes) {
  __builtin_prefetch(static_cast<const char*>(at) + bytes, 0, 2);
}

inline int64_t block_of(const CodebookWeight& w, int64_t k) {
  return k >> __builtin_ctzll(uint64_t(w.block_size));
}
inline int64_t blocks_of(const CodebookWeight& w) { return block_of(w, w.K + w.block_size - 1); }

// The scales of one row, asked for in ascending order: floats, or 8-bit codes decoded W at a time.
struct RowScales {
  const float* values;
  const uint8_t* codes = nullptr;
  float step = 0, offset = 0;
  int64_t blocks, decoded = -W;  // `room` holds the scales of the blocks from `decoded` on
  float room[W];

  RowScales(const CodebookWeight& w, int64_t n) : blocks(blocks_of(w)) {
    values = static_cast<const float*>(w.absmax) + n * blocks;
    if (w.absmax_scale) {
      codes = static_cast<const uint8_t*>(w.absmax) + n * blocks;
      step = w.absmax_scale[2 * n];
      offset = w.absmax_scale[2 * n + 1];
    }
  }
  float operator[](int64_t b) {
    if (!codes) return values[b];
    if (b - decoded >= W) decode(b);
    return room[b - decoded];
  }
  // Those of blocks b, ..., b + count - 1 at once.
  void range(int64_t b, int64_t count, float* out) const {
    if (codes) {
      for (int64_t i = 0; i < count; ++i) out[i] = float(codes[b + i]) * step + offset;
    } else {
      memcpy(out, values + b, size_t(count) * sizeof(float));
    }
  }
  // Two roundings, as stored: the compiler must not contract this (-ffp-contract=off).
  void decode(int64_t b) {
    decoded = b;
    if (b + W <= blocks) {
      for (int i = 0; i < W; ++i) room[i] = float(codes[b + i]) * step + offset;
    } else {
      for (int i = 0; b + i < blocks; ++i) room[i] = float(codes[b + i]) * step + offset;
    }
  }
};

inline void decode32(const uint8_t* packed, const BlockTable& table, float* out) {
  Vec v[VECTORS];
  decode32(packed, table, v);
  for (int i = 0; i < VECTORS; ++i) store(out + i * W, v[i]);
}

template <class T>
struct TableFor {
  BlockTable16 table;
  TableFor(const Table& t, float absmax) : table(t, absmax, static_cast<T*>(nullptr)) {}
};
template <>
struct TableFor<float> {
  BlockTable table;
  TableFor(const Table& t, float absmax) : table(t, absmax) {}
};

// Columns k0 <= k < k1 of row n, k0 a multiple of 32; STREAM: `out` is aligned to 64 bytes.
template <bool STREAM, class T>
void dequantize_row(const CodebookWeight& w, int64_t n, int64_t k0, int64_t k1, const Table& table,
                    T* out) {
  const uint8_t* packed = w.packed + n * (padded(w.K) / 2);
  RowScales scales(w, n);
  for (int64_t k = k0, b = block_of(w, k0); k < k1; ++b) {
    const TableFor<T> block(table, scales[b]);
    const int64_t end = smaller((b + 1) * w.block_size, k1);
    for (; k + CHUNK <= end; k += CHUNK) {
      prefetch(packed + k / 2, AHEAD);
      if (STREAM) {
        alignas(64) T room[CHUNK];
        decode32(packed + k / 2, block.table, room);
        stream(out + k - k0, room, sizeof(room));
      } else {
        decode32(packed + k / 2, block.table, out + k - k0);
      }
    }
    if (k < end) {
      T rest[CHUNK];
      decode32(packed + k / 2, block.table, rest);
      memcpy(out + k - k0, rest, size_t(end - k) * sizeof(T));
      k = end;
    }
  }
}

template <class T>
void dequantize_to(const CodebookWeight& w, const Rectangle& r, T* out, int32_t threads) {
  const int64_t width = r.k1 - r.k0, bytes = (r.n1 - r.n0) * width * int64_t(sizeof(T));
  const bool aligned = (reinterpret_cast<uintptr_t>(out) | uintptr_t(width) * sizeof(T)) % 64 == 0;
  const bool past_caches = aligned && bytes >= WORTH_STREAMING;
#pragma omp parallel num_threads(threads) if ((r.n1 - r.n0) * width > WORTH_THREADS)
  {
    const Table shared(w.codebook);
#pragma omp for schedule(static)
    for (int64_t n = r.n0; n < r.n1; ++n) {
      const Table table = w.codebook_rows == 1 ? shared : Table(codebook_of(w, n));
      T* row = out + (n - r.n0) * width;
      if (past_caches) {
        dequantize_row<true>(w, n, r.k0, r.k1, table, row);
      } else {
        dequantize_row<false>(w, n, r.k0, r.k1, table, row);
      }
    }
    if (past_caches) finish_streams();
  }
}

void dequantize(const CodebookWeight& w, const Rectangle& r, void* out, int32_t dtype,
                int32_t threads) {
  if (dtype == LOWRANK_F32) dequantize_to(w, r, static_cast<float*>(out), threads);
  if (dtype == LOWRANK_F16) dequantize_to(w, r, static_cast<Half*>(out), threads);
  if (dtype == LOWRANK_BF16) dequantize_to(w, r, static_cast<Bfloat16*>(out), threads);
}

// `from` [length] -> floats, with zeros up to a multiple of 32.
template <class T>
void widen(const T* from, int64_t length, float* to) {
  int64_t i = 0;
  for (; i + W <= length; i += W) store(to + i, load(from + i));
  for (; i < length; ++i) to[i] = to_float(from[i]);
  for (; i < padded(length); ++i) to[i] = 0;
}

inline const float* widened_block(const float* from, int64_t length, float* room) {
  if (length % CHUNK == 0) return from;
  widen(from, length, room);
  return room;
}
template <class T>
const float* widened_block(const T* from, int64_t length, float* room) {
  widen(from, length, room);
  return room;
}

// One block [length <= G] of a row -> codes; returns its absmax.
template <class T>
float quantize_block(const T* from, int64_t length, bool full, const Encoder& encoder,
                     uint8_t* packed) {
  alignas(64) float room[MAX_BLOCK];
  const float* values = widened_block(from, length, room);
  AbsMax largest;
  for (int64_t i = 0; i < length; i += W) {
    prefetch(from + i, AHEAD);
    largest.take(load(values + i));
  }
  const float absmax = largest.get();
  const float divisor = absmax < 1e-38f ? 1e-38f : absmax;
  const Vec inverse = set1(1.0f / divisor), one = set1(1.0f), minus_one = set1(-1.0f);
  for (int64_t i = 0; i < length; i += CHUNK) {
    Vec s[VECTORS];
    for (int j = 0; j < VECTORS; ++j) {
      const Vec v = load(values + i + j * W);
      // bitsandbytes divides in a partial block and multiplies by the reciprocal in a full one.
      s[j] = max(min(full ? mul(v, inverse) : div(v, set1(divisor)), one), minus_one);
    }
    encoder.encode32(s, packed + i / 2);
  }
  for (int64_t i = length; i < padded(length); ++i) packed[i / 2] &= i % 2 ? 0xF0 : 0x0F;
  return absmax;
}

template <class T>
void quantize_rows(const T* weight, int64_t stride, const CodebookWeight& shape, uint8_t* packed,
                   float* absmax, int32_t threads) {
  const int64_t N = shape.N, K = shape.K, G = shape.block_size, blocks = blocks_of(shape);
#pragma omp parallel num_threads(threads) if (N * K > WORTH_THREADS)
  {
    const Levels shared(shape.codebook);
#pragma omp for schedule(static)
    for (int64_t n = 0; n < N; ++n) {
      const Levels levels = shape.codebook_rows == 1 ? shared : Levels(codebook_of(shape, n));
      const Encoder encoder(levels);
      for (int64_t b = 0; b < blocks; ++b) {
        const int64_t length = smaller(G, K - b * G);
        absmax[n * blocks + b] = quantize_block(weight + n * stride + b * G, length, length == G,
                                                encoder, packed + (n * padded(K) + b * G) / 2);
      }
    }
  }
}

void quantize(const void* weight, int32_t dtype, int64_t stride, const CodebookWeight& shape,
              uint8_t* packed, float* absmax, int32_t threads) {
  if (dtype == LOWRANK_F32)
    quantize_rows(static_cast<const float*>(weight), stride, shape, packed, absmax, threads);
  if (dtype == LOWRANK_F16)
    quantize_rows(static_cast<const Half*>(weight), stride, shape, packed, absmax, threads);
  if (dtype == LOWRANK_BF16)
    quantize_rows(static_cast<const Bfloat16*>(weight), stride, shape, packed, absmax, threads);
}

}  // namespace
