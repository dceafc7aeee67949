// How a warp multiplies TALL × WIDE pieces of 16 × 8 by a step of 16 bytes of K: float32 without
// tensor cores. A lane has the same sums of a piece as mma.sync gives it.

constexpr int STEPS = 8;  // of a panel

struct Lane {
  int x, w;  // the lane's first row of x and its first column of W, in bytes from a panel's start
  int x_chunk, w_chunk;
};
WORD Lane lane_of(int lane) {
  const int row = lane / 4, column = lane % 4 * 2;
  return {row * PANEL, column * PANEL, row * 16, column * 16};
}

template <class C> struct Fragments {
  float4 a[C::TALL][2], b[C::WIDE][2];
};

template <class C>
WORD void load(Fragments<C>& of, const u8* x, const u8* w, const Lane& lane, int step) {
#pragma unroll
  for (int i = 0; i < 2 * C::TALL; ++i)
    of.a[i / 2][i % 2] = *(const float4*)(x + lane.x + (lane.x_chunk ^ step * 16) + i * (8 * PANEL));
#pragma unroll
  for (int j = 0; j < 2 * C::WIDE; ++j)
    of.b[j / 2][j % 2] = *(const float4*)(w + lane.w + (lane.w_chunk ^ (step ^ j % 2) * 16) +
                                          (j / 2 * 8 + j % 2) * PANEL);
}

template <class C>
WORD void multiply(Sum (&sums)[C::TALL * C::WIDE][4], const Fragments<C>& of) {
#pragma unroll
  for (int j = 0; j < C::WIDE; ++j)
#pragma unroll
    for (int i = 0; i < C::TALL; ++i)
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const float4 a = of.a[i][k / 2], b = of.b[j][k % 2];
        Sum& sum = sums[i * C::WIDE + j][k];
        sum += a.x * b.x;
        sum += a.y * b.y;
        sum += a.z * b.z;
        sum += a.w * b.w;
      }
}
