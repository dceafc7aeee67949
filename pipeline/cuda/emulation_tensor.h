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
    if ((int)lane >= 8 * first.matrices) continue;
    shared_read(*shadow, distance(*shadow, load.row), 16, thread, stamp(thread));
    memcpy(rows[lane / 8][lane % 8], load.row, 16);
  }
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
  for (int row = 0; row < 16; ++row)
    for (int k = 0; k < K; ++k)
      for (int column = 0; column < 8; ++column) d[row][column] += a[row][k] * b[k][column];
}

// Fills a and b: `read(register, index)` gives number `index` of a register of a lane.
template <int K, int N, class T, class F>
void gather(Lane* lanes, T (&a)[16][K], T (&b)[K][8], T (&d)[16][8], F read) {
  for (unsigned lane = 0; lane < kLanes; ++lane) {
    const Product& one = *(Product*)lanes[lane].request;
    const unsigned g = lane / 4, t = lane % 4;
    for (unsigned i = 0; i < N; ++i) {
      for (unsigned r = 0; r < 4; ++r)
        a[g + r % 2 * 8][r / 2 * 4 * N + t * N + i] = read(one.a.v[r], i, false);
      for (unsigned r = 0; r < 2; ++r) b[r * 4 * N + t * N + i][g] = read(one.b.v[r], i, true);
    }
    for (unsigned i = 0; i < 4; ++i) memcpy(&d[g + i / 2 * 8][2 * t + i % 2], &one.d.v[i], 4);
  }
}

template <class T> void scatter(Lane* lanes, const T (&d)[16][8]) {
  for (unsigned lane = 0; lane < kLanes; ++lane)
    for (unsigned i = 0; i < 4; ++i)
      memcpy(&((Product*)lanes[lane].request)->d.v[i],
             &d[lane / 4 + i / 2 * 8][2 * (lane % 4) + i % 2], 4);
}

// K numbers in four lanes' two registers: N of them in each register.
template <int K, int N, class T, class F> void product(Lane* lanes, F read) {
  T a[16][K], b[K][8], d[16][8];
  gather<K, N>(lanes, a, b, d, read);
  multiply<K>(d, a, b);
  scatter(lanes, d);
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
      product<16, 2, float>(lanes, [](unsigned x, unsigned i, bool) {
        return __uint_as_float(x >> 16 * i << 16);
      });
    });
  else
    together("mma_16816<f16>", &one, [](Lane* lanes, unsigned) {
      product<16, 2, float>(lanes, [](unsigned x, unsigned i, bool) {
        return emulated_half_to_float((unsigned short)(x >> 16 * i));
      });
    });
  return __builtin_bit_cast(EmulatedFloats, one.d);
}

EmulatedFloats emulated_mma_1688_tf32(EmulatedFloats d, EmulatedFour a, EmulatedTwo b) {
  Product one = pack_product(&d, a, b);
  whole_warp("mma_1688_tf32");
  together("mma_1688_tf32", &one, [](Lane* lanes, unsigned) {
    product<8, 1, float>(lanes, [](unsigned x, unsigned, bool) {
      return __uint_as_float(x & 0xffffe000);
    });
  });
  return __builtin_bit_cast(EmulatedFloats, one.d);
}

EmulatedFour emulated_mma_16832_u8s8(EmulatedFour d, EmulatedFour a, EmulatedTwo b) {
  Product one = pack_product(&d, a, b);
  whole_warp("mma_16832_u8s8");
  together("mma_16832_u8s8", &one, [](Lane* lanes, unsigned) {
    product<32, 4, int>(lanes, [](unsigned x, unsigned i, bool is_signed) {
      const unsigned byte = x >> 8 * i & 255;
      return is_signed ? (int)(signed char)byte : (int)byte;
    });
  });
  return one.d;
}
