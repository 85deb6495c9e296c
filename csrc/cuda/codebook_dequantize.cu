// w[n, k] = codebook[n, code[n, k]] * absmax[n, k / G], double-quantized scales decoded in passing.
#include "cuda/common.h"

namespace {

using lowrank_cuda::kOctet;
using lowrank_cuda::Weight;

// Writing is 80 % of the traffic. Eight values a thread: a warp reads 128 consecutive bytes of
// codes and stores 512 consecutive bytes of a 16-bit dtype, 16 a lane. Four steps hide latency.
constexpr int kThreads = 128;
constexpr int kSteps = 4;
constexpr int64_t kColumns = int64_t(kOctet) * kThreads * kSteps;
constexpr int64_t kMaxGridY = 65535;

// Multiply, then add, each rounded: the format says twice, a fused multiply-add would round once.
__device__ float absmax_of(const Weight& w, int64_t n, int64_t block) {
  const int64_t at = n * w.blocks + block;
  if (!w.absmax_scale) return static_cast<const float*>(w.absmax)[at];
  const float code = static_cast<const uint8_t*>(w.absmax)[at];
  return __fadd_rn(__fmul_rn(code, w.absmax_scale[2 * n]), w.absmax_scale[2 * n + 1]);
}

template <class T>
__global__ void __launch_bounds__(kThreads) dequantize(const Weight w, T* __restrict__ out) {
  __shared__ float table[16];  // 16 entries, 16 banks: no two codes conflict
  const int64_t n = blockIdx.x;
  if (threadIdx.x < 16) table[threadIdx.x] = w.codebook[n * w.codebook_stride + threadIdx.x];
  __syncthreads();

  T* const row = out + n * w.K;
  for (int64_t tile = blockIdx.y; tile * kColumns < w.K; tile += gridDim.y) {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const int64_t k = tile * kColumns + (int64_t(step) * kThreads + threadIdx.x) * kOctet;
      if (k >= w.K) break;
      // Kp is a multiple of 32, so eight codes from a multiple of 8 are always there to be read.
      const uint32_t codes = *reinterpret_cast<const uint32_t*>(w.packed + n * w.row_bytes + k / 2);
      const float absmax = absmax_of(w, n, k >> w.log2_block);
      float values[kOctet];
#pragma unroll
      for (int i = 0; i < kOctet; ++i) {
        const int shift = 8 * (i / 2) + (i % 2 ? 0 : 4);  // even elements in the high nibbles
        values[i] = __fmul_rn(table[(codes >> shift) & 0xF], absmax);
      }
      const bool whole = k + kOctet <= w.K && reinterpret_cast<uintptr_t>(row + k) % 16 == 0;
      lowrank_cuda::store_octet(row + k, w.K - k, whole, values);
    }
  }
}

template <class T>
int32_t run(const Weight& w, void* out, int32_t device, void* stream) {
  const int64_t tiles = (w.K + kColumns - 1) / kColumns;
  const int64_t height = tiles < kMaxGridY ? tiles : kMaxGridY;
  const dim3 grid(static_cast<unsigned>(w.N), static_cast<unsigned>(height));
  return lowrank_cuda::launch(dequantize<T>, grid, kThreads, device, stream, w,
                              static_cast<T*>(out));
}

}  // namespace

int32_t lowrank_cuda_codebook_dequantize(const uint8_t* packed, const void* absmax,
                                         const float* absmax_scale, const float* codebook,
                                         int64_t codebook_rows, int64_t N, int64_t K,
                                         int64_t block_size, void* out, int32_t dtype,
                                         int32_t device, void* stream) {
  Weight w;
  if (!lowrank_cuda::make_weight(packed, absmax, absmax_scale, codebook, codebook_rows, N, K,
                                 block_size, &w)) {
    return LOWRANK_BAD_ARGUMENT;
  }
  if (N == 0 || K == 0) return LOWRANK_OK;
  if (!packed || !absmax || !codebook || !out) return LOWRANK_BAD_ARGUMENT;
  if (!lowrank_cuda::aligned(packed, 4)) return LOWRANK_BAD_ARGUMENT;
  switch (dtype) {
    case LOWRANK_F32: return run<float>(w, out, device, stream);
    case LOWRANK_F16: return run<__half>(w, out, device, stream);
    case LOWRANK_BF16: return run<__nv_bfloat16>(w, out, device, stream);
    default: return LOWRANK_BAD_ARGUMENT;
  }
}
