// The C ABI of lowrank's CUDA kernels; the layout of a quantized weight is that of lowrank.h.
//
// Pointers are device pointers, `stream` is a cudaStream_t of `device`, launches are asynchronous.
// A status of LOWRANK_CUDA_ERROR + e is cudaError_t e; the library loads where there is no driver.
#pragma once

#include "lowrank.h"

#define LOWRANK_CUDA_ERROR 1000

// Rows of x that lowrank_cuda_codebook_linear multiplies at most.
#define LOWRANK_CUDA_MOST_ROWS 16

#ifdef __cplusplus
extern "C" {
#endif

// The number of this interface, LOWRANK_ABI as it was when the library was built.
LOWRANK_EXPORT int32_t lowrank_cuda_abi(void);

// LOWRANK_OK if there is a driver and at least one device, else why not.
LOWRANK_EXPORT int32_t lowrank_cuda_ready(void);

// What a status means, in words; never null.
LOWRANK_EXPORT const char* lowrank_cuda_message(int32_t status);

// weight [N, K] of `dtype`, rows `stride` apart -> packed, 4-byte aligned, and absmax float32. A NaN
// or an infinity in a block shows as a non-finite absmax of that block; its codes mean nothing.
LOWRANK_EXPORT int32_t lowrank_cuda_codebook_quantize(
    const void* weight, int32_t dtype, int64_t N, int64_t K, int64_t stride, const float* codebook,
    int64_t codebook_rows, int64_t block_size, uint8_t* packed, float* absmax, int32_t device,
    void* stream);

// The weight -> out [N, K] of `dtype`, contiguous. `packed` must be 4-byte aligned.
LOWRANK_EXPORT int32_t lowrank_cuda_codebook_dequantize(
    const uint8_t* packed, const void* absmax, const float* absmax_scale, const float* codebook,
    int64_t codebook_rows, int64_t N, int64_t K, int64_t block_size, void* out, int32_t dtype,
    int32_t device, void* stream);

// y [M, N] = x [M, K] w^T + bias for M <= LOWRANK_CUDA_MOST_ROWS; y is contiguous, bias is null or
// [N], both of x's dtype. Rows of x are `stride` elements apart and zeros from K on up to a
// multiple of 64; x and its rows must be 16-byte aligned, `packed` 8-byte aligned. Sums are
// float32, the codebook is rounded to x's dtype. LOWRANK_UNSUPPORTED_ISA: 16-bit x before sm_80.
LOWRANK_EXPORT int32_t lowrank_cuda_codebook_linear(
    const void* x, int32_t dtype, int64_t M, int64_t stride, const uint8_t* packed,
    const void* absmax, const float* absmax_scale, const float* codebook, int64_t codebook_rows,
    int64_t N, int64_t K, int64_t block_size, const void* bias, void* y, int32_t device,
    void* stream);

// lowrank_adamw8bit_step on a device: the pointers in `tensors` and both maps are the device's,
// `tensors` and `coefficients` themselves are read before this returns. One launch for 400 tensors.
LOWRANK_EXPORT int32_t lowrank_cuda_adamw8bit_step(
    const struct lowrank_moments8bit_tensor* tensors, int64_t count, const float* m_map,
    const float* v_map, const struct lowrank_adamw8bit_coefficients* coefficients, int32_t device,
    void* stream);

#ifdef __cplusplus
}
#endif
