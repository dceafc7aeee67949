// The two products of a tile in tf32 on tensor cores (mma_1688_tf32). Keys are counted as the
// accumulators hold them: columns 2 t and 2 t + 1 of the weights are k = t and k = t + 4.

struct Query {
  static constexpr bool HELD = DP <= 64;  // in registers; else they are read for every tile
  unsigned a[HELD ? DP / 8 : 1][4];

  static __device__ void part(unsigned (&a)[4], const X* q, int k) {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int i = 0; i < 4; ++i)
      a[i] = to_tf32(q[(g + i % 2 * 8) * STRIDE + 8 * k + t + i / 2 * 4]);
  }

  __device__ void read(const X* q) {
#pragma unroll
    for (int k = 0; HELD && k < DP / 8; ++k) part(a[k], q, k);
  }
};

template <int N, bool WHOLE>
__device__ inline void products(float (&s)[N / 8][4], const Query& query, const X* q,
                                const X* k, int low, int high) {
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
  for (int j = 0; j < N / 8; ++j)
#pragma unroll
    for (int i = 0; i < 4; ++i) s[j][i] = 0.0f;
#pragma unroll
  for (int d = 0; d < DP / 8; ++d) {
    unsigned a[4];
    if (Query::HELD) {
#pragma unroll
      for (int i = 0; i < 4; ++i) a[i] = query.a[Query::HELD ? d : 0][i];
    } else {
      Query::part(a, q, d);
    }
#pragma unroll
    for (int j = 0; j < N / 8; ++j) {
      if (!WHOLE && (j / 2 < low || j / 2 >= high)) continue;
      const X* from = k + (8 * j + g) * STRIDE + 8 * d + t;
      mma_1688_tf32(s[j], a, {to_tf32(from[0]), to_tf32(from[4])});
    }
  }
}

template <bool WHOLE>
__device__ inline void context(Context& o, const Scores& s, const X* v, int low, int high) {
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
  for (int j = 0; j < KEYS / 8; ++j) {
    if (!WHOLE && (j / 2 < low || j / 2 >= high)) continue;
    const unsigned a[4] = {to_tf32(s[j][0]), to_tf32(s[j][2]), to_tf32(s[j][1]), to_tf32(s[j][3])};
#pragma unroll
    for (int d = 0; d < DP / 8; ++d) {
      const X* from = v + (8 * j + 2 * t) * STRIDE + 8 * d + g;
      mma_1688_tf32(o[d], a, {to_tf32(from[0]), to_tf32(from[STRIDE])});
    }
  }
}
