// What the distance of two tokens adds to their score: the product of a query with a vector of its
// table (BY_KEYS), and that of a key with one of its own (BY_QUERIES); tables have vectors for
// query - key from -LAST to LAST, the outermost hold beyond. A tile brings those that its keys and the
// queries of this thread block need into shared memory, in the order of keys: AROUND of them.
//
// For 16 queries and 16 keys these are 31 neighbours. A warp multiplies its queries (the keys) by 32
// vectors, and reads the products askew, through shared memory of its own, in rows of LINE floats: no
// score is written.

constexpr int COUNT = BY_KEYS + BY_QUERIES, AROUND = TILE + 16 * BLOCKS;
constexpr int PLACES = AROUND * STRIDE;  // elements of one table's vectors

struct Tables {
  const X *keys, *queries;  // (H, 2 LAST + 1, DP), null: none

  // The vectors of a tile whose first key is ``ahead`` places before this block's first query.
  __device__ void ask(X* near, int stage, int head, int ahead) const {
    X* const to = near + stage * COUNT * PLACES;
    if (BY_KEYS) ask_one(to, keys, head, ahead);
    if (BY_QUERIES) ask_one(to + BY_KEYS * PLACES, queries, head, ahead);
  }

  static __device__ void ask_one(X* to, const X* table, int head, int ahead) {
    constexpr int EACH = 16 / sizeof(X), PER_ROW = DP / EACH;
    const X* const from = table + static_cast<long long>(head) * (2 * LAST + 1) * DP;
    for (int i = threadIdx.x; i < AROUND * PER_ROW; i += 32 * WARPS) {
      const int row = i / PER_ROW, c = i % PER_ROW * EACH;
      const int distance = min(max(ahead + 16 * BLOCKS - 1 - row, -LAST), LAST);
      copy_async_16(to + row * STRIDE + c, from + (distance + LAST) * DP + c, true);
    }
  }
};

// The vectors of a tile from ``first`` on: those of a warp's queries and its first 16 keys.
struct Near {
  const X *keys, *queries;
  float* products_of_warp;

  __device__ Near(X* near, int stage, int first, int warp) {
    keys = near + stage * COUNT * PLACES + first * STRIDE;
    queries = keys + BY_KEYS * PLACES;
    products_of_warp = reinterpret_cast<float*>(near + STAGES * COUNT * PLACES) + warp * 16 * LINE;
  }

  template <bool WHOLE>
  __device__ void add(Scores& s, const Query& query, const X* q, const X* k, int low,
                      int high) const {
#pragma unroll
    for (int j = 0; j < KEYS / 16; ++j) {
      if (!WHOLE && (j < low || j >= high)) continue;
      if (BY_KEYS) add_askew<true>(s, j, query, q, keys);
      if (BY_QUERIES) {
        Query as_rows;
        as_rows.read(k + j * ROW);
        add_askew<false>(s, j, as_rows, k + j * ROW, queries);
      }
    }
  }

  // To the scores of block j of keys: ``x``, 16 queries or 16 keys, times the vectors near them.
  template <bool OF_QUERIES>
  __device__ void add_askew(Scores& s, int j, const Query& held, const X* x,
                            const X* vectors) const {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    float found[4][4];
    products<32, true>(found, held, x, vectors + j * ROW, 0, 2);
    warp_sync();  // the products before these are read
#pragma unroll
    for (int c = 0; c < 4; ++c)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        products_of_warp[(g + i / 2 * 8) * LINE + 8 * c + 2 * t + i % 2] = found[c][i];
    warp_sync();
#pragma unroll
    for (int c = 0; c < 2; ++c)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int own = g + i / 2 * 8, key = 8 * c + 2 * t + i % 2;
        s[2 * j + c][i] += products_of_warp[(OF_QUERIES ? own : key) * LINE + key - own + 15];
      }
  }
};
