// What scan.cu and finish.cu use of a GPU beside machine.h: loads of tiles, barriers in shared memory, and products of four
// warps. tests/ops/emulator.h has the same names for a CPU.
typedef unsigned long long u64;
struct alignas(64) TensorMap { char bytes[128]; };

DEVICE void sync_warp() { __syncwarp(); }

// a matrix of 8 x 8 numbers of 16 bits, of which each lane has two of row lane / 4, and its transpose
DEVICE u32 transposed(u32 x) {
  u32 y;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
  return y;
}
// d [16, 8] += a [16, 8] b [8, 8]
DEVICE void multiply_bf16_8(float* d, const u32* a, u32 b) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(b));
}

// A barrier in shared memory: a phase ends after `count` arrivals and all bytes that were announced
DEVICE void barrier_init(char* b, int count) { asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(address(b)), "r"(count) : "memory"); }
DEVICE void barriers_are_ready() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
DEVICE void barrier_expect(char* b, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address(b)), "r"(bytes) : "memory");
}
// without branches, which would make products that still run wait for each other
DEVICE void barrier_arrive_if(char* b, bool x) {
  asm volatile("{.reg .pred p; setp.ne.b32 p, %1, 0; @p mbarrier.arrive.shared::cta.b64 _, [%0];}" ::"r"(address(b)), "r"((int)x) : "memory");
}
DEVICE void store_if(void* to, u4 x, bool there) {
  asm volatile("{.reg .pred p; setp.ne.b32 p, %5, 0; @p st.global.v4.b32 [%0], {%1, %2, %3, %4};}"
               ::"l"(to), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w), "r"((int)there) : "memory");
}
DEVICE void barrier_wait(char* b, int phase) {  // traps after some seconds, so that a fault does not block the GPU
  LOOP for (int n = 0; n < 1 << 22; n++) {
    u32 done;
    asm volatile("{.reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}"
                 : "=r"(done) : "r"(address(b)), "r"(phase) : "memory");
    if (done) return;
  }
  asm volatile("trap;");
}

// Loads of 64 rows of 128 bytes, whose 16-byte pieces end at piece ^ row % 8, and of consecutive bytes
DEVICE void load_tile(char* to, const TensorMap* map, int column, int row, char* b) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];"
               ::"r"(address(to)), "l"(map), "r"(address(b)), "r"(column), "r"(row) : "memory");
}
DEVICE void load_bytes(char* to, const void* from, int bytes, char* b) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
               ::"r"(address(to)), "l"(from), "r"(bytes), "r"(address(b)) : "memory");
}

// stmatrix: four matrices of 8 x 8; lane 8 m + r has the address of row r of matrix m
DEVICE void store_matrices4(char* p, const u32* d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1,%2,%3,%4};"
               ::"r"(address(p)), "r"(d[0]), "r"(d[1]), "r"(d[2]), "r"(d[3]) : "memory");
}
DEVICE void store_matrices4_transposed(char* p, const u32* d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1,%2,%3,%4};"
               ::"r"(address(p)), "r"(d[0]), "r"(d[1]), "r"(d[2]), "r"(d[3]) : "memory");
}

// Products of four warps, d [64, N] (+)= SIGN a [64, 16] b [16, N]. They run on while the warps go on.
DEVICE void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N> DEVICE void products_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory"); }
// keeps the compiler from moving uses of results before the wait
template <int N> DEVICE void settle(float (&d)[N]) { UNROLL for (int n = 0; n < N; n++) asm volatile("" : "+f"(d[n])::"memory"); }
// right operands in tiles that load_tile wrote: b^T with N rows, or b with N columns in tiles 8,192 bytes apart
DEVICE u64 operand(const char* p) { return (u64)((address(p) & 0x3ffff) >> 4) | (u64)1 << 16 | (u64)64 << 32 | (u64)1 << 62; }
DEVICE u64 operand_of_columns(const char* p) { return (u64)((address(p) & 0x3ffff) >> 4) | (u64)512 << 16 | (u64)64 << 32 | (u64)1 << 62; }
// The operand that begins some bytes after another one. This takes one instruction. To call operand() again takes six,
// which is longer than a product of 64 columns.
DEVICE u64 later(u64 operand, int bytes) { return operand + (bytes >> 4); }
#define D8(d, n) "+f"(d[n]), "+f"(d[n + 1]), "+f"(d[n + 2]), "+f"(d[n + 3]), "+f"(d[n + 4]), "+f"(d[n + 5]), "+f"(d[n + 6]), "+f"(d[n + 7])
template <int SIGN> DEVICE void multiply64(float* d, const u32* a, u64 b, int add) {
  asm volatile("{.reg .pred p; setp.ne.b32 p, %37, 0;\n"
    "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31}, "
    "{%32,%33,%34,%35}, %36, p, %38, 1, 0;}"
    : D8(d, 0), D8(d, 8), D8(d, 16), D8(d, 24) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add), "n"(SIGN));
}
template <int SIGN> DEVICE void multiply64_columns(float* d, const u32* a, u64 b, int add) {
  asm volatile("{.reg .pred p; setp.ne.b32 p, %37, 0;\n"
    "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31}, "
    "{%32,%33,%34,%35}, %36, p, %38, 1, 1;}"
    : D8(d, 0), D8(d, 8), D8(d, 16), D8(d, 24) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add), "n"(SIGN));
}
template <int SIGN> DEVICE void multiply128_columns(float* d, const u32* a, u64 b, int add) {
  asm volatile("{.reg .pred p; setp.ne.b32 p, %69, 0;\n"
    "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63}, "
    "{%64,%65,%66,%67}, %68, p, %70, 1, 1;}"
    : D8(d, 0), D8(d, 8), D8(d, 16), D8(d, 24), D8(d, 32), D8(d, 40), D8(d, 48), D8(d, 56) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add), "n"(SIGN));
}
