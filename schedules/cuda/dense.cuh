// y = activation(x W + b) + residual, or what else `finish` makes of x W + b. A block makes a tile of C::ROWS × C::COLUMNS, in three steps:
// panels of x and W go through STAGES slots of shared memory, warps multiply them, `finish` ends.
//
// A panel is 128 bytes of K, whatever the element: of ROWS rows of x, then of COLUMNS columns of W.
// The chunk of 16 bytes at c of line i lies at c ^ i % 8: what eight lanes read of eight lines, by
// ldmatrix or each for itself, lies in all 32 banks once. W is packed as it lies there. A slot has
// SLICES panels, one for each group of warps, whose sums meet in `finish`.

// Where the copy `at + index` lies, of EACH to a panel, COUNT made at once: its panel and its place
// there, in a part that the compiler knows and a part of the thread.
struct Place {
  int panel, inside, own_panel, own_inside;
};
template <int COUNT, int EACH> WORD Place locate(int at, int index) {
  if (EACH % COUNT == 0) return {at / EACH, at % EACH, 0, index};
  if (COUNT % EACH == 0) return {at / EACH, 0, index / EACH, index % EACH};
  return {0, 0, (at + index) / EACH, (at + index) % EACH};
}

// The block's tile. Tiles are taken in bands of BAND rows of tiles, each column by column.
template <class C> WORD void place(int rows, int& row, int& column) {
  const int columns = (W_COLUMNS + C::COLUMNS - 1) / C::COLUMNS;
  const int tiles = (rows + C::ROWS - 1) / C::ROWS;
  const int band = blockIdx.x / (C::BAND * columns), first = band * C::BAND;
  const int inside = blockIdx.x - band * C::BAND * columns;
  const int height = tiles - first < C::BAND ? tiles - first : C::BAND;
  row = (first + inside % height) * C::ROWS;
  column = inside / height * C::COLUMNS;
}

// The panels of an iteration into a slot; zeros beyond the ends of x and W.
template <class C>
WORD void fill(const Operands& of, u8* slot, int iteration, int row, int column) {
  constexpr bool WHOLE = C::ITERATIONS * C::SLICES * PANEL == INPUT_BYTES;
  const int first = iteration * C::SLICES;
  constexpr int LINES = C::ROWS * C::SLICES, PASS = C::THREADS / 8;
  const int thread = threadIdx.x, line = thread / 8, chunk = thread % 8 * 16;
  const u8* const x = of.x + (long long)row * INPUT_BYTES + first * PANEL;
#pragma unroll
  for (int at = 0; at < LINES; at += PASS) {
    if (LINES % PASS != 0 && at + line >= LINES) break;
    const auto to = locate<PASS, C::ROWS>(at, line);
    const u8* const from = x + (to.own_inside * INPUT_BYTES + to.own_panel * PANEL + chunk);
    const int byte = (first + to.panel + to.own_panel) * PANEL + chunk;
    const bool valid = to.inside < of.rows - row - to.own_inside && (WHOLE || byte < INPUT_BYTES);
    const int swizzled = chunk ^ (to.inside + to.own_inside) % 8 * 16;
    copy_async_16(slot + line * PANEL + swizzled + at * PANEL,
                  from + (to.inside * INPUT_BYTES + to.panel * PANEL), valid);
  }
  constexpr int EACH = C::COLUMNS * 8, CHUNKS = EACH * C::SLICES;
  constexpr long long STRIDE = W_COLUMNS * PANEL;
  const u8* const w = of.w + column * PANEL + first * STRIDE;
#pragma unroll
  for (int at = 0; at < CHUNKS; at += C::THREADS) {
    if (CHUNKS % C::THREADS != 0 && at + thread >= CHUNKS) break;
    const auto to = locate<C::THREADS, EACH>(at, thread);
    const u8* const from = w + (to.own_inside * 16 + to.own_panel * STRIDE);
    const bool valid =
        (W_COLUMNS % C::COLUMNS == 0 || column + (to.inside + to.own_inside) / 8 < W_COLUMNS) &&
        (WHOLE || first + to.panel + to.own_panel < PANELS);
    copy_async_16(slot + LINES * PANEL + thread * 16 + at * 16,
                  from + (to.inside * 16 + to.panel * STRIDE), valid);
  }
}

template <class C> WORD void dense(const Operands& of) {
  SHARED_MEMORY(shared);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int slice = warp / C::WARPS, inside = warp % C::WARPS;
  int row, column;
  place<C>(of.rows, row, column);
  begin<C>(of, shared, row, column);
#pragma unroll
  for (int s = 0; s < C::STAGES - 1; ++s) {
    if (s < C::ITERATIONS) fill<C>(of, shared + s * C::SLOT, s, row, column);
    copy_commit();
  }
  const int warp_row = inside / C::WARPS_ACROSS * (C::TALL * 16);
  const int warp_column = inside % C::WARPS_ACROSS * (C::WIDE * 8);
  const int x_at = slice * (C::ROWS * PANEL) + warp_row * PANEL;
  const int w_at = C::SLICES * (C::ROWS * PANEL) + slice * (C::COLUMNS * PANEL) +
                   warp_column * PANEL;

  Sum sums[C::TALL * C::WIDE][4];
#pragma unroll
  for (int i = 0; i < C::TALL * C::WIDE; ++i)
    for (int k = 0; k < 4; ++k) sums[i][k] = 0;
  Fragments<C> fragments[2];
  const Lane names = lane_of(lane);

  copy_wait<C::STAGES - 2>();
  block_sync();
  load<C>(fragments[0], shared + x_at, shared + w_at, names, 0);
  int slot = 0, next = C::STAGES - 1;  // that is read, that is filled
#pragma unroll 1
  for (int iteration = 0; iteration < C::ITERATIONS; ++iteration) {
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
      if (step == STEPS - 1) {  // the next slot is there, and this one has been read by all
        copy_wait<C::STAGES - 2>();
        block_sync();
        if (iteration < C::ITERATIONS - 1) slot = slot == C::STAGES - 1 ? 0 : slot + 1;
      }
      const u8* const now = shared + slot * C::SLOT;
      load<C>(fragments[(step + 1) % 2], now + x_at, now + w_at, names, (step + 1) % STEPS);
      if (step == 0) {
        const int ahead = iteration + C::STAGES - 1;
        if (ahead < C::ITERATIONS) fill<C>(of, shared + next * C::SLOT, ahead, row, column);
        if (RESIDUAL && !C::LATE && iteration == 0)
          fill_residual<C>(of, shared + C::AT_RESIDUAL, row, column);
        copy_commit();
        next = next == C::STAGES - 1 ? 0 : next + 1;
      }
      multiply<C>(sums, fragments[step % 2]);
    }
  }
  copy_wait<0>();
  block_sync();
  finish<C>(of, shared, sums, slice, inside, lane, warp_row, warp_column, row, column);
}
