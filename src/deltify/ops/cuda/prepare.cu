// Everything of a chunk that does not need the state, as ../triton/prepare.py computes it. One block of 256 threads
// handles one head of a chunk of 64 tokens.
//
// Compiled with K (64 or 128) and BOUNDED (the gate's form).
//
// Exact for any gates. A token's decay is at least 2^-28, which is less than what float32 can add to 1, so eight tokens
// decay by 2^-224 at most. Rows and columns are multiplied by the decay from an anchor, where half of a channel's decay is
// reached: of the chunk if a group of 32 channels decays by 2^-224 at most, otherwise of each eight tokens. No factor
// leaves 2^-112 to 2^112. A tile of two different eights is related to the boundaries between them, where all factors are
// at most 1. Anchors and boundaries are whole exponents, so that such a change is an exact product with a power of 2.
//
// docs/explanation/kernels.md explains G, M, P and A. Legend: C = 64 tokens of a chunk, G cumulative log2-decay.

#define LEAST -28.f    // log2-decay of a token
#define RANGE 224.f    // of the exponents of the factors from one anchor

#define PIECES (K / 8)            // of a row, 16 bytes each
#define PAIRS (K / 2)             // of channels; a thread computes the gates of one
#define PARTS (256 / PAIRS)       // of a chunk's tokens, among threads
#define TOKENS (64 / PARTS)       // of a part
#define TILE (64 * K * 2)         // bytes of [C, K]

// Shared memory, in tiles of chunks.h
#define S_K 0                         // k, then k 2^{G - anchor}
#define S_Q TILE                      // q, then q 2^{G - anchor}
#define S_F (2 * TILE)                // decay logits, then k 2^{anchor - G}
#define S_P S_F                       // P, bfloat16, over these
#define S_L (S_P + 8192)              // blocks of 16 x 16 on the diagonal of beta M, float, rows of 80 bytes
#define S_M (S_L + 5120)              // beta M, float16
#define S_T (S_M + 8192)              // its inverse, float16
#define S_NORM (S_T + 8192)
#define S_DIAGONAL (S_NORM + 512)
#define S_BETA (S_DIAGONAL + 256)
#define S_TOTAL (S_BETA + 256)        // log2-decay of each part of the tokens
#define S_FROM (S_TOTAL + 2048)       // of each eight tokens [8, K], bfloat16: 2^{anchor - boundary before it}
#define S_TO (S_FROM + 16 * K)        // 2^{boundary after it - anchor}
#define S_OVER (S_TO + 16 * K)        // 2^{boundary after it - boundary before it}
#define S_STRONG (S_OVER + 16 * K)    // whether a group of 32 channels decays further than RANGE
#define SHARED_BYTES (S_STRONG + 16)

struct Call {
  const u16 *q, *k, *f, *beta;   // q, k, f [.., heads, K], beta logits [.., heads], bfloat16
  const float *A_log, *dt_bias;  // [heads], [heads, K]
  u16 *wide, *square;            // k 2^G, q 2^G, k 2^{G_C - G} [3, slots, C, K]; A, P [2, slots, C, C]; bfloat16
  float* ends;                   // 2^{G_C} [slots, K]
  Documents documents;
  int heads;
  float lower_bound, scale;
  int slots, first_slot;         // of the call, and of this launch
};

// Multiplies a left operand by factors of its channels.
DEVICE void scale_rows(u32* a, const char* factors) {
  const u32 x = *(const u32*)factors, y = *(const u32*)(factors + 16);
  a[0] = multiply_bf16_pairs(a[0], x);
  a[1] = multiply_bf16_pairs(a[1], x);
  a[2] = multiply_bf16_pairs(a[2], y);
  a[3] = multiply_bf16_pairs(a[3], y);
}

// Eights of rows that a warp works on, and eights of columns left of them: its own eight and four more of columns, and of
// the last three eights of rows the sixth to eighth. `d` is a constant of the unrolled loop.
#define EIGHTS(job, b) UNROLL for (int job = 0; job < 2; job++) if (const int b = job ? 7 - warp : warp; job == 0 || warp < 3)
#define TILES(job, b, d) UNROLL for (int d = job ? 5 : 0; d < (job ? 8 : 5) && d <= b; d++)

KERNEL(256, 3) kda_prepare(BY_VALUE Call call) {
  const int slot = call.first_slot + BLOCK, heads = call.heads, chunk = slot / heads, head = slot - chunk * heads;
  const int warp = THREAD / 32, lane = THREAD & 31;
  int first, have;
  if (!locate(call.documents, chunk, first, have)) return;
  float* beta = (float*)(shared + S_BETA);
  float* diagonal = (float*)(shared + S_DIAGONAL);
  f2* norm = (f2*)(shared + S_NORM);
  const int pair = THREAD % PAIRS, part = THREAD / PAIRS;  // channels and tokens whose gates the thread computes

  // ---- load
  f2 bias;
  float rate;
  {
    const long long base = ((long long)first * heads + head) * K;
    const int piece = THREAD % PIECES;
    UNROLL for (int n = 0; n < K / 32; n++) {
      const int row = THREAD / PIECES + 256 / PIECES * n, to = place(row, piece);
      const bool there = row < have;
      const long long from = base + (long long)(there ? row : 0) * heads * K + piece * 8;
      copy16(shared + S_F + to, call.f + from, there);
      copy16(shared + S_K + to, call.k + from, there);
      copy16(shared + S_Q + to, call.q + from, there);
    }
    if (THREAD < 64) {
      const float x = THREAD < have ? low(call.beta[((long long)first + THREAD) * heads + head]) : 0.f;
      beta[THREAD] = inverse(1.f + exp2_(x * -LOG2E));
    }
    rate = exp2_(call.A_log[head] * LOG2E);
    bias = *(const f2*)(call.dt_bias + head * K + 2 * pair);
    wait_for_copies();
    if (have < 64) {  // rows that are missing forget nothing: their logits are -inf
      UNROLL for (int n = 0; n < K / 32; n++)
        if (const int row = THREAD / PIECES + 256 / PIECES * n; row >= have)
          *(u4*)(shared + S_F + place(row, piece)) = {0xff80ff80u, 0xff80ff80u, 0xff80ff80u, 0xff80ff80u};
    }
    sync();
  }

  // ---- norms: diagonals of k k^T, q k^T and q q^T
  const int matrix = lane >> 3, r = lane & 7, i8 = lane >> 2, j2 = 2 * (lane & 3);
  const char* of_rows = shared + ((matrix & 1) ? S_Q : S_K);
  {
    float x1[4] = {0, 0, 0, 0}, x2[4] = {0, 0, 0, 0};
    UNROLL for (int s = 0; s < K / 16; s++) {
      u32 a[4];
      load_matrices4(a, of_rows + place(8 * warp + r, 2 * s + (matrix >> 1)));
      multiply_bf16(x1, a, a[0], a[2]);
      multiply_bf16(x2, a, a[1], a[3]);
    }
    if ((lane & 3) == (i8 >> 1)) {
      const bool odd = i8 & 1;
      const float k_norm = inverse_root((odd ? x1[1] : x1[0]) + NORM_EPS);
      const float q_norm = call.scale * inverse_root((odd ? x2[3] : x2[2]) + NORM_EPS);
      norm[8 * warp + i8] = {k_norm, q_norm};
      diagonal[8 * warp + i8] = k_norm * q_norm * (odd ? x1[3] : x1[2]);
    }
  }

  // ---- gates: a thread has two channels of a part of the tokens
  const int piece = (pair & 31) >> 2, bank = (pair >> 5) * 8192 + (pair & 3) * 4 + part * TOKENS * 128;
  float start0, start1, end0 = 0.f, end1 = 0.f, G0[TOKENS], G1[TOKENS];
  {
#if BOUNDED
    const float slope = fmaxf(rate, 1e-30f) * LOG2E;
    rate = call.lower_bound * -LOG2E;
#else
    const float slope = LOG2E;
#endif
    const float most = -LEAST * inverse(rate);
    bias.x *= slope;
    bias.y *= slope;
    float g0 = 0.f, g1 = 0.f;
    UNROLL for (int t = 0; t < TOKENS; t++) {
      const u32 x = *(const u32*)(shared + S_F + bank + t * 128 + ((piece ^ (t & 7)) << 4));
      g0 -= rate * fminf(forget(low(x) * slope + bias.x), most);
      g1 -= rate * fminf(forget(high(x) * slope + bias.y), most);
      G0[t] = g0;
      G1[t] = g1;
    }
    f2* total = (f2*)(shared + S_TOTAL);
    total[part * PAIRS + pair] = {g0, g1};
    sync();
    float before0 = 0.f, before1 = 0.f;
    UNROLL for (int n = 0; n < PARTS; n++) {
      const f2 x = total[n * PAIRS + pair];
      if (n < part) {
        before0 += x.x;
        before1 += x.y;
      }
      end0 += x.x;
      end1 += x.y;
    }
    UNROLL for (int t = 0; t < TOKENS; t++) {
      G0[t] += before0;
      G1[t] += before1;
    }
    start0 = before0;
    start1 = before1;
    if (part == 0) *(f2*)(call.ends + (long long)slot * K + 2 * pair) = {exp2_(end0), exp2_(end1)};
  }

  // ---- factors, each in the place of what it is computed from, and to global memory
  {
    const u32 strong = ballot(fminf(end0, end1) < -RANGE) >> (lane & 16) & 0xffff;  // any channel of the group
    if (part == 0 && (lane & 15) == 0) ((u32*)(shared + S_STRONG))[pair >> 4] = strong;
    const long long parts_apart = (long long)call.slots * 64 * K / 2;  // in words
    u32* to = (u32*)call.wide + (long long)slot * 64 * K / 2 + part * TOKENS * K / 2 + pair;
    UNROLL for (int eight = 0; eight < TOKENS / 8; eight++) {
      const float last0 = G0[8 * eight + 7], last1 = G1[8 * eight + 7];
      const float anchor0 = rintf(0.5f * (strong ? start0 + last0 : end0)), anchor1 = rintf(0.5f * (strong ? start1 + last1 : end1));
      const float before0 = rintf(start0), before1 = rintf(start1), after0 = rintf(last0), after1 = rintf(last1);
      if (strong) {
        const int at = (part * TOKENS / 8 + eight) * 2 * K + pair * 4;
        *(u32*)(shared + S_FROM + at) = bf16_pair(exp2_(anchor0 - before0), exp2_(anchor1 - before1));
        *(u32*)(shared + S_TO + at) = bf16_pair(exp2_(after0 - anchor0), exp2_(after1 - anchor1));
        *(u32*)(shared + S_OVER + at) = bf16_pair(exp2_(after0 - before0), exp2_(after1 - before1));
      }
      // two factors, since the anchor itself may be less than bfloat16's smallest number where its product is not
      const float first0 = fmaxf(anchor0, -112.f), first1 = fmaxf(anchor1, -112.f);
      const u32 start = bf16_pair(exp2_(first0), exp2_(first1)), rest = bf16_pair(exp2_(anchor0 - first0), exp2_(anchor1 - first1));
      const float end_from0 = exp2_(end0 - anchor0), end_from1 = exp2_(end1 - anchor1);
      UNROLL for (int e = 0; e < 8; e++) {
        const int t = 8 * eight + e, here = bank + t * 128 + ((piece ^ e) << 4);
        const f2 n = norm[part * TOKENS + t];
        u32* k_at = (u32*)(shared + S_K + here);
        u32* q_at = (u32*)(shared + S_Q + here);
        const u32 x = *k_at, y = *q_at;
        const float G0_ = G0[t] - anchor0, G1_ = G1[t] - anchor1;
        const float d0 = exp2_(G0_), d1 = exp2_(G1_), k0 = low(x) * n.x, k1 = high(x) * n.x;
        const u32 decayed_k = bf16_pair(k0 * d0, k1 * d1);
        const u32 decayed_q = bf16_pair(low(y) * n.y * d0, high(y) * n.y * d1);
        *k_at = decayed_k;
        *q_at = decayed_q;
        const float a0 = k0 * exp2_(-G0_), a1 = k1 * exp2_(-G1_);
        *(u32*)(shared + S_F + here) = bf16_pair(a0, a1);
        to[t * K / 2] = multiply_bf16_pairs(multiply_bf16_pairs(decayed_k, start), rest);
        to[parts_apart + t * K / 2] = multiply_bf16_pairs(multiply_bf16_pairs(decayed_q, start), rest);
        to[2 * parts_apart + t * K / 2] = bf16_pair(a0 * end_from0, a1 * end_from1);
      }
      start0 = last0;
      start1 = last1;
    }
    sync();
  }

  // ---- pairs: M in [0] and [1], P in [2] and [3]; a tile for each distance of columns
  float products[8][4];
  UNROLL for (int n = 0; n < 8; n++) UNROLL for (int e = 0; e < 4; e++) products[n][e] = 0.f;
  EIGHTS(job, b) {
    for (int group = 0; group < K / 32; group++) {
      u32 a0[4], a1[4];
      load_matrices4(a0, of_rows + 1024 * b + place(r, 4 * group + (matrix >> 1)));
      load_matrices4(a1, of_rows + 1024 * b + place(r, 4 * group + 2 + (matrix >> 1)));
      const char* columns = shared + S_F + 1024 * b + place(r, 4 * group + matrix);
      if (!((const u32*)(shared + S_STRONG))[group]) {
        TILES(job, b, d) {
          u32 c[4];
          load_matrices4(c, columns - d * 1024);
          multiply_bf16(products[d], a0, c[0], c[1]);
          multiply_bf16(products[d], a1, c[2], c[3]);
        }
      } else {
        const char* factors = shared + b * 2 * K + group * 64 + j2 * 2;
        UNROLL for (int d = 0; d < (job ? 8 : 5) && d <= b; d++) {
          if (d > 0) {  // relate the rows to the boundary after the columns
            const char* x = factors + (d == 1 ? S_FROM : S_OVER - (d - 1) * 2 * K);
            scale_rows(a0, x);
            scale_rows(a1, x + 32);
          }
          if (job && d < 5) continue;
          u32 c[4];
          load_matrices4(c, columns - d * 1024);
          if (d > 0) {  // and the columns
            const char* x = factors + S_TO - d * 2 * K;
            UNROLL for (int n = 0; n < 4; n++) c[n] = multiply_bf16_pairs(c[n], *(const u32*)(x + 16 * n));
          }
          multiply_bf16(products[d], a0, c[0], c[1]);
          multiply_bf16(products[d], a1, c[2], c[3]);
        }
      }
    }
  }
  sync();

  // ---- P, and beta M for the inverse
  EIGHTS(job, b) {
    const int row = 8 * b + i8;
    const float row_beta = beta[row], on = diagonal[row];
    TILES(job, b, d) {
      const int j = b - d, column = 8 * j + j2, here = row * 128 + ((j ^ i8) << 4) + j2 * 2;
      float m0 = products[d][0] * row_beta, m1 = products[d][1] * row_beta, p0 = products[d][2], p1 = products[d][3];
      if (d == 0) {  // the diagonal is computed without the factors, whose product is only nearly 1
        m0 = j2 < i8 ? m0 : 0.f;
        m1 = j2 + 1 < i8 ? m1 : 0.f;
        p0 = j2 < i8 ? p0 : j2 == i8 ? on : 0.f;
        p1 = j2 + 1 < i8 ? p1 : j2 + 1 == i8 ? on : 0.f;
      }
      *(u32*)(shared + S_P + here) = bf16_pair(p0, p1);
      *(u32*)(shared + S_M + here) = fp16_pair(m0, m1);
      if (d == 0 || (d == 1 && b & 1)) *(f2*)(shared + S_L + row * 80 + (column & 15) * 4) = {m0, m1};
    }
  }
  UNROLL for (int n = 0; n < 2; n++) {  // right of the diagonal, P and the inverse are 0
    const int j = (lane >> 3) + 4 * n, row = 8 * warp + r;
    if (j > warp) *(u4*)(shared + S_P + row * 128 + ((j ^ r) << 4)) = {0, 0, 0, 0};
    *(u4*)(shared + S_T + row * 128 + ((j ^ r) << 4)) = {0, 0, 0, 0};
  }
  sync();

  // ---- the inverse: blocks of 16 by substitution, then T21 = -T22 M21 T11, twice; other warps store P meanwhile
  if (warp >= 4) {
    UNROLL for (int n = 0; n < 4; n++) {
      const int at = THREAD - 128 + 128 * n, row = at >> 3, j = at & 7;
      ((u4*)call.square)[((long long)call.slots + slot) * 512 + at] = *(const u4*)(shared + S_P + row * 128 + ((j ^ (row & 7)) << 4));
    }
  } else {
    const int c = lane & 15;
    float x[16];
    UNROLL for (int n = 0; n < 16; n++) {
      float s0 = n == c ? 1.f : 0.f, s1 = 0.f;
      UNROLL for (int t = 0; t < n; t += 4) {
        const f4 l = *(const f4*)(shared + S_L + (16 * warp + n) * 80 + t * 4);
        s0 -= l.x * x[t];
        if (t + 1 < n) s1 -= l.y * x[t + 1];
        if (t + 2 < n) s0 -= l.z * x[t + 2];
        if (t + 3 < n) s1 -= l.w * x[t + 3];
      }
      x[n] = s0 + s1;
      const int row = 16 * warp + n, at = row * 128 + (((2 * warp + (c >> 3)) ^ (row & 7)) << 4) + (c & 7) * 2;
      if (lane < 16) *(u16*)(shared + S_T + at) = (u16)fp16_pair(x[n], 0.f);
    }
  }
  sync();
  // operands of a 16 x 16 tile whose corner is (row, 8 piece)
  auto left = [&](u32* a, int tile, int row, int piece) {
    load_matrices4(a, shared + tile + (row + (matrix & 1) * 8 + r) * 128 + (((piece + (matrix >> 1)) ^ r) << 4));
  };
  auto right = [&](u32* a, int tile, int row, int piece) {
    load_matrices4_transposed(a, shared + tile + (row + (matrix & 1) * 8 + r) * 128 + (((piece + (matrix >> 1)) ^ r) << 4));
  };
  auto keep = [&](const float* x, int row, int piece) {  // -x [16, 8] to the inverse
    UNROLL for (int e = 0; e < 2; e++)
      *(u32*)(shared + S_T + (row + i8 + 8 * e) * 128 + ((piece ^ i8) << 4) + j2 * 2) = fp16_pair(-x[2 * e], -x[2 * e + 1]);
  };
  if (warp < 2) {
    u32 a[4], c[4];
    float x[2][4] = {{0, 0, 0, 0}, {0, 0, 0, 0}}, y[2][4] = {{0, 0, 0, 0}, {0, 0, 0, 0}};
    left(a, S_T, 32 * warp + 16, 4 * warp + 2);
    right(c, S_M, 32 * warp + 16, 4 * warp);
    multiply_fp16(x[0], a, c[0], c[1]);
    multiply_fp16(x[1], a, c[2], c[3]);
    a[0] = fp16_pair(x[0][0], x[0][1]);
    a[1] = fp16_pair(x[0][2], x[0][3]);
    a[2] = fp16_pair(x[1][0], x[1][1]);
    a[3] = fp16_pair(x[1][2], x[1][3]);
    right(c, S_T, 32 * warp, 4 * warp);
    multiply_fp16(y[0], a, c[0], c[1]);
    multiply_fp16(y[1], a, c[2], c[3]);
    keep(y[0], 32 * warp + 16, 4 * warp);
    keep(y[1], 32 * warp + 16, 4 * warp + 1);
  }
  sync();
  if (warp < 4) {
    const int rows = 32 + 16 * (warp & 1), columns = 2 * (warp >> 1);
    float x[4][4], y[2][4] = {{0, 0, 0, 0}, {0, 0, 0, 0}};
    UNROLL for (int n = 0; n < 4; n++) UNROLL for (int e = 0; e < 4; e++) x[n][e] = 0.f;
    UNROLL for (int s = 0; s < 2; s++) {
      u32 a[4], c[4];
      left(a, S_T, rows, 4 + 2 * s);
      UNROLL for (int n = 0; n < 2; n++) {
        right(c, S_M, 32 + 16 * s, 2 * n);
        multiply_fp16(x[2 * n], a, c[0], c[1]);
        multiply_fp16(x[2 * n + 1], a, c[2], c[3]);
      }
    }
    UNROLL for (int s = 0; s < 2; s++) {
      u32 a[4], c[4];
      const float *u = x[2 * s], *v = x[2 * s + 1];
      a[0] = fp16_pair(u[0], u[1]);
      a[1] = fp16_pair(u[2], u[3]);
      a[2] = fp16_pair(v[0], v[1]);
      a[3] = fp16_pair(v[2], v[3]);
      right(c, S_T, 16 * s, columns);
      multiply_fp16(y[0], a, c[0], c[1]);
      multiply_fp16(y[1], a, c[2], c[3]);
    }
    keep(y[0], rows, columns);
    keep(y[1], rows, columns + 1);
  }
  sync();

  // ---- A to global memory
  UNROLL for (int n = 0; n < 2; n++) {
    const int at = THREAD + 256 * n, row = at >> 3, j = at & 7;
    const u4 x = *(const u4*)(shared + S_T + row * 128 + ((j ^ (row & 7)) << 4));
    const f4 y = *(const f4*)(beta + 8 * j), z = *(const f4*)(beta + 8 * j + 4);
    const u4 a = {bf16_pair(fp16_low(x.x) * y.x, fp16_high(x.x) * y.y), bf16_pair(fp16_low(x.y) * y.z, fp16_high(x.y) * y.w),
                  bf16_pair(fp16_low(x.z) * z.x, fp16_high(x.z) * z.y), bf16_pair(fp16_low(x.w) * z.z, fp16_high(x.w) * z.w)};
    ((u4*)call.square)[(long long)slot * 512 + at] = a;
  }
}
