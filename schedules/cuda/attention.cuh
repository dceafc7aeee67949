// Attention of WARPS blocks of 16 queries for one head, a block a warp. The keys of all sequences
// that these blocks belong to go through shared memory in tiles of KEYS; a warp takes those of its
// own sequence. Scores, weights and context stay in registers, as accumulators of 16 × 8 tiles:
// with g = lane / 4 and t = lane % 4, columns 2 t and 2 t + 1 of row g, then of row g + 8.
// Before it: H, D, DP (D rounded up to 16), STRIDE (of rows in shared memory), PITCH, PITCH_Y, WARPS,
// KEYS, STAGES, BIAS, ALIGNED (a head's rows start on a multiple of 16 bytes), FACTOR (of scores, in
// powers of two), X, Y (of qkv and y), Piece (1 to 16 bytes, of which a head's rows of y are made),
// Scores, Context, and an arithmetic: Query, scores, context.

constexpr float LOG2E = 1.4426950408889634f;
constexpr float LOWEST = -1e30f;  // the least that is added to a score
constexpr float NEVER = -1e38f;   // its weight is zero beside any score
constexpr int ROW = 16 * STRIDE;  // elements of 16 rows in shared memory

// ROWS rows of a head into shared memory; zeros behind the first ``there``.
template <int ROWS, int THREADS>
__device__ inline void ask_for(X* to, const X* from, int there, int thread) {
  if (ALIGNED) {
    constexpr int EACH = 16 / sizeof(X), PER_ROW = DP / EACH;
#pragma unroll
    for (int start = 0; start < ROWS * PER_ROW; start += THREADS) {
      const int row = (start + thread) / PER_ROW, c = (start + thread) % PER_ROW * EACH;
      if (ROWS * PER_ROW % THREADS == 0 || row < ROWS)
        copy_async_16(to + row * STRIDE + c, from + static_cast<long long>(row) * PITCH + c,
                      row < there && c < D);
    }
  } else {
    for (int i = thread; i < ROWS * DP; i += THREADS) {
      const int row = i / DP, c = i % DP;
      const bool has = row < there && c < D;
      to[row * STRIDE + c] =
          has ? from[static_cast<long long>(row) * PITCH + c] : from_float<X>(0.0f);
    }
  }
}

// Shared memory: each warp's queries (and its context at the end), then the tiles of keys.
struct Shared {
  X* queries;
  X* keys;      // STAGES tiles
  X* values;
  float* masks;

  __device__ explicit Shared(unsigned char* memory) {
    queries = reinterpret_cast<X*>(memory);
    keys = queries + WARPS * ROW;
    values = keys + STAGES * KEYS * STRIDE;
    masks = reinterpret_cast<float*>(values + STAGES * KEYS * STRIDE);
  }

  // The tile that starts at row ``start`` of the keys, of which ``there`` are wanted.
  __device__ void ask_tile(int stage, const X* qkv, const float* added, int start, int there) const {
    constexpr int THREADS = 32 * WARPS;
    const int head = blockIdx.y * D, tile = stage * KEYS * STRIDE, thread = threadIdx.x;
    const X* from = qkv + static_cast<long long>(start) * PITCH + head;
    ask_for<KEYS, THREADS>(keys + tile, from + H * D, there, thread);
    ask_for<KEYS, THREADS>(values + tile, from + 2 * H * D, there, thread);
    if (thread < KEYS / 4)
      copy_async_16(masks + stage * KEYS + 4 * thread, added + start + 4 * thread,
                    4 * thread < there);
  }
};

// An additive bias (batch or 1, heads or 1, length, length) for a warp's queries.
struct Bias {
  const float* plane;  // null: none
  int length, query;   // query: position of row g

  __device__ float of(int row, int key) const {
    const int at = query + 8 * row;
    if (at >= length || key >= length) return 0.0f;
    return fmaxf(plane[at * length + key], LOWEST) * LOG2E;
  }
};

// What a warp's softmax has seen; ``sum`` is of the lane's own columns.
struct Softmax {
  float most[2] = {NEVER, NEVER}, sum[2] = {0.0f, 0.0f};

  // The scores of a tile become weights; what was added up before is brought to their maximum.
  // The first key is at ``position`` of its sequence. Of the tile's blocks, low to high - 1 count.
  template <bool WHOLE>
  __device__ void take(Scores& s, Context& o, const float* mask, const Bias& bias, int position,
                       int low, int high) {
    const int column = threadIdx.x % 4 * 2;
    float seen[2] = {most[0], most[1]};
#pragma unroll
    for (int j = 0; j < KEYS / 8; ++j) {
      const bool own = WHOLE || (j / 2 >= low && j / 2 < high);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int key = j * 8 + column + i;
        const float added = mask[key] * LOG2E;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          float score = s[j][2 * r + i] * FACTOR + added;
          if (BIAS && own) score += bias.of(r, position + key);
          score = own ? score : NEVER;
          seen[r] = fmaxf(seen[r], score);
          s[j][2 * r + i] = score;
        }
      }
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      seen[r] = fmaxf(seen[r], shuffle_xor(seen[r], 1));
      seen[r] = fmaxf(seen[r], shuffle_xor(seen[r], 2));
      const float shrink = fast_exp2(most[r] - seen[r]);
      most[r] = seen[r];
      sum[r] *= shrink;
#pragma unroll
      for (int j = 0; j < DP / 8; ++j) {
        o[j][2 * r] *= shrink;
        o[j][2 * r + 1] *= shrink;
      }
    }
#pragma unroll
    for (int j = 0; j < KEYS / 8; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        s[j][i] = fast_exp2(s[j][i] - most[i / 2]);
        sum[i / 2] += s[j][i];
      }
  }

  __device__ float inverse(int row) const {
    float total = sum[row] + shuffle_xor(sum[row], 1);
    total += shuffle_xor(total, 2);
    return 1.0f / total;
  }
};

// An element of y. Bytes count steps from limits[0], limits[1] of them a unit.
template <typename T>
__device__ inline T stored(float value, const float*) {
  return from_float<T>(value);
}
template <>
__device__ inline u8 stored<u8>(float value, const float* limits) {
  return to_u8((value - limits[0]) * limits[1]);
}

// A warp's context, through its own shared memory, to 16 rows of y.
__device__ inline void put(const Context& o, const Softmax& softmax, Y* shared, Y* y,
                           const float* limits) {
  constexpr int EACH = sizeof(Piece) / sizeof(Y), PER_ROW = D / EACH;
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float inverse = softmax.inverse(r);
    Y* row = shared + (lane / 4 + 8 * r) * STRIDE + lane % 4 * 2;
#pragma unroll
    for (int j = 0; j < DP / 8; ++j)
#pragma unroll
      for (int i = 0; i < 2; ++i) row[j * 8 + i] = stored<Y>(o[j][2 * r + i] * inverse, limits);
  }
  warp_sync();
  for (int i = lane; i < 16 * PER_ROW; i += 32) {
    const int row = i / PER_ROW, c = i % PER_ROW * EACH;
    *reinterpret_cast<Piece*>(y + static_cast<long long>(row) * PITCH_Y + blockIdx.y * D + c) =
        *reinterpret_cast<const Piece*>(shared + row * STRIDE + c);
  }
  if (blockIdx.y == H - 1)
    for (int i = lane; i < 16 * 16; i += 32)
      if (const int c = H * D + i % 16; c < PITCH_Y)
        y[static_cast<long long>(i / 16) * PITCH_Y + c] = Y{};
}

template <bool WHOLE>
__device__ inline void tile(Context& o, Softmax& softmax, const Query& query, const Shared& shared,
                            int warp, int stage, const Bias& bias, int position, int low, int high) {
  const int at = stage * KEYS * STRIDE;
  Scores s;
  scores<WHOLE>(s, query, shared.queries + warp * ROW, shared.keys + at, low, high);
  softmax.take<WHOLE>(s, o, shared.masks + stage * KEYS, bias, position, low, high);
  context<WHOLE>(o, s, shared.values + at, low, high);
}

__device__ inline void attend(const X* qkv, const float* added, const int* table, const float* bias,
                              const float* limits, Y* y, int blocks, int length, int bias_batch,
                              int bias_heads) {
  SHARED_MEMORY(memory);
  const Shared shared(memory);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int first = blockIdx.x * WARPS;
  const int last = first + WARPS < blocks ? first + WARPS - 1 : blocks - 1;
  const bool inside = first + warp <= last;  // warps behind the last block repeat it
  const int mine = inside ? first + warp : last;
  const int start = table[4 * first + 2], end = table[4 * last + 2] + table[4 * last + 3];
  const int own = table[4 * mine + 2], own_end = own + table[4 * mine + 3];
  const int tiles = ((end - start) * 16 + KEYS - 1) / KEYS;
  Bias of{bias, length, 0};
  if (BIAS) {
    const int row = table[4 * mine], batch = row < bias_batch ? row : bias_batch - 1;
    const int head = static_cast<int>(blockIdx.y) < bias_heads ? blockIdx.y : bias_heads - 1;
    of.plane += (static_cast<long long>(batch) * bias_heads + head) * length * length;
    of.query = table[4 * mine + 1] + lane / 4;
  }
  ask_for<16, 32>(shared.queries + warp * ROW,
                  qkv + static_cast<long long>(mine) * 16 * PITCH + blockIdx.y * D, 16, lane);
#pragma unroll
  for (int stage = 0; stage < STAGES - 1; ++stage) {
    const int at = start * 16 + stage * KEYS;
    if (stage < tiles) shared.ask_tile(stage, qkv, added, at, end * 16 - at);
    copy_commit();
  }
  Query query;
  Softmax softmax;
  Context o;
#pragma unroll
  for (int j = 0; j < DP / 8; ++j)
#pragma unroll
    for (int i = 0; i < 4; ++i) o[j][i] = 0.0f;
  for (int i = 0; i < tiles; ++i) {
    copy_wait<STAGES - 2>();
    block_sync();  // the tile is there for all, and the one before it is done with
    const int next = i + STAGES - 1, at = start * 16 + next * KEYS;
    if (next < tiles) shared.ask_tile(next % STAGES, qkv, added, at, end * 16 - at);
    copy_commit();
    if (i == 0) query.read(shared.queries + warp * ROW);
    const int here = start + i * (KEYS / 16), low = own - here, high = own_end - here;
    const int position = -low * 16;
    if (low <= 0 && high >= KEYS / 16)
      tile<true>(o, softmax, query, shared, warp, i % STAGES, of, position, low, high);
    else if (low < KEYS / 16 && high > 0)
      tile<false>(o, softmax, query, shared, warp, i % STAGES, of, position, low, high);
  }
  warp_sync();  // the queries are read
  if (inside)
    put(o, softmax, reinterpret_cast<Y*>(shared.queries + warp * ROW),
        y + static_cast<long long>(mine) * 16 * PITCH_Y, limits);
}
