// One call of lowrank.h from the command line, to run the library of another processor in an
// emulator: `driver FUNCTION ISA NUMBERS...`, inputs one after another on stdin, results on stdout.
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <vector>

#include "lowrank.h"

namespace {

template <class T>
struct Buffer {
  std::vector<T> items;
  explicit Buffer(int64_t count) : items(size_t(count)) {}
  T* at() { return items.empty() ? nullptr : items.data(); }
  Buffer& read() {
    if (fread(items.data(), sizeof(T), items.size(), stdin) != items.size()) exit(10);
    return *this;
  }
  void write() {
    if (fwrite(items.data(), sizeof(T), items.size(), stdout) != items.size()) exit(11);
  }
};
using Bytes = Buffer<uint8_t>;
using Floats = Buffer<float>;

int64_t size_of(int64_t dtype) { return dtype == LOWRANK_F32 ? 4 : 2; }
int64_t packed_size(int64_t N, int64_t K) { return N * ((K + 31) / 32 * 16); }

// packed, absmax, absmax_scale and codebook of N, K, codebook rows, block size, double_quant.
struct Weight {
  int64_t N, K, T, G, blocks;
  Bytes packed, absmax;
  Floats scale, codebook;
  explicit Weight(const int64_t* n)
      : N(n[0]), K(n[1]), T(n[2]), G(n[3]), blocks((K + G - 1) / G), packed(packed_size(N, K)),
        absmax(N * blocks * (n[4] ? 1 : 4)), scale(n[4] ? 2 * N : 0), codebook(16 * T) {
    packed.read();
    absmax.read();
    scale.read();
    codebook.read();
  }
};

int32_t quantize(const int64_t* n) {  // dtype, N, K, T, G
  Bytes weight(n[1] * n[2] * size_of(n[0]));
  Floats codebook(16 * n[3]), absmax(n[1] * ((n[2] + n[4] - 1) / n[4]));
  Bytes packed(packed_size(n[1], n[2]));
  weight.read();
  codebook.read();
  const int32_t status =
      lowrank_codebook_quantize(weight.at(), int32_t(n[0]), n[1], n[2], n[2], codebook.at(), n[3],
                                n[4], packed.at(), absmax.at(), 1);
  packed.write();
  absmax.write();
  return status;
}

int32_t dequantize(const int64_t* n) {  // dtype, weight
  Weight w(n + 1);
  Bytes out(w.N * w.K * size_of(n[0]));
  const int32_t status = lowrank_codebook_dequantize(
      w.packed.at(), w.absmax.at(), w.scale.at(), w.codebook.at(), w.T, w.N, w.K, w.G, 0, w.N,
      out.at(), int32_t(n[0]), 1);
  out.write();
  return status;
}

int32_t linear(const int64_t* n, bool int16) {  // dtype, M, weight
  Weight w(n + 2);
  Bytes x(n[1] * w.K * size_of(n[0])), y(n[1] * w.N * size_of(n[0]));
  x.read();
  const int32_t status = (int16 ? lowrank_codebook_linear_int16 : lowrank_codebook_linear)(
      x.at(), int32_t(n[0]), n[1], w.packed.at(), w.absmax.at(), w.scale.at(), w.codebook.at(),
      w.T, w.N, w.K, w.G, nullptr, y.at(), 1);
  y.write();
  return status;
}

int32_t softmax(const int64_t* n) {  // T, V
  Floats logits(n[0] * n[1]), loss(n[0]);
  Buffer<int64_t> labels(n[0]);
  logits.read();
  labels.read();
  const int32_t status =
      lowrank_softmax_cross_entropy(logits.at(), labels.at(), n[0], n[1], loss.at(), 1, 1);
  loss.write();
  logits.write();
  return status;
}

int32_t adamw8bit(const int64_t* n) {  // dtype, rows, cols
  const int64_t count = n[1] * n[2], scales = n[1] * ((n[2] + 255) / 256);
  Bytes p(count * size_of(n[0])), g(count * size_of(n[0])), m(count), v(count);
  Floats m_scale(scales), v_scale(scales), m_map(256), v_map(256), numbers(8);
  for (Bytes* bytes : {&p, &g, &m, &v}) bytes->read();
  for (Floats* floats : {&m_scale, &v_scale, &m_map, &v_map, &numbers}) floats->read();
  lowrank_adamw8bit_coefficients by;
  memcpy(&by, numbers.at(), sizeof by);
  const lowrank_moments8bit_tensor tensor{p.at(),       g.at(),       m.at(), v.at(),
                                          m_scale.at(), v_scale.at(), n[1],   n[2],
                                          int32_t(n[0])};
  const int32_t status = lowrank_adamw8bit_step(&tensor, 1, m_map.at(), v_map.at(), &by, 1);
  for (Bytes* bytes : {&p, &m, &v}) bytes->write();
  for (Floats* floats : {&m_scale, &v_scale}) floats->write();
  return status;
}

int32_t lion8bit(const int64_t* n) {  // dtype, rows, cols
  const int64_t count = n[1] * n[2], scales = n[1] * ((n[2] + 255) / 256);
  Bytes p(count * size_of(n[0])), g(count * size_of(n[0])), m(count);
  Floats m_scale(scales), m_map(256), numbers(6);
  for (Bytes* bytes : {&p, &g, &m}) bytes->read();
  for (Floats* floats : {&m_scale, &m_map, &numbers}) floats->read();
  lowrank_lion8bit_coefficients by;
  memcpy(&by, numbers.at(), sizeof by);
  const lowrank_moments8bit_tensor tensor{p.at(),       g.at(),  m.at(), nullptr,
                                          m_scale.at(), nullptr, n[1],   n[2],
                                          int32_t(n[0])};
  const int32_t status = lowrank_lion8bit_step(&tensor, 1, m_map.at(), &by, 1);
  for (Bytes* bytes : {&p, &m}) bytes->write();
  m_scale.write();
  return status;
}

// dtype, M, K, count, seed, threshold; then x (into which the rows go back), order, 1 / (1 - p).
int32_t rows(const int64_t* n) {
  Bytes x(n[1] * n[2] * size_of(n[0]));
  Buffer<int32_t> order(n[3]);
  Floats inverse(1), panel(n[3] * n[2]);
  x.read();
  order.read();
  inverse.read();
  const lowrank_rows some{order.at(), 0, n[3], n[1]};
  const lowrank_dropout dropout{n[4], uint32_t(n[5]), inverse.items[0]};
  const int32_t status = lowrank_gather_rows(x.at(), int32_t(n[0]), n[2], n[2], &some, &dropout,
                                             panel.at(), 1);
  panel.write();
  if (status != LOWRANK_OK) return status;
  const int32_t back = lowrank_scatter_rows(panel.at(), n[2], &some, &dropout, 1, x.at(),
                                            int32_t(n[0]), n[2], 1);
  x.write();
  return back;
}

// dtype, M, H, plus_one; then x, weight, dy.
int32_t rms_norm(const int64_t* n) {
  const int64_t M = n[1], H = n[2], size = size_of(n[0]);
  Bytes x(M * H * size), dy(M * H * size), y(M * H * size), dx(M * H * size);
  Floats weight(H), rstd(M), dweight(H);
  x.read();
  weight.read();
  dy.read();
  const int32_t dtype = int32_t(n[0]), plus_one = int32_t(n[3]);
  const int32_t status = lowrank_rms_norm(x.at(), dtype, M, H, weight.at(), LOWRANK_F32, plus_one,
                                          1e-5f, y.at(), rstd.at(), 1);
  if (status != LOWRANK_OK) return status;
  const int32_t back =
      lowrank_rms_norm_backward(dy.at(), x.at(), dtype, M, H, weight.at(), LOWRANK_F32, plus_one,
                                rstd.at(), dx.at(), dweight.at(), 1);
  y.write();
  dx.write();
  dweight.write();
  return back;
}

// dtype, S, heads, D, turned, back; then x, cos, sin of float32.
int32_t rotate(const int64_t* n) {
  Bytes x(n[1] * n[2] * n[3] * size_of(n[0])), y(n[1] * n[2] * n[3] * size_of(n[0]));
  Floats cos(n[1] * n[4]), sin(n[1] * n[4] / 2);
  x.read();
  cos.read();
  sin.read();
  const lowrank_heads heads{x.at(), 1, n[1], n[2], n[3], 0, n[2] * n[3], n[3]};
  const lowrank_angles angles{cos.at(), sin.at(), 1, n[4], LOWRANK_F32};
  const int32_t status =
      lowrank_rotate(&heads, int32_t(n[0]), &angles, int32_t(n[5]), y.at(), 1);
  y.write();
  return status;
}

// dtype, M, I, activation; then gate, up, dy.
int32_t gated(const int64_t* n) {
  const int64_t bytes = n[1] * n[2] * size_of(n[0]);
  Bytes gate(bytes), up(bytes), dy(bytes), y(bytes), dgate(bytes), dup(bytes);
  for (Bytes* input : {&gate, &up, &dy}) input->read();
  const lowrank_gate both{gate.at(), up.at(), n[1], n[2], n[2], n[2], int32_t(n[0]), int32_t(n[3])};
  const int32_t status = lowrank_gated(&both, y.at(), 1);
  if (status != LOWRANK_OK) return status;
  const int32_t back = lowrank_gated_backward(&both, dy.at(), dgate.at(), dup.at(), 1);
  for (Bytes* output : {&y, &dgate, &dup}) output->write();
  return back;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 3 || lowrank_use_isa(atoi(argv[2])) != LOWRANK_OK) return 12;
  std::vector<int64_t> numbers;
  for (int i = 3; i < argc; ++i) numbers.push_back(atoll(argv[i]));
  numbers.resize(16);
  const char* name = argv[1];
  const int64_t* n = numbers.data();
  if (!strcmp(name, "quantize")) return quantize(n);
  if (!strcmp(name, "dequantize")) return dequantize(n);
  if (!strcmp(name, "linear")) return linear(n, false);
  if (!strcmp(name, "linear_int16")) return linear(n, true);
  if (!strcmp(name, "softmax")) return softmax(n);
  if (!strcmp(name, "adamw8bit")) return adamw8bit(n);
  if (!strcmp(name, "lion8bit")) return lion8bit(n);
  if (!strcmp(name, "rows")) return rows(n);
  if (!strcmp(name, "rms_norm")) return rms_norm(n);
  if (!strcmp(name, "rotate")) return rotate(n);
  if (!strcmp(name, "gated")) return gated(n);
  return 13;
}
