// What the kernels use of a GPU. tests/ops/emulator.h has the same names for a CPU.
typedef unsigned int u32;
typedef unsigned short u16;
#define DEVICE __device__ __forceinline__
#define KERNEL(threads, blocks) extern "C" __global__ void __launch_bounds__(threads, blocks)
#define BY_VALUE const __grid_constant__
#define UNROLL _Pragma("unroll")
#define LOOP _Pragma("unroll 1")
#define THREAD ((int)threadIdx.x)
#define BLOCK ((int)blockIdx.x)
extern __shared__ __align__(1024) char shared[];
struct f2 { float x, y; };
struct alignas(16) f4 { float x, y, z, w; };
struct alignas(16) u4 { u32 x, y, z, w; };

DEVICE u32 address(const void* p) { return (u32)__cvta_generic_to_shared(p); }
DEVICE void sync() { __syncthreads(); }
DEVICE float float_of(u32 bits) { return __uint_as_float(bits); }
DEVICE float exp2_(float x) { float y; asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }
DEVICE float inverse(float x) { float y; asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }
DEVICE float inverse_root(float x) { float y; asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }

// two numbers of 16 bits in a register, the first in the low half
DEVICE u32 bf16_pair(float x, float y) {
  u32 z;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(z) : "f"(y), "f"(x));
  return z;
}
DEVICE u32 multiply_bf16_pairs(u32 x, u32 y) {
  u32 z;
  asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(z) : "r"(x), "r"(y));
  return z;
}
DEVICE u32 fp16_pair(float x, float y) {
  u32 z;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(z) : "f"(y), "f"(x));
  return z;
}
DEVICE float fp16_low(u32 x) {
  float y;
  asm("{.reg .b16 a, b; mov.b32 {a, b}, %1; cvt.f32.f16 %0, a;}" : "=f"(y) : "r"(x));
  return y;
}
DEVICE float fp16_high(u32 x) {
  float y;
  asm("{.reg .b16 a, b; mov.b32 {a, b}, %1; cvt.f32.f16 %0, b;}" : "=f"(y) : "r"(x));
  return y;
}

// ldmatrix: four or two matrices of 8 x 8; lane 8 m + r has the address of row r of matrix m
DEVICE void load_matrices4(u32* d, const char* p) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3]) : "r"(address(p)) : "memory");
}
DEVICE void load_matrices4_transposed(u32* d, const char* p) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3]) : "r"(address(p)) : "memory");
}
DEVICE void load_matrices2(u32* d, const char* p) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];" : "=r"(d[0]), "=r"(d[1]) : "r"(address(p)) : "memory");
}

// d [16, 8] += a [16, 16] b [16, 8]
DEVICE void multiply_bf16(float* d, const u32* a, u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
DEVICE void multiply_fp16(float* d, const u32* a, u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// 16 bytes from global to shared memory, or zeros
DEVICE void copy16(char* to, const void* from, bool there) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address(to)), "l"(from), "r"(there ? 16 : 0) : "memory");
}
DEVICE void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }
DEVICE void atomic_or(u32* p, u32 x) { atomicOr(p, x); }
DEVICE bool any(bool x) { return __any_sync(0xffffffffu, x); }
DEVICE u32 ballot(bool x) { return __ballot_sync(0xffffffffu, x); }
DEVICE int first_set(u32 x) { return __ffs(x) - 1; }
template <class Number> DEVICE Number from_lane(Number x, int lane) { return __shfl_sync(0xffffffffu, x, lane); }
DEVICE int from_lane_before(int x, int distance) { return __shfl_up_sync(0xffffffffu, x, distance); }
