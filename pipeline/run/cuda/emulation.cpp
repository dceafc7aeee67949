// Runs the threads of CUDA blocks on the CPU, one fiber each, and checks what they do.
//
// A warp's lanes meet at every operation of a whole warp; the last to come computes it for all.
// Between barriers warps run in an order drawn from a seed. A launch ends at the first mistake:
// emulated_error() says what it was.
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#if defined(__F16C__)
#include <immintrin.h>
#endif

#include "emulation.h"

#define EXPORT extern "C" __attribute__((visibility("default")))
#define HIDDEN __attribute__((visibility("hidden")))

namespace {

constexpr unsigned kLanes = 32, kThreads = 1024, kWarps = kThreads / kLanes, kBarriers = 16;
constexpr size_t kStack = 128 << 10;
constexpr uint64_t kEnd = 0x656e64206f662073;  // lies at a stack's end, which nothing may reach
constexpr unsigned kSharedLimit = 232448;  // of one block, of the largest card (sm_90)

// ---- switching between fibers --------------------------------------------------------------------

extern "C" HIDDEN void emulated_switch(void** from, void* to);
extern "C" HIDDEN void emulated_start();
#if defined(__x86_64__)
asm(R"(
.text
.hidden emulated_switch
.type emulated_switch, @function
emulated_switch:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
.size emulated_switch, .-emulated_switch
)");
constexpr int kReturn = 6, kFrame = 8;  // in words: where the return address lies, of how many
#elif defined(__aarch64__)
asm(R"(
.text
.hidden emulated_switch
.type emulated_switch, %function
emulated_switch:
  sub sp, sp, #160
  stp x19, x20, [sp]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x2, sp
  str x2, [x0]
  mov sp, x1
  ldp x19, x20, [sp]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
.size emulated_switch, .-emulated_switch
)");
constexpr int kReturn = 11, kFrame = 20;
#else
#error "fibers are written for x86-64 and aarch64"
#endif

// ---- the block that runs -------------------------------------------------------------------------

enum State : u8 { kReady, kCollective, kBarrier, kDone };

struct Copy {
  unsigned char* to;
  unsigned char data[16];
};

struct Lane {
  EmulatedThread self;
  void* stack_pointer;
  void* request;  // of the operation of a warp that it waits in
  State state;
  Copy* copies;  // under way, in the order of their start
  unsigned copied, copies_size;
  unsigned* groups;  // where each group that is under way ends in `copies`
  unsigned committed, groups_size;
};

struct Warp {
  unsigned size, ready, arrived;
  const char* operation;
};

struct Barrier {
  unsigned arrived, expected;
};

struct Machine {
  Lane lanes[kThreads];
  Warp warps[kWarps];
  Barrier barriers[kBarriers];
  u8 barrier_of[kThreads];
  unsigned order[kWarps], threads, warp_count, done, place;
  // A warp's epoch ends at each of its barriers; known[a][b] is the last epoch of b that a has met.
  unsigned epoch[kWarps], known[kWarps][kWarps];
  unsigned fenced[kThreads];  // the epoch of each thread's last shared_fence
  void (*entry)(void**);
  void** arguments;
  void* main_stack;
  bool failed;
} machine;

Lane* current;
unsigned current_index;
uint64_t random_state = 1;
char message[1024];
const char* running = "";
pthread_mutex_t one_launch = PTHREAD_MUTEX_INITIALIZER;
unsigned char* stacks;
unsigned stacks_count;

unsigned draw(unsigned below) {  // xorshift64*
  random_state ^= random_state >> 12;
  random_state ^= random_state << 25;
  random_state ^= random_state >> 27;
  return (unsigned)((random_state * 0x2545F4914F6CDD1Dull >> 33) % below);
}

void say(const char* format, va_list rest) {
  int used = snprintf(message, sizeof message, "%s", running);
  if (current)
    used += snprintf(message + used, sizeof message - used, " in block (%u, %u, %u), thread %u",
                     current->self.block.x, current->self.block.y, current->self.block.z,
                     current_index);
  used += snprintf(message + used, sizeof message - used, ": ");
  vsnprintf(message + used, sizeof message - used, format, rest);
}

// Ends the launch. Comes back only where no fiber runs.
__attribute__((format(printf, 1, 2))) void fail(const char* format, ...) {
  if (machine.failed) return;
  va_list rest;
  va_start(rest, format);
  say(format, rest);
  va_end(rest);
  machine.failed = true;
  if (current) {
    void* abandoned;
    emulated_switch(&abandoned, machine.main_stack);
  }
}

void resume(unsigned index) {
  if (current == &machine.lanes[index]) return;
  void** from = current ? &current->stack_pointer : &machine.main_stack;
  current = &machine.lanes[index];
  current_index = index;
  emulated_thread = &current->self;
  emulated_switch(from, current->stack_pointer);
}

int ready_lane(unsigned warp, unsigned after) {
  for (unsigned step = 1; step <= kLanes; ++step) {
    const unsigned index = warp * kLanes + (after + step) % kLanes;
    if (index < machine.threads && machine.lanes[index].state == kReady) return (int)index;
  }
  return -1;
}

void deadlock() {
  unsigned waiting[kBarriers] = {}, collective = 0;
  for (unsigned i = 0; i < machine.threads; ++i) {
    if (machine.lanes[i].state == kBarrier) ++waiting[machine.barrier_of[i]];
    if (machine.lanes[i].state == kCollective) ++collective;
  }
  for (unsigned id = 0; id < kBarriers; ++id)
    if (waiting[id] && !collective)
      return fail("barrier %u is reached by %u of %u threads", id, waiting[id],
                  machine.barriers[id].expected);
  for (unsigned w = 0; w < machine.warp_count; ++w)
    if (machine.warps[w].arrived)
      return fail("%s is reached by %u of the 32 lanes of warp %u", machine.warps[w].operation,
                  machine.warps[w].arrived, w);
}

// Gives the CPU to another fiber: of the same warp first, else of the next in the order drawn.
void next() {
  const unsigned warp = current_index / kLanes;
  if (machine.warps[warp].ready) return resume((unsigned)ready_lane(warp, current_index % kLanes));
  for (unsigned step = 0; step < machine.warp_count; ++step) {
    machine.place = (machine.place + 1) % machine.warp_count;
    const unsigned other = machine.order[machine.place];
    if (machine.warps[other].ready) return resume((unsigned)ready_lane(other, draw(kLanes)));
  }
  if (machine.done == machine.threads) {
    current = nullptr;
    void* finished;
    emulated_switch(&finished, machine.main_stack);
  }
  deadlock();
}

void sleep(State state) {
  current->state = state;
  --machine.warps[current_index / kLanes].ready;
}

void wake(unsigned index) {
  machine.lanes[index].state = kReady;
  ++machine.warps[index / kLanes].ready;
}

bool counting;  // whether emulation_traffic.h counts accesses to memory
void count_warp(unsigned warp);

// Meets the other lanes; `work` (the requests of the lanes, null where there is no thread) is done
// once, by the last.
template <class F> void together(const char* operation, void* request, F work) {
  const unsigned index = current_index / kLanes;
  Warp& warp = machine.warps[index];
  if (warp.arrived && warp.operation != operation)
    fail("lanes of a warp are in %s and in %s at once", warp.operation, operation);
  warp.operation = operation;
  current->request = request;
  if (++warp.arrived < warp.size) {
    sleep(kCollective);
    return next();
  }
  Lane* lanes = machine.lanes + index * kLanes;
  work(lanes, index);
  if (counting) count_warp(index);
  warp.arrived = 0;
  for (unsigned lane = 0; lane < kLanes; ++lane)
    if (lanes[lane].state == kCollective) wake(index * kLanes + lane);
}

void whole_warp(const char* operation) {
  const unsigned size = machine.warps[current_index / kLanes].size;
  if (size != kLanes) fail("%s in a warp of %u threads", operation, size);
}

}  // namespace

#include "emulation_traffic.h"
#include "emulation_memory.h"
#include "emulation_tensor.h"
#include "emulation_wgmma.h"

// ---- threads -------------------------------------------------------------------------------------

EmulatedThread* emulated_thread;
unsigned char* emulated_shared_memory;

void emulated_warp_sync() {
  together("warp_sync", nullptr, [](Lane*, unsigned warp) {
    machine.known[warp][warp] = machine.epoch[warp]++;
  });
}

void emulated_group_sync(int id, int threads) {
  if (id < 0 || id >= (int)kBarriers) fail("barrier %d: there are %u", id, kBarriers);
  if (threads <= 0 || threads > (int)machine.threads || (threads % kLanes && id))
    fail("barrier %d of %d threads in a block of %u", id, threads, machine.threads);
  Barrier& barrier = machine.barriers[id];
  if (barrier.arrived && barrier.expected != (unsigned)threads)
    fail("barrier %d is for %u threads and for %d", id, barrier.expected, threads);
  barrier.expected = (unsigned)threads;
  machine.barrier_of[current_index] = (u8)id;
  sleep(kBarrier);
  if (++barrier.arrived < barrier.expected) return next();
  barrier.arrived = 0;
  unsigned met[kWarps] = {};
  bool here[kWarps] = {};
  for (unsigned i = 0; i < machine.threads; ++i)
    if (machine.lanes[i].state == kBarrier && machine.barrier_of[i] == id) {
      here[i / kLanes] = true;
      wake(i);
    }
  for (unsigned w = 0; w < machine.warp_count; ++w)
    for (unsigned v = 0; here[w] && v < machine.warp_count; ++v) {
      const unsigned seen = v == w ? machine.epoch[w] : machine.known[w][v];
      if (seen > met[v]) met[v] = seen;
    }
  for (unsigned w = 0; w < machine.warp_count; ++w)
    if (here[w]) {
      if (counting) count_warp(w);
      memcpy(machine.known[w], met, sizeof met);
      ++machine.epoch[w];
    }
  for (unsigned i = machine.warp_count; i-- > 1;) {
    const unsigned j = draw(i + 1), kept = machine.order[i];
    machine.order[i] = machine.order[j];
    machine.order[j] = kept;
  }
  const unsigned first = machine.order[machine.place];
  if (machine.warps[first].ready) resume((unsigned)ready_lane(first, draw(kLanes)));
}

void emulated_block_sync() { emulated_group_sync(0, (int)machine.threads); }

namespace {
struct Shuffle {
  unsigned given, made;
  int from;
};
}  // namespace

unsigned emulated_shuffle(unsigned value, int from, int kind) {
  Shuffle shuffle = {value, value, from};
  if (kind == 0) shuffle.from = from & 31;
  if (kind == 1) shuffle.from = (int)(current_index % kLanes) ^ from;
  if (kind == 2) shuffle.from = (int)(current_index % kLanes) + from;
  together("shuffle", &shuffle, [](Lane* lanes, unsigned warp) {
    for (unsigned lane = 0; lane < machine.warps[warp].size; ++lane) {
      Shuffle& one = *(Shuffle*)lanes[lane].request;
      if (one.from >= 0 && one.from < (int)machine.warps[warp].size)
        one.made = ((Shuffle*)lanes[one.from].request)->given;
    }
  });
  return shuffle.made;
}

// ---- launches ------------------------------------------------------------------------------------

namespace {

extern "C" HIDDEN void emulated_start() {
  machine.entry(machine.arguments);
  if (memcmp(stacks + (current_index + 1) * kStack, &kEnd, sizeof kEnd))
    fail("needs more than %zu bytes of stack", kStack);
  ++machine.done;
  sleep(kDone);
  next();
  __builtin_unreachable();
}

// Mappings are few (the system has a limit) and live for one launch only: a process may have
// hundreds of libraries of kernels.
bool reserve_stacks(unsigned threads) {
  ++threads;  // the first is spare: what the second one needs too much is still memory
  void* got = mmap(nullptr, threads * kStack, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  stacks = got == MAP_FAILED ? nullptr : (unsigned char*)got;
  stacks_count = stacks ? threads : 0;
  return stacks != nullptr;
}

void release_stacks() {
  if (stacks) munmap(stacks, stacks_count * kStack);
  stacks = nullptr;
  stacks_count = 0;
}

void begin_lane(unsigned index, dim3 block, const EmulatedThread& shape) {
  Lane& lane = machine.lanes[index];
  lane.self = shape;
  lane.self.thread = {index, 0, 0};
  lane.self.block = block;
  lane.state = kReady;
  lane.copied = lane.committed = 0;
  void** top = (void**)(stacks + (index + 2) * kStack) - kFrame;
  memset(top, 0, kFrame * sizeof *top);
  top[kReturn] = (void*)emulated_start;
  lane.stack_pointer = top;
  memcpy(stacks + (index + 1) * kStack, &kEnd, sizeof kEnd);
}

void run_block(dim3 block, const EmulatedThread& shape) {
  machine.done = machine.place = 0;
  memset(machine.barriers, 0, sizeof machine.barriers);
  memset(machine.known, 0, sizeof machine.known);
  memset(machine.fenced, 0, sizeof machine.fenced);
  for (unsigned w = 0; w < machine.warp_count; ++w) {
    const unsigned size = machine.threads - w * kLanes;
    machine.warps[w] = {};
    machine.warps[w].size = machine.warps[w].ready = size < kLanes ? size : kLanes;
    machine.epoch[w] = 1;
    machine.order[w] = w;
  }
  for (unsigned i = 0; i < machine.threads; ++i) begin_lane(i, block, shape);
  begin_shared();
  begin_wgmma();
  machine.place = draw(machine.warp_count);
  resume(draw(machine.threads));
  current = nullptr;
  end_wgmma();
  for (unsigned w = 0; counting && w < machine.warp_count; ++w) count_warp(w);
}

// The blocks in an order drawn: another start and another step each time.
void run_grid(const unsigned grid[3], const EmulatedThread& shape) {
  const uint64_t count = (uint64_t)grid[0] * grid[1] * grid[2];
  uint64_t step = 1 + draw(count < 1000 ? (unsigned)count : 1000);
  for (uint64_t a = step, b = count; b != 1 || step == 0;) {  // until they have no common divisor
    while (b) {
      const uint64_t rest = a % b;
      a = b;
      b = rest;
    }
    if (a == 1) break;
    a = ++step;
    b = count;
  }
  uint64_t at = draw((unsigned)(count < 1u << 30 ? count : 1u << 30));
  for (uint64_t i = 0; i < count && !machine.failed; ++i, at = (at + step) % count)
    run_block({(unsigned)(at % grid[0]), (unsigned)(at / grid[0] % grid[1]),
               (unsigned)(at / grid[0] / grid[1])},
              shape);
}

}  // namespace

void emulated_launch(void (*entry)(void**), const char* name, const unsigned grid[3],
                     unsigned threads, unsigned limit, unsigned shared, void** arguments) {
  pthread_mutex_lock(&one_launch);
  message[0] = 0;
  forget_writes();
  running = name;
  machine.failed = false;
  machine.entry = entry;
  machine.arguments = arguments;
  machine.threads = threads;
  machine.warp_count = (threads + kLanes - 1) / kLanes;
  if (!threads || threads > kThreads || (limit && threads > limit))
    fail("launched with %u threads, made for at most %u", threads, limit ? limit : kThreads);
  else if (!grid[0] || !grid[1] || !grid[2] || grid[0] > 0x7fffffff || grid[1] > 65535 ||
           grid[2] > 65535)
    fail("launched with a grid of %u × %u × %u blocks", grid[0], grid[1], grid[2]);
  else if (shared + static_shared() > kSharedLimit)
    fail("%zu bytes of shared memory, of at most %u", shared + static_shared(), kSharedLimit);
  else if (!reserve_stacks(threads) || !reserve_shared(shared))
    fail("no memory for the fibers");
  else
    run_grid(grid, {{}, {}, {threads, 1, 1}, {grid[0], grid[1], grid[2]}});
  release_stacks();
  release_shared();
  forget_writes();
  pthread_mutex_unlock(&one_launch);
}

// The mistake of the last launch, or null.
EXPORT const char* emulated_error() { return message[0] ? message : nullptr; }

EXPORT void emulated_seed(uint64_t seed) { random_state = seed * 2654435769u + 1; }
