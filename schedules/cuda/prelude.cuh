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
