// Runs the kernels on a CPU, one block at a time, with the names of machine.h and pipeline.h. Every thread is a fiber. What
// the lanes of a warp do together is done for all of them by the lane that arrives last.
#include <math.h>
#include <setjmp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>
#include <algorithm>
#include <vector>
using std::max;
using std::min;
typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned long long u64;
#define DEVICE static inline
#define KERNEL(threads, blocks) static void
#define BY_VALUE const
#define UNROLL
#define LOOP
struct f2 { float x, y; };
struct alignas(16) f4 { float x, y, z, w; };
struct alignas(16) u4 { u32 x, y, z, w; };

#ifndef THREADS
#define THREADS 256
#endif
static int THREAD, BLOCK;
alignas(1024) static char shared[232448];
struct Fiber { jmp_buf here; std::vector<char> stack; bool begun, done; };
static Fiber fibers[THREADS];
static jmp_buf scheduler;
static ucontext_t main_context;
static long meetings;
static void yield() { if (!_setjmp(fibers[THREAD].here)) _longjmp(scheduler, 1); }

struct Meeting { int arrived, turn; };
static Meeting of_block, of_warps[THREADS / 32];
// Waits for `count` threads; the last one runs `together` before they all go on.
template <class F> static void meet(Meeting& m, int count, F together) {
  const int turn = m.turn;
  if (++m.arrived == count) {
    together();
    m.arrived = 0;
    m.turn++;
    meetings++;
  } else {
    while (m.turn == turn) yield();
  }
}
DEVICE void sync() { meet(of_block, THREADS, [] {}); }

// What each lane brings to its warp's meeting.
static char boxes[THREADS][64];
template <class T, class F> static void warp_meets(const T& mine, F together) {
  static_assert(sizeof(T) <= sizeof boxes[0]);
  memcpy(boxes[THREAD], &mine, sizeof(T));
  const int first = THREAD & ~31;
  meet(of_warps[THREAD / 32], 32, [&] { together([&](int lane) -> T& { return *(T*)boxes[first + lane]; }); });
}

DEVICE float float_of(u32 x) { float y; memcpy(&y, &x, 4); return y; }
DEVICE u32 bits_of(float x) { u32 y; memcpy(&y, &x, 4); return y; }
DEVICE float exp2_(float x) { return x < -126.f ? 0.f : exp2f(x); }
DEVICE float inverse(float x) { return 1.f / x; }
DEVICE float inverse_root(float x) { return 1.f / sqrtf(x); }
DEVICE u32 bf16(float x) {
  const u32 u = bits_of(x);
  return (u & 0x7f800000) == 0x7f800000 ? u >> 16 : (u + 0x7fff + ((u >> 16) & 1)) >> 16;
}
DEVICE u32 fp16(float x) {
  const u32 u = bits_of(x), sign = u >> 16 & 0x8000;
  const float size = fabsf(x);
  if (!(size < 65520.f)) return sign | (size == size ? 0x7c00 : 0x7e00);
  if (size < 6.103515625e-5f) return sign | (u32)nearbyintf(size * 16777216.f);
  return sign | (((u & 0x7fffffff) + 0xfff + ((u >> 13) & 1)) >> 13) - (112 << 10);
}
DEVICE float of_fp16(u32 x) {
  const u32 size = x & 0x7fff;
  float y = size < 0x400 ? size / 16777216.f : float_of((size << 13) + (size < 0x7c00 ? 112 << 23 : 224 << 23));
  return x & 0x8000 ? -y : y;
}
DEVICE u32 bf16_pair(float x, float y) { return bf16(x) | bf16(y) << 16; }
DEVICE u32 multiply_bf16_pairs(u32 x, u32 y) {
  return bf16_pair(float_of(x << 16) * float_of(y << 16), float_of(x & 0xffff0000u) * float_of(y & 0xffff0000u));
}
DEVICE u32 fp16_pair(float x, float y) { return fp16(x) | fp16(y) << 16; }
DEVICE float fp16_low(u32 x) { return of_fp16(x & 0xffff); }
DEVICE float fp16_high(u32 x) { return of_fp16(x >> 16); }

struct Matrices { u32* d; const char* row; };
static void load_matrices(u32* d, const char* p, int count, bool transposed) {
  warp_meets(Matrices{d, p}, [&](auto of) {
    for (int m = 0; m < count; m++) for (int lane = 0; lane < 32; lane++) {
      u32 x = 0;
      for (int e = 0; e < 2; e++) {
        const int i = lane / 4, j = 2 * (lane & 3) + e;
        const char* row = of(8 * m + (transposed ? j : i)).row;
        if ((size_t)row & 15) abort();
        u16 y;
        memcpy(&y, row + 2 * (transposed ? i : j), 2);
        x |= (u32)y << 16 * e;
      }
      of(lane).d[m] = x;
    }
  });
}
DEVICE void load_matrices4(u32* d, const char* p) { load_matrices(d, p, 4, false); }
DEVICE void load_matrices4_transposed(u32* d, const char* p) { load_matrices(d, p, 4, true); }
DEVICE void load_matrices2(u32* d, const char* p) { load_matrices(d, p, 2, false); }

struct Product { float* d; u32 a[4], b[2]; };
static void multiply(float* d, const u32* a, u32 b0, u32 b1, bool half) {
  warp_meets(Product{d, {a[0], a[1], a[2], a[3]}, {b0, b1}}, [&](auto of) {
    float A[16][16], B[8][16];
    const auto value = [&](u32 x, int high) {
      const u32 y = high ? x >> 16 : x & 0xffff;
      return half ? of_fp16(y) : float_of(y << 16);
    };
    for (int lane = 0; lane < 32; lane++) {
      const int i = lane / 4, j = 2 * (lane & 3);
      for (int n = 0; n < 4; n++) for (int e = 0; e < 2; e++) A[i + 8 * (n & 1)][j + 8 * (n >> 1) + e] = value(of(lane).a[n], e);
      for (int n = 0; n < 2; n++) for (int e = 0; e < 2; e++) B[i][j + 8 * n + e] = value(of(lane).b[n], e);
    }
    for (int lane = 0; lane < 32; lane++) for (int n = 0; n < 4; n++) {
      const float *x = A[lane / 4 + 8 * (n >> 1)], *y = B[2 * (lane & 3) + (n & 1)];
      float sum = 0;
      for (int k = 0; k < 16; k++) sum += x[k] * y[k];
      of(lane).d[n] += sum;
    }
  });
}
DEVICE void multiply_bf16(float* d, const u32* a, u32 b0, u32 b1) { multiply(d, a, b0, b1, false); }
DEVICE void multiply_fp16(float* d, const u32* a, u32 b0, u32 b1) { multiply(d, a, b0, b1, true); }

DEVICE void copy16(char* to, const void* from, bool there) {
  if ((size_t)from & 15) abort();
  if (there) memcpy(to, from, 16); else memset(to, 0, 16);
}
DEVICE void wait_for_copies() {}
DEVICE void atomic_or(u32* p, u32 x) { *p |= x; }
struct Vote { bool mine; u32* result; };
DEVICE u32 ballot(bool x) {
  u32 result = 0;
  warp_meets(Vote{x, &result}, [&](auto of) {
    u32 all = 0;
    for (int lane = 0; lane < 32; lane++) all |= (u32)of(lane).mine << lane;
    for (int lane = 0; lane < 32; lane++) *of(lane).result = all;
  });
  return result;
}
DEVICE bool any(bool x) { return ballot(x); }
DEVICE int first_set(u32 x) { return __builtin_ffs(x) - 1; }
template <class Number> struct Shuffle { Number mine; int lane; Number* result; };
template <class Number> DEVICE Number from_lane(Number x, int lane) {
  Number result = 0;
  warp_meets(Shuffle<Number>{x, lane, &result}, [&](auto of) {
    for (int n = 0; n < 32; n++) *of(n).result = of(of(n).lane & 31).mine;
  });
  return result;
}
DEVICE int from_lane_before(int x, int distance) {
  const int lane = THREAD & 31;
  return from_lane(x, lane < distance ? lane : lane - distance);
}

DEVICE void sync_warp() { meet(of_warps[THREAD / 32], 32, [] {}); }
struct Barrier { unsigned char count, pending; u16 phase; int bytes; };  // bytes that are announced and not yet there
static void advance(Barrier& b) {
  if (b.pending || b.bytes) return;
  b.phase ^= 1;
  b.pending = b.count;
  meetings++;
}
DEVICE void barrier_init(char* b, int count) { *(Barrier*)b = {(unsigned char)count, (unsigned char)count, 0, 0}; }
DEVICE void barriers_are_ready() {}
DEVICE void barrier_expect(char* b, int bytes) {
  ((Barrier*)b)->bytes += bytes;
  ((Barrier*)b)->pending--;
  advance(*(Barrier*)b);
}
DEVICE void store_if(void* to, u4 x, bool there) { if (there) memcpy(to, &x, 16); }
DEVICE void barrier_arrive_if(char* b, bool x) {
  if (!x) return;
  ((Barrier*)b)->pending--;
  advance(*(Barrier*)b);
}
DEVICE void barrier_wait(char* b, int phase) { while (((Barrier*)b)->phase == phase) yield(); }
struct alignas(64) TensorMap { const u16* base; long long columns, rows, padding[13]; };
DEVICE void load_tile(char* to, const TensorMap* map, int column, int row, char* b) {
  if ((size_t)to & 1023) abort();
  for (int i = 0; i < 64; i++) for (int j = 0; j < 64; j++) {
    const bool there = row + i < map->rows && column + j < map->columns;
    ((u16*)to)[(64 * i + j) ^ (i & 7) << 3] = there ? map->base[(row + i) * map->columns + column + j] : 0;
  }
  ((Barrier*)b)->bytes -= 8192;
  advance(*(Barrier*)b);
}
DEVICE void load_bytes(char* to, const void* from, int bytes, char* b) {
  memcpy(to, from, bytes);
  ((Barrier*)b)->bytes -= bytes;
  advance(*(Barrier*)b);
}
struct Stored { u32 d[4]; char* row; };
static void store_matrices(char* p, const u32* d, bool transposed) {
  warp_meets(Stored{{d[0], d[1], d[2], d[3]}, p}, [&](auto of) {
    for (int m = 0; m < 4; m++) for (int lane = 0; lane < 32; lane++) for (int e = 0; e < 2; e++) {
      const int i = lane / 4, j = 2 * (lane & 3) + e;
      char* row = of(8 * m + (transposed ? j : i)).row;
      if ((size_t)row & 15) abort();
      const u16 y = of(lane).d[m] >> 16 * e;
      memcpy(row + 2 * (transposed ? i : j), &y, 2);
    }
  });
}
DEVICE void store_matrices4(char* p, const u32* d) { store_matrices(p, d, false); }
DEVICE void store_matrices4_transposed(char* p, const u32* d) { store_matrices(p, d, true); }

DEVICE void products_begin() {}
DEVICE void products_commit() {}
template <int N> DEVICE void settle(float (&)[N]) {}
template <int N> DEVICE void products_wait() {}
DEVICE u64 operand(const char* p) { return (u64)p; }
DEVICE u64 operand_of_columns(const char* p) { return (u64)p; }
DEVICE u64 later(u64 operand, int bytes) { return operand + bytes; }
struct Left { float* d; u32 a[4]; };
template <int SIGN, int N, bool COLUMNS> static void multiply_wide(float* d, const u32* a, u64 b, int add) {
  warp_meets(Left{d, {a[0], a[1], a[2], a[3]}}, [&](auto of) {
    static float A[16][16], B[16][N];
    for (int lane = 0; lane < 32; lane++) for (int n = 0; n < 4; n++) for (int e = 0; e < 2; e++) {
      const u32 x = of(lane).a[n];
      A[lane / 4 + 8 * (n & 1)][2 * (lane & 3) + 8 * (n >> 1) + e] = float_of(e ? x & 0xffff0000u : x << 16);
    }
    for (int k = 0; k < 16; k++) for (int n = 0; n < N; n++) {
      u64 at = b + (COLUMNS ? n / 64 * 8192 + k * 128 + n % 64 * 2 : n * 128 + k * 2);
      at ^= (at >> 7 & 7) << 4;
      B[k][n] = float_of((u32) * (const u16*)at << 16);
    }
    for (int lane = 0; lane < 32; lane++) for (int i = 0; i < N / 2; i++) {
      const int row = lane / 4 + 8 * (i >> 1 & 1), column = i / 4 * 8 + 2 * (lane & 3) + (i & 1);
      float sum = 0;
      for (int k = 0; k < 16; k++) sum += A[row][k] * B[k][column];
      float& to = of(lane).d[i];
      to = (add ? to : 0.f) + SIGN * sum;
    }
  });
}
template <int SIGN> DEVICE void multiply64(float* d, const u32* a, u64 b, int add) { multiply_wide<SIGN, 64, false>(d, a, b, add); }
template <int SIGN> DEVICE void multiply64_columns(float* d, const u32* a, u64 b, int add) { multiply_wide<SIGN, 64, true>(d, a, b, add); }
template <int SIGN> DEVICE void multiply128_columns(float* d, const u32* a, u64 b, int add) { multiply_wide<SIGN, 128, true>(d, a, b, add); }

struct Word { u32 mine; u32* result; };
DEVICE u32 transposed(u32 x) {
  u32 result = 0;
  warp_meets(Word{x, &result}, [&](auto of) {
    const auto number = [&](int i, int j) { return of(4 * i + j / 2).mine >> 16 * (j & 1) & 0xffff; };
    for (int lane = 0; lane < 32; lane++) {
      const int i = lane / 4, j = 2 * (lane & 3);
      *of(lane).result = number(j, i) | number(j + 1, i) << 16;
    }
  });
  return result;
}
DEVICE void multiply_bf16_8(float* d, const u32* a, u32 b) {
  const u32 whole[4] = {a[0], a[1], 0, 0};
  multiply_bf16(d, whole, b, 0);
}

static void (*block)();
static void fiber() {
  block();
  fibers[THREAD].done = true;
  _longjmp(scheduler, 1);
}
// Runs a block; false if its threads wait for each other without end.
static bool run_block() {
  memset(shared, 0xff, sizeof shared);  // NaN: what nobody wrote shows
  of_block = {};
  for (auto& m : of_warps) m = {};
  for (auto& x : fibers) x.begun = x.done = false;
  static int left;
  for (left = THREADS; left;) {
    const long meetings_before = meetings;
    const int left_before = left;
    for (THREAD = 0; THREAD < THREADS; THREAD++) {
      Fiber& x = fibers[THREAD];
      if (x.done) continue;
      if (_setjmp(scheduler)) {
        left -= fibers[THREAD].done;
        continue;
      }
      if (x.begun) _longjmp(x.here, 1);
      x.begun = true;
      x.stack.resize(1 << 16);
      static ucontext_t context;
      getcontext(&context);
      context.uc_stack.ss_sp = x.stack.data();
      context.uc_stack.ss_size = x.stack.size();
      context.uc_link = nullptr;
      makecontext(&context, fiber, 0);
      swapcontext(&main_context, &context);
    }
    if (meetings == meetings_before && left == left_before) return false;
  }
  return true;
}

// Runs a kernel; returns 0, or 1 after a deadlock, or 2 if it wrote beyond its shared memory.
#define RUN(kernel)                                                                              \
  extern "C" int run(const void* arguments, int blocks) {                                        \
    static Call call;                                                                            \
    memcpy(&call, arguments, sizeof call);                                                       \
    block = [] { kernel(call); };                                                                \
    for (BLOCK = 0; BLOCK < blocks; BLOCK++) {                                                   \
      if (!run_block()) return 1;                                                                \
      for (const char* p = shared + SHARED_BYTES; p < shared + sizeof shared; p++)               \
        if (*p != (char)0xff) return 2;                                                          \
    }                                                                                            \
    return 0;                                                                                    \
  }
