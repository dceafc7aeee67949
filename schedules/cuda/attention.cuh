// Attention of some blocks of 16 queries for one head, or for TOGETHER heads that read the same keys
// and values; a block of a head to SPLIT warps. The keys that any of these queries may see go through
// shared memory in tiles of TILE; a warp takes those that its own see, all of them of its sequence.
// Scores, weights and context stay in registers, as accumulators of 16 × 8 tiles: with g = lane / 4
// and t = lane % 4, columns 2 t and 2 t + 1 of row g, then of row g + 8.
// Before it: H, KV (heads of keys and values), GROUP (H / KV), TOGETHER, D, DP (D rounded up to 16),
// STRIDE (of rows in shared memory), ROW (of 16 of them), PITCH, PITCH_Y, WARPS, SPLIT, UNITS (blocks
// of a head) and BLOCKS (of queries) of a thread block, TILE, KEYS (of a tile, for a warp),
// STAGES, BIAS, BEFORE and BEHIND (keys that a query sees there, ALL: no bound), ALIGNED (a head's rows
// start on a multiple of 16 bytes), FACTOR (of scores, in powers of two), CAP (their bound, 0: none),
// BY_KEYS, BY_QUERIES and LAST (see attention_distances.cuh), X, Y (of qkv and y), Piece (1 to 16
// bytes, of which a head's rows of y are made), Scores, Context, and an arithmetic: Query, products,
// context.

constexpr float LOG2E = 1.4426950408889634f;
constexpr float LOWEST = -1e30f;  // the least that is added to a score
constexpr float NEVER = -1e38f;   // its weight is zero beside any score
constexpr int BEFORE_BLOCKS = (BEFORE + 15) / 16, BEHIND_BLOCKS = (BEHIND + 15) / 16;

// ROWS rows of a head into shared memory; zeros behind the first ``there``.
template <int ROWS, int THREADS>
__device__ inline void ask_for(X* to, const X* from, int there, int thread) {
  constexpr int EACH = 16 / sizeof(X), PER_ROW = DP / EACH;
  constexpr int AT_ONCE = THREADS < PER_ROW ? 1 : THREADS / PER_ROW;
  if (ALIGNED && THREADS >= PER_ROW) {
    const int mine = thread / PER_ROW, c = thread % PER_ROW * EACH;
    to += mine * STRIDE + c;
    from += static_cast<long long>(mine) * PITCH + c;
#pragma unroll
    for (int row = 0; row < ROWS; row += AT_ONCE)
      if ((ROWS % AT_ONCE == 0 || row + mine < ROWS) && (THREADS % PER_ROW == 0 || mine < AT_ONCE))
        copy_async_16(to + row * STRIDE, from + row * PITCH, row + mine < there && c < D);
  } else {
    for (int i = thread; i < ROWS * DP; i += THREADS) {
      const int row = i / DP, c = i % DP;
      const bool has = row < there && c < D;
      to[row * STRIDE + c] =
          has ? from[static_cast<long long>(row) * PITCH + c] : from_float<X>(0.0f);
    }
  }
}

// Shared memory: the queries of each block (and their context at the end), then the tiles of keys
// (and what warps of a block have found, at the end), and what is near them.
struct Shared {
  X* queries;
  X* keys;  // STAGES tiles
  X* values;
  float* masks;
  X* near;

  __device__ explicit Shared(unsigned char* memory) {
    queries = reinterpret_cast<X*>(memory);
    keys = queries + UNITS * ROW;
    values = keys + STAGES * TILE * STRIDE;
    masks = reinterpret_cast<float*>(values + STAGES * TILE * STRIDE);
    near = reinterpret_cast<X*>(masks + STAGES * TILE);
  }

  // The tile that starts at row ``start`` of the keys, of which ``there`` are wanted.
  __device__ void ask_tile(int stage, const X* qkv, const float* added, int start, int there) const {
    constexpr int THREADS = 32 * WARPS;
    const int head = blockIdx.y * TOGETHER / GROUP, tile = stage * TILE * STRIDE;
    const int thread = threadIdx.x;
    const X* from = qkv + static_cast<long long>(start) * PITCH + (H + head) * D;
    ask_for<TILE, THREADS>(keys + tile, from, there, thread);
    ask_for<TILE, THREADS>(values + tile, from + KV * D, there, thread);
    if (thread < TILE / 4)
      copy_async_16(masks + stage * TILE + 4 * thread, added + start + 4 * thread,
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

// A score in powers of two, before its mask. With a bound CAP that is CAP tanh(s / bound), of which
// FACTOR has what the exponential is of.
__device__ inline float scaled(float s) {
  if (CAP == 0.0f) return s * FACTOR;
  return CAP - fast_divide(2.0f * CAP, 1.0f + fast_exp2(s * FACTOR));
}

// Whether a query sees a key so many places behind its own.
__device__ inline bool sees(int behind) {
  return (BEHIND == ALL || behind <= BEHIND) && (BEFORE == ALL || -behind <= BEFORE);
}

// What a warp's softmax has seen; ``sum`` is of the lane's own columns.
struct Softmax {
  float most[2] = {NEVER, NEVER}, sum[2] = {0.0f, 0.0f};

  // The scores of a tile become weights; what was added up before is brought to their maximum.
  // The first key is at ``position`` of its sequence, ``behind`` places behind the first query. Of
  // the tile's blocks, low to high - 1 count; a WHOLE one is seen by all queries.
  template <bool WHOLE>
  __device__ void take(Scores& s, Context& o, const float* mask, const Bias& bias, int position,
                       int behind, int low, int high) {
    const int column = threadIdx.x % 4 * 2, own = threadIdx.x % 32 / 4;
    float seen[2] = {most[0], most[1]};
#pragma unroll
    for (int j = 0; j < KEYS / 8; ++j) {
      const bool there = WHOLE || (j / 2 >= low && j / 2 < high);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int key = j * 8 + column + i;
        const float added = mask[key] * LOG2E;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          float score = scaled(s[j][2 * r + i]) + added;
          if (BIAS && there) score += bias.of(r, position + key);
          score = there && (WHOLE || sees(behind + key - own - 8 * r)) ? score : NEVER;
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

  // Adds what another warp has found for the same queries; ``found``: see ``leave``.
  __device__ void join(Context& o, const float* found) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float other = found[32 * r], all = fmaxf(most[r], other);
      const float mine = fast_exp2(most[r] - all), theirs = fast_exp2(other - all);
      most[r] = all;
      sum[r] = sum[r] * mine + found[32 * (2 + r)] * theirs;
#pragma unroll
      for (int j = 0; j < DP / 8; ++j)
#pragma unroll
        for (int i = 2 * r; i < 2 * r + 2; ++i)
          o[j][i] = o[j][i] * mine + found[32 * (4 + 4 * j + i)] * theirs;
    }
  }

  __device__ void leave(const Context& o, float* found) const {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      found[32 * r] = most[r];
      found[32 * (2 + r)] = sum[r];
    }
#pragma unroll
    for (int j = 0; j < DP / 8; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) found[32 * (4 + 4 * j + i)] = o[j][i];
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
__device__ inline void put(const Context& o, const Softmax& softmax, Y* shared, Y* y, int head,
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
    *reinterpret_cast<Piece*>(y + static_cast<long long>(row) * PITCH_Y + head * D + c) =
        *reinterpret_cast<const Piece*>(shared + row * STRIDE + c);
  }
  if (head == H - 1)
    for (int i = lane; i < 16 * 16; i += 32)
      if (const int c = H * D + i % 16; c < PITCH_Y)
        y[static_cast<long long>(i / 16) * PITCH_Y + c] = Y{};
}

// A warp's part of a tile: ``q`` its queries, k, v and masks those of its first key.
template <bool WHOLE>
__device__ inline void step(Context& o, Softmax& softmax, const Query& query, const X* q,
                            const X* k, const X* v, const float* mask, const Bias& bias,
                            const Near& near, int position, int behind, int low, int high) {
  Scores s;
  products<KEYS, WHOLE>(s, query, q, k, low, high);
  if (BY_KEYS || BY_QUERIES) near.add<WHOLE>(s, query, q, k, low, high);
  softmax.take<WHOLE>(s, o, mask, bias, position, behind, low, high);
  context<WHOLE>(o, s, v, low, high);
}

__device__ inline void attend(const X* qkv, const float* added, const int* table, const float* bias,
                              const Tables& tables, const float* limits, Y* y, int blocks,
                              int length, int bias_batch, int bias_heads) {
  SHARED_MEMORY(memory);
  const Shared shared(memory);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, part = warp % SPLIT;
  const int unit = warp / SPLIT, head = blockIdx.y * TOGETHER + unit % TOGETHER;
  const int first = blockIdx.x * BLOCKS;
  const int last = first + BLOCKS < blocks ? first + BLOCKS - 1 : blocks - 1;
  const bool inside = first + unit / TOGETHER <= last;  // warps behind the last block repeat it
  const int mine = inside ? first + unit / TOGETHER : last;
  const int sequence = table[4 * mine + 2];
  int start = table[4 * first + 2], end = table[4 * last + 2] + table[4 * last + 3];
  int own = sequence, own_end = own + table[4 * mine + 3];
  if (BEFORE != ALL) {
    start = max(start, first - BEFORE_BLOCKS);
    own = max(own, mine - BEFORE_BLOCKS);
  }
  if (BEHIND != ALL) {
    end = min(end, last + 1 + BEHIND_BLOCKS);
    own_end = min(own_end, mine + 1 + BEHIND_BLOCKS);
  }
  const int tiles = ((end - start) * 16 + TILE - 1) / TILE;
  Bias of{bias, length, 0};
  if (BIAS) {
    const int row = table[4 * mine], batch = row < bias_batch ? row : bias_batch - 1;
    const int plane = head < bias_heads ? head : bias_heads - 1;
    of.plane += (static_cast<long long>(batch) * bias_heads + plane) * length * length;
    of.query = table[4 * mine + 1] + lane / 4;
  }
  X* const q = shared.queries + unit * ROW;
  ask_for<16, 32 * SPLIT>(q, qkv + static_cast<long long>(mine) * 16 * PITCH + head * D, 16,
                          threadIdx.x % (32 * SPLIT));
#pragma unroll
  for (int stage = 0; stage < STAGES - 1; ++stage) {
    const int at = start * 16 + stage * TILE;
    if (stage < tiles) {
      shared.ask_tile(stage, qkv, added, at, end * 16 - at);
      tables.ask(shared.near, stage, head, first * 16 - at);
    }
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
    const int next = i + STAGES - 1, at = start * 16 + next * TILE;
    if (next < tiles) {
      shared.ask_tile(next % STAGES, qkv, added, at, end * 16 - at);
      tables.ask(shared.near, next % STAGES, head, first * 16 - at);
    }
    copy_commit();
    if (i == 0) query.read(q);
    const int here = start + (i * TILE + part * KEYS) / 16, low = own - here, high = own_end - here;
    const int position = (here - sequence) * 16, behind = (here - mine) * 16;
    const int key = i % STAGES * TILE + part * KEYS;
    const X *k = shared.keys + key * STRIDE, *v = shared.values + key * STRIDE;
    const float* mask = shared.masks + key;
    const Near near(shared.near, i % STAGES, part * KEYS + 16 * (BLOCKS - 1 - (mine - first)), warp);
    const bool whole = low <= 0 && high >= KEYS / 16 && sees(behind + KEYS - 1) && sees(behind - 15);
    if (whole)
      step<true>(o, softmax, query, q, k, v, mask, of, near, position, behind, low, high);
    else if (low < KEYS / 16 && high > 0)
      step<false>(o, softmax, query, q, k, v, mask, of, near, position, behind, low, high);
  }
  if (SPLIT > 1) {
    float* const found = reinterpret_cast<float*>(shared.keys) + lane;
    constexpr int EACH = 32 * (4 + DP / 2);
    block_sync();  // all are done with the tiles
    if (part) softmax.leave(o, found + (warp - unit - 1) * EACH);
    block_sync();
    if (part) return;
#pragma unroll
    for (int other = 0; other < SPLIT - 1; ++other)
      softmax.join(o, found + (unit * (SPLIT - 1) + other) * EACH);
  }
  warp_sync();  // the queries are read
  if (inside)
    put(o, softmax, reinterpret_cast<Y*>(q), y + static_cast<long long>(mine) * 16 * PITCH_Y, head,
        limits);
}
