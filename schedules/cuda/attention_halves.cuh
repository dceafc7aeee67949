// The two products of a tile in 16 bits on tensor cores (mma_16816). K comes by its rows, V
// transposed on the way; the weights are their accumulators, rounded.

// Where matrix ``lane / 8`` of four has its row ``lane % 8``: the second to the right or below.
__device__ inline int corner(bool right_first) {
  const int lane = threadIdx.x % 32, second = lane / 8 % 2, third = lane / 16;
  const int below = right_first ? third : second, right = right_first ? second : third;
  return (lane % 8 + 8 * below) * STRIDE + 8 * right;
}

struct Query {
  static constexpr bool HELD = DP <= 128;  // in registers; else they are read for every tile
  unsigned a[HELD ? DP / 16 : 1][4];

  __device__ void read(const X* q) {
#pragma unroll
    for (int k = 0; HELD && k < DP / 16; ++k)
      load_matrix_x4(a[k], q + corner(false) + 16 * k);
  }
};

template <int N, bool WHOLE>
__device__ inline void products(float (&s)[N / 8][4], const Query& query, const X* q,
                                const X* k, int low, int high) {
#pragma unroll
  for (int j = 0; j < N / 8; ++j)
#pragma unroll
    for (int i = 0; i < 4; ++i) s[j][i] = 0.0f;
  const X* corner_q = q + corner(false);
  const X* corner_k = k + corner(true);
#pragma unroll
  for (int d = 0; d < DP / 16; ++d) {
    unsigned a[4];
    if (Query::HELD) {
#pragma unroll
      for (int i = 0; i < 4; ++i) a[i] = query.a[Query::HELD ? d : 0][i];
    } else {
      load_matrix_x4(a, corner_q + 16 * d);
    }
#pragma unroll
    for (int j = 0; j < N / 16; ++j) {
      if (!WHOLE && (j < low || j >= high)) continue;
      unsigned b[4];
      load_matrix_x4(b, corner_k + j * 16 * STRIDE + 16 * d);
      mma_16816<X>(s[2 * j], a, {b[0], b[1]});
      mma_16816<X>(s[2 * j + 1], a, {b[2], b[3]});
    }
  }
}

template <bool WHOLE>
__device__ inline void context(Context& o, const Scores& s, const X* v, int low, int high) {
  const X* corner_v = v + corner(false);
#pragma unroll
  for (int j = 0; j < KEYS / 16; ++j) {
    if (!WHOLE && (j < low || j >= high)) continue;
    const unsigned a[4] = {pack2<X>(s[2 * j][0], s[2 * j][1]), pack2<X>(s[2 * j][2], s[2 * j][3]),
                           pack2<X>(s[2 * j + 1][0], s[2 * j + 1][1]),
                           pack2<X>(s[2 * j + 1][2], s[2 * j + 1][3])};
#pragma unroll
    for (int d = 0; d < DP / 16; ++d) {
      unsigned b[4];
      load_matrix_x4_trans(b, corner_v + j * 16 * STRIDE + 16 * d);
      mma_16816<X>(o[2 * d], a, {b[0], b[1]});
      mma_16816<X>(o[2 * d + 1], a, {b[2], b[3]});
    }
  }
}
