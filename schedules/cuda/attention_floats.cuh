// The two products of a tile in float32 without tensor cores; each lane adds up its own elements.

struct alignas(16) Four {
  float x[4];
};
struct alignas(8) Two {
  float x[2];
};

struct Query {
  __device__ void read(const X*) {}  // from shared memory, tile by tile
};

template <int N, bool WHOLE>
__device__ inline void products(float (&s)[N / 8][4], const Query&, const X* q, const X* k,
                                int low, int high) {
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
  for (int j = 0; j < N / 8; ++j)
#pragma unroll
    for (int i = 0; i < 4; ++i) s[j][i] = 0.0f;
#pragma unroll 1  // more of them at once do not fit into the registers
  for (int d = 0; d < DP; d += 4) {
    Four rows[2];
#pragma unroll
    for (int r = 0; r < 2; ++r)
      rows[r] = *reinterpret_cast<const Four*>(q + (g + 8 * r) * STRIDE + d);
#pragma unroll
    for (int j = 0; j < N / 8; ++j) {
      if (!WHOLE && (j / 2 < low || j / 2 >= high)) continue;
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const Four key = *reinterpret_cast<const Four*>(k + (8 * j + 2 * t + c) * STRIDE + d);
#pragma unroll
        for (int r = 0; r < 2; ++r)
#pragma unroll
          for (int i = 0; i < 4; ++i) s[j][2 * r + c] += rows[r].x[i] * key.x[i];
      }
    }
  }
}

template <bool WHOLE>
__device__ inline void context(Context& o, const Scores& s, const X* v, int low, int high) {
  const int lane = threadIdx.x % 32, quad = lane / 4 * 4, t = lane % 4;
#pragma unroll
  for (int j = 0; j < KEYS / 8; ++j) {
    if (!WHOLE && (j / 2 < low || j / 2 >= high)) continue;
#pragma unroll
    for (int key = 0; key < 8; ++key) {
      const float weight[2] = {shuffle(s[j][key % 2], quad + key / 2),
                               shuffle(s[j][2 + key % 2], quad + key / 2)};
#pragma unroll
      for (int d = 0; d < DP / 8; ++d) {
        const Two value = *reinterpret_cast<const Two*>(v + (8 * j + key) * STRIDE + 8 * d + 2 * t);
#pragma unroll
        for (int i = 0; i < 4; ++i) o[d][i] += weight[i / 2] * value.x[i % 2];
      }
    }
  }
}
