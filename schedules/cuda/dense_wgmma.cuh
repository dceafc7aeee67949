// The product of `dense` by wgmma, which reads both operands from shared memory: a group of four
// warps makes 64 × COLUMNS. Slots are filled STAGES - 2 ahead: when an iteration begins, the slot of
// the one before may still be read by some group, that of the one before it is not.

template <class C> WORD void dense_by_groups(const Operands& of) {
  SHARED_MEMORY(shared);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int group_row = warp / 4 * 64;
  int row, column;
  place<C>(of.rows, row, column);
  begin<C>(of, shared, row, column);
#pragma unroll
  for (int s = 0; s < C::STAGES - 2; ++s) {
    if (s < C::ITERATIONS) fill<C>(of, shared + s * C::SLOT, s, row, column);
    copy_commit();
  }
  Sum sums[C::COLUMNS / 2];
#pragma unroll
  for (int i = 0; i < C::COLUMNS / 2; ++i) sums[i] = 0;
  int slot = 0, next = C::STAGES - 2;
#pragma unroll 1
  for (int iteration = 0; iteration < C::ITERATIONS; ++iteration) {
    copy_wait<C::STAGES - 3>();
    shared_fence();
    block_sync();
    const u8* const x = shared + slot * C::SLOT + group_row * PANEL;
    const u8* const w = shared + slot * C::SLOT + C::ROWS * PANEL;
    wgmma_keep(sums);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < PANEL / 32; ++step)
      multiply_group<C::COLUMNS>(sums, wgmma_matrix(x + step * 32), wgmma_matrix(w + step * 32));
    wgmma_commit();
    const int ahead = iteration + C::STAGES - 2;
    if (ahead < C::ITERATIONS) fill<C>(of, shared + next * C::SLOT, ahead, row, column);
    if (RESIDUAL && !C::LATE && iteration == 0)
      fill_residual<C>(of, shared + C::AT_RESIDUAL, row, column);
    copy_commit();
    slot = slot == C::STAGES - 1 ? 0 : slot + 1;
    next = next == C::STAGES - 1 ? 0 : next + 1;
    wgmma_wait<1>();
  }
  wgmma_wait<0>();
  wgmma_keep(sums);
  copy_wait<0>();
  block_sync();
  finish<C>(of, shared, (Sum(&)[C::WIDE][4])sums[0], 0, 0, lane, group_row + warp % 4 * 16, 0, row,
            column);
}
