// The words of schedules/cuda/prelude.cuh for the CPU, and those of CUDA that kernels use.
// A kernel is compiled with this before its text and linked with emulation.cpp, which runs the
// threads of a block as fibers and checks every access to memory (the compiler calls it for each,
// by -fsanitize=thread). Fragments go to it in registers: an array whose address escapes would have
// every access checked.
#include <stddef.h>
#include <stdint.h>

#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
#define __shared__ static __attribute__((section("emulated_shared")))
#define __restrict__

typedef unsigned char u8;
struct alignas(2) f16 { unsigned short bits; };
struct alignas(2) bf16 { unsigned short bits; };

#define EMULATED_VECTORS(T, N)                                                                     \
  struct alignas(2 * sizeof(T)) N##2 { T x, y; };                                                  \
  struct N##3 { T x, y, z; };                                                                      \
  struct alignas(4 * sizeof(T) > 16 ? 16 : 4 * sizeof(T)) N##4 { T x, y, z, w; };                  \
  static inline N##2 make_##N##2(T x, T y) { return {x, y}; }                                      \
  static inline N##4 make_##N##4(T x, T y, T z, T w) { return {x, y, z, w}; }
EMULATED_VECTORS(signed char, char)
EMULATED_VECTORS(unsigned char, uchar)
EMULATED_VECTORS(short, short)
EMULATED_VECTORS(unsigned short, ushort)
EMULATED_VECTORS(int, int)
EMULATED_VECTORS(unsigned, uint)
EMULATED_VECTORS(long long, longlong)
EMULATED_VECTORS(float, float)

struct dim3 { unsigned x, y, z; };
struct EmulatedThread { dim3 thread, block, block_size, grid; };
struct EmulatedFour { unsigned v[4]; };
struct EmulatedFloats { float v[4]; };
struct EmulatedTwo { unsigned v[2]; };

// <math.h> takes longer to read than most kernels.
#define EMULATED_MATH(NAME) extern "C" float NAME(float) noexcept;
EMULATED_MATH(ceilf) EMULATED_MATH(cosf) EMULATED_MATH(erff) EMULATED_MATH(exp2f)
EMULATED_MATH(expf) EMULATED_MATH(fabsf) EMULATED_MATH(floorf) EMULATED_MATH(log1pf)
EMULATED_MATH(log2f) EMULATED_MATH(logf) EMULATED_MATH(rintf) EMULATED_MATH(roundf)
EMULATED_MATH(sinf) EMULATED_MATH(sqrtf) EMULATED_MATH(tanhf) EMULATED_MATH(truncf)
extern "C" float fmaxf(float, float) noexcept;
extern "C" float fminf(float, float) noexcept;
extern "C" float fmodf(float, float) noexcept;
extern "C" float powf(float, float) noexcept;
extern "C" float fmaf(float, float, float) noexcept;
#define __expf expf
#define __logf logf

extern "C" {
extern EmulatedThread* emulated_thread;
extern unsigned char* emulated_shared_memory;
void emulated_block_sync();
void emulated_group_sync(int id, int threads);
void emulated_warp_sync();
unsigned emulated_shuffle(unsigned value, int from, int kind);
EmulatedFour emulated_load_matrix(const void* row, int matrices, int transposed);
void emulated_copy_async(void* shared, const void* global, bool valid);
void emulated_copy_commit();
void emulated_copy_wait(int under_way);
EmulatedFloats emulated_mma_16816(EmulatedFloats d, EmulatedFour a, EmulatedTwo b, int bf16);
EmulatedFloats emulated_mma_sp_16832(EmulatedFloats d, EmulatedFour a, EmulatedFour b,
                                     unsigned kept, int bf16);
EmulatedFloats emulated_mma_1688_tf32(EmulatedFloats d, EmulatedFour a, EmulatedTwo b);
EmulatedFour emulated_mma_16832_u8s8(EmulatedFour d, EmulatedFour a, EmulatedTwo b);
void emulated_shared_fence();
void emulated_wgmma_fence();
void emulated_wgmma_commit();
void emulated_wgmma_wait(int under_way);
void emulated_wgmma(void* d, int columns, int kind, uint64_t a, uint64_t b, int accumulate);
void emulated_launch(void (*entry)(void**), const char* name, const unsigned grid[3],
                     unsigned threads, unsigned limit, unsigned shared, void** arguments);
float emulated_half_to_float(unsigned short bits);
unsigned short emulated_float_to_half(float x);
}

#define threadIdx (emulated_thread->thread)
#define blockIdx (emulated_thread->block)
#define blockDim (emulated_thread->block_size)
#define gridDim (emulated_thread->grid)
#define SHARED_MEMORY(name) unsigned char* const name = emulated_shared_memory
#define WORD static inline __attribute__((always_inline))

// ---- CUDA's own -----------------------------------------------------------------------------------

template <class To, class From> WORD To emulated_bits(From x) {
  static_assert(sizeof(To) == sizeof(From), "of the same size");
  return __builtin_bit_cast(To, x);
}
WORD float __uint_as_float(unsigned x) { return emulated_bits<float>(x); }
WORD float __int_as_float(int x) { return emulated_bits<float>(x); }
WORD double __longlong_as_double(long long x) { return emulated_bits<double>(x); }
WORD unsigned __float_as_uint(float x) { return emulated_bits<unsigned>(x); }
WORD int __float_as_int(float x) { return emulated_bits<int>(x); }
WORD float __fdividef(float a, float b) { return a / b; }
WORD float __frcp_rn(float x) { return 1 / x; }
WORD float rsqrtf(float x) { return 1 / sqrtf(x); }
WORD int __float2int_rn(float x) { return (int)rintf(x); }
WORD int __float2int_rz(float x) { return (int)x; }
WORD float __int2float_rn(int x) { return (float)x; }
WORD int min(int a, int b) { return a < b ? a : b; }
WORD int max(int a, int b) { return a > b ? a : b; }
WORD unsigned min(unsigned a, unsigned b) { return a < b ? a : b; }
WORD unsigned max(unsigned a, unsigned b) { return a > b ? a : b; }
WORD long min(long a, long b) { return a < b ? a : b; }
WORD long max(long a, long b) { return a > b ? a : b; }
WORD long long min(long long a, long long b) { return a < b ? a : b; }
WORD long long max(long long a, long long b) { return a > b ? a : b; }
WORD float min(float a, float b) { return fminf(a, b); }
WORD float max(float a, float b) { return fmaxf(a, b); }
template <class T> WORD T __ldg(const T* p) { return *p; }
WORD void __syncthreads() { emulated_block_sync(); }
WORD void __syncwarp(unsigned = ~0u) { emulated_warp_sync(); }
WORD unsigned __activemask() { return ~0u; }
WORD int __dp4a(int a, int b, int c) {
  for (int i = 0; i < 4; ++i) c += (signed char)(a >> 8 * i) * (signed char)(b >> 8 * i);
  return c;
}

// ---- numbers ---------------------------------------------------------------------------------------

WORD float to_float(float x) { return x; }
WORD float to_float(u8 x) { return x; }
WORD float to_float(f16 x) { return emulated_half_to_float(x.bits); }
WORD float to_float(bf16 x) { return __uint_as_float((unsigned)x.bits << 16); }

template <class T> inline T from_float(float x);
template <> inline float from_float<float>(float x) { return x; }
template <> inline f16 from_float<f16>(float x) { return {emulated_float_to_half(x)}; }
template <> inline bf16 from_float<bf16>(float x) {
  const unsigned bits = __float_as_uint(x);
  if (x != x) return {0x7fff};
  return {(unsigned short)((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
WORD u8 to_u8(float x) {
  const float y = rintf(x);
  return y > 0 ? (u8)fminf(y, 255) : 0;
}
template <class T> WORD unsigned pack2(float lo, float hi) {
  return from_float<T>(lo).bits | (unsigned)from_float<T>(hi).bits << 16;
}
template <class T> WORD void unpack2(unsigned x, float& lo, float& hi) {
  T a, b;
  a.bits = (unsigned short)x;
  b.bits = (unsigned short)(x >> 16);
  lo = to_float(a);
  hi = to_float(b);
}
WORD float fast_exp2(float x) {
  const float y = exp2f(x);
  return y < 1.17549435e-38f ? 0 : y;
}
WORD float reciprocal_sqrt(float x) { return rsqrtf(x); }
WORD float fast_divide(float a, float b) { return a / b; }

// ---- threads ---------------------------------------------------------------------------------------

WORD void block_sync() { emulated_block_sync(); }
WORD void warp_sync() { emulated_warp_sync(); }
WORD void group_sync(int id, int threads) { emulated_group_sync(id, threads); }
template <class V> WORD V emulated_exchange(V v, int from, int kind) {
  return emulated_bits<V>(emulated_shuffle(emulated_bits<unsigned>(v), from, kind));
}
template <class V> WORD V shuffle(V v, int lane) { return emulated_exchange(v, lane, 0); }
template <class V> WORD V shuffle_xor(V v, int mask) { return emulated_exchange(v, mask, 1); }
template <class V> WORD V __shfl_sync(unsigned, V v, int lane, int = 32) { return shuffle(v, lane); }
template <class V> WORD V __shfl_xor_sync(unsigned, V v, int mask, int = 32) {
  return shuffle_xor(v, mask);
}
template <class V> WORD V __shfl_down_sync(unsigned, V v, int by, int = 32) {
  return emulated_exchange(v, by, 2);
}
template <class V> WORD V __shfl_up_sync(unsigned, V v, int by, int = 32) {
  return emulated_exchange(v, -by, 2);
}

// ---- shared memory ---------------------------------------------------------------------------------

WORD void load_matrix_x4(unsigned (&r)[4], const void* row) {
  const EmulatedFour found = emulated_load_matrix(row, 4, 0);
  for (int i = 0; i < 4; ++i) r[i] = found.v[i];
}
WORD void load_matrix_x4_trans(unsigned (&r)[4], const void* row) {
  const EmulatedFour found = emulated_load_matrix(row, 4, 1);
  for (int i = 0; i < 4; ++i) r[i] = found.v[i];
}
WORD void load_matrix_x2(unsigned (&r)[2], const void* row) {
  const EmulatedFour found = emulated_load_matrix(row, 2, 0);
  for (int i = 0; i < 2; ++i) r[i] = found.v[i];
}
WORD void load_matrix_x2_trans(unsigned (&r)[2], const void* row) {
  const EmulatedFour found = emulated_load_matrix(row, 2, 1);
  for (int i = 0; i < 2; ++i) r[i] = found.v[i];
}
WORD void copy_async_16(void* shared, const void* global, bool valid) {
  emulated_copy_async(shared, global, valid);
}
WORD void copy_commit() { emulated_copy_commit(); }
template <int N> WORD void copy_wait() { emulated_copy_wait(N); }

// ---- tensor cores ----------------------------------------------------------------------------------

template <class T> inline constexpr int emulated_kind = 0;  // of 16-bit numbers: f16
template <> inline constexpr int emulated_kind<bf16> = 1;
template <class T>
WORD void mma_16816(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  const EmulatedFloats made =
      emulated_mma_16816({{d[0], d[1], d[2], d[3]}}, {{a[0], a[1], a[2], a[3]}}, {{b[0], b[1]}},
                         emulated_kind<T>);
  for (int i = 0; i < 4; ++i) d[i] = made.v[i];
}
template <class T>
WORD void mma_sp_16832(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[4],
                       unsigned kept) {
  const EmulatedFloats made = emulated_mma_sp_16832(
      {{d[0], d[1], d[2], d[3]}}, {{a[0], a[1], a[2], a[3]}}, {{b[0], b[1], b[2], b[3]}}, kept,
      emulated_kind<T>);
  for (int i = 0; i < 4; ++i) d[i] = made.v[i];
}
WORD void mma_1688_tf32(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  const EmulatedFloats made = emulated_mma_1688_tf32(
      {{d[0], d[1], d[2], d[3]}}, {{a[0], a[1], a[2], a[3]}}, {{b[0], b[1]}});
  for (int i = 0; i < 4; ++i) d[i] = made.v[i];
}
WORD unsigned to_tf32(float x) {
  return x - x == 0 ? (__float_as_uint(x) + 0x1000) & 0xffffe000 : __float_as_uint(x);
}
WORD void mma_16832_u8s8(int (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  const EmulatedFour made = emulated_mma_16832_u8s8(
      {{(unsigned)d[0], (unsigned)d[1], (unsigned)d[2], (unsigned)d[3]}},
      {{a[0], a[1], a[2], a[3]}}, {{b[0], b[1]}});
  for (int i = 0; i < 4; ++i) d[i] = (int)made.v[i];
}

WORD unsigned shared_address(const void* pointer) {
  return (unsigned)((const unsigned char*)pointer - emulated_shared_memory);
}
WORD int swizzled(int row, int byte) { return row * 128 + (byte ^ row % 8 * 16); }
WORD unsigned long long wgmma_matrix(const void* rows) {
  return (unsigned long long)(shared_address(rows) >> 4 & 0x3fff) | 1ull << 16 | 64ull << 32 |
         1ull << 62;
}
WORD void shared_fence() { emulated_shared_fence(); }
WORD void wgmma_fence() { emulated_wgmma_fence(); }
WORD void wgmma_commit() { emulated_wgmma_commit(); }
template <int N> WORD void wgmma_wait() { emulated_wgmma_wait(N); }
template <class T, int R> WORD void wgmma_keep(T (&)[R]) {}
constexpr int emulated_bytes = 2;
template <class T, int N>
WORD void wgmma(float (&d)[N / 2], unsigned long long a, unsigned long long b, bool accumulate) {
  static_assert(N == 64 || N == 96 || N == 128 || N == 192 || N == 256, "of these widths");
  emulated_wgmma(d, N, emulated_kind<T>, a, b, accumulate);
}
template <int N>
WORD void wgmma_u8s8(int (&d)[N / 2], unsigned long long a, unsigned long long b, bool accumulate) {
  static_assert(N == 64 || N == 96 || N == 128 || N == 192 || N == 256, "of these widths");
  emulated_wgmma(d, N, emulated_bytes, a, b, accumulate);
}

// ---- entries ---------------------------------------------------------------------------------------

// Calls an entry with the arguments that pointers are given to.
template <int... I> struct EmulatedIndices {};
template <int N, int... I> struct EmulatedCount : EmulatedCount<N - 1, N - 1, I...> {};
template <int... I> struct EmulatedCount<0, I...> { using Indices = EmulatedIndices<I...>; };
#define EMULATED_UNCHECKED __attribute__((noinline, no_sanitize("thread")))
template <class... P, int... I>
EMULATED_UNCHECKED void emulated_call(void (*entry)(P...), void** a, EmulatedIndices<I...>) {
  entry(*(P*)a[I]...);
}
template <class... P> EMULATED_UNCHECKED void emulated_call(void (*entry)(P...), void** a) {
  emulated_call(entry, a, typename EmulatedCount<sizeof...(P)>::Indices());
}
template <class> struct EmulatedParameters;
template <class... P> struct EmulatedParameters<void (*)(P...)> {
  unsigned bytes[1 + sizeof...(P)] = {sizeof...(P), sizeof(P)...};  // how many, and of each
};
#define EMULATED_EXPORT extern "C" __attribute__((visibility("default")))
#define EMULATED_ENTRY(NAME, LIMIT)                                                                \
  EMULATED_EXPORT constexpr EmulatedParameters<decltype(&NAME)> emulated_parameters_##NAME = {};   \
  static EMULATED_UNCHECKED void emulated_call_##NAME(void** arguments) {                          \
    emulated_call(NAME, arguments);                                                                \
  }                                                                                                \
  EMULATED_EXPORT void emulated_##NAME(const unsigned grid[3], unsigned threads, unsigned shared,  \
                                       void** arguments) {                                         \
    emulated_launch(emulated_call_##NAME, #NAME, grid, threads, LIMIT, shared, arguments);         \
  }
