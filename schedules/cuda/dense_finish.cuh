// What becomes of a tile's sums: groups of warps that took parts of K add theirs up, each for some
// of the pieces; then scale, shift, bias, activation and residual; and rows leave by 16 bytes.
//
// A lane has columns 2 i and 2 i + 1 of W, which is packed so that outputs that meet lie there: those
// of the two halves of a gated layer, of which one channel of y is made; and channels d and d + HALF
// of a head that is turned. These stay side by side: attention multiplies the channels of Q and K in
// whatever order both have.
//
// Shared memory: slots, later the sums that are exchanged; AT_VECTORS: b, scale, shift, ranges of
// the tile; AT_RESIDUAL, AT_RESULT: tiles, over the slots where C::LATE. A residual with a place of
// its own is asked for in the first iteration, behind what the products wait for.

enum { NONE, RELU, GELU, GELU_TANH, TANH, SILU };

WORD float activated(float x) {
  if (ACTIVATION == RELU) return x > 0 ? x : 0;
  if (ACTIVATION == TANH) return tanhf(x);
  if (ACTIVATION == SILU) return fast_divide(x, 1 + fast_exp2(x * -1.442695041f));
  if (ACTIVATION == GELU_TANH) {  // x sigmoid(2 sqrt(2 / pi) (x + 0.044715 x³))
    const float u = x * (-2.302208198f - 0.1029432397f * x * x);  // times log2(e)
    return fast_divide(x, 1 + fast_exp2(u));
  }
  if (ACTIVATION == GELU && WIDE_RESULT) return 0.5f * x * (1 + erff(x * 0.70710678f));
  if (ACTIVATION == GELU) {
    // relu(x) - a erfc(a / sqrt(2)) / 2 with a = |x|, erfc as exp(-a² / 2) times a polynomial
    // (least squares, reweighted): within 1e-6, near zero within 8e-5 of the value
    const float a = fabsf(x) < 16 ? fabsf(x) : 16;
    float q = 2.1241003e-5f;
    q = q * a - 3.9248871e-4f;
    q = q * a + 3.1956693e-3f;
    q = q * a - 1.5434310e-2f;
    q = q * a + 5.0790437e-2f;
    q = q * a - 1.2520821e-1f;
    q = q * a + 2.4702404e-1f;
    q = q * a - 3.9838085e-1f;
    q = q * a + 4.9996358e-1f;
    return (x > 0 ? x : 0) - a * q * fast_exp2(a * a * -0.72134752f);
  }
  return x;
}

// `row`: bytes in memory; `bytes`: of the tile's row; lines of `pitch` in shared memory.
template <class C>
WORD void fill_residual(const Operands& of, u8* tile, int row, int column) {
  constexpr int CHUNKS = C::COLUMNS * (int)sizeof(Wide) / 16;
  for (int at = threadIdx.x; at < C::ROWS * CHUNKS; at += C::THREADS) {
    const int i = at / CHUNKS, j = at % CHUNKS * (16 / (int)sizeof(Wide));
    const bool valid = row + i < of.rows && column + j < Y_PITCH;
    copy_async_16(tile + i * C::RESIDUAL_PITCH + j * (int)sizeof(Wide),
                  of.residual + (long long)(row + i) * Y_PITCH + column + j, valid);
  }
}

// Under way with the first slot: the vectors.
template <class C> WORD void begin(const Operands& of, u8* shared, int row, int column) {
  constexpr int CHUNKS = C::COLUMNS / 4;
  float* const vectors = (float*)(shared + C::AT_VECTORS);
  for (int at = threadIdx.x; at < VECTORS * CHUNKS; at += C::THREADS) {
    const int vector = at / CHUNKS, j = at % CHUNKS * 4;
    const float* const from = vector == 0 ? of.b : vector == 1 ? of.scale : of.shift;
    copy_async_16(vectors + vector * C::COLUMNS + j, from + column + j, column + j < W_COLUMNS);
  }
  if (RANGES)
    for (int i = threadIdx.x; i < C::ROWS; i += C::THREADS) {
      float2 range = make_float2(0, 0);
      if (row + i < of.rows) range = ((const float2*)of.range)[row + i];
      ((float2*)(vectors + VECTORS * C::COLUMNS))[i] = range;
    }
}

WORD void read_pair(const u8* at, float& lo, float& hi, float) {
  const float2 pair = *(const float2*)at;
  lo = pair.x;
  hi = pair.y;
}
template <class T> WORD void read_pair(const u8* at, float& lo, float& hi, T) {
  unpack2<T>(*(const unsigned*)at, lo, hi);
}
WORD void write_pair(u8* at, float lo, float hi, float) { *(float2*)at = make_float2(lo, hi); }
WORD void write_pair(u8* at, float lo, float hi, u8) {
  *(unsigned short*)at = (unsigned short)(to_u8(lo) | to_u8(hi) << 8);
}
template <class T> WORD void write_pair(u8* at, float lo, float hi, T) {
  *(unsigned*)at = pack2<T>(lo, hi);
}
WORD void write_one(u8* at, float x, u8) { *at = to_u8(x); }
template <class T> WORD void write_one(u8* at, float x, T) { *(T*)at = from_float<T>(x); }

// Sums of all slices, of the pieces slice * C::PORTION …: piece f is i = f / WIDE, j = f % WIDE.
template <class C>
WORD void exchange(u8* shared, Sum (&sums)[C::TALL * C::WIDE][4], Sum (&own)[C::PORTION][4],
                   int slice, int inside, int lane) {
  constexpr int PIECES = C::TALL * C::WIDE;
  Sums* const all = (Sums*)shared + inside * (PIECES * C::SLICES * 32) + lane;
#pragma unroll
  for (int f = 0; f < PIECES; ++f)
    all[(f * C::SLICES + slice) * 32] = {sums[f][0], sums[f][1], sums[f][2], sums[f][3]};
  block_sync();
#pragma unroll
  for (int p = 0; p < C::PORTION; ++p) {
    const Sums* const from = all + (slice * C::PORTION + p) * (C::SLICES * 32);
    Sums total = from[0];
#pragma unroll
    for (int s = 1; s < C::SLICES; ++s) {
      const Sums more = from[s * 32];
      total.x += more.x;
      total.y += more.y;
      total.z += more.z;
      total.w += more.w;
    }
    own[p][0] = total.x;
    own[p][1] = total.y;
    own[p][2] = total.z;
    own[p][3] = total.w;
  }
  if (C::LATE) block_sync();
}

// Two channels of a head, the first at `place` of the turned ones, by the angles of their token.
WORD void turn(const Operands& of, int row, int place, float (&v)[2]) {
  const long long low = (long long)row * ANGLES_PITCH + place / 2 % HALF, high = low + HALF;
  const float first = v[0] * of.cos[low] - v[1] * of.sin[low];
  v[1] = v[1] * of.cos[high] + v[0] * of.sin[high];
  v[0] = first;
}

// Two neighbouring values of a row, from their sums.
template <class C>
WORD void end_pair(const Operands& of, u8* shared, Sum low_sum, Sum high_sum, int i, int j,
                   int row, int column, float low, float inverse) {
  const float* const vectors = (const float*)(shared + C::AT_VECTORS) + j;
  float v[2] = {(float)low_sum, (float)high_sum};
  const float2 b = *(const float2*)vectors;
  if (VECTORS >= 2) {
    const float2 scale = *(const float2*)(vectors + C::COLUMNS);
    v[0] *= scale.x;
    v[1] *= scale.y;
  }
  if (RANGES) {
    const float2 range = ((const float2*)(shared + C::AT_VECTORS + VECTORS * C::COLUMNS * 4))[i];
    const float2 shift = *(const float2*)(vectors + 2 * C::COLUMNS);
    v[0] = range.x * v[0] + range.y * shift.x;
    v[1] = range.x * v[1] + range.y * shift.y;
  }
  v[0] += b.x;
  v[1] += b.y;
  u8* const line = shared + C::AT_RESULT + i * C::RESULT_PITCH;
  if (GATED) {
    float y = activated(v[0]) * v[1];
    if (NARROW) y = (column + j) / 2 < CHANNELS ? (y - low) * inverse : 0;
    write_one(line + j / 2 * (int)sizeof(Result), y, Result());
    return;
  }
  if (TURNED && column + j < TURNED && row + i < of.rows) turn(of, row + i, column + j, v);
  v[0] = activated(v[0]);
  v[1] = activated(v[1]);
  if (RESIDUAL) {
    float r[2];
    read_pair(shared + C::AT_RESIDUAL + i * C::RESIDUAL_PITCH + j * (int)sizeof(Wide), r[0], r[1],
              Wide());
    v[0] += r[0];
    v[1] += r[1];
  }
  if (NARROW) {
    v[0] = column + j < CHANNELS ? (v[0] - low) * inverse : 0;
    v[1] = column + j + 1 < CHANNELS ? (v[1] - low) * inverse : 0;
  }
  write_pair(line + j * (int)sizeof(Result), v[0], v[1], Result());
}

// What a thread moves of a row at once: half as much where a row of bytes ends within 16.
template <int BYTES> struct Chunk { using Type = uint4; };
template <> struct Chunk<8> { using Type = uint2; };

template <class C>
WORD void finish(const Operands& of, u8* shared, Sum (&sums)[C::TALL * C::WIDE][4], int slice,
                 int inside, int lane, int warp_row, int warp_column, int row, int column) {
  if (RESIDUAL && C::LATE && C::SLICES == 1) {
    fill_residual<C>(of, shared + C::AT_RESIDUAL, row, column);
    copy_commit();
  }
  Sum own[C::PORTION][4];
  if (C::SLICES > 1) {
    exchange<C>(shared, sums, own, slice, inside, lane);
    if (RESIDUAL && C::LATE) fill_residual<C>(of, shared + C::AT_RESIDUAL, row, column);
    copy_commit();
  }
  if (RESIDUAL && C::LATE) {
    copy_wait<0>();
    block_sync();
  }
  float low = 0, inverse = 0;
  if (NARROW) {
    low = of.limits[0];
    inverse = of.limits[1];
  }
#pragma unroll
  for (int p = 0; p < C::PORTION; ++p) {
    const int f = C::SLICES > 1 ? slice * C::PORTION + p : p;
    const int i = warp_row + f / C::WIDE * 16 + lane / 4;
    const int j = warp_column + f % C::WIDE * 8 + lane % 4 * 2;
    const Sum(&of_piece)[4] = C::SLICES > 1 ? own[p] : sums[p];
    end_pair<C>(of, shared, of_piece[0], of_piece[1], i, j, row, column, low, inverse);
    end_pair<C>(of, shared, of_piece[2], of_piece[3], i + 8, j, row, column, low, inverse);
  }
  block_sync();
  constexpr int MEETING = GATED ? 2 : 1, SIZE = sizeof(Result);
  constexpr int LINE = C::COLUMNS / MEETING * SIZE, EACH = LINE % 16 == 0 ? 16 : 8;
  constexpr int CHUNKS = LINE / EACH;
  using Piece = typename Chunk<EACH>::Type;
  const int first = column / MEETING * SIZE;
#pragma unroll
  for (int from = 0; from < C::ROWS * CHUNKS; from += C::THREADS) {
    const int at = from + threadIdx.x, i = at / CHUNKS, j = at % CHUNKS * EACH;
    if (C::ROWS * CHUNKS % C::THREADS != 0 && at >= C::ROWS * CHUNKS) break;
    if (row + i < of.rows && first + j < Y_PITCH * SIZE)
      *(Piece*)((u8*)of.y + (row + i) * ((long long)Y_PITCH * SIZE) + first + j) =
          *(const Piece*)(shared + C::AT_RESULT + i * C::RESULT_PITCH + j);
  }
}
