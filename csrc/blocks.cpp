// Blocks of a decoder for the newest positions of some texts: the exported functions in a row, as a
// caller would ask for them one by one if asking took no time.
#include <new>
#include <vector>

#include "lowrank.h"
#include "scalar.h"

namespace {

// Where a block keeps what it computes on the way, all of one dtype.
struct Room {
  char *normed, *heads, *attended, *inner, *activated;
  float* rstd;
};

// The widths of a block: of queries, of keys and of values; of the MLP.
struct Widths {
  int64_t Q, KV, I;

  Widths(const lowrank_block& b, const lowrank_newest& n)
      : Q(b.query_heads * n.D), KV(n.kv_heads * n.D), I(b.inner[0].N / (b.inner_count == 2 ? 1 : 2)) {}
};

bool valid(const lowrank_block& b, const lowrank_newest& n, int64_t H) {
  const Widths w(b, n);
  if (b.query_heads < 1 || n.kv_heads < 1 || n.D < 1 || b.out.N != H || b.down.N != H) return false;
  if (!b.attention_norm.weight || !b.mlp_norm.weight) return false;
  const bool three = b.heads_count == 3 && b.heads[0].N == w.Q && b.heads[1].N == w.KV &&
                     b.heads[2].N == w.KV;
  const bool two = b.inner_count == 2 && b.inner[1].N == w.I;
  return (three || (b.heads_count == 1 && b.heads[0].N == w.Q + 2 * w.KV)) &&
         (two || (b.inner_count == 1 && b.inner[0].N == 2 * w.I));
}

// x += y, rounded once.
template <class T>
void add(T* x, const void* y, int64_t count) {
  const T* other = static_cast<const T*>(y);
  for (int64_t i = 0; i < count; ++i) from_float(to_float(x[i]) + to_float(other[i]), x + i);
}

struct Pass {
  int64_t M, H;
  int32_t dtype, threads;
  void* x;
  Room room;

  int64_t bytes(int64_t elements) const { return elements * (dtype == LOWRANK_F32 ? 4 : 2); }

  int32_t norm(const lowrank_norm& n, const void* from, int64_t rows, int64_t width, void* to) const {
    return lowrank_rms_norm(from, dtype, rows, width, n.weight, n.dtype, n.plus_one, n.eps, to,
                            room.rstd, threads);
  }

  // Heads of each text, `apart` elements from the next text's, normed where they are.
  int32_t norm_heads(const lowrank_norm& n, char* heads, int64_t count, int64_t D,
                     int64_t apart) const {
    for (int64_t m = 0; n.weight && m < M; ++m) {
      char* at = heads + bytes(m * apart);
      if (const int32_t status = norm(n, at, count, D, at)) return status;
    }
    return LOWRANK_OK;
  }

  // x += product(from), normed before where there is a norm behind.
  int32_t add_product(const lowrank_product& product, const void* from, int64_t K,
                      const lowrank_norm& behind) const {
    void* const to[] = {room.normed};
    int32_t status = lowrank_codebook_products(from, dtype, M, K, &product, 1, to, threads);
    if (!status && behind.weight) status = norm(behind, room.normed, M, H, room.normed);
    if (status) return status;
    if (dtype == LOWRANK_F32) add(static_cast<float*>(x), room.normed, M * H);
    if (dtype == LOWRANK_F16) add(static_cast<Half*>(x), room.normed, M * H);
    if (dtype == LOWRANK_BF16) add(static_cast<Bfloat16*>(x), room.normed, M * H);
    return LOWRANK_OK;
  }

  int32_t attention(const lowrank_block& b, lowrank_newest n, void* keys, void* values) const {
    const Widths w(b, n);
    const bool joined = b.heads_count == 1;  // then a text's q, k and v follow one another
    const int64_t all = w.Q + 2 * w.KV, of_q = joined ? all : w.Q, of_k = joined ? all : w.KV;
    char* q = room.heads;
    char* k = q + bytes(joined ? w.Q : M * w.Q);
    char* v = k + bytes(joined ? w.KV : M * w.KV);
    void* const to[] = {q, k, v};
    const int64_t strides[] = {of_q, n.D, of_k, n.D, of_k, n.D};
    n.heads = b.query_heads;
    n.scale = b.scale;
    n.softcap = b.softcap;
    int32_t status = norm(b.attention_norm, x, M, H, room.normed);
    if (!status)
      status = lowrank_codebook_products(room.normed, dtype, M, H, b.heads, b.heads_count, to,
                                         threads);
    if (!status) status = norm_heads(b.q_norm, q, n.heads, n.D, of_q);
    if (!status) status = norm_heads(b.k_norm, k, n.kv_heads, n.D, of_k);
    if (!status)
      status = lowrank_attend_newest(&n, q, k, v, strides, dtype, keys, values, room.attended,
                                     threads);
    return status ? status : add_product(b.out, room.attended, w.Q, b.attention_out_norm);
  }

  int32_t mlp(const lowrank_block& b, const lowrank_newest& n) const {
    const int64_t I = Widths(b, n).I;
    const bool joined = b.inner_count == 1;
    char* up = room.inner + bytes(joined ? I : M * I);
    void* const to[] = {room.inner, up};
    const int64_t apart = joined ? 2 * I : I;
    const lowrank_gate gate{room.inner, up, M, I, apart, apart, dtype, b.activation};
    int32_t status = norm(b.mlp_norm, x, M, H, room.normed);
    if (!status)
      status = lowrank_codebook_products(room.normed, dtype, M, H, b.inner, b.inner_count, to,
                                         threads);
    if (!status) status = lowrank_gated(&gate, room.activated, threads);
    return status ? status : add_product(b.down, room.activated, I, b.mlp_out_norm);
  }
};

}  // namespace

int32_t lowrank_blocks(const lowrank_block* blocks, int64_t count,
                       const lowrank_newest* const* newest, void* const* keys, void* const* values,
                       void* x, int32_t dtype, int64_t H, int32_t threads) {
  if (count < 0 || H < 1 || threads < 1) return LOWRANK_BAD_ARGUMENT;
  if (count == 0) return LOWRANK_OK;
  if (!blocks || !newest || !keys || !values || !x || !newest[0]) return LOWRANK_BAD_ARGUMENT;
  const int64_t M = newest[0]->B;
  int64_t heads = 0, attended = 0, inner = 0, rows = M;
  for (int64_t i = 0; i < count; ++i) {
    if (!newest[i] || newest[i]->B != M || !valid(blocks[i], *newest[i], H))
      return LOWRANK_BAD_ARGUMENT;
    const Widths w(blocks[i], *newest[i]);
    const auto at_least = [](int64_t& most, int64_t value) { most = most < value ? value : most; };
    at_least(heads, w.Q + 2 * w.KV);
    at_least(attended, w.Q);
    at_least(inner, w.I);
    at_least(rows, blocks[i].query_heads);
    at_least(rows, newest[i]->kv_heads);
  }
  if (M < 1) return M < 0 ? LOWRANK_BAD_ARGUMENT : LOWRANK_OK;
  thread_local std::vector<float> kept;  // fresh memory would be faulted in for each token
  const size_t floats = size_t(rows + M * (H + heads + attended + 3 * inner));
  try {
    if (kept.size() < floats) kept.resize(floats);
  } catch (const std::bad_alloc&) {
    return LOWRANK_OUT_OF_MEMORY;
  }
  float* at = kept.data();
  const auto next = [&](int64_t size) {
    at += size;
    return reinterpret_cast<char*>(at - size);
  };
  Pass pass{M, H, dtype, threads, x, {}};
  pass.room.rstd = reinterpret_cast<float*>(next(rows));
  pass.room.normed = next(M * H);
  pass.room.heads = next(M * heads);
  pass.room.attended = next(M * attended);
  pass.room.inner = next(M * 2 * inner);
  pass.room.activated = next(M * inner);
  for (int64_t i = 0; i < count; ++i) {
    int32_t status = pass.attention(blocks[i], *newest[i], keys[i], values[i]);
    if (!status) status = pass.mlp(blocks[i], *newest[i]);
    if (status) return status;
  }
  return LOWRANK_OK;
}
