// How a warp multiplies TALL × WIDE pieces of 16 × 8 by a step of 32 bytes of K: tensor cores.

constexpr int STEPS = 4;  // of a panel

struct Lane {
  int x, w;  // the chunk of a panel that the lane names to ldmatrix at step 0
};
WORD Lane lane_of(int lane) {
  return {lane % 16 * PANEL + (lane / 16 ^ lane % 8) * 16,
          (lane % 8 + lane / 16 * 8) * PANEL + (lane / 8 % 2 ^ lane % 8) * 16};
}

template <class C> struct Fragments {
  unsigned a[C::TALL][4], b[C::WIDE][2];
};

template <class C>
WORD void load(Fragments<C>& of, const u8* x, const u8* w, const Lane& lane, int step) {
#pragma unroll
  for (int i = 0; i < C::TALL; ++i) {
    load_matrix_x4(of.a[i], x + (lane.x ^ step * 32) + i * (16 * PANEL));
#pragma unroll
    for (int k = 0; k < 4; ++k) of.a[i][k] = as_multiplied(of.a[i][k]);
  }
#pragma unroll
  for (int j = 0; j < C::WIDE; j += 2) {
    unsigned pair[4];
    load_matrix_x4(pair, w + (lane.w ^ step * 32) + j * (8 * PANEL));
#pragma unroll
    for (int k = 0; k < 4; ++k) of.b[j + k / 2][k % 2] = pair[k];
  }
}

template <class C>
WORD void multiply(Sum (&sums)[C::TALL * C::WIDE][4], const Fragments<C>& of) {
#pragma unroll
  for (int i = 0; i < C::TALL; ++i)
#pragma unroll
    for (int j = 0; j < C::WIDE; ++j) multiply_add(sums[i * C::WIDE + j], of.a[i], of.b[j]);
}
