// wgmma of emulation.cpp. Matrices are read by their descriptors, as PTX lays them out for matrices
// whose k is contiguous. A sum lands in d at wgmma_wait; until then d is NaN, and what was read may
// not be written to.

namespace {

constexpr unsigned kSums = 16, kColumns = 256, kGroupOpen = ~0u;

struct Sum {  // one array d of a warp's lanes, under way
  void* d[kLanes];
  int columns, kind;
  unsigned group;  // of the last operation on it
  union {
    float numbers[16][kColumns];
    int integers[16][kColumns];
  };
};

struct Reading {
  size_t at;
  unsigned group;
};

struct Warpgroup {  // what a warp has under way
  Sum* sums;
  unsigned count, groups;
  bool fenced;
  Reading* readings;
  unsigned readings_count, readings_size;
  unsigned issued;  // operations, of which the four warps of a warpgroup must have as many
} wgmmas[kWarps];

struct Multiply {
  void* d;
  int columns, kind, accumulate;
  uint64_t a, b;
};

void begin_wgmma() {
  for (Warpgroup& one : wgmmas) {
    one.count = one.groups = one.readings_count = 0;
    one.issued = 0;
    one.fenced = false;
  }
}

void end_wgmma() {
  for (unsigned w = 0; w + 3 < machine.warp_count; w += 4)
    for (unsigned other = w + 1; other < w + 4; ++other)
      if (wgmmas[w].issued != wgmmas[other].issued)
        fail("warps %u and %u of a warpgroup ran %u and %u wgmma", w, other, wgmmas[w].issued,
             wgmmas[other].issued);
}

// The byte of shared memory that holds byte `k` of a row, of a matrix by its descriptor.
size_t matrix_byte(uint64_t descriptor, unsigned row, unsigned k) {
  const unsigned start = (unsigned)(descriptor & 0x3fff) << 4;
  const unsigned leading = (unsigned)(descriptor >> 16 & 0x3fff) << 4;
  const unsigned stride = (unsigned)(descriptor >> 32 & 0x3fff) << 4;
  const unsigned mode = (unsigned)(descriptor >> 62);
  if (mode == 0) return start + row / 8 * stride + row % 8 * 16 + k / 16 * leading + k % 16;
  const unsigned pitch = 256u >> mode;  // 128, 64, 32
  const size_t at = start + row / 8 * stride + row % 8 * pitch + k;
  return at ^ ((at >> 7 & (pitch / 16 - 1)) << 4);
}

void check_matrix(const char* name, uint64_t descriptor) {
  const unsigned start = (unsigned)(descriptor & 0x3fff) << 4, mode = (unsigned)(descriptor >> 62);
  const unsigned pitch = mode ? 256u >> mode : 0;
  if (descriptor >> 49 & 7) fail("wgmma: the matrix %s has a base offset", name);
  if (mode && (start % (8 * pitch) >= pitch || start % pitch + 32 > pitch))
    fail("wgmma: the matrix %s starts at byte %u of shared memory, not in the first row of a "
         "pattern of %u bytes", name, start, 8 * pitch);
}

// Copies 32 bytes of each row to `to`, and marks them as read until the group is waited for.
bool read_matrix(Warpgroup& own, const char* name, uint64_t descriptor, unsigned first,
                 unsigned rows, unsigned thread, u8* to) {
  for (unsigned row = first; row < first + rows; ++row)
    for (unsigned k = 0; k < 32; k += 16, to += 16) {
      const size_t at = matrix_byte(descriptor, row, k);
      if (at + 16 > shared_now.size) {
        fail("wgmma: row %u of the matrix %s is at byte %zu of shared memory of %zu bytes", row,
             name, at, shared_now.size);
        return false;
      }
      const size_t step = used_alike(shared_now, at, 16);
      for (size_t byte = at; byte < at + 16; byte += step) {
        const unsigned stamp = shared_now.written[byte], writer = stamp >> kEpochBits;
        if (stamp && (stamp & kUnderWay) != kUnderWay &&
            machine.fenced[writer] < (stamp & kUnderWay)) {
          fail("wgmma: byte %zu of shared memory was written by thread %u without a shared_fence "
               "behind it", byte, writer);
          return false;
        }
      }
      shared_read(shared_now, at, 16, thread, thread << kEpochBits | kUnderWay);
      if (own.readings_count == own.readings_size) {
        own.readings_size = 2 * own.readings_size + 256;
        own.readings =
            (Reading*)realloc(own.readings, own.readings_size * sizeof *own.readings);
      }
      own.readings[own.readings_count++] = {at, kGroupOpen};
      memcpy(to, shared_now.memory + at, 16);
    }
  return true;
}

// The place of number i of a lane in a warp's 16 rows.
void place_of(unsigned lane, unsigned i, unsigned& row, unsigned& column) {
  row = lane / 4 + i / 2 % 2 * 8;
  column = i / 4 * 8 + lane % 4 * 2 + i % 2;
}

Sum& sum_of(Warpgroup& own, Lane* lanes, const Multiply& one) {
  for (unsigned i = 0; i < own.count; ++i)
    if (own.sums[i].d[0] == one.d) return own.sums[i];
  if (!own.sums) own.sums = (Sum*)malloc(kSums * sizeof *own.sums);
  if (own.count == kSums) fail("wgmma: more than %u sums under way", kSums);
  Sum& made = own.sums[own.count++];
  made.columns = one.columns;
  made.kind = one.kind;
  for (unsigned lane = 0; lane < kLanes; ++lane) {
    made.d[lane] = ((Multiply*)lanes[lane].request)->d;
    for (int i = 0; i < one.columns / 2; ++i) {
      unsigned row, column;
      place_of(lane, (unsigned)i, row, column);
      memcpy(&made.integers[row][column], (int*)made.d[lane] + i, 4);
    }
    memset(made.d[lane], 0xff, (size_t)one.columns / 2 * 4);
  }
  return made;
}

// sum += a (16 × K) * b (columns × K), whose numbers lie as C in rows of 32 bytes.
template <int K, class C, class T, class A, class B>
void accumulate_rows(T (&sum)[16][kColumns], int columns, const u8* a, const u8* b, A wide_a,
                     B wide_b) {
  static T x[16 * K], y[kColumns * K], turned[K][kColumns];
  wide_a((const C*)a, x, 16 * K);
  wide_b((const C*)b, y, columns * K);
  for (int n = 0; n < columns; ++n)
    for (int k = 0; k < K; ++k) turned[k][n] = y[n * K + k];
  for (int first = 0; first < columns; first += 32)  // all widths are multiples of 32
    for (int row = 0; row < 16; ++row) {
      typedef T Part __attribute__((vector_size(32 * sizeof(T))));
      Part total, part;
      memcpy(&total, &sum[row][first], sizeof total);
      for (int k = 0; k < K; ++k) {
        memcpy(&part, &turned[k][first], sizeof part);
        total += x[row * K + k] * part;
      }
      memcpy(&sum[row][first], &total, sizeof total);
    }
}

void multiply_warp(Lane* lanes, unsigned warp) {
  Warpgroup& own = wgmmas[warp];
  const Multiply& one = *(Multiply*)lanes[0].request;
  for (unsigned lane = 1; lane < kLanes; ++lane) {
    const Multiply& other = *(Multiply*)lanes[lane].request;
    if (other.columns != one.columns || other.kind != one.kind || other.a != one.a ||
        other.b != one.b || other.accumulate != one.accumulate)
      return fail("wgmma: lanes 0 and %u give different matrices", lane);
  }
  if (machine.threads % 128) return fail("wgmma in a block of %u threads", machine.threads);
  if (!own.fenced) return fail("wgmma without a wgmma_fence before it");
  check_matrix("a", one.a);
  check_matrix("b", one.b);
  ++own.issued;
  alignas(64) static u8 a[16 * 32], b[kColumns * 32];
  const unsigned thread = warp * kLanes;
  if (!read_matrix(own, "a", one.a, warp % 4 * 16, 16, thread, a)) return;
  if (!read_matrix(own, "b", one.b, 0, (unsigned)one.columns, thread, b)) return;
  Sum& sum = sum_of(own, lanes, one);
  sum.group = kGroupOpen;
  multiplications += 16u * (unsigned)one.columns * (one.kind == emulated_bytes ? 32 : 16);
  if (!one.accumulate) memset(sum.numbers, 0, sizeof sum.numbers);
  if (one.kind == emulated_bytes)
    return accumulate_rows<32, u8>(sum.integers, one.columns, a, b, wide_u8, wide_s8);
  const auto wide = one.kind == emulated_kind<bf16> ? wide_bf16 : wide_f16;
  accumulate_rows<16, unsigned short>(sum.numbers, one.columns, a, b, wide, wide);
}

}  // namespace

void emulated_wgmma(void* d, int columns, int kind, uint64_t a, uint64_t b, int accumulate) {
  Multiply one = {d, columns, kind, accumulate, a, b};
  whole_warp("wgmma");
  together("wgmma", &one, multiply_warp);
}

void emulated_shared_fence() {
  machine.fenced[current_index] = machine.epoch[current_index / kLanes];
}

void emulated_wgmma_fence() {
  together("wgmma_fence", nullptr, [](Lane*, unsigned warp) { wgmmas[warp].fenced = true; });
}

void emulated_wgmma_commit() {
  together("wgmma_commit", nullptr, [](Lane*, unsigned warp) {
    Warpgroup& own = wgmmas[warp];
    ++own.groups;
    for (unsigned i = 0; i < own.count; ++i)
      if (own.sums[i].group == kGroupOpen) own.sums[i].group = own.groups;
    for (unsigned i = own.readings_count; i-- > 0 && own.readings[i].group == kGroupOpen;)
      own.readings[i].group = own.groups;
  });
}

void emulated_wgmma_wait(int under_way) {
  int count = under_way;
  together("wgmma_wait", &count, [](Lane* lanes, unsigned warp) {
    Warpgroup& own = wgmmas[warp];
    const unsigned kept = (unsigned)*(int*)lanes[0].request;
    const unsigned done = own.groups > kept ? own.groups - kept : 0;
    const unsigned thread = warp * kLanes, mine = thread << kEpochBits | kUnderWay;
    unsigned left = 0;
    for (unsigned i = 0; i < own.count; ++i) {
      Sum& sum = own.sums[i];
      if (sum.group > done) {
        if (left != i) own.sums[left] = sum;
        ++left;
        continue;
      }
      for (unsigned lane = 0; lane < kLanes; ++lane)
        for (int n = 0; n < sum.columns / 2; ++n) {
          unsigned row, column;
          place_of(lane, (unsigned)n, row, column);
          memcpy((int*)sum.d[lane] + n, &sum.integers[row][column], 4);
        }
    }
    own.count = left;
    left = 0;
    for (unsigned i = 0; i < own.readings_count; ++i) {
      const Reading one = own.readings[i];
      if (one.group > done) {
        own.readings[left++] = one;
        continue;
      }
      for (size_t byte = one.at; byte < one.at + 16; ++byte) {
        if (shared_now.read[byte] == mine) shared_now.read[byte] = stamp(thread);
        if (shared_now.read_too[byte] == mine) shared_now.read_too[byte] = stamp(thread);
      }
    }
    own.readings_count = left;
    // Those that are under way still hold what they read.
    for (unsigned i = 0; i < left; ++i)
      for (size_t byte = own.readings[i].at; byte < own.readings[i].at + 16; ++byte)
        if (shared_now.read[byte] == stamp(thread)) shared_now.read[byte] = mine;
    own.fenced = own.count != 0;
  });
}
