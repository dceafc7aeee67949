// The tensor cores of emulation.cpp: fragments of 32 lanes to matrices, the product, and back.
// Fragments as PTX has them: g = lane / 4, t = lane % 4.

float emulated_half_to_float(unsigned short bits) {
#if defined(__FLT16_MAX__)
  return (float)__builtin_bit_cast(_Float16, bits);
#else
  const unsigned sign = (bits & 0x8000u) << 16, exponent = bits >> 10 & 31, rest = bits & 1023;
  if (exponent == 31) return __builtin_bit_cast(float, sign | 0x7f800000 | rest << 13);
  if (exponent) return __builtin_bit_cast(float, sign | (exponent + 112) << 23 | rest << 13);
  const float small = (float)rest * 5.9604644775390625e-8f;
  return sign ? -small : small;
#endif
}

unsigned short emulated_float_to_half(float x) {
  if (x != x) return 0x7fff;
#if defined(__FLT16_MAX__)
  return __builtin_bit_cast(unsigned short, (_Float16)x);
#else
  const unsigned bits = __builtin_bit_cast(unsigned, x), sign = bits >> 16 & 0x8000;
  const float size = fabsf(x);
  if (size >= 65520) return (unsigned short)(sign | 0x7c00);
  if (size < 6.103515625e-5f)
    return (unsigned short)(sign | (unsigned)rintf(size * 16777216.0f));
  const unsigned rounded = (bits & 0x7fffffff) + 0xfff + (bits >> 13 & 1);
  return (unsigned short)(sign | ((rounded - (112u << 23)) >> 13));
#endif
}

namespace {

struct Load {
  const unsigned char* row;
  EmulatedFour made;
  int matrices, transposed;
};

struct Product {
  EmulatedFour a, d;
  EmulatedTwo b;
};

void load_matrices(Lane* lanes, unsigned warp) {
  const Load& first = *(Load*)lanes[0].request;
  u8 rows[4][8][16];
  const unsigned char* given[kLanes];
  for (unsigned lane = 0; lane < kLanes; ++lane) {
    const Load& load = *(Load*)lanes[lane].request;
    const unsigned thread = warp * kLanes + lane;
    if (load.matrices != first.matrices || load.transposed != first.transposed)
      return fail("load_matrix of two kinds in one warp");
    if ((uintptr_t)load.row % 16)
      return fail("load_matrix: lane %u gives an address that is not a multiple of 16", lane);
    Shadow* shadow = shared_of(load.row, 16);
    if (!shadow)
      return fail("load_matrix: lane %u gives byte %td of shared memory of %zu bytes", lane,
                  load.row - shared_now.memory, shared_now.size);
    given[lane] = load.row;
    if ((int)lane >= 8 * first.matrices) continue;
    shared_read(*shadow, distance(*shadow, load.row), 16, thread, stamp(thread));
    memcpy(rows[lane / 8][lane % 8], load.row, 16);
  }
  if (counting) count_matrices(given, first.matrices);
  for (unsigned lane = 0; lane < kLanes; ++lane) {
    Load& load = *(Load*)lanes[lane].request;
    const unsigned g = lane / 4, t = lane % 4;
    for (int m = 0; m < first.matrices; ++m) {
      unsigned short two[2];
      for (unsigned i = 0; i < 2; ++i)
        if (first.transposed)
          memcpy(two + i, rows[m][2 * t + i] + 2 * g, 2);
        else
          memcpy(two + i, rows[m][g] + 2 * (2 * t + i), 2);
      memcpy(&load.made.v[m], two, 4);
    }
  }
}

// d (16 × 8) += a (16 × K) * b (K × 8), in the order of k.
template <int K, class T> void multiply(T (&d)[16][8], const T (&a)[16][K], const T (&b)[K][8]) {
  typedef T Row __attribute__((vector_size(8 * sizeof(T))));
  Row columns[K];
  memcpy(columns, b, sizeof columns);
  for (int row = 0; row < 16; ++row) {
    Row sum;
    memcpy(&sum, d[row], sizeof sum);
    for (int k = 0; k < K; ++k) sum += a[row][k] * columns[k];
    memcpy(d[row], &sum, sizeof sum);
  }
}

// The bits of a and b as they lie in registers, N numbers C in each, and d.
template <int K, int N, class C, class T>
void gather(Lane* lanes, C (&a)[16][K], C (&b)[8][K], T (&d)[16][8]) {
  for (unsigned lane = 0; lane < kLanes; ++lane) {
    const Product& one = *(Product*)lanes[lane].request;
    const unsigned g = lane / 4, t = lane % 4;
    for (unsigned r = 0; r < 4; ++r) memcpy(&a[g + r % 2 * 8][r / 2 * 4 * N + t * N], &one.a.v[r], 4);
    for (unsigned r = 0; r < 2; ++r) memcpy(&b[g][r * 4 * N + t * N], &one.b.v[r], 4);
    for (unsigned i = 0; i < 4; i += 2) memcpy(&d[g + i / 2 * 8][2 * t], &one.d.v[i], 8);
  }
}

template <class T> void scatter(Lane* lanes, const T (&d)[16][8]) {
  for (unsigned lane = 0; lane < kLanes; ++lane)
    for (unsigned i = 0; i < 4; i += 2)
      memcpy(&((Product*)lanes[lane].request)->d.v[i], &d[lane / 4 + i / 2 * 8][2 * (lane % 4)], 8);
}

// Of matrices of K numbers C, N in each register; `wide(bits, number, count)` makes numbers of them.
template <int K, int N, class C, class T, class A, class B>
void product(Lane* lanes, A wide_a, B wide_b) {
  C a[16][K], b[8][K];
  T x[16][K], y[8][K], turned[K][8], d[16][8];
  gather<K, N>(lanes, a, b, d);
  wide_a(a[0], x[0], 16 * K);
  wide_b(b[0], y[0], 8 * K);
  for (int k = 0; k < K; ++k)
    for (int column = 0; column < 8; ++column) turned[k][column] = y[column][k];
  multiply<K>(d, x, turned);
  multiplications += 16 * 8 * K;
  scatter(lanes, d);
}

void wide_f16(const unsigned short* bits, float* numbers, int count) {
#if defined(__F16C__)
  for (int i = 0; i < count; i += 8)
    _mm256_storeu_ps(numbers + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(bits + i))));
#else
  for (int i = 0; i < count; ++i) numbers[i] = emulated_half_to_float(bits[i]);
#endif
}

void wide_bf16(const unsigned short* bits, float* numbers, int count) {
  for (int i = 0; i < count; ++i) numbers[i] = __uint_as_float((unsigned)bits[i] << 16);
}

void wide_u8(const u8* bytes, int* numbers, int count) {
  for (int i = 0; i < count; ++i) numbers[i] = bytes[i];
}

void wide_s8(const u8* bytes, int* numbers, int count) {
  for (int i = 0; i < count; ++i) numbers[i] = (signed char)bytes[i];
}

Product pack_product(const void* d, EmulatedFour a, EmulatedTwo b) {
  Product made = {a, {}, b};
  memcpy(made.d.v, d, 16);
  return made;
}

}  // namespace

EmulatedFour emulated_load_matrix(const void* row, int matrices, int transposed) {
  Load load = {(const unsigned char*)row, {}, matrices, transposed};
  whole_warp("load_matrix");
  together("load_matrix", &load, load_matrices);
  return load.made;
}

EmulatedFloats emulated_mma_16816(EmulatedFloats d, EmulatedFour a, EmulatedTwo b, int bf16) {
  Product one = pack_product(&d, a, b);
  whole_warp("mma_16816");
  if (bf16)
    together("mma_16816<bf16>", &one, [](Lane* lanes, unsigned) {
      product<16, 2, unsigned short, float>(lanes, wide_bf16, wide_bf16);
    });
  else
    together("mma_16816<f16>", &one, [](Lane* lanes, unsigned) {
      product<16, 2, unsigned short, float>(lanes, wide_f16, wide_f16);
    });
  return __builtin_bit_cast(EmulatedFloats, one.d);
}

namespace {

struct SparseProduct {
  EmulatedFour a, b, d;
  unsigned kept;
};

// a, of which `kept` says where the numbers lie, becomes a matrix with zeros.
template <class F> void multiply_sparse(Lane* lanes, F read) {
  float a[16][32] = {}, b[32][8], d[16][8];
  for (unsigned lane = 0; lane < kLanes; ++lane) {
    const SparseProduct& one = *(SparseProduct*)lanes[lane].request;
    const unsigned g = lane / 4, t = lane % 4;
    for (unsigned i = 0; i < 4; ++i) {
      memcpy(&d[g + i / 2 * 8][2 * t + i % 2], &one.d.v[i], 4);
      for (unsigned k = 0; k < 2; ++k) b[8 * i + 2 * t + k][g] = read(one.b.v[i], k);
      // Register i holds the two that are kept of four: row g or g+8, of k in one half.
      const unsigned half = i / 2;
      const unsigned kept = ((SparseProduct*)lanes[lane - t + half].request)->kept;
      const unsigned where = kept >> (16 * (i % 2) + 4 * t) & 15;
      if ((where & 3) >= where >> 2)
        return fail("mma_sp_16832: lane %u says that columns %u and %u of a four are kept",
                    lane - t + half, where & 3, where >> 2);
      for (unsigned k = 0; k < 2; ++k)
        a[g + i % 2 * 8][16 * half + 4 * t + (where >> 2 * k & 3)] = read(one.a.v[i], k);
    }
  }
  multiply<32>(d, a, b);
  multiplications += 16 * 8 * 32;
  for (unsigned lane = 0; lane < kLanes; ++lane)
    for (unsigned i = 0; i < 4; ++i)
      memcpy(&((SparseProduct*)lanes[lane].request)->d.v[i],
             &d[lane / 4 + i / 2 * 8][2 * (lane % 4) + i % 2], 4);
}

}  // namespace

EmulatedFloats emulated_mma_sp_16832(EmulatedFloats d, EmulatedFour a, EmulatedFour b,
                                     unsigned kept, int bf16) {
  SparseProduct one = {a, b, __builtin_bit_cast(EmulatedFour, d), kept};
  whole_warp("mma_sp_16832");
  if (bf16)
    together("mma_sp_16832<bf16>", &one, [](Lane* lanes, unsigned) {
      multiply_sparse(lanes, [](unsigned x, unsigned k) {
        return __uint_as_float(x >> 16 * k << 16);
      });
    });
  else
    together("mma_sp_16832<f16>", &one, [](Lane* lanes, unsigned) {
      multiply_sparse(lanes, [](unsigned x, unsigned k) {
        return emulated_half_to_float((unsigned short)(x >> 16 * k));
      });
    });
  return __builtin_bit_cast(EmulatedFloats, one.d);
}

EmulatedFloats emulated_mma_1688_tf32(EmulatedFloats d, EmulatedFour a, EmulatedTwo b) {
  Product one = pack_product(&d, a, b);
  whole_warp("mma_1688_tf32");
  together("mma_1688_tf32", &one, [](Lane* lanes, unsigned) {
    const auto wide = [](const unsigned* bits, float* numbers, int count) {
      for (int i = 0; i < count; ++i) numbers[i] = __uint_as_float(bits[i] & 0xffffe000);
    };
    product<8, 1, unsigned, float>(lanes, wide, wide);
  });
  return __builtin_bit_cast(EmulatedFloats, one.d);
}

EmulatedFour emulated_mma_16832_u8s8(EmulatedFour d, EmulatedFour a, EmulatedTwo b) {
  Product one = pack_product(&d, a, b);
  whole_warp("mma_16832_u8s8");
  together("mma_16832_u8s8", &one, [](Lane* lanes, unsigned) {
    product<32, 4, u8, int>(lanes, wide_u8, wide_s8);
  });
  return one.d;
}
