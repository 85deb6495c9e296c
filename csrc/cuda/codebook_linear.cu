// y = x W^T + bias for M <= 16 rows of x, straight from packed codes.
//
// A thread block has 16 or 32 rows of W. Its eight warps take chunks of 64 columns in turn, each
// multiplies what it has by its part of x, and their sums are added in shared memory, always in
// the same order. While a warp multiplies, its next codes and scales are on their way.
#include "cuda/linear_products.h"

namespace {

using lowrank_cuda::Codebooks;
using lowrank_cuda::Float32;
using lowrank_cuda::Input;
using lowrank_cuda::kChunk;
using lowrank_cuda::kPart;
using lowrank_cuda::kThreads;
using lowrank_cuda::kWarps;
using lowrank_cuda::Part;
using lowrank_cuda::TensorCores;
using lowrank_cuda::Weight;

constexpr int kSpan = kWarps * kChunk;  // columns that the warps of a thread block take at once
constexpr int64_t kMostK = 1 << 30;     // columns are counted in 32 bits, a few spans beyond K too

// The rows of W that a lane reads from, and how.
template <int ROWS>
struct Reader {
  const uint8_t* codes[ROWS];   // of the lane's part of the next chunk to use
  const uint8_t* scales[ROWS];  // the row's first
  float step[ROWS], offset[ROWS];

  // Row n0 and those after it, each eighth from row `first` of them on.
  __device__ Reader(const Weight& w, int64_t n0, int first, int k) {
    const uint8_t* const packed = w.packed + n0 * w.row_bytes + k / 2;
    const uint32_t row_bytes = static_cast<uint32_t>(w.row_bytes);
    const int64_t scale_bytes = w.blocks * (w.absmax_scale ? 1 : 4);
    const int64_t after = w.N - 1 - n0;
#pragma unroll
    for (int row = 0; row < ROWS; ++row) {
      // Rows beyond N repeat the last: their sums are never stored.
      const uint32_t n = first + 8 * row < after ? first + 8 * row : static_cast<uint32_t>(after);
      codes[row] = packed + uint64_t(n) * row_bytes;
      scales[row] = static_cast<const uint8_t*>(w.absmax) + (n0 + n) * scale_bytes;
      step[row] = w.absmax_scale ? w.absmax_scale[2 * (n0 + n)] : 0.0f;
      offset[row] = w.absmax_scale ? w.absmax_scale[2 * (n0 + n) + 1] : 0.0f;
    }
  }

  // The part from column k on, `ahead` columns after the next one to use. Beyond K the codes stay
  // what they were: they meet zeros of x. Scales come as they are stored: nothing waits for them.
  __device__ void fetch(const Weight& w, int k, int ahead, Part<ROWS>* part) const {
    const int last = static_cast<int>(w.blocks) - 1, found = k >> w.log2_block;
    const uint32_t block = static_cast<uint32_t>(found < last ? found : last);
    const bool inside = k < static_cast<int>(w.K);
    const uint32_t at = block << (w.absmax_scale ? 0 : 2);
#pragma unroll
    for (int row = 0; row < ROWS; ++row) {
      // Evicted first: a weight is read once, x by every thread block.
      if (inside) part->codes[row] = __ldcs(reinterpret_cast<const uint2*>(codes[row] + ahead / 2));
      const uint8_t* const scale = scales[row] + at;
      part->scale[row] = w.absmax_scale ? __uint_as_float(*scale)
                                        : *reinterpret_cast<const float*>(scale);
    }
  }

  // Multiply, then add, each rounded: the format says twice.
  __device__ void decode_scales(const Weight& w, Part<ROWS>* part) const {
    if (!w.absmax_scale) return;
#pragma unroll
    for (int row = 0; row < ROWS; ++row) {
      const float code = static_cast<float>(__float_as_uint(part->scale[row]));
      part->scale[row] = __fadd_rn(__fmul_rn(code, step[row]), offset[row]);
    }
  }

  __device__ void advance(int columns) {
#pragma unroll
    for (int row = 0; row < ROWS; ++row) codes[row] += columns / 2;
  }
};

template <class T, class Products>
__global__ void __launch_bounds__(kThreads, Products::kResident)
    linear(const Weight w, const Input input, const T* __restrict__ bias, T* __restrict__ y) {
  using Lookup = typename Products::Lookup;
  constexpr int kRows = Products::kRows, kLaneRows = Products::kLaneRows;
  constexpr int kAhead = Products::kAhead;
  __shared__ Lookup table;
  __shared__ Codebooks<kRows> books;
  static_assert(sizeof(float) * kWarps * Products::kMostM * kRows <= sizeof table, "room for sums");

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, part = lane % 4 * kPart;
  const int64_t n0 = int64_t(blockIdx.x) * kRows;
  const int first = warp * kChunk + part, K = static_cast<int>(w.K);
  Reader<kLaneRows> reader(w, n0, lane / 4, first);
  Part<kLaneRows> parts[kAhead] = {};
#pragma unroll
  for (int i = 0; i < kAhead; ++i) reader.fetch(w, first + i * kSpan, i * kSpan, parts + i);

  const bool per_row = w.codebook_stride != 0;
  books.template load<typename Products::Pair>(w, n0);
  __syncthreads();
  table.make(books, per_row);
  lowrank_cuda::SharedAddress place[kLaneRows];
#pragma unroll
  for (int row = 0; row < kLaneRows; ++row) place[row] = table.place(lane / 4 + 8 * row, per_row);
  __syncthreads();

  Products products(input, first);
  const bool split = w.log2_block == 5;
  for (int start = first; start - part < K; start += kAhead * kSpan) {
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int k = start + i * kSpan;
      if (k - part >= K) break;
      reader.decode_scales(w, parts + i);
      products.add(parts[i], place, i * kSpan, split);
      reader.fetch(w, k + kAhead * kSpan, (kAhead + i) * kSpan, parts + i);
    }
    reader.advance(kAhead * kSpan);
    products.advance(kAhead * kSpan);
  }

  __syncthreads();  // the table has served
  float* const sums = reinterpret_cast<float*>(table.bytes);  // [kWarps, kMostM, kRows]
  products.store(sums + warp * Products::kMostM * kRows);
  __syncthreads();
  for (int i = threadIdx.x; i < input.M * kRows; i += kThreads) {
    const int64_t n = n0 + i % kRows;
    if (n >= w.N) continue;
    float sum = 0;
#pragma unroll
    for (int from = 0; from < kWarps; ++from) sum += sums[from * Products::kMostM * kRows + i];
    sum = __fmul_rn(sum, books.units[per_row ? i % kRows : 0]);
    if (bias) sum = __fadd_rn(sum, lowrank_cuda::to_float(bias[n]));
    lowrank_cuda::from_float(sum, y + i / kRows * w.N + n);
  }
}

struct Call {
  const Weight& w;
  const Input& input;
  const void* bias;
  void* y;
  int32_t device;
  void* stream;

  template <class T, class Products>
  int32_t run() const {
    const int64_t blocks = (w.N + Products::kRows - 1) / Products::kRows;
    return lowrank_cuda::launch(linear<T, Products>, dim3(static_cast<unsigned>(blocks)), kThreads,
                                device, stream, w, input, static_cast<const T*>(bias),
                                static_cast<T*>(y));
  }

  // More rows of W a thread block read x less often and build fewer tables: where x is large, or
  // where there are thread blocks enough all the same, two for each multiprocessor.
  template <class T>
  int32_t on_tensor_cores() const {
    int major = 0, processors = 0;
    cudaError_t error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    if (error == cudaSuccess) {
      error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
    }
    if (error != cudaSuccess) return lowrank_cuda::status_of(error);
    if (major < 8) return LOWRANK_UNSUPPORTED_ISA;
    if (input.M > 8) return run<T, TensorCores<T, 2, 2>>();
    if (input.M > 4 || w.N >= int64_t(processors) * 2 * 32) return run<T, TensorCores<T, 1, 2>>();
    return run<T, TensorCores<T, 1, 1>>();
  }

  int32_t in_float32() const {
    if (input.M <= 1) return run<float, Float32<1>>();
    if (input.M <= 2) return run<float, Float32<2>>();
    if (input.M <= 4) return run<float, Float32<4>>();
    if (input.M <= 8) return run<float, Float32<8>>();
    return run<float, Float32<16>>();
  }
};

}  // namespace

int32_t lowrank_cuda_codebook_linear(const void* x, int32_t dtype, int64_t M, int64_t stride,
                                     const uint8_t* packed, const void* absmax,
                                     const float* absmax_scale, const float* codebook,
                                     int64_t codebook_rows, int64_t N, int64_t K,
                                     int64_t block_size, const void* bias, void* y, int32_t device,
                                     void* stream) {
  Weight w;
  if (!lowrank_cuda::make_weight(packed, absmax, absmax_scale, codebook, codebook_rows, N, K,
                                 block_size, &w)) {
    return LOWRANK_BAD_ARGUMENT;
  }
  if (dtype < LOWRANK_F32 || dtype > LOWRANK_BF16) return LOWRANK_BAD_ARGUMENT;
  if (M < 0 || M > LOWRANK_CUDA_MOST_ROWS || K < 1) return LOWRANK_BAD_ARGUMENT;
  if (M == 0 || N == 0) return LOWRANK_OK;
  if (!x || !packed || !absmax || !codebook || !y) return LOWRANK_BAD_ARGUMENT;
  const int64_t size = dtype == LOWRANK_F32 ? 4 : 2;
  if (K > kMostK || stride < (K + kChunk - 1) / kChunk * kChunk || stride * size % 16) return LOWRANK_BAD_ARGUMENT;
  if (!lowrank_cuda::aligned(x, 16) || !lowrank_cuda::aligned(packed, 8)) {
    return LOWRANK_BAD_ARGUMENT;
  }
  const Input input{x, stride, static_cast<int>(M)};
  const Call call{w, input, bias, y, device, stream};
  if (dtype == LOWRANK_F16) return call.on_tensor_cores<__half>();
  if (dtype == LOWRANK_BF16) return call.on_tensor_cores<__nv_bfloat16>();
  return call.in_float32();
}
