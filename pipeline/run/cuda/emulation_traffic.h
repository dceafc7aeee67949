// What emulation.cpp counts of memory where asked: how many passes an access of a warp takes.
//
// Shared memory has 32 banks of 4 bytes: a pass serves one word of each. Global memory is moved in
// sectors of 32 bytes. Lanes run one after another here, so the accesses of each are kept until the
// warp meets; of each way the first of all lanes are taken for one instruction, the second for
// another: exact where lanes do not go different ways. What a lane touches right after its neighbour
// is one access, up to 16 aligned bytes: compilers for GPUs make vectors of a structure's fields.

namespace {

enum Way { kSharedRead, kSharedWrite, kGlobalRead, kGlobalWrite, kCopyIn, kMatrixRead, kWays };

struct Traffic {
  uint64_t instructions, bytes, parts, least;  // passes or sectors: those taken, and the fewest
} traffic[kWays];
uint64_t multiplications;  // of tensor cores

struct Event {
  uintptr_t at;
  unsigned size;
  unsigned first, last;  // by the order in which the lane makes all its accesses
};

struct Events {
  Event* events;
  unsigned count, size;
} events_of[kWays][kThreads];

void note(Way way, uintptr_t at, size_t size) {
  static unsigned clocks[kThreads];
  Events& own = events_of[way][current_index];
  if (own.count == own.size) {
    own.size = 2 * own.size + 64;
    own.events = (Event*)realloc(own.events, own.size * sizeof *own.events);
  }
  const unsigned now = ++clocks[current_index];
  own.events[own.count++] = {at, (unsigned)size, now, now};
  while (own.count > 1) {
    Event &one = own.events[own.count - 2], &next = own.events[own.count - 1];
    const bool pair = one.size == next.size && one.at + one.size == next.at &&
                      one.last + 1 == next.first && one.size <= 8 && one.at % (2 * one.size) == 0;
    if (!pair) return;
    one.size *= 2;
    one.last = next.last;
    --own.count;
  }
}

// The different numbers among `count`, which are sorted on the way.
unsigned different(uintptr_t* numbers, unsigned count) {
  unsigned kept = 0;
  for (unsigned i = 0; i < count; ++i) {
    unsigned j = 0;
    while (j < kept && numbers[j] != numbers[i]) ++j;
    if (j == kept) numbers[kept++] = numbers[i];
  }
  return kept;
}

// Lanes whose accesses make 128 bytes are served together.
void count_shared(Traffic& total, const Event* const* lanes, unsigned count) {
  const unsigned size = lanes[0]->size, together = size <= 4 ? 32 : 128 / size;
  for (unsigned first = 0; first < count; first += together) {
    uintptr_t words[32];
    unsigned used = 0, banks[32] = {}, most = 0;
    for (unsigned i = first; i < count && i < first + together; ++i)
      for (unsigned byte = 0; byte < size; byte += 4) words[used++] = (lanes[i]->at + byte) / 4;
    used = different(words, used);
    for (unsigned i = 0; i < used; ++i) {
      const unsigned in_bank = ++banks[words[i] % 32];
      if (in_bank > most) most = in_bank;
    }
    total.parts += most;
    ++total.least;
  }
}

void count_global(Traffic& total, const Event* const* lanes, unsigned count) {
  uintptr_t sectors[32];
  unsigned bytes = 0;
  for (unsigned i = 0; i < count; ++i) {
    sectors[i] = lanes[i]->at / 32;
    bytes += lanes[i]->size;
  }
  const unsigned found = different(sectors, count);
  total.parts += found;
  const unsigned fewest = (bytes + 31) / 32;
  total.least += fewest < found ? fewest : found;  // lanes may read the same
}

void count_way(Way way, Events* own) {
  unsigned most = 0;
  for (unsigned lane = 0; lane < kLanes; ++lane)
    if (own[lane].count > most) most = own[lane].count;
  for (unsigned i = 0; i < most; ++i) {
    bool taken[kLanes] = {};
    for (unsigned first = 0; first < kLanes; ++first) {
      if (i >= own[first].count || taken[first]) continue;
      const Event* same[kLanes];
      unsigned count = 0;
      for (unsigned lane = first; lane < kLanes; ++lane) {
        if (i >= own[lane].count || taken[lane]) continue;
        if (own[lane].events[i].size != own[first].events[i].size) continue;
        taken[lane] = true;
        same[count++] = &own[lane].events[i];
      }
      Traffic& total = traffic[way];
      ++total.instructions;
      total.bytes += (uint64_t)count * same[0]->size;
      if (way == kSharedRead || way == kSharedWrite)
        count_shared(total, same, count);
      else
        count_global(total, same, count);
    }
  }
  for (unsigned lane = 0; lane < kLanes; ++lane) own[lane].count = 0;
}

// Counts what the lanes of a warp have noted.
void count_warp(unsigned warp) {
  for (int way = 0; way < kWays; ++way) count_way((Way)way, events_of[way] + warp * kLanes);
}

void count_matrices(const unsigned char* const* rows, int matrices) {
  for (int m = 0; m < matrices; ++m) {
    Event events[8];
    const Event* lanes[8];
    for (unsigned row = 0; row < 8; ++row) {
      events[row] = {(uintptr_t)rows[8 * m + (int)row], 16, 0, 0};
      lanes[row] = &events[row];
    }
    count_shared(traffic[kMatrixRead], lanes, 8);
  }
  ++traffic[kMatrixRead].instructions;
  traffic[kMatrixRead].bytes += (uint64_t)matrices * 128;
}

}  // namespace

// From now on accesses are counted, or no longer; counts begin at 0.
EXPORT void emulated_count(int on) {
  counting = on;
  memset(traffic, 0, sizeof traffic);
  multiplications = 0;
}

// Four numbers for each Way, and the multiplications of tensor cores.
EXPORT void emulated_counts(uint64_t* numbers) {
  memcpy(numbers, traffic, sizeof traffic);
  numbers[4 * kWays] = multiplications;
}
