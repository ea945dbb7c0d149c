// The parallel part of the backward pass: the gradients of q, k, the decay logits f, the logits b of beta, A_log and
// dt_bias. One block handles one head of a chunk of 64 tokens; each warp has eight channels.
//
// With S the state before the chunk, dS' the gradient of that after it, dP = do u^T scale and dM = -dv u^T below the
// diagonal, and unit rows q and k:
//
//   dq = (do S^T) 2^G scale + (dP decayed) k + diagonal k                       - (q . dq) q
//   dk = -(dv S^T) 2^G + (dM decayed) k                                         as the later token of a pair
//      + (u dS'^T) 2^{G_C - G} + (dP decayed)^T q + (dM decayed)^T k            as the earlier one
//      + diagonal q - (k . dk) k
//
// The gradient of a log-decay is the sum over all pairs that it lies between. Where both tokens are in the chunk, it is the
// sum of the pairs of all later rows minus those of all later columns. Both sides have the same rounded factors, so that
// what cancels does so exactly. q . dq = do . o and k . dk = 2 dv . u / beta - dv . v need no channels.
//
// Anchors are those of prepare.cu: one of the chunk for eight channels that decay by 2^-200 at most, otherwise one of each
// eight tokens. Sums over earlier or later blocks of 16 tokens are then related to the boundaries between the blocks.
//
// Compiled with K (64 or 128) and BOUNDED. Legend: C = 64 tokens of a chunk, G cumulative log2-decay.

#define LEAST -25.f    // log2-decay of a token: less than what float32 can add to 1
#define RANGE 200.f    // of the exponents of the factors from one anchor. Less than in prepare.cu, as gradients may be large
#define V K
#define WARPS (K / 8)

#define ROWS_K (128 * K)          // bytes of [C, K]
#define ROWS_V (128 * V)
#define S_Q 0
#define S_K ROWS_K                // k, then dk
#define S_F (2 * ROWS_K)          // decay logits, then their gradients
#define S_U (3 * ROWS_K)
#define S_DO (S_U + ROWS_V)
#define S_DV (S_DO + ROWS_V)
#define S_STATE (S_DV + ROWS_V)   // S [V, K]
#define S_DSTATE (S_STATE + 2 * V * K)
#define S_P (S_DSTATE + 2 * V * K)  // dP, then dM
#define S_M (S_P + 8192)
#define S_EDGES (S_M + 8192)      // G before each eight tokens and after the last [9, K], float
#define S_DQ (S_EDGES + 36 * K)   // [C, K]
#define S_NUMBERS (S_DQ + ROWS_K)  // of each token: norms of q and k, the diagonal of dP, q . dq, k . dk
#define S_BARRIERS (S_NUMBERS + 5 * 256)
#define SHARED_BYTES (S_BARRIERS + 32)

struct alignas(8) w2 { u32 x, y; };
struct Call {
  TensorMap q, k, f, u, d_o, dv;  // [tokens, heads K] and [tokens, heads V]
  TensorMap states, dstates;      // S and dS' [slots V, K]
  const u16 *o, *v, *b;           // [tokens, heads, V], [tokens, heads]
  const float *A_log, *dt_bias;   // [heads], [heads, K]
  u16 *dq, *dk, *df, *db;         // like q, k, f, b
  float *dA_log, *ddt_bias;       // of each chunk [slots, K]
  Documents documents;
  int heads;
  float lower_bound, scale;
};

// N channels of a row, those of a lane
template <int N> DEVICE void read_row(float* to, const char* tile, int row, int lane) {
  if (N == 4) {
    const w2 x = *(const w2*)(tile + place(row, lane >> 1) + 8 * (lane & 1));
    to[0] = low(x.x), to[1] = high(x.x), to[2] = low(x.y), to[3] = high(x.y);
  } else {
    const u32 x = *(const u32*)(tile + place(row, lane >> 2) + 4 * (lane & 3));
    to[0] = low(x), to[1] = high(x);
  }
}
template <int N> DEVICE void read_row(float* to, const u16* row, int lane) {
  if (N == 4) {
    const w2 x = *(const w2*)(row + 4 * lane);
    to[0] = low(x.x), to[1] = high(x.x), to[2] = low(x.y), to[3] = high(x.y);
  } else {
    const u32 x = *(const u32*)(row + 2 * lane);
    to[0] = low(x), to[1] = high(x);
  }
}
template <int N> DEVICE float dot(const float* x, const float* y) {
  float sum = 0.f;
  UNROLL for (int n = 0; n < N; n++) sum += x[n] * y[n];
  return sum;
}

KERNEL(4 * K, K == 64 ? 2 : 1) kda_finish(BY_VALUE Call call) {
  const int slot = BLOCK, heads = call.heads, chunk = slot / heads, head = slot - chunk * heads;
  const int warp = THREAD / 32, lane = THREAD & 31, i8 = lane >> 2, j2 = 2 * (lane & 3), matrix = lane >> 3, r = lane & 7;
  const long long channel = (long long)slot * K + 8 * warp + j2;  // of two, in what is kept of each chunk
  int first, have;
  if (!locate(call.documents, chunk, first, have)) {
    if (i8 == 0) *(f2*)(call.dA_log + channel) = *(f2*)(call.ddt_bias + channel) = {0.f, 0.f};
    return;
  }
  char* loaded = shared + S_BARRIERS;
  if (THREAD == 0) {
    UNROLL for (int n = 0; n < 4; n++) barrier_init(loaded + 8 * n, 1);
    barriers_are_ready();
  }
  sync();
  if (THREAD == 0) {
    barrier_expect(loaded, 3 * ROWS_K);
    UNROLL for (int n = 0; n < K / 64; n++) {
      load_tile(shared + S_Q + 8192 * n, &call.q, head * K + 64 * n, first, loaded);
      load_tile(shared + S_K + 8192 * n, &call.k, head * K + 64 * n, first, loaded);
      load_tile(shared + S_F + 8192 * n, &call.f, head * K + 64 * n, first, loaded);
    }
    barrier_expect(loaded + 8, 3 * ROWS_V);
    UNROLL for (int n = 0; n < V / 64; n++) {
      load_tile(shared + S_U + 8192 * n, &call.u, head * V + 64 * n, first, loaded + 8);
      load_tile(shared + S_DO + 8192 * n, &call.d_o, head * V + 64 * n, first, loaded + 8);
      load_tile(shared + S_DV + 8192 * n, &call.dv, head * V + 64 * n, first, loaded + 8);
    }
    barrier_expect(loaded + 16, 2 * V * K);
    UNROLL for (int n = 0; n < V / 64 * (K / 64); n++)
      load_tile(shared + S_STATE + 8192 * n, &call.states, n % (K / 64) * 64, slot * V + n / (K / 64) * 64, loaded + 16);
    barrier_expect(loaded + 24, 2 * V * K);
    UNROLL for (int n = 0; n < V / 64 * (K / 64); n++)
      load_tile(shared + S_DSTATE + 8192 * n, &call.dstates, n % (K / 64) * 64, slot * V + n / (K / 64) * 64, loaded + 24);
  }
  float* numbers = (float*)(shared + S_NUMBERS);
  float rate = exp2_(call.A_log[head] * LOG2E);
  const f2 bias = *(const f2*)(call.dt_bias + head * K + 8 * warp + j2);
  barrier_wait(loaded, 0);
  barrier_wait(loaded + 8, 0);

  // ---- sums over the channels of each token, and the gradient of b
  LOOP for (int n = 0; n < 64 / WARPS; n++) {
    const int row = 64 / WARPS * warp + n;
    const long long token = (long long)(first + (row < have ? row : 0)) * heads + head;
    float q[K / 32], k[K / 32], u[V / 32], d_o[V / 32], dv[V / 32], o[V / 32], v[V / 32];
    read_row<V / 32>(o, call.o + token * V, lane);
    read_row<V / 32>(v, call.v + token * V, lane);
    read_row<K / 32>(q, shared + S_Q, row, lane);
    read_row<K / 32>(k, shared + S_K, row, lane);
    read_row<V / 32>(u, shared + S_U, row, lane);
    read_row<V / 32>(d_o, shared + S_DO, row, lane);
    read_row<V / 32>(dv, shared + S_DV, row, lane);
    float sums[6] = {dot<K / 32>(q, q), dot<K / 32>(k, k), dot<V / 32>(d_o, u), dot<V / 32>(d_o, o), dot<V / 32>(dv, u),
                     dot<V / 32>(dv, v)};
    UNROLL for (int i = 0; i < 6; i++) UNROLL for (int step = 16; step; step /= 2) sums[i] += from_lane(sums[i], lane ^ step);
    if (lane == 0) {
      const float b = row < have ? low(call.b[token]) : 0.f, other = fminf(exp2_(b * -LOG2E), 1e24f);  // 1 / beta = 1 + e^-b
      numbers[row] = inverse_root(sums[0] + NORM_EPS);
      numbers[64 + row] = inverse_root(sums[1] + NORM_EPS);
      numbers[128 + row] = call.scale * sums[2];
      numbers[192 + row] = sums[3];
      numbers[256 + row] = 2.f * sums[4] * (1.f + other) - sums[5];
      // dbeta = dv . u / beta^2, and sigmoid's slope is beta (1 - beta)
      if (row < have) call.db[token] = (u16)bf16_pair(sums[4] * other, 0.f);
    }
  }

  // ---- dP and dM: each warp computes one or two blocks of 16 x 16 of both
  for (int block = warp; block < 16; block += WARPS) {
    const int B = block >> 2, J = block & 3;
    float p[2][4] = {{0, 0, 0, 0}, {0, 0, 0, 0}}, m[2][4] = {{0, 0, 0, 0}, {0, 0, 0, 0}};
    if (J <= B) UNROLL for (int s = 0; s < V / 16; s++) {
      const int row = 16 * B + 8 * (matrix & 1) + r, column = 16 * J + 8 * (matrix >> 1) + r;
      u32 a[4], c[4], x[4];
      load_matrices4(a, shared + S_DO + place(row, 2 * s + (matrix >> 1)));
      load_matrices4(c, shared + S_DV + place(row, 2 * s + (matrix >> 1)));
      load_matrices4(x, shared + S_U + place(column, 2 * s + (matrix & 1)));
      multiply_bf16(p[0], a, x[0], x[1]);
      multiply_bf16(p[1], a, x[2], x[3]);
      multiply_bf16(m[0], c, x[0], x[1]);
      multiply_bf16(m[1], c, x[2], x[3]);
    }
    UNROLL for (int n = 0; n < 2; n++) UNROLL for (int e = 0; e < 2; e++) {
      const int row = 16 * B + 8 * e + i8, column = 16 * J + 8 * n + j2, at = place(row, 2 * J + n) + 2 * j2;
      const bool one = column < row && row < have, two = column + 1 < row && row < have;  // not of the next document
      *(u32*)(shared + S_P + at) = bf16_pair(one ? p[n][2 * e] * call.scale : 0.f, two ? p[n][2 * e + 1] * call.scale : 0.f);
      *(u32*)(shared + S_M + at) = bf16_pair(one ? -m[n][2 * e] : 0.f, two ? -m[n][2 * e + 1] : 0.f);
    }
  }

  // adds to x, a number of each token of eight, those of the earlier ones
  const auto add_earlier = [&](float& x) {
    UNROLL for (int step = 4; step < 32; step *= 2) {
      const float y = from_lane(x, lane - step);
      if (lane >= step) x += y;
    }
  };

  // ---- gates: a thread has the tokens 8 b + i8 of two channels
  const int here = 4 * (lane & 3);  // bytes, in the warp's piece of a row
  float G[8][2], end[2];
#if BOUNDED
  const float slope = fmaxf(rate, 1e-30f) * LOG2E, size = call.lower_bound * -LOG2E;
#else
  const float slope = LOG2E, size = rate;
#endif
  const float most = -LEAST * inverse(size);
  {
    float* edges = (float*)(shared + S_EDGES) + 8 * warp + j2;
    end[0] = end[1] = 0.f;
    UNROLL for (int b = 0; b < 8; b++) {
      const u32 f = 8 * b + i8 < have ? *(const u32*)(shared + S_F + place(8 * b + i8, warp) + here) : 0xff80ff80u;
      if (i8 == 0) *(f2*)(edges + b * K) = {end[0], end[1]};
      G[b][0] = -size * fminf(forget(low(f) * slope + bias.x * slope), most);
      G[b][1] = -size * fminf(forget(high(f) * slope + bias.y * slope), most);
      UNROLL for (int e = 0; e < 2; e++) {
        add_earlier(G[b][e]);
        G[b][e] += end[e];
        end[e] = from_lane(G[b][e], 28 + (lane & 3));
      }
    }
    if (i8 == 0) *(f2*)(edges + 8 * K) = {end[0], end[1]};
  }
  const bool strong = any(fminf(end[0], end[1]) < -RANGE);
  sync();  // numbers, dP and dM are written; edges are read by the warp that wrote them

  const auto edge = [&](int b, int e) { return ((const float*)(shared + S_EDGES))[b * K + 8 * warp + j2 + e]; };
  const auto anchor = [&](int b, int e) { return rintf(0.5f * (strong ? edge(b, e) + edge(b + 1, e) : end[e])); };
  // decays between an anchor or a boundary and another, which are powers of 2
  const auto from = [&](int b, int e) { return exp2_(anchor(b, e) - rintf(edge(b, e))); };
  const auto to = [&](int b, int e) { return exp2_(rintf(edge(b + 1, e)) - anchor(b, e)); };
  const auto over = [&](int b, int count, int e) { return exp2_(rintf(edge(b + count, e)) - rintf(edge(b, e))); };
  const auto word_of = [&](int tile, int b) {
    return 8 * b + i8 < have ? *(const u32*)(shared + tile + place(8 * b + i8, warp) + here) : 0u;
  };
  const auto unit = [&](int tile, int b, int e) {
    const u32 x = word_of(tile, b);
    return (e ? high(x) : low(x)) * numbers[(tile == S_K ? 64 : 0) + 8 * b + i8];
  };

  // What depends on G is computed anew after this: to keep it would take more registers than there are.
  const auto again = [&] { UNROLL for (int b = 0; b < 8; b++) settle(G[b]); };

  // rows decayed from their anchors, as the right operands of products that they are summed in, and as they are
  u32 q_rows[8], k_rows[8], k_columns[8];
  UNROLL for (int b = 0; b < 8; b++) {
    float d[2], g[2];
    UNROLL for (int e = 0; e < 2; e++) {
      const float x = G[b][e] - anchor(b, e);
      d[e] = exp2_(x);
      g[e] = exp2_(-x);
    }
    q_rows[b] = bf16_pair(unit(S_Q, b, 0) * d[0], unit(S_Q, b, 1) * d[1]);
    k_rows[b] = bf16_pair(unit(S_K, b, 0) * d[0], unit(S_K, b, 1) * d[1]);
    k_columns[b] = bf16_pair(unit(S_K, b, 0) * g[0], unit(S_K, b, 1) * g[1]);
  }
  // a block of 16 x 16 of dP or dM, or its transpose, as left operand
  const auto block_of = [&](u32* a, int tile, int B, int J) {
    load_matrices4(a, shared + tile + place(16 * B + 8 * (matrix & 1) + r, 2 * J + (matrix >> 1)));
  };
  const auto transposed_block_of = [&](u32* a, int tile, int B, int J) {
    load_matrices4_transposed(a, shared + tile + place(16 * B + 8 * (matrix >> 1) + r, 2 * J + (matrix & 1)));
  };
  const auto scaled = [&](u32 x, float s0, float s1) { return multiply_bf16_pairs(x, bf16_pair(s0, s1)); };

  // sums over earlier tokens, of the rows of block B, related to their anchors: x [16, 8] = sum of dX k decayed
  const auto sum_earlier = [&](float* x, int tile, int B) {
    UNROLL for (int e = 0; e < 4; e++) x[e] = 0.f;
    u32 a[4];
    if (!strong) {
      UNROLL for (int J = 0; J <= B; J++) {
        block_of(a, tile, B, J);
        multiply_bf16(x, a, transposed(k_columns[2 * J]), transposed(k_columns[2 * J + 1]));
      }
      return;
    }
    UNROLL for (int J = 0; J < B; J++) {
      UNROLL for (int e = 0; e < 4; e++) x[e] *= over(2 * J, 2, e & 1);
      block_of(a, tile, B, J);
      const u32 one = scaled(k_columns[2 * J], to(2 * J, 0) * over(2 * J + 1, 1, 0), to(2 * J, 1) * over(2 * J + 1, 1, 1));
      const u32 two = scaled(k_columns[2 * J + 1], to(2 * J + 1, 0), to(2 * J + 1, 1));
      multiply_bf16(x, a, transposed(one), transposed(two));
    }
    block_of(a, tile, B, B);
    float y[4] = {0, 0, 0, 0}, z[4] = {0, 0, 0, 0};
    multiply_bf16_8(y, a, transposed(k_columns[2 * B]));
    multiply_bf16_8(z, a + 2, transposed(k_columns[2 * B + 1]));
    UNROLL for (int e = 0; e < 2; e++) {
      x[e] = x[e] * from(2 * B, e) + y[e];
      x[2 + e] = (x[2 + e] * over(2 * B, 1, e) + y[2 + e] * to(2 * B, e)) * from(2 * B + 1, e) + z[2 + e];
    }
  };
  // sums over later tokens, of the columns of block J: x [16, 8] = sum of dP^T q decayed + dM^T k decayed
  const auto sum_later = [&](float* x, int J) {
    UNROLL for (int e = 0; e < 4; e++) x[e] = 0.f;
    u32 a[4];
    if (!strong) {
      UNROLL for (int B = 3; B >= J; B--) {
        transposed_block_of(a, S_P, B, J);
        multiply_bf16(x, a, transposed(q_rows[2 * B]), transposed(q_rows[2 * B + 1]));
        transposed_block_of(a, S_M, B, J);
        multiply_bf16(x, a, transposed(k_rows[2 * B]), transposed(k_rows[2 * B + 1]));
      }
      return;
    }
    UNROLL for (int B = 3; B > J; B--) {
      UNROLL for (int e = 0; e < 4; e++) x[e] *= over(2 * B, 2, e & 1);
      const float s0 = from(2 * B, 0), s1 = from(2 * B, 1);
      const float t0 = from(2 * B + 1, 0) * over(2 * B, 1, 0), t1 = from(2 * B + 1, 1) * over(2 * B, 1, 1);
      transposed_block_of(a, S_P, B, J);
      multiply_bf16(x, a, transposed(scaled(q_rows[2 * B], s0, s1)), transposed(scaled(q_rows[2 * B + 1], t0, t1)));
      transposed_block_of(a, S_M, B, J);
      multiply_bf16(x, a, transposed(scaled(k_rows[2 * B], s0, s1)), transposed(scaled(k_rows[2 * B + 1], t0, t1)));
    }
    float y[4] = {0, 0, 0, 0}, z[4] = {0, 0, 0, 0};
    transposed_block_of(a, S_P, J, J);
    multiply_bf16_8(y, a, transposed(q_rows[2 * J]));
    multiply_bf16_8(z, a + 2, transposed(q_rows[2 * J + 1]));
    transposed_block_of(a, S_M, J, J);
    multiply_bf16_8(y, a, transposed(k_rows[2 * J]));
    multiply_bf16_8(z, a + 2, transposed(k_rows[2 * J + 1]));
    UNROLL for (int e = 0; e < 2; e++) {
      x[e] = (x[e] * over(2 * J + 1, 1, e) + z[e] * from(2 * J + 1, e)) * to(2 * J, e) + y[e];
      x[2 + e] = x[2 + e] * to(2 * J + 1, e) + z[2 + e];
    }
  };
  // x [64, 8] = rows [64, V] times a state [V, K]
  const auto times_state = [&](float (*x)[2], int rows, int state) {
    UNROLL for (int b = 0; b < 8; b++) x[b][0] = x[b][1] = 0.f;
    LOOP for (int s = 0; s < V / 32; s++) {
      u32 c[4];
      const int v = 32 * s + lane;
      load_matrices4_transposed(c, shared + state + (v >> 6) * (128 * K) + place(v & 63, warp));
      UNROLL for (int half = 0; half < 2; half++) UNROLL for (int B = 0; B < 4; B++) {
        u32 a[4];
        load_matrices4(a, shared + rows + place(16 * B + 8 * (matrix & 1) + r, 4 * s + 2 * half + (matrix >> 1)));
        multiply_bf16(x[2 * B], a, c[2 * half], c[2 * half + 1]);
      }
    }
  };

  // ---- q
  again();
  float crossing[8][2], x[8][2], t[4];
  barrier_wait(loaded + 16, 0);
  times_state(x, S_DO, S_STATE);
  UNROLL for (int B = 0; B < 4; B++) {
    sum_earlier(t, S_P, B);
    UNROLL for (int h = 0; h < 2; h++) {
      const int b = 2 * B + h, row = 8 * b + i8;
      float dq[2];
      UNROLL for (int e = 0; e < 2; e++) {
        const float of_state = x[b][e] * exp2_(G[b][e]) * call.scale, q = unit(S_Q, b, e), new_ = t[2 * h + e];
        crossing[b][e] = q * of_state + (e ? high(q_rows[b]) : low(q_rows[b])) * new_;
        dq[e] = of_state + new_ * exp2_(G[b][e] - anchor(b, e)) + numbers[128 + row] * unit(S_K, b, e) - numbers[192 + row] * q;
      }
      x[b][0] = dq[0] * numbers[row];
      x[b][1] = dq[1] * numbers[row];
    }
  }
  UNROLL for (int b = 0; b < 8; b++) *(u32*)(shared + S_DQ + place(8 * b + i8, warp) + here) = bf16_pair(x[b][0], x[b][1]);

  // ---- k
  again();
  float dk[8][2];
  times_state(x, S_DV, S_STATE);
  UNROLL for (int B = 0; B < 4; B++) {
    float later[4];
    sum_earlier(t, S_M, B);
    sum_later(later, B);
    UNROLL for (int h = 0; h < 2; h++) UNROLL for (int e = 0; e < 2; e++) {
      const int b = 2 * B + h, row = 8 * b + i8;
      const float of_state = -x[b][e] * exp2_(G[b][e]), from_anchor = G[b][e] - anchor(b, e), k = unit(S_K, b, e);
      crossing[b][e] += k * of_state + (e ? high(k_rows[b]) : low(k_rows[b])) * t[2 * h + e];
      crossing[b][e] -= (e ? high(k_columns[b]) : low(k_columns[b])) * later[2 * h + e];
      dk[b][e] = of_state + t[2 * h + e] * exp2_(from_anchor) + later[2 * h + e] * exp2_(-from_anchor);
      dk[b][e] += numbers[128 + row] * unit(S_Q, b, e) - numbers[256 + row] * k;
    }
  }
  barrier_wait(loaded + 24, 0);
  float whole[2];  // the gradient of the whole chunk's decay
  {
    float sums[8] = {0, 0, 0, 0, 0, 0, 0, 0};
    UNROLL for (int s = 0; s < V / 32; s++) {
      const int v = 32 * s + lane, at = (v >> 6) * (128 * K) + place(v & 63, warp);
      const u4 y = *(const u4*)(shared + S_STATE + at), z = *(const u4*)(shared + S_DSTATE + at);
      sums[0] += low(y.x) * low(z.x), sums[1] += high(y.x) * high(z.x);
      sums[2] += low(y.y) * low(z.y), sums[3] += high(y.y) * high(z.y);
      sums[4] += low(y.z) * low(z.z), sums[5] += high(y.z) * high(z.z);
      sums[6] += low(y.w) * low(z.w), sums[7] += high(y.w) * high(z.w);
    }
    UNROLL for (int n = 0; n < 8; n++) UNROLL for (int step = 16; step; step /= 2) sums[n] += from_lane(sums[n], lane ^ step);
    UNROLL for (int e = 0; e < 2; e++) {
      const float one = j2 & 2 ? sums[2 + e] : sums[e], two = j2 & 2 ? sums[6 + e] : sums[4 + e];
      whole[e] = exp2_(end[e]) * (j2 & 4 ? two : one);
    }
  }
  again();
  times_state(x, S_U, S_DSTATE);
  UNROLL for (int b = 0; b < 8; b++) UNROLL for (int e = 0; e < 2; e++) {
    const float of_state = x[b][e] * exp2_(end[e] - G[b][e]);
    dk[b][e] = (dk[b][e] + of_state) * numbers[64 + 8 * b + i8];
    const bool there = 8 * b + i8 < have;  // what is loaded after the last token is of the next document
    x[b][e] = there ? unit(S_K, b, e) * of_state : 0.f;
    crossing[b][e] = there ? crossing[b][e] : 0.f;
  }

  // ---- gates: x of all earlier tokens, and crossing of this and all later ones
  UNROLL for (int e = 0; e < 2; e++) {
    float before = whole[e], after = 0.f;
    UNROLL for (int b = 0; b < 8; b++) {
      add_earlier(x[b][e]);
      const float total = from_lane(x[b][e], 28 + (lane & 3)), y = from_lane(x[b][e], lane - 4);
      x[b][e] = before + (i8 ? y : 0.f);
      before += total;
    }
    UNROLL for (int b = 7; b >= 0; b--) {
      UNROLL for (int step = 4; step < 32; step *= 2) {
        const float y = from_lane(crossing[b][e], lane + step);
        if (lane + step < 32) crossing[b][e] += y;
      }
      const float total = from_lane(crossing[b][e], lane & 3);
      x[b][e] += after + crossing[b][e];
      after += total;
    }
  }
  float dA[2] = {0, 0}, dbias[2] = {0, 0};
  sync();  // q, k and f have been read
  UNROLL for (int b = 0; b < 8; b++) {
    const int at = place(8 * b + i8, warp) + here;
    const bool there = 8 * b + i8 < have;
    const u32 f = *(const u32*)(shared + S_F + at);
    float df[2];
    UNROLL for (int e = 0; e < 2; e++) {
      const float y = (e ? high(f) + bias.y : low(f) + bias.x), dg = x[b][e];
#if BOUNDED
      const float less = exp2_(-fabsf(y * slope)), both = inverse(1.f + less);  // s (1 - s) of s = sigmoid(rate y)
      df[e] = dg * call.lower_bound * rate * less * both * both;
#else
      df[e] = -rate * dg * inverse(1.f + exp2_(-LOG2E * y));
#endif
      const float forgets = forget(y * slope);
      df[e] = there && forgets < most ? df[e] : 0.f;
#if BOUNDED
      dA[e] += df[e] * y;
#else
      dA[e] += there && forgets < most ? -rate * dg * forgets / LOG2E : 0.f;
#endif
      dbias[e] += df[e];
    }
    *(u32*)(shared + S_K + at) = bf16_pair(dk[b][0], dk[b][1]);
    *(u32*)(shared + S_F + at) = bf16_pair(df[0], df[1]);
  }
  UNROLL for (int e = 0; e < 2; e++) UNROLL for (int step = 4; step < 32; step *= 2) {
    dA[e] += from_lane(dA[e], lane ^ step);
    dbias[e] += from_lane(dbias[e], lane ^ step);
  }
  if (i8 == 0) {
    *(f2*)(call.dA_log + channel) = {dA[0], dA[1]};
    *(f2*)(call.ddt_bias + channel) = {dbias[0], dbias[1]};
  }
  sync();
  UNROLL for (int n = 0; n < 2; n++) {
    const int at = THREAD + 4 * K * n, row = at / (K / 8), piece = at % (K / 8);
    const long long out = ((long long)(first + row) * heads + head) * K + 8 * piece;
    if (row < have) {
      *(u4*)(call.dq + out) = *(const u4*)(shared + S_DQ + place(row, piece));
      *(u4*)(call.dk + out) = *(const u4*)(shared + S_K + place(row, piece));
      *(u4*)(call.df + out) = *(const u4*)(shared + S_F + place(row, piece));
    }
  }
}
