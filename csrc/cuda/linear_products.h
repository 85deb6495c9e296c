// The two ways to multiply a chunk of 64 columns: tensor cores for 16-bit x, else float32.
//
// A chunk is cut into four parts of 16 columns, and lane 4g + t of a warp has part t of the rows
// g, g + 8, ... of the thread block: 8 bytes of codes each, so four lanes read a 32-byte sector.
// A part lies within one quantization block, and so does a chunk but for blocks of 32.
#pragma once

#include "cuda/linear_table.h"

namespace lowrank_cuda {

constexpr int kChunk = 64;
constexpr int kPart = 16;

struct Input {
  const void* x;   // [M, stride], 16-byte aligned; zeros from K up to a multiple of 64
  int64_t stride;  // a multiple of 16 bytes
  int M;
};

// What a lane has of a chunk: its part of each of its rows, as codes and the scale of these.
template <int ROWS>
struct Part {
  uint2 codes[ROWS];
  float scale[ROWS];
};

// Sixteen rows a tile as the first factor, of TILES tiles, and 8 COLUMNS rows of x as the second.
// The columns of a chunk meet in an order of their own: in step s lane t brings 16t + 4s, ..., + 3.
template <class T, int COLUMNS, int TILES>
struct TensorCores {
  using Pair = Pair16<T>;
  static constexpr int kRows = 16 * TILES;
  static constexpr int kLaneRows = 2 * TILES;
  static constexpr int kMostM = 8 * COLUMNS;
  static constexpr int kResident = TILES == 1 ? 3 : 2;  // thread blocks a multiprocessor
  static constexpr int kAhead = 2;  // chunks
  using Lookup = Table<Pair, kRows>;

  float sums[TILES][COLUMNS][4] = {};
  uint4 b[COLUMNS][2] = {};  // the lane's part of rows g, g + 8; stays 0 where there is no such row
  bool present[COLUMNS];     // that row
  const T* x[COLUMNS];       // it, for the next chunk

  // `k`: of the lane's part of its first chunk.
  __device__ TensorCores(const Input& input, int k) {
#pragma unroll
    for (int column = 0; column < COLUMNS; ++column) {
      const int m = 8 * column + static_cast<int>(threadIdx.x % 32 / 4);
      present[column] = m < input.M;
      x[column] = static_cast<const T*>(input.x) + (present[column] ? m * input.stride : 0) + k;
    }
  }

  __device__ void advance(int columns) {
#pragma unroll
    for (int column = 0; column < COLUMNS; ++column) x[column] += columns;
  }

  // The chunk `ahead` columns after the next. `split`: its halves are blocks of 32, to be scaled
  // apart.
  __device__ void add(const Part<kLaneRows>& part, const SharedAddress (&place)[kLaneRows],
                      int ahead, bool split) {
#pragma unroll
    for (int column = 0; column < COLUMNS; ++column) {
      if (present[column]) {
        b[column][0] = reinterpret_cast<const uint4*>(x[column] + ahead)[0];
        b[column][1] = reinterpret_cast<const uint4*>(x[column] + ahead)[1];
      }
    }
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) {
      uint32_t a[4][4];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint2 codes = part.codes[2 * tile + half];
        const SharedAddress at = place[2 * tile + half];
        a[0][half] = Lookup::template look_up<0>(codes.x, at);
        a[0][half + 2] = Lookup::template look_up<1>(codes.x, at);
        a[1][half] = Lookup::template look_up<2>(codes.x, at);
        a[1][half + 2] = Lookup::template look_up<3>(codes.x, at);
        a[2][half] = Lookup::template look_up<0>(codes.y, at);
        a[2][half + 2] = Lookup::template look_up<1>(codes.y, at);
        a[3][half] = Lookup::template look_up<2>(codes.y, at);
        a[3][half + 2] = Lookup::template look_up<3>(codes.y, at);
      }
      const float upper = part.scale[2 * tile], lower = part.scale[2 * tile + 1];
      if (split) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          multiply<true>(tile, a, half, __shfl_sync(0xFFFFFFFFu, upper, 2 * half, 4),
                         __shfl_sync(0xFFFFFFFFu, lower, 2 * half, 4));
        }
      } else {
        multiply<false>(tile, a, 0, upper, lower);
      }
    }
  }

  // sums += scales * a b, in the product only the columns of `half` of the chunk if SPLIT.
  template <bool SPLIT>
  __device__ void multiply(int tile, const uint32_t (&a)[4][4], int half, float upper,
                           float lower) {
    const bool kept = !SPLIT || int(threadIdx.x % 4) / 2 == half;
#pragma unroll
    for (int column = 0; column < COLUMNS; ++column) {
      const uint4 first = b[column][0], last = b[column][1];
      const uint32_t all[8] = {first.x, first.y, first.z, first.w, last.x, last.y, last.z, last.w};
      float d[4] = {};
#pragma unroll
      for (int step = 0; step < 4; ++step) {
        mma(d, a[step], kept ? all[2 * step] : 0, kept ? all[2 * step + 1] : 0, d, T());
      }
      float(&sum)[4] = sums[tile][column];
      sum[0] = __fmaf_rn(upper, d[0], sum[0]);
      sum[1] = __fmaf_rn(upper, d[1], sum[1]);
      sum[2] = __fmaf_rn(lower, d[2], sum[2]);
      sum[3] = __fmaf_rn(lower, d[3], sum[3]);
    }
  }

  // The warp's sums, to [kMostM, kRows].
  __device__ void store(float* to) {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) {
#pragma unroll
      for (int column = 0; column < COLUMNS; ++column) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int m = 8 * column + 2 * t + i % 2, row = 16 * tile + g + i / 2 * 8;
          to[m * kRows + row] = sums[tile][column][i];
        }
      }
    }
  }
};

// Float32 throughout, for M up to MOST_M: a weight is decoded once for all rows of x.
template <int MOST_M>
struct Float32 {
  using Pair = Pair32;
  static constexpr int kRows = 16;
  static constexpr int kLaneRows = 2;
  static constexpr int kMostM = MOST_M;
  static constexpr int kResident = MOST_M == 1 ? 3 : MOST_M <= 8 ? 2 : 1;
  static constexpr int kAhead = MOST_M <= 2 ? 4 : 2;
  using Lookup = Table<Pair, kRows>;

  float sums[MOST_M][kLaneRows] = {};
  const float* x;  // of row 0, for the next chunk
  int64_t stride;
  int M;

  __device__ Float32(const Input& input, int k)
      : x(static_cast<const float*>(input.x) + k), stride(input.stride), M(input.M) {}

  __device__ void advance(int columns) { x += columns; }

  __device__ void add(const Part<kLaneRows>& part, const SharedAddress (&place)[kLaneRows],
                      int ahead, bool) {
    float2 w[kLaneRows][kPart / 2];
#pragma unroll
    for (int row = 0; row < kLaneRows; ++row) {
      const uint2 codes = part.codes[row];
      w[row][0] = Lookup::template look_up<0>(codes.x, place[row]);
      w[row][1] = Lookup::template look_up<1>(codes.x, place[row]);
      w[row][2] = Lookup::template look_up<2>(codes.x, place[row]);
      w[row][3] = Lookup::template look_up<3>(codes.x, place[row]);
      w[row][4] = Lookup::template look_up<0>(codes.y, place[row]);
      w[row][5] = Lookup::template look_up<1>(codes.y, place[row]);
      w[row][6] = Lookup::template look_up<2>(codes.y, place[row]);
      w[row][7] = Lookup::template look_up<3>(codes.y, place[row]);
    }
    const float* row_of_x = x + ahead;
#pragma unroll
    for (int m = 0; m < MOST_M; ++m, row_of_x += stride) {
      if (m >= M) break;
      float products[kLaneRows] = {};
#pragma unroll
      for (int i = 0; i < kPart / 4; ++i) {
        const float4 v = reinterpret_cast<const float4*>(row_of_x)[i];
#pragma unroll
        for (int row = 0; row < kLaneRows; ++row) {
          float& product = products[row];
          product = __fmaf_rn(v.x, w[row][2 * i].x, product);
          product = __fmaf_rn(v.y, w[row][2 * i].y, product);
          product = __fmaf_rn(v.z, w[row][2 * i + 1].x, product);
          product = __fmaf_rn(v.w, w[row][2 * i + 1].y, product);
        }
      }
#pragma unroll
      for (int row = 0; row < kLaneRows; ++row) {
        sums[m][row] = __fmaf_rn(part.scale[row], products[row], sums[m][row]);
      }
    }
  }

  // The warp's sums, to [kMostM, kRows]: over the four parts, then by the first lane of four.
  __device__ void store(float* to) {
#pragma unroll
    for (int m = 0; m < MOST_M; ++m) {
#pragma unroll
      for (int row = 0; row < kLaneRows; ++row) {
        float sum = sums[m][row];
        sum = __fadd_rn(sum, __shfl_xor_sync(0xFFFFFFFFu, sum, 1));
        sum = __fadd_rn(sum, __shfl_xor_sync(0xFFFFFFFFu, sum, 2));
        if (threadIdx.x % 4 == 0) to[m * kRows + 8 * row + threadIdx.x % 32 / 4] = sum;
      }
    }
  }
};

}  // namespace lowrank_cuda
