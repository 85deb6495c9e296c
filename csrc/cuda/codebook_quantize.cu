// Nearest codes of weight [N, K], each block of G along a row scaled by its largest magnitude.
//
// A lane takes eight consecutive values, so G / 8 lanes share a block of up to 256; a warp takes a
// longer block in steps of 256 and reads it twice, the second time from the first-level cache.
#include "cuda/common.h"

namespace {

using lowrank_cuda::kOctet;
using lowrank_cuda::Weight;

constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
constexpr int kStep = 32 * kOctet;  // values that a warp reads at once
constexpr int64_t kMaxGridY = 65535;

// A sorted codebook's midpoints and the codes in its order.
struct Levels {
  float midpoints[16];  // the last is not used
  int order[16];

  // By the first 16 threads of a block, each placing its entry: equal entries keep their order.
  __device__ void make(const float* codebook, int i) {
    const float mine = codebook[i];
    int rank = 0;
    for (int j = 0; j < 16; ++j) {
      rank += codebook[j] < mine || (codebook[j] == mine && j < i) ? 1 : 0;
    }
    order[rank] = i;
  }
  __device__ void halve(const float* codebook, int i) {
    const float sum = __fadd_rn(codebook[order[i]], codebook[order[i + 1]]);
    midpoints[i] = __fmul_rn(sum, 0.5f);
  }
  // The number of midpoints below s, hence a tie goes to the lower entry: four comparisons.
  __device__ uint32_t code(float s) const {
    int rank = s > midpoints[7] ? 8 : 0;
    rank += s > midpoints[rank + 3] ? 4 : 0;
    rank += s > midpoints[rank + 1] ? 2 : 0;
    rank += s > midpoints[rank] ? 1 : 0;
    return static_cast<uint32_t>(order[rank]);
  }
};

// Eight codes of the values from k on; what is beyond K becomes 0.
__device__ uint32_t encode(const Levels& levels, float (&v)[kOctet], int64_t count, float divisor,
                           bool full) {
  // bitsandbytes divides in a partial block and multiplies by the reciprocal in a full one.
  if (full) {
    const float inverse = __frcp_rn(divisor);
#pragma unroll
    for (int i = 0; i < kOctet; ++i) v[i] = __fmul_rn(v[i], inverse);
  } else {
#pragma unroll
    for (int i = 0; i < kOctet; ++i) v[i] = __fdiv_rn(v[i], divisor);
  }
  uint32_t codes = 0;
#pragma unroll
  for (int i = 0; i < kOctet; ++i) {
    const uint32_t code = levels.code(fminf(fmaxf(v[i], -1.0f), 1.0f));
    const int shift = 8 * (i / 2) + (i % 2 ? 0 : 4);  // even elements in the high nibbles
    codes |= i < count ? code << shift : 0;
  }
  return codes;
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    quantize(const Weight w, const T* __restrict__ weight, int64_t stride, bool aligned,
             uint8_t* __restrict__ packed, float* __restrict__ absmax) {
  __shared__ Levels levels;
  const int64_t n = blockIdx.x;
  const float* codebook = w.codebook + n * w.codebook_stride;
  if (threadIdx.x < 16) levels.make(codebook, threadIdx.x);
  __syncthreads();
  if (threadIdx.x < 15) levels.halve(codebook, threadIdx.x);
  __syncthreads();

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t G = int64_t(1) << w.log2_block, span = G < kStep ? kStep : G;
  const int lanes = G < kStep ? int(G) / kOctet : 32;  // that share a block
  const T* const row = weight + n * stride;
  for (int64_t at = (int64_t(blockIdx.y) * kWarps + warp) * span; at < w.K;
       at += int64_t(gridDim.y) * kWarps * span) {
    const int64_t first = at + lane * kOctet;
    float v[kOctet];
    uint32_t largest = 0;
    for (int64_t k = first; k < first + span; k += kStep) {
      lowrank_cuda::load_octet(row + k, w.K - k, aligned && k + kOctet <= w.K, v);
#pragma unroll
      for (int i = 0; i < kOctet; ++i) {
        const uint32_t bits = lowrank_cuda::magnitude_bits(v[i]);
        largest = bits > largest ? bits : largest;
      }
    }
    largest = lowrank_cuda::largest_of(largest, lanes);
    const float scale = __uint_as_float(largest);
    const int64_t block = first >> w.log2_block;
    if (lane % lanes == 0 && first < w.K) absmax[n * w.blocks + block] = scale;

    const bool full = (block + 1) * G <= w.K;
    const float divisor = scale < 1e-38f ? 1e-38f : scale;
    for (int64_t k = first; k < first + span && k / 2 < w.row_bytes; k += kStep) {
      if (span > kStep) {
        lowrank_cuda::load_octet(row + k, w.K - k, aligned && k + kOctet <= w.K, v);
      }
      *reinterpret_cast<uint32_t*>(packed + n * w.row_bytes + k / 2) =
          encode(levels, v, w.K - k, divisor, full);
    }
  }
}

template <class T>
int32_t run(const Weight& w, const void* weight, int64_t stride, uint8_t* packed, float* absmax,
            int32_t device, void* stream) {
  const int64_t G = int64_t(1) << w.log2_block, columns = kWarps * (G < kStep ? kStep : G);
  const int64_t tiles = (w.K + columns - 1) / columns;
  const int64_t height = tiles < kMaxGridY ? tiles : kMaxGridY;
  const dim3 grid(static_cast<unsigned>(w.N), static_cast<unsigned>(height));
  const bool aligned =
      lowrank_cuda::aligned(weight, 16) && stride * int64_t(sizeof(T)) % 16 == 0;
  return lowrank_cuda::launch(quantize<T>, grid, kThreads, device, stream, w,
                              static_cast<const T*>(weight), stride, aligned, packed, absmax);
}

}  // namespace

int32_t lowrank_cuda_codebook_quantize(const void* weight, int32_t dtype, int64_t N, int64_t K,
                                       int64_t stride, const float* codebook,
                                       int64_t codebook_rows, int64_t block_size, uint8_t* packed,
                                       float* absmax, int32_t device, void* stream) {
  Weight w;
  if (!lowrank_cuda::make_weight(nullptr, nullptr, nullptr, codebook, codebook_rows, N, K,
                                 block_size, &w)) {
    return LOWRANK_BAD_ARGUMENT;
  }
  if (N == 0 || K == 0) return LOWRANK_OK;
  if (!weight || !codebook || !packed || !absmax) return LOWRANK_BAD_ARGUMENT;
  if (stride < (N > 1 ? K : 0) || !lowrank_cuda::aligned(packed, 4)) return LOWRANK_BAD_ARGUMENT;
  switch (dtype) {
    case LOWRANK_F32: return run<float>(w, weight, stride, packed, absmax, device, stream);
    case LOWRANK_F16: return run<__half>(w, weight, stride, packed, absmax, device, stream);
    case LOWRANK_BF16:
      return run<__nv_bfloat16>(w, weight, stride, packed, absmax, device, stream);
    default: return LOWRANK_BAD_ARGUMENT;
  }
}
