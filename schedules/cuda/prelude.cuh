// The words that kernels are written in: types, fragments for the tensor cores, asynchronous copies,
// barriers. Nothing is included, so nvcc and NVRTC compile it alike.
// pipeline/cuda/emulation.h says the same words for the CPU.

typedef unsigned char u8;
struct __align__(2) f16 { unsigned short bits; };
struct __align__(2) bf16 { unsigned short bits; };

// `name`: the block's dynamic shared memory, from an address that is a multiple of 1024.
extern __shared__ __align__(1024) unsigned char prelude_shared_memory[];
#define SHARED_MEMORY(name) unsigned char* const name = prelude_shared_memory

#define WORD __device__ __forceinline__

// ---- numbers -------------------------------------------------------------------------------------

WORD float to_float(float x) { return x; }
WORD float to_float(u8 x) { return x; }
WORD float to_float(f16 x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}
WORD float to_float(bf16 x) { return __uint_as_float((unsigned)x.bits << 16); }

// To the nearest, ties to even; what is too large for f16 becomes infinite.
template <class T> WORD T from_float(float x);
template <> WORD float from_float<float>(float x) { return x; }
template <> WORD f16 from_float<f16>(float x) {
  f16 y;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
}
#if __CUDA_ARCH__ >= 800
template <> WORD bf16 from_float<bf16>(float x) {
  bf16 y;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
}
#endif

// To the nearest integer, ties to even, within 0..255.
WORD u8 to_u8(float x) {
  unsigned y;
  asm("cvt.rni.sat.u8.f32 %0, %1;" : "=r"(y) : "f"(x));
  return (u8)y;
}

// Two numbers of 16 bits in one register, `lo` in the lower half.
template <class T> WORD unsigned pack2(float lo, float hi) {
  return from_float<T>(lo).bits | (unsigned)from_float<T>(hi).bits << 16;
}
#if __CUDA_ARCH__ >= 800
template <> WORD unsigned pack2<f16>(float lo, float hi) {
  unsigned y;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(hi), "f"(lo));
  return y;
}
template <> WORD unsigned pack2<bf16>(float lo, float hi) {
  unsigned y;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(hi), "f"(lo));
  return y;
}
#endif
template <class T> WORD void unpack2(unsigned x, float& lo, float& hi) {
  T a, b;
  a.bits = (unsigned short)x;
  b.bits = (unsigned short)(x >> 16);
  lo = to_float(a);
  hi = to_float(b);
}

WORD float fast_exp2(float x) {  // about 2 units in the last place; denormals are zero
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
WORD float reciprocal_sqrt(float x) { return rsqrtf(x); }
WORD float fast_divide(float a, float b) { return __fdividef(a, b); }

// ---- threads -------------------------------------------------------------------------------------

WORD void block_sync() { __syncthreads(); }
WORD void warp_sync() { __syncwarp(); }
// Barrier `id` (1..15) of `threads` threads, whole warps.
WORD void group_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
template <class V> WORD V shuffle_xor(V v, int mask) { return __shfl_xor_sync(0xffffffffu, v, mask); }
template <class V> WORD V shuffle(V v, int lane) { return __shfl_sync(0xffffffffu, v, lane); }

// ---- shared memory -------------------------------------------------------------------------------

// Not by asm: the compiler adds constant offsets to the address of what it can see into.
WORD unsigned shared_address(const void* pointer) {
  return (unsigned)__cvta_generic_to_shared(pointer);
}

// 8 × 8 matrices of 16-bit numbers: lane 8*i + r gives the address of row r of matrix i (16 bytes,
// aligned to 16); r[i] gets, in lane l, columns 2*(l%4) and 2*(l%4)+1 of row l/4 of matrix i.
// x2 asks for valid addresses in all lanes. _trans: of the transposed matrices.
WORD void load_matrix_x4(unsigned (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)));
}
WORD void load_matrix_x4_trans(unsigned (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)));
}
WORD void load_matrix_x2(unsigned (&r)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1]) : "r"(shared_address(row)));
}
WORD void load_matrix_x2_trans(unsigned (&r)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1]) : "r"(shared_address(row)));
}

// 16 bytes, both ends aligned to 16; zeros where not valid (nothing is read then). They are there
// for this thread after copy_wait, for others after a barrier behind it.
WORD void copy_async_16(void* shared, const void* global, bool valid) {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               ::"r"(shared_address(shared)), "l"(global), "r"(valid ? 16 : 0) : "memory");
#else
  *(uint4*)shared = valid ? *(const uint4*)global : make_uint4(0, 0, 0, 0);
#endif
}
WORD void copy_commit() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
// Until at most the N groups committed last are under way.
template <int N> WORD void copy_wait() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
#endif
}

// ---- tensor cores: d += a * b --------------------------------------------------------------------
// With g = lane / 4 and t = lane % 4: d[0], d[1] are columns 2t, 2t+1 of row g; d[2], d[3] of row g+8.

// 16 × 8 × 16. a[0]: row g, k 2t and 2t+1; a[1]: row g+8; a[2], a[3]: the same at k+8.
// b[0]: column g, k 2t and 2t+1; b[1]: the same at k+8.
template <class T> WORD void mma_16816(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]);
#if __CUDA_ARCH__ >= 800
#define MMA_16816(T, NAME)                                                                         \
  template <>                                                                                      \
  WORD void mma_16816<T>(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {          \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." NAME "." NAME ".f32 "                    \
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                 \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                  \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));              \
  }
MMA_16816(f16, "f16")
MMA_16816(bf16, "bf16")
#undef MMA_16816

// 16 × 8 × 32 where of every four neighbours along k in a row of a two are kept: a as for 16 × 8 × 16
// of what is kept. b[0]: column g, k 2t and 2t+1; b[1], b[2], b[3]: at k+8, k+16, k+24. `kept` is read
// of lanes with t = 0 (k 0..15) and t = 1 (k 16..31): its lower half is of row g, its upper half of
// row g+8; 4 bits for every four: where the first lies, and above that where the second does.
#if __CUDACC_VER_MAJOR__ * 100 + __CUDACC_VER_MINOR__ >= 1205
#define MMA_SP "mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32."
#else
#define MMA_SP "mma.sp.sync.aligned.m16n8k32.row.col.f32."
#endif
template <class T>
WORD void mma_sp_16832(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[4],
                       unsigned kept);
#define MMA_SP_16832(T, NAME)                                                                      \
  template <>                                                                                      \
  WORD void mma_sp_16832<T>(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[4],         \
                            unsigned kept) {                                                       \
    asm volatile(MMA_SP NAME "." NAME ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "                  \
                 "{%8, %9, %10, %11}, {%0, %1, %2, %3}, %12, 0x0;"                                 \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                  \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]),    \
                   "r"(b[3]), "r"(kept));                                                          \
  }
MMA_SP_16832(f16, "f16")
MMA_SP_16832(bf16, "bf16")
#undef MMA_SP_16832

// 16 × 8 × 8, numbers as to_tf32 makes them. a[0]: row g, k t; a[1]: row g+8; a[2], a[3]: at k+4.
// b[0]: column g, k t; b[1]: at k+4.
WORD void mma_1688_tf32(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
               "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
WORD unsigned to_tf32(float x) {  // to the nearest, ties away from zero
  unsigned y;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(x));
  return y;
}

// 16 × 8 × 32, a unsigned, b signed, exact in 32 bits. a[0]: row g, k 4t..4t+3; a[1]: row g+8;
// a[2], a[3]: at k+16. b[0]: column g, k 4t..4t+3; b[1]: at k+16.
WORD void mma_16832_u8s8(int (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 "
               "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
#else
template <>
WORD void mma_16816<f16>(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
#pragma unroll
  for (int half = 0; half < 2; ++half)
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 "
                 "{%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[2 * half]), "r"(a[2 * half + 1]), "r"(b[half]));
}
WORD void mma_16832_u8s8(int (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
#pragma unroll
  for (int i = 0; i < 4; ++i)
    asm volatile("mma.sync.aligned.m8n8k16.row.col.s32.u8.s8.s32 {%0, %1}, {%2}, {%3}, {%0, %1};"
                 : "+r"(d[i % 2 * 2]), "+r"(d[i % 2 * 2 + 1]) : "r"(a[i]), "r"(b[i / 2]));
}
#endif

// ---- wgmma, in code for sm_90a: d += a * b by the 128 threads of a warpgroup, from shared memory -----
// Matrices are rows of 128 bytes along k, from multiples of 1024, swizzled: what lies at byte x of row
// r is at swizzled(r, x). Warp w of the four has rows 16w..16w+15 of d (64 × N), in every 8 columns the
// four numbers of an mma. In order: writes to shared memory and shared_fence by the threads that wrote;
// a barrier; wgmma_keep(d), wgmma_fence, wgmma..., wgmma_commit, wgmma_wait, wgmma_keep(d). Until the
// wait nothing may touch d or write to the matrices.

// Where byte x (0..127) of row r lies behind a matrix's start.
WORD int swizzled(int row, int byte) { return row * 128 + (byte ^ row % 8 * 16); }
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
// The matrix at `rows`; for its columns from byte 32*i on, rows + 32*i.
WORD unsigned long long wgmma_matrix(const void* rows) {
  return (unsigned long long)(shared_address(rows) >> 4 & 0x3fff) | 1ull << 16 | 64ull << 32 |
         1ull << 62;
}
WORD void shared_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
WORD void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
WORD void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N> WORD void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}
template <int R> WORD void wgmma_keep(float (&d)[R]) {
#pragma unroll
  for (int i = 0; i < R; ++i) asm volatile("" : "+f"(d[i])::"memory");
}
template <int R> WORD void wgmma_keep(int (&d)[R]) {
#pragma unroll
  for (int i = 0; i < R; ++i) asm volatile("" : "+r"(d[i])::"memory");
}

// 64 × N × 16 (32 bytes of k), and of bytes 64 × N × 32; N: 64, 96, 128, 192 or 256. Without
// `accumulate` what d had is forgotten.
template <class T, int N>
WORD void wgmma(float (&d)[N / 2], unsigned long long a, unsigned long long b, bool accumulate);
template <int N>
WORD void wgmma_u8s8(int (&d)[N / 2], unsigned long long a, unsigned long long b, bool accumulate);
#define WGMMA_P0 "%0, %1, %2, %3, %4, %5, %6, %7"
#define WGMMA_P1 "%8, %9, %10, %11, %12, %13, %14, %15"
#define WGMMA_P2 "%16, %17, %18, %19, %20, %21, %22, %23"
#define WGMMA_P3 "%24, %25, %26, %27, %28, %29, %30, %31"
#define WGMMA_P4 "%32, %33, %34, %35, %36, %37, %38, %39"
#define WGMMA_P5 "%40, %41, %42, %43, %44, %45, %46, %47"
#define WGMMA_P6 "%48, %49, %50, %51, %52, %53, %54, %55"
#define WGMMA_P7 "%56, %57, %58, %59, %60, %61, %62, %63"
#define WGMMA_P8 "%64, %65, %66, %67, %68, %69, %70, %71"
#define WGMMA_P9 "%72, %73, %74, %75, %76, %77, %78, %79"
#define WGMMA_P10 "%80, %81, %82, %83, %84, %85, %86, %87"
#define WGMMA_P11 "%88, %89, %90, %91, %92, %93, %94, %95"
#define WGMMA_P12 "%96, %97, %98, %99, %100, %101, %102, %103"
#define WGMMA_P13 "%104, %105, %106, %107, %108, %109, %110, %111"
#define WGMMA_P14 "%112, %113, %114, %115, %116, %117, %118, %119"
#define WGMMA_P15 "%120, %121, %122, %123, %124, %125, %126, %127"
#define WGMMA_R8(C, i)                                                                             \
  C(d[i]), C(d[i + 1]), C(d[i + 2]), C(d[i + 3]), C(d[i + 4]), C(d[i + 5]), C(d[i + 6]), C(d[i + 7])
#define WGMMA_R32(C, i)                                                                            \
  WGMMA_R8(C, i), WGMMA_R8(C, i + 8), WGMMA_R8(C, i + 16), WGMMA_R8(C, i + 24)
#define WGMMA_R48(C) WGMMA_R32(C, 0), WGMMA_R8(C, 32), WGMMA_R8(C, 40)
#define WGMMA_R96(C) WGMMA_R32(C, 0), WGMMA_R32(C, 32), WGMMA_R32(C, 64)
#define WGMMA_P32 WGMMA_P0 ", " WGMMA_P1 ", " WGMMA_P2 ", " WGMMA_P3
#define WGMMA_P48 WGMMA_P32 ", " WGMMA_P4 ", " WGMMA_P5
#define WGMMA_P64 WGMMA_P48 ", " WGMMA_P6 ", " WGMMA_P7
#define WGMMA_P96 WGMMA_P64 ", " WGMMA_P8 ", " WGMMA_P9 ", " WGMMA_P10 ", " WGMMA_P11
#define WGMMA_P128 WGMMA_P96 ", " WGMMA_P12 ", " WGMMA_P13 ", " WGMMA_P14 ", " WGMMA_P15
#define WGMMA_RUN(SHAPE, P, A, B, S, REST, ...)                                                    \
  asm volatile("{ .reg .pred p; setp.ne.b32 p, " S ", 0; wgmma.mma_async.sync.aligned." SHAPE      \
               " {" P "}, " A ", " B ", p" REST "; }"                                              \
               : __VA_ARGS__ : "l"(a), "l"(b), "r"((int)accumulate))
#define WGMMA(N, P, A, B, S, R)                                                                    \
  template <> WORD void wgmma<f16, N>(float (&d)[N / 2], unsigned long long a,                     \
                                      unsigned long long b, bool accumulate) {                     \
    WGMMA_RUN("m64n" #N "k16.f32.f16.f16", P, A, B, S, ", 1, 1, 0, 0", R("+f"));                   \
  }                                                                                                \
  template <> WORD void wgmma<bf16, N>(float (&d)[N / 2], unsigned long long a,                    \
                                       unsigned long long b, bool accumulate) {                    \
    WGMMA_RUN("m64n" #N "k16.f32.bf16.bf16", P, A, B, S, ", 1, 1, 0, 0", R("+f"));                 \
  }                                                                                                \
  template <> WORD void wgmma_u8s8<N>(int (&d)[N / 2], unsigned long long a,                       \
                                      unsigned long long b, bool accumulate) {                     \
    WGMMA_RUN("m64n" #N "k32.s32.u8.s8", P, A, B, S, "", R("+r"));                                 \
  }
#define WGMMA_N64(C) WGMMA_R32(C, 0)
#define WGMMA_N96(C) WGMMA_R48(C)
#define WGMMA_N128(C) WGMMA_R32(C, 0), WGMMA_R32(C, 32)
#define WGMMA_N192(C) WGMMA_R96(C)
#define WGMMA_N256(C) WGMMA_R96(C), WGMMA_R32(C, 96)
WGMMA(64, WGMMA_P32, "%32", "%33", "%34", WGMMA_N64)
WGMMA(96, WGMMA_P48, "%48", "%49", "%50", WGMMA_N96)
WGMMA(128, WGMMA_P64, "%64", "%65", "%66", WGMMA_N128)
WGMMA(192, WGMMA_P96, "%96", "%97", "%98", WGMMA_N192)
WGMMA(256, WGMMA_P128, "%128", "%129", "%130", WGMMA_N256)
#endif
