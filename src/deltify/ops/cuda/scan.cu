// The run over the chunks, in order and in reverse: one block for each document, head and 64 value columns.
//
//   u = A (v - (k 2^G) S)     o = (q 2^G) S + P u     S' = 2^{G_C} S + (k 2^{G_C - G})^T u
//
// Compiled with K (64 or 128) and MODE: 0 writes o; 1 writes u and the state before each chunk, for the backward pass; 2 is
// the reverse run, which writes dv and dS':
//
//   du = P^T do + (k 2^{G_C - G}) dS'    dv = A^T du    dS = 2^{G_C} dS' + (q 2^G)^T do - (k 2^G)^T dv
//
// Four warps hold the state transposed, values by keys, in float32. Each product leaves it, v - .., u, du and dv in the
// registers from which the next product reads its left operand. Right operands are read as they lie in memory. A fifth
// warp loads them some chunks ahead, those that a chunk needs first apart from those that it needs last.
//
// docs/explanation/kernels.md explains G, A and P. Legend: C = 64 tokens of a chunk.

#define HALVES (K / 64)             // tiles of 64 channels
#define WIDE (8192 * HALVES)        // bytes of [C, K]
#if MODE == 0
// first: k 2^G, q 2^G, v, A; last: k 2^{G_C - G}, P
#define F_KD 0
#define F_QD WIDE
#define F_V (2 * WIDE)
#define F_A (F_V + 8192)
#define FIRST (F_A + 8192)
#define L_KA 0
#define L_P WIDE
#define LAST (L_P + 8192)
#define FIRSTS 3
#define LASTS 3
#elif MODE == 1
// first: k 2^G, v, A; last: k 2^{G_C - G}
#define F_KD 0
#define F_V WIDE
#define F_A (F_V + 8192)
#define FIRST (F_A + 8192)
#define L_KA 0
#define LAST WIDE
#define FIRSTS 3
#define LASTS 3
#else
// first: k 2^{G_C - G}, P, do, A; last: q 2^G, k 2^G
#define F_KA 0
#define F_P WIDE
#define F_V (F_P + 8192)
#define F_A (F_V + 8192)
#define FIRST (F_A + 8192)
#define L_QD 0
#define L_KD WIDE
#define LAST (2 * WIDE)
#define FIRSTS 3
#define LASTS 2
#endif
#define S_LAST (FIRSTS * FIRST)
#define S_ROWS (S_LAST + LASTS * LAST)               // o, u or dv of each warp: [64 tokens, 16 values]
#define S_STATES (S_ROWS + 8192)                     // states of each warp: [16 values, K]; not with MODE 0
#define S_ENDS (S_STATES + (MODE ? 128 * K : 0))  // 2^{G_C} of each chunk whose last operands are loaded, float
#define S_BARRIERS (S_ENDS + LASTS * 4 * K)         // first: loaded, free; last: loaded, free
#define SHARED_BYTES (S_BARRIERS + 16 * (FIRSTS + LASTS))

struct Call {
  TensorMap wide, square, values;  // k 2^G, q 2^G, k 2^{G_C - G} [3 slots C, K]; A, P [2 slots C, C]; v or do [tokens, heads V]
  const float *ends, *before;      // 2^{G_C} [slots, K]; states before the first chunk [documents, heads, K, V], or null
  float* after;                    // after the last one
  u16 *out, *states;               // o, u or dv [tokens, heads, V]; S or dS' [slots, V, K]
  Documents documents;
  int heads, V, slots;
  int from, to;                    // the chunks of each document to run over
};

// Finds a document: its first token, its number of tokens, and the number of chunks before it.
DEVICE void find(const Documents& of, int document, int& first, int& have, int& chunk) {
  int end;
  bounds_of(of, document, first, end);
  have = end - first;
  chunk = document * ((of.tokens + 63) / 64);
  if (!of.bounds) return;
  chunk = 0;
  for (int group = 0; group < document; group += 32) chunk = from_lane(chunks_until(of, group, chunk), min(document - group, 32) - 1);
}

KERNEL(160, 1) kda_scan(BY_VALUE Call call) {
  const int warp = THREAD / 32, lane = THREAD & 31, heads = call.heads, V = call.V, tiles = V / 64;
  const int tile = BLOCK % tiles, head = BLOCK / tiles % heads, document = BLOCK / tiles / heads;
  int token, tokens, chunk;
  find(call.documents, document, token, tokens, chunk);
  const int chunks = min((tokens + 63) / 64, call.slots / heads - chunk);  // as many as there is memory for
  const int from = min(call.from, chunks), count = min(call.to, chunks) - from;
  const int begin = MODE == 2 ? from + count - 1 : from, step = MODE == 2 ? -1 : 1;  // the order of the chunks
  char* firsts = shared + S_BARRIERS;
  char* lasts = firsts + 16 * FIRSTS;
  if (THREAD == 0) {
    for (int n = 0; n < FIRSTS + LASTS; n++) {
      barrier_init(firsts + 16 * n, 1);
      barrier_init(firsts + 16 * n + 8, 4);
    }
    barriers_are_ready();
  }
  sync();

  if (warp == 4) {  // ---- the warp that loads
    if (lane == 0) for (int n = 0, f = 0, l = 0, f_phase = 1, l_phase = 1; n < count; n++) {
      const int here = begin + step * n, slot = (chunk + here) * heads + head;
      const int kd = slot * 64, qd = (call.slots + slot) * 64, ka = (2 * call.slots + slot) * 64;
      char* first = shared + f * FIRST;
      char* last = shared + S_LAST + l * LAST;
      char* b = firsts + 16 * f;
      if (n >= FIRSTS) barrier_wait(b + 8, f_phase);
      barrier_expect(b, FIRST);
      UNROLL for (int h = 0; h < HALVES; h++) {
#if MODE < 2
        load_tile(first + F_KD + 8192 * h, &call.wide, 64 * h, kd, b);
#else
        load_tile(first + F_KA + 8192 * h, &call.wide, 64 * h, ka, b);
#endif
      }
      load_tile(first + F_V, &call.values, head * V + tile * 64, token + 64 * here, b);
#if MODE == 2
      load_tile(first + F_P, &call.square, 0, qd, b);
#endif
      load_tile(first + F_A, &call.square, 0, kd, b);
#if MODE == 0
      UNROLL for (int h = 0; h < HALVES; h++) load_tile(first + F_QD + 8192 * h, &call.wide, 64 * h, qd, b);
#endif
      if (++f == FIRSTS) f = 0, f_phase ^= 1;
      b = lasts + 16 * l;
      if (n >= LASTS) barrier_wait(b + 8, l_phase);
      barrier_expect(b, LAST + 4 * K);
      load_bytes(shared + S_ENDS + l * 4 * K, call.ends + (long long)slot * K, 4 * K, b);
      UNROLL for (int h = 0; h < HALVES; h++) {
#if MODE < 2
        load_tile(last + L_KA + 8192 * h, &call.wide, 64 * h, ka, b);
#else
        load_tile(last + L_QD + 8192 * h, &call.wide, 64 * h, qd, b);
        load_tile(last + L_KD + 8192 * h, &call.wide, 64 * h, kd, b);
#endif
      }
#if MODE == 0
      load_tile(last + L_P, &call.square, 0, qd, b);
#endif
      if (++l == LASTS) l = 0, l_phase ^= 1;
    }
    return;
  }

  // ---- four warps: each has 16 values of the state
  const int matrix = lane >> 3, r = lane & 7, i8 = lane >> 2, j2 = 2 * (lane & 3);
  const long long state = ((long long)document * heads + head) * K * V + tile * 64 + 16 * warp + i8;
  char* rows = shared + S_ROWS + 2048 * warp;
  char* kept = shared + S_STATES + 32 * K * warp;
  float S[K / 2], x[32], y[32] = {};  // float32 results, [16 values, K or C] of a warp
  u32 a[K / 4], c[16], w[16];    // left operands, bfloat16; w is v or do
  UNROLL for (int n = 0; n < K / 8; n++) UNROLL for (int e = 0; e < 4; e++)
    S[4 * n + e] = call.before ? call.before[state + (long long)(8 * n + j2 + (e & 1)) * V + 8 * (e >> 1)] : 0.f;

  // Writes [64 tokens, 16 values] of a warp as bfloat16, given as left operands.
  auto write_rows = [&](const u32* words, int here, bool there = true) {
    sync_warp();
    UNROLL for (int g = 0; g < 4; g++) {
      const int t = 16 * g + 8 * (matrix >> 1) + r;
      store_matrices4_transposed(rows + 32 * t + (((matrix & 1) ^ (t >> 2 & 1)) << 4), words + 4 * g);
    }
    sync_warp();
    u16* to = call.out + ((long long)(token + 64 * here) * heads + head) * V + tile * 64 + 16 * warp;
    UNROLL for (int n = 0; n < 4; n++) {
      const int t = (lane >> 1) + 16 * n, piece = lane & 1;
      const u4 words_of_row = *(const u4*)(rows + 32 * t + ((piece ^ (t >> 2 & 1)) << 4));
      store_if(to + (long long)t * heads * V + 8 * piece, words_of_row, there && 64 * here + t < tokens);
    }
  };
  auto write_state = [&](long long slot) {
    sync_warp();
    UNROLL for (int n = 0; n < K / 16; n++)
      store_matrices4(kept + (8 * (matrix & 1) + r) * 2 * K + (((2 * n + (matrix >> 1)) ^ r) << 4), a + 4 * n);
    sync_warp();
    u16* to = call.states + (slot * V + tile * 64 + 16 * warp) * K;
    UNROLL for (int n = 0; n < K / 16; n++) {
      const int at = lane + 32 * n, row = at / (K / 8), piece = at % (K / 8);
      *(u4*)(to + row * K + 8 * piece) = *(const u4*)(kept + row * 2 * K + ((piece ^ (row & 7)) << 4));
    }
  };
  // Reads [16 values, 64 tokens] of v or do; tokens after the document's end are 0.
  auto load_rows = [&](u32* to, const char* first, int have) {
    UNROLL for (int g = 0; g < 4; g++) {
      load_matrices4_transposed(to + 4 * g, first + F_V + (16 * g + 8 * (matrix >> 1) + r) * 128 + (((2 * warp + (matrix & 1)) ^ r) << 4));
      UNROLL for (int i = 0; i < 4; i++) {
        const int t = 16 * g + 8 * (i >> 1) + j2;
        to[4 * g + i] &= (t < have ? 0xffffu : 0) | (t + 1 < have ? 0xffff0000u : 0);
      }
    }
  };
  auto pack = [&](u32* to, const float* from, int n) { UNROLL for (int i = 0; i < n; i++) to[i] = bf16_pair(from[2 * i], from[2 * i + 1]); };
  auto decay = [&](int l) {
    UNROLL for (int n = 0; n < K / 8; n++) {
      const f2 e = *(const f2*)(shared + S_ENDS + l * 4 * K + (8 * n + j2) * 4);
      S[4 * n] *= e.x;
      S[4 * n + 1] *= e.y;
      S[4 * n + 2] *= e.x;
      S[4 * n + 3] *= e.y;
    }
  };
  auto free = [&](char* b, bool used = true) {
    sync_warp();
    barrier_arrive_if(b + 8, used && lane == 0);
  };
#if K == 128
#define MULTIPLY_STATE multiply128_columns
#else
#define MULTIPLY_STATE multiply64_columns
#endif

  pack(a, S, K / 4);
#if MODE == 0  // the loop begins and ends with products that run
  products_begin();
  multiply64<1>(y, a, operand(shared + S_ROWS), 0);
  products_commit();
#endif
  for (int n = 0, f = 0, l = 0, f_phase = 0, l_phase = 0; n < count; n++) {
    const int here = begin + step * n, have = tokens - 64 * here;
    const char* first = shared + f * FIRST;
    const char* last = shared + S_LAST + l * LAST;
    barrier_wait(firsts + 16 * f, f_phase);
    products_begin();
#if MODE < 2
    UNROLL for (int i = 0; i < K / 16; i++) multiply64<-1>(x, a + 4 * i, later(operand(first + F_KD), (i >> 2) * 8192 + (i & 3) * 32), i);
    products_commit();
    load_rows(w, first, have);
#if MODE == 0
    products_wait<1>();
    settle(y);  // o of the chunk before
    free(lasts + 16 * (l ? l - 1 : LASTS - 1), n > 0);
    pack(c, y, 16);
    write_rows(c, here - 1, n > 0);
    products_begin();
    UNROLL for (int i = 0; i < K / 16; i++) multiply64<1>(y, a + 4 * i, later(operand(first + F_QD), (i >> 2) * 8192 + (i & 3) * 32), i);
    products_commit();
    products_wait<1>();
#else
    write_state((long long)(chunk + here) * heads + head);
    products_wait<0>();
#endif
    settle(x);
    UNROLL for (int i = 0; i < 16; i++) c[i] = bf16_pair(low(w[i]) + x[2 * i], high(w[i]) + x[2 * i + 1]);
    products_begin();
    UNROLL for (int i = 0; i < 4; i++) multiply64<1>(x, c + 4 * i, later(operand(first + F_A), i * 32), i);
    products_commit();
    barrier_wait(lasts + 16 * l, l_phase);
    decay(l);
    products_wait<0>();
    settle(x);
    free(firsts + 16 * f);
    pack(c, x, 16);
    products_begin();
    UNROLL for (int i = 0; i < 4; i++) MULTIPLY_STATE<1>(S, c + 4 * i, later(operand_of_columns(last + L_KA), i * 2048), 1);
    products_commit();
#if MODE == 0
    UNROLL for (int i = 0; i < 4; i++) multiply64<1>(y, c + 4 * i, later(operand(last + L_P), i * 32), 1);
    products_commit();
    products_wait<1>();
#endif
#else
    UNROLL for (int i = 0; i < K / 16; i++) multiply64<1>(x, a + 4 * i, later(operand(first + F_KA), (i >> 2) * 8192 + (i & 3) * 32), i);
    products_commit();
    load_rows(w, first, have);
    products_begin();
    UNROLL for (int i = 0; i < 4; i++) multiply64_columns<1>(x, w + 4 * i, later(operand_of_columns(first + F_P), i * 2048), 1);
    products_commit();
    write_state((long long)(chunk + here) * heads + head);
    products_wait<0>();
    settle(x);
    pack(c, x, 16);
    products_begin();
    UNROLL for (int i = 0; i < 4; i++) multiply64_columns<1>(y, c + 4 * i, later(operand_of_columns(first + F_A), i * 2048), i);
    products_commit();
    barrier_wait(lasts + 16 * l, l_phase);
    decay(l);
    products_begin();
    UNROLL for (int i = 0; i < 4; i++) MULTIPLY_STATE<1>(S, w + 4 * i, later(operand_of_columns(last + L_QD), i * 2048), 1);
    products_commit();
    products_wait<1>();
    settle(y);
    free(firsts + 16 * f);
    pack(c, y, 16);
    products_begin();
    UNROLL for (int i = 0; i < 4; i++) MULTIPLY_STATE<-1>(S, c + 4 * i, later(operand_of_columns(last + L_KD), i * 2048), 1);
    products_commit();
#endif
#if MODE > 0
    write_rows(c, here);
    products_wait<0>();
#endif
    settle(S);
    pack(a, S, K / 4);
#if MODE > 0
    free(lasts + 16 * l);  // with MODE 0, P is still being read
#endif
    if (++f == FIRSTS) f = 0, f_phase ^= 1;
    if (++l == LASTS) l = 0, l_phase ^= 1;
  }
#if MODE == 0
  products_wait<0>();
  settle(y);
  if (count > 0) {
    pack(c, y, 16);
    write_rows(c, from + count - 1);
  }
#endif
  UNROLL for (int n = 0; n < K / 8; n++) UNROLL for (int e = 0; e < 4; e++)
    call.after[state + (long long)(8 * n + j2 + (e & 1)) * V + 8 * (e >> 1)] = S[4 * n + e];
}
