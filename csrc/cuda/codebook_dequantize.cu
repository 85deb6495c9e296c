// w[n, k] = codebook[n, code[n, k]] * absmax[n, k / G], double-quantized scales decoded in passing.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "lowrank_cuda.h"

namespace {

// Writing is 80 % of the traffic. Eight values a thread: a warp reads 128 consecutive bytes of
// codes and stores 512 consecutive bytes of a 16-bit dtype, 16 a lane. Four steps hide latency.
constexpr int kValues = 8;
constexpr int kThreads = 128;
constexpr int kSteps = 4;
constexpr int64_t kColumns = int64_t(kValues) * kThreads * kSteps;
constexpr int64_t kMaxGridY = 65535;

struct Weight {
  const uint8_t* packed;
  const void* absmax;
  const float* absmax_scale;
  const float* codebook;
  int64_t codebook_stride;  // 16 if each row has its table, 0 if all share one
  int64_t K, row_bytes, blocks;
  int log2_block;
};

__device__ void store(float v, float& to) { to = v; }
__device__ void store(float v, __half& to) { to = __float2half_rn(v); }
__device__ void store(float v, __nv_bfloat16& to) { to = __float2bfloat16_rn(v); }

// Multiply, then add, each rounded: the format says twice, a fused multiply-add would round once.
__device__ float absmax_of(const Weight& w, int64_t n, int64_t block) {
  const int64_t at = n * w.blocks + block;
  if (!w.absmax_scale) return static_cast<const float*>(w.absmax)[at];
  const float code = static_cast<const uint8_t*>(w.absmax)[at];
  return __fadd_rn(__fmul_rn(code, w.absmax_scale[2 * n]), w.absmax_scale[2 * n + 1]);
}

template <typename T>
__global__ void __launch_bounds__(kThreads) dequantize(const Weight w, T* __restrict__ out) {
  __shared__ float table[16];  // 16 entries, 16 banks: no two codes conflict
  const int64_t n = blockIdx.x;
  if (threadIdx.x < 16) table[threadIdx.x] = w.codebook[n * w.codebook_stride + threadIdx.x];
  __syncthreads();

  T* const row = out + n * w.K;
  for (int64_t tile = blockIdx.y; tile * kColumns < w.K; tile += gridDim.y) {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const int64_t k = tile * kColumns + (int64_t(step) * kThreads + threadIdx.x) * kValues;
      if (k >= w.K) break;
      // Kp is a multiple of 32, so eight codes from a multiple of 8 are always there to be read.
      const uint32_t codes = *reinterpret_cast<const uint32_t*>(w.packed + n * w.row_bytes + k / 2);
      const float absmax = absmax_of(w, n, k >> w.log2_block);
      alignas(16) T values[kValues];
#pragma unroll
      for (int i = 0; i < kValues; ++i) {
        const int shift = 8 * (i / 2) + (i % 2 ? 0 : 4);  // even elements in the high nibbles
        store(__fmul_rn(table[(codes >> shift) & 0xF], absmax), values[i]);
      }
      if (k + kValues <= w.K && reinterpret_cast<uintptr_t>(row + k) % 16 == 0) {
#pragma unroll
        for (int i = 0; i < int(kValues * sizeof(T) / 16); ++i) {
          reinterpret_cast<uint4*>(row + k)[i] = reinterpret_cast<const uint4*>(values)[i];
        }
      } else {
#pragma unroll
        for (int i = 0; i < kValues; ++i) {
          if (k + i < w.K) row[k + i] = values[i];
        }
      }
    }
  }
}

int32_t status_of(cudaError_t error) {
  return error == cudaSuccess ? LOWRANK_OK : LOWRANK_CUDA_ERROR + static_cast<int32_t>(error);
}

template <typename T>
int32_t launch(const Weight& w, int64_t N, void* out, cudaStream_t stream) {
  const int64_t tiles = (w.K + kColumns - 1) / kColumns;
  const int64_t height = tiles < kMaxGridY ? tiles : kMaxGridY;
  const dim3 grid(static_cast<unsigned>(N), static_cast<unsigned>(height));
  dequantize<T><<<grid, kThreads, 0, stream>>>(w, static_cast<T*>(out));
  return status_of(cudaGetLastError());
}

}  // namespace

int32_t lowrank_cuda_abi(void) { return LOWRANK_ABI; }

int32_t lowrank_cuda_ready(void) {
  int devices = 0;
  return status_of(cudaGetDeviceCount(&devices));
}

const char* lowrank_cuda_message(int32_t status) {
  if (status == LOWRANK_OK) return "no error";
  if (status < LOWRANK_CUDA_ERROR) return "an argument was refused";
  return cudaGetErrorString(static_cast<cudaError_t>(status - LOWRANK_CUDA_ERROR));
}

int32_t lowrank_cuda_codebook_dequantize(const uint8_t* packed, const void* absmax,
                                         const float* absmax_scale, const float* codebook,
                                         int64_t codebook_rows, int64_t N, int64_t K,
                                         int64_t block_size, void* out, int32_t dtype,
                                         int32_t device, void* stream) {
  const bool power_of_two = (block_size & (block_size - 1)) == 0;
  if (block_size < 32 || block_size > 4096 || !power_of_two) return LOWRANK_BAD_ARGUMENT;
  if (N < 0 || N > INT32_MAX || K < 0) return LOWRANK_BAD_ARGUMENT;
  if (codebook_rows != 1 && codebook_rows != N) return LOWRANK_BAD_ARGUMENT;
  if (N == 0 || K == 0) return LOWRANK_OK;
  if (!packed || !absmax || !codebook || !out) return LOWRANK_BAD_ARGUMENT;
  if (reinterpret_cast<uintptr_t>(packed) % 4) return LOWRANK_BAD_ARGUMENT;

  int log2_block = 5;
  while ((int64_t(1) << log2_block) < block_size) ++log2_block;
  const Weight w{packed, absmax, absmax_scale, codebook, codebook_rows == 1 ? 0 : 16, K,
                 (K + 31) / 32 * 16, (K + block_size - 1) / block_size, log2_block};
  const cudaError_t error = cudaSetDevice(device);
  if (error != cudaSuccess) return status_of(error);
  const auto s = static_cast<cudaStream_t>(stream);
  switch (dtype) {
    case LOWRANK_F32: return launch<float>(w, N, out, s);
    case LOWRANK_F16: return launch<__half>(w, N, out, s);
    case LOWRANK_BF16: return launch<__nv_bfloat16>(w, N, out, s);
    default: return LOWRANK_BAD_ARGUMENT;
  }
}
