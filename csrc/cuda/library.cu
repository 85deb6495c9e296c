// The library's number, whether it can run here, and its statuses in words.
#include "cuda/common.h"

int32_t lowrank_cuda_abi(void) { return LOWRANK_ABI; }

int32_t lowrank_cuda_ready(void) {
  int devices = 0;
  return lowrank_cuda::status_of(cudaGetDeviceCount(&devices));
}

const char* lowrank_cuda_message(int32_t status) {
  if (status == LOWRANK_OK) return "no error";
  if (status == LOWRANK_UNSUPPORTED_ISA) return "this device lacks the instructions";
  if (status < LOWRANK_CUDA_ERROR) return "an argument was refused";
  return cudaGetErrorString(static_cast<cudaError_t>(status - LOWRANK_CUDA_ERROR));
}
