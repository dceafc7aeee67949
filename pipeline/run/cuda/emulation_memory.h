// What emulation.cpp checks of memory: the compiler calls __tsan_… for every access that may leave a
// thread's own variables.
//
// Each byte of shared memory has the stamp of its last write and of two reads: thread and epoch of
// its warp. An access is a race unless what it conflicts with lies behind a barrier that both have
// met. No stamp: not written yet.

namespace {

constexpr unsigned kEpochBits = 22, kUnderWay = (1u << kEpochBits) - 1;

struct Shadow {
  unsigned char* memory;
  size_t size;
  unsigned *written, *read, *read_too;
};
Shadow shared_now, static_now;

extern "C" {  // the linker's names for the section of static __shared__ arrays, if there is one
extern unsigned char __start_emulated_shared[] __attribute__((weak, visibility("hidden")));
extern unsigned char __stop_emulated_shared[] __attribute__((weak, visibility("hidden")));
extern unsigned char __ehdr_start[] __attribute__((visibility("hidden")));
extern unsigned char _end[] __attribute__((visibility("hidden")));
}

size_t static_shared() { return (size_t)(__stop_emulated_shared - __start_emulated_shared); }

bool reserve(Shadow& shadow) {
  shadow.written = (unsigned*)malloc((3 * shadow.size + 1) * sizeof(unsigned));
  shadow.read = shadow.written + shadow.size;
  shadow.read_too = shadow.read + shadow.size;
  return shadow.written != nullptr;
}

bool reserve_shared(unsigned size) {
  emulated_shared_memory = (unsigned char*)aligned_alloc(1024, kSharedLimit / 1024 * 1024 + 1024);
  shared_now.memory = emulated_shared_memory;
  shared_now.size = size;
  static_now.memory = __start_emulated_shared;
  static_now.size = static_shared();
  return emulated_shared_memory && reserve(shared_now) && reserve(static_now);
}

void release_shared() {
  Shadow* const both[] = {&shared_now, &static_now};
  for (Shadow* one : both) {
    free(one->written);
    *one = {};
  }
  free(emulated_shared_memory);
  emulated_shared_memory = nullptr;
}

void begin_shared() {
  Shadow* const both[] = {&shared_now, &static_now};
  for (Shadow* one : both) {
    memset(one->memory, 0xff, one->size);  // NaN as f16, bf16 and float
    memset(one->written, 0, one->size * sizeof(unsigned));
    memset(one->read, 0, one->size * sizeof(unsigned));
    memset(one->read_too, 0, one->size * sizeof(unsigned));
  }
}

unsigned stamp(unsigned thread) { return thread << kEpochBits | machine.epoch[thread / kLanes]; }

bool ordered(unsigned stamp, unsigned thread) {
  const unsigned other = stamp >> kEpochBits, epoch = stamp & kUnderWay;
  return !stamp || epoch <= machine.known[thread / kLanes][other / kLanes] ||
         (other == thread && epoch != kUnderWay);
}

size_t distance(const Shadow& shadow, const void* p) {
  return (size_t)((const unsigned char*)p - shadow.memory);
}

void race(const char* what, const Shadow& shadow, size_t byte, unsigned stamp) {
  const char* name = &shadow == &static_now ? "static " : "";
  if ((stamp & kUnderWay) == kUnderWay)
    fail("%s byte %zu of %sshared memory before copy_wait or wgmma_wait: thread %u has an operation "
         "on it under way", what, byte, name, stamp >> kEpochBits);
  else
    fail("race: %s byte %zu of %sshared memory, which thread %u has used since the last barrier "
         "that both met", what, byte, name, stamp >> kEpochBits);
}

// How many bytes from `at` on were used alike, and may be looked at as one: all, or 1.
size_t used_alike(const Shadow& shadow, size_t at, size_t size) {
  const unsigned *a = shadow.written + at, *b = shadow.read + at, *c = shadow.read_too + at;
  unsigned differs = 0;
  if (size == 16)  // most accesses; a fixed count becomes a few vector instructions
    for (size_t i = 0; i < 16; ++i) differs |= (a[i] ^ a[0]) | (b[i] ^ b[0]) | (c[i] ^ c[0]);
  else
    for (size_t i = 1; i < size; ++i) differs |= (a[i] ^ a[0]) | (b[i] ^ b[0]) | (c[i] ^ c[0]);
  return differs ? 1 : size;
}

void fill(unsigned* stamps, size_t count, unsigned stamp) {
  for (size_t i = 0; i < count; ++i) stamps[i] = stamp;
}

// `mine`: the stamp that the read leaves.
void shared_read(Shadow& shadow, size_t at, size_t size, unsigned thread, unsigned mine) {
  const size_t step = used_alike(shadow, at, size);
  for (size_t i = at; i < at + size; i += step) {
    const unsigned written = shadow.written[i], a = shadow.read[i], b = shadow.read_too[i];
    if (!written) return fail("reads byte %zu of shared memory, which nothing was written to", i);
    if (!ordered(written, thread)) return race("reads", shadow, i, written);
    if (a == mine || b == mine) continue;
    // Two readers are kept, of different warps where there are such: a write by any thread is
    // concurrent with one of them unless it is ordered behind both.
    if (ordered(a, thread))
      fill(shadow.read + i, step, mine);
    else if (ordered(b, thread) || (a ^ b) >> kEpochBits < kLanes)
      fill(shadow.read_too + i, step, mine);
  }
}

void shared_write(Shadow& shadow, size_t at, size_t size, unsigned thread, bool under_way) {
  const unsigned mine = under_way ? thread << kEpochBits | kUnderWay : stamp(thread);
  const size_t step = used_alike(shadow, at, size);
  for (size_t i = at; i < at + size; i += step) {
    const unsigned uses[] = {shadow.written[i], shadow.read[i], shadow.read_too[i]};
    for (unsigned before : uses)
      if (!ordered(before, thread)) return race("writes", shadow, i, before);
  }
  fill(shadow.written + at, size, mine);
  fill(shadow.read + at, size, 0);
  fill(shadow.read_too + at, size, 0);
}

// ---- global memory -------------------------------------------------------------------------------

struct Range {
  uintptr_t start, end;
  unsigned* written;  // for each byte the block that wrote it in this launch, from 1 on; or null
};
Range* ranges;
size_t ranges_count, ranges_size, last_range;

Range* known_range(uintptr_t at, size_t size) {
  for (size_t i = 0; i < ranges_count; ++i) {
    const size_t place = (last_range + i) % ranges_count;
    if (at < ranges[place].start || at + size > ranges[place].end) continue;
    last_range = place;
    return &ranges[place];
  }
  return nullptr;
}

// Blocks run in any order, so none may touch what another one writes.
void between_blocks(Range& range, const char* what, uintptr_t at, size_t size, bool write) {
  if (!write && !range.written) return;
  if (!range.written)
    range.written = (unsigned*)calloc(range.end - range.start, sizeof *range.written);
  const dim3 block = current->self.block, grid = current->self.grid;
  const unsigned mine = 1 + block.x + grid.x * (block.y + grid.y * block.z);
  unsigned* written = range.written + (at - range.start);
  for (size_t i = 0; i < size; ++i) {
    if (written[i] && written[i] != mine) {
      const unsigned other = written[i] - 1;
      return fail("race: %s byte %zu of an array of %zu bytes, which block (%u, %u, %u) has written",
                  what, (size_t)(at - range.start + i), (size_t)(range.end - range.start),
                  other % grid.x, other / grid.x % grid.y, other / grid.x / grid.y);
    }
    if (write) written[i] = mine;
  }
}

void forget_writes() {
  for (size_t i = 0; i < ranges_count; ++i) {
    free(ranges[i].written);
    ranges[i].written = nullptr;
  }
}

void outside(const char* what, uintptr_t at, size_t size) {
  const Range* nearest = nullptr;
  uintptr_t least = UINTPTR_MAX;
  for (size_t i = 0; i < ranges_count; ++i) {
    const uintptr_t off = at < ranges[i].start ? ranges[i].start - at
                          : at < ranges[i].end ? 0 : at - ranges[i].end;
    if (off < least) {
      least = off;
      nearest = &ranges[i];
    }
  }
  if (nearest)
    fail("%s %zu bytes at byte %td of an array of %zu bytes", what, size,
         (ptrdiff_t)(at - nearest->start), (size_t)(nearest->end - nearest->start));
  else
    fail("%s %zu bytes of memory that belongs to nothing", what, size);
}

// Whether the access is to global memory that was given (or to what is the program's own).
void global_access(const char* what, Way way, uintptr_t at, size_t size) {
  if (at - (uintptr_t)stacks < stacks_count * kStack) return;
  if (Range* range = known_range(at, size)) {
    if (counting) note(way, at, size);
    return between_blocks(*range, what, at, size, way == kGlobalWrite);
  }
  if (at >= (uintptr_t)__ehdr_start && at + size <= (uintptr_t)_end) return;
  const size_t behind = at - (uintptr_t)shared_now.memory;
  if (behind < kSharedLimit + 4096)
    return fail("%s %zu bytes at byte %zu of shared memory of %zu bytes", what, size, behind,
                shared_now.size);
  outside(what, at, size);
}

// Which shared memory the bytes lie in wholly, or null.
Shadow* shared_of(const void* p, size_t size) {
  Shadow* const both[] = {&shared_now, &static_now};
  for (Shadow* one : both)
    if (distance(*one, p) < one->size && distance(*one, p) + size <= one->size) return one;
  return nullptr;
}

void on_access(const void* p, size_t size, bool write) {
  if (!current) return;
  const char* what = write ? "writes" : "reads";
  Shadow* shadow = shared_of(p, size);
  if (!shadow) return global_access(what, write ? kGlobalWrite : kGlobalRead, (uintptr_t)p, size);
  if (counting) note(write ? kSharedWrite : kSharedRead, (uintptr_t)p, size);
  if (write)
    shared_write(*shadow, distance(*shadow, p), size, current_index, false);
  else
    shared_read(*shadow, distance(*shadow, p), size, current_index, stamp(current_index));
}

}  // namespace

// Global memory that kernels may use from now on; all of it is taken back by emulated_forget.
EXPORT void emulated_memory(const void* start, size_t bytes) {
  if (ranges_count == ranges_size) {
    ranges_size = 2 * ranges_size + 16;
    ranges = (Range*)realloc(ranges, ranges_size * sizeof *ranges);
  }
  ranges[ranges_count++] = {(uintptr_t)start, (uintptr_t)start + bytes, nullptr};
}
EXPORT void emulated_forget() {
  forget_writes();
  ranges_count = last_range = 0;
}

// ---- what the compiler calls -----------------------------------------------------------------------

extern "C" {
#define EMULATED_ACCESS(SIZE)                                                                      \
  HIDDEN void __tsan_read##SIZE(void* p) {                                                         \
    if ((uintptr_t)p % SIZE) fail("reads %d bytes from an address that they are not aligned to", SIZE); \
    on_access(p, SIZE, false);                                                                     \
  }                                                                                                \
  HIDDEN void __tsan_write##SIZE(void* p) {                                                        \
    if ((uintptr_t)p % SIZE) fail("writes %d bytes to an address that they are not aligned to", SIZE);  \
    on_access(p, SIZE, true);                                                                      \
  }                                                                                                \
  HIDDEN void __tsan_volatile_read##SIZE(void* p) { __tsan_read##SIZE(p); }                        \
  HIDDEN void __tsan_volatile_write##SIZE(void* p) { __tsan_write##SIZE(p); }                      \
  HIDDEN void __tsan_unaligned_read##SIZE(void* p) { on_access(p, SIZE, false); }                  \
  HIDDEN void __tsan_unaligned_write##SIZE(void* p) { on_access(p, SIZE, true); }
EMULATED_ACCESS(1)
EMULATED_ACCESS(2)
EMULATED_ACCESS(4)
EMULATED_ACCESS(8)
EMULATED_ACCESS(16)
HIDDEN void __tsan_read_range(void* p, unsigned long size) { on_access(p, size, false); }
HIDDEN void __tsan_write_range(void* p, unsigned long size) { on_access(p, size, true); }
HIDDEN void* __tsan_memset(void* to, int value, size_t size) {
  on_access(to, size, true);
  return memset(to, value, size);
}
HIDDEN void* __tsan_memcpy(void* to, const void* from, size_t size) {
  on_access(from, size, false);
  on_access(to, size, true);
  return memcpy(to, from, size);
}
HIDDEN void* __tsan_memmove(void* to, const void* from, size_t size) {
  on_access(from, size, false);
  on_access(to, size, true);
  return memmove(to, from, size);
}
HIDDEN void __tsan_init() {}
HIDDEN void __tsan_func_entry(void*) {}
HIDDEN void __tsan_func_exit() {}
}

// ---- asynchronous copies -------------------------------------------------------------------------

void emulated_copy_async(void* shared, const void* global, bool valid) {
  if ((uintptr_t)shared % 16 || (valid && (uintptr_t)global % 16))
    fail("copy_async_16: the %s address is not a multiple of 16",
         (uintptr_t)shared % 16 ? "shared" : "global");
  Shadow* shadow = shared_of(shared, 16);
  if (!shadow) {
    fail("copy_async_16 to byte %td of shared memory of %zu bytes",
         (const unsigned char*)shared - shared_now.memory, shared_now.size);
    return;
  }
  if (valid) global_access("copy_async_16 reads", kCopyIn, (uintptr_t)global, 16);
  if (counting) note(kSharedWrite, (uintptr_t)shared, 16);
  shared_write(*shadow, distance(*shadow, shared), 16, current_index, true);
  Lane& lane = *current;
  if (lane.copied == lane.copies_size) {
    lane.copies_size = 2 * lane.copies_size + 16;
    lane.copies = (Copy*)realloc(lane.copies, lane.copies_size * sizeof *lane.copies);
  }
  Copy& copy = lane.copies[lane.copied++];
  copy.to = (unsigned char*)shared;
  memset(copy.data, 0, 16);
  if (valid) memcpy(copy.data, global, 16);
}

void emulated_copy_commit() {
  Lane& lane = *current;
  if (lane.committed == lane.groups_size) {
    lane.groups_size = 2 * lane.groups_size + 8;
    lane.groups = (unsigned*)realloc(lane.groups, lane.groups_size * sizeof *lane.groups);
  }
  lane.groups[lane.committed++] = lane.copied;
}

void emulated_copy_wait(int under_way) {
  Lane& lane = *current;
  if ((int)lane.committed <= under_way) return;
  const unsigned groups = lane.committed - (unsigned)under_way, count = lane.groups[groups - 1];
  for (unsigned i = 0; i < count; ++i) {
    const Copy& copy = lane.copies[i];
    memcpy(copy.to, copy.data, 16);
    Shadow& shadow = *shared_of(copy.to, 16);
    fill(shadow.written + distance(shadow, copy.to), 16, stamp(current_index));
  }
  lane.copied -= count;
  memmove(lane.copies, lane.copies + count, lane.copied * sizeof *lane.copies);
  lane.committed -= groups;
  memmove(lane.groups, lane.groups + groups, lane.committed * sizeof *lane.groups);
  for (unsigned i = 0; i < lane.committed; ++i) lane.groups[i] -= count;
}
