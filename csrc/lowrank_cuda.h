// The C ABI of lowrank's CUDA kernels; the layout of a quantized weight is that of lowrank.h.
//
// Pointers are device pointers, `stream` is a cudaStream_t of `device`, launches are asynchronous.
// A status of LOWRANK_CUDA_ERROR + e is cudaError_t e; the library loads where there is no driver.
#pragma once

#include "lowrank.h"

#define LOWRANK_CUDA_ERROR 1000

#ifdef __cplusplus
extern "C" {
#endif

// The number of this interface, LOWRANK_ABI as it was when the library was built.
LOWRANK_EXPORT int32_t lowrank_cuda_abi(void);

// LOWRANK_OK if there is a driver and at least one device, else why not.
LOWRANK_EXPORT int32_t lowrank_cuda_ready(void);

// What a status means, in words; never null.
LOWRANK_EXPORT const char* lowrank_cuda_message(int32_t status);

// The weight -> out [N, K] of `dtype`, contiguous. `packed` must be 4-byte aligned.
LOWRANK_EXPORT int32_t lowrank_cuda_codebook_dequantize(
    const uint8_t* packed, const void* absmax, const float* absmax_scale, const float* codebook,
    int64_t codebook_rows, int64_t N, int64_t K, int64_t block_size, void* out, int32_t dtype,
    int32_t device, void* stream);

#ifdef __cplusplus
}
#endif
