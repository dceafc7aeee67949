// A library in the place of libcuda.so.1: the functions of the driver that cuda_loader calls, on the
// memory of this process. Kernels are those of the library that BERTILE_EMULATED_KERNELS names, which
// `emulator.build` made of the same text as the code that is loaded here.
//
// Misuse is refused as the driver would; fake_reason() says why. Device memory is never handed out
// twice, so a pointer that was freed is always found. Nodes of a graph run in any order that their
// edges allow. With fake_lazy(1) nothing runs before somebody waits for it.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <stdarg.h>
#include <sys/mman.h>
#include <time.h>

#include "fake_image.h"

#define EXPORT __attribute__((visibility("default")))

enum {
  SUCCESS = 0,
  INVALID_VALUE = 1,
  OUT_OF_MEMORY = 2,
  NOT_INITIALIZED = 3,
  NO_DEVICE = 100,
  INVALID_DEVICE = 101,
  INVALID_IMAGE = 200,
  INVALID_CONTEXT = 201,
  NO_BINARY_FOR_GPU = 209,
  INVALID_HANDLE = 400,
  NOT_FOUND = 500,
  NOT_READY = 600,
  ILLEGAL_ADDRESS = 700,
  OUT_OF_RESOURCES = 701,
  LAUNCH_FAILED = 719,
  NOT_SUPPORTED = 801,
};

typedef int Result;
typedef uint64_t Address;

enum kind { MEMORY, HOST, STREAM, EVENT, GRAPH, EXECUTABLE, MODULE, CONTEXT, KINDS };
static const char* const kind_names[KINDS] = {"memory", "host",       "stream", "event",
                                              "graph",  "executable", "module", "context"};

struct object {  // the head of everything that lives behind a handle
  enum kind kind;
};

struct memory {
  struct object object;
  Address start;
  size_t bytes;
};

struct function {
  struct object object;  // of no kind that is counted: it goes with its module
  struct module* module;
  struct entry* entry;
  void (*run)(const unsigned grid[3], unsigned threads, unsigned shared, void** arguments);
  const unsigned* sizes;  // how many parameters, and the bytes of each
  int dynamic_limit;
};

struct module {
  struct object object;
  struct image image;
  void* library;
  struct function* functions;  // one for each entry of the image
  void (*forget)(void);
  void (*give)(const void*, size_t);
  const char* (*error)(void);
};

struct launch {
  struct function* function;
  unsigned grid[3], block[3], shared;
  void** arguments;  // each with its own copy
};

struct copy {
  Address to, from;
  size_t bytes;
  int to_device, from_device;
  void* kept;  // what a copy from memory that is not pinned took at once
};

enum work_kind { KERNEL, COPY, FILL, RECORD, WAIT, RUN_GRAPH };

struct work {
  enum work_kind kind;
  struct launch launch;
  struct copy copy;
  int value;
  struct event* event;
  unsigned long version;
  struct executable* executable;
  struct work* next;
};

struct node {
  struct work work;
  unsigned waits, *before;  // indices of the nodes that it waits for
};

struct graph {
  struct object object;
  unsigned count;
  struct node** nodes;
};

struct executable {
  struct object object;
  unsigned count;
  struct node** nodes;   // copies of the graph's
  struct node** origin;  // the graph's own, by which nodes are named
};

struct stream {
  struct object object;
  unsigned flags;
  struct work *first, *last;
};

struct event {
  struct object object;
  unsigned flags;
  unsigned long recorded, done;  // versions
  struct stream* stream;
  struct timespec time;
};

static struct {
  pthread_mutex_t lock;
  int initialised, lazy, broken, inject, capability;
  char inject_name[64], reason[1400];
  struct object** objects;
  unsigned count, room;
  size_t bytes, peak, limit;
  Address begin, next, end;
  uint64_t random;
  unsigned retained;
  struct stream null_stream;
  struct object context;
} fake = {.lock = PTHREAD_RECURSIVE_MUTEX_INITIALIZER_NP,
          .capability = 90,
          .limit = (size_t)8 << 30,
          .random = 88172645463325252u,
          .null_stream = {.object = {STREAM}},
          .context = {CONTEXT}};

static __thread struct {
  unsigned depth;
  void* contexts[64];
} thread;

// ---- objects and answers -----------------------------------------------------------------------

__attribute__((format(printf, 2, 3))) static Result refuse(Result code, const char* format, ...) {
  va_list rest;
  va_start(rest, format);
  vsnprintf(fake.reason, sizeof fake.reason, format, rest);
  va_end(rest);
  return code;
}

static void* make(enum kind kind, size_t size) {
  struct object* made = calloc(1, size);
  made->kind = kind;
  if (fake.count == fake.room) {
    fake.room = 2 * fake.room + 64;
    fake.objects = realloc(fake.objects, fake.room * sizeof *fake.objects);
  }
  fake.objects[fake.count++] = made;
  return made;
}

static void* known(const void* handle, enum kind kind) {
  for (unsigned i = fake.count; i-- > 0;)
    if (fake.objects[i] == handle) return fake.objects[i]->kind == kind ? fake.objects[i] : NULL;
  return NULL;
}

static void drop(void* object) {
  for (unsigned i = fake.count; i-- > 0;)
    if (fake.objects[i] == object) {
      memmove(fake.objects + i, fake.objects + i + 1, (fake.count - i - 1) * sizeof *fake.objects);
      --fake.count;
      free(object);
      return;
    }
}

static struct function* known_function(const void* handle) {
  for (unsigned i = 0; i < fake.count; ++i) {
    if (fake.objects[i]->kind != MODULE) continue;
    struct module* module = (struct module*)fake.objects[i];
    const struct function* one = handle;
    if (one >= module->functions && one < module->functions + module->image.count)
      return one->run ? (struct function*)handle : NULL;
  }
  return NULL;
}

static struct stream* known_stream(void* handle) {
  if ((uintptr_t)handle <= 2) return &fake.null_stream;  // null, legacy, per thread
  return known(handle, STREAM);
}

// The allocation of a kind that holds all of the bytes, or null.
static struct memory* holding(enum kind kind, Address at, size_t bytes) {
  for (unsigned i = fake.count; i-- > 0;) {
    struct memory* one = (struct memory*)fake.objects[i];
    if (one->object.kind == kind && at >= one->start && at + bytes <= one->start + one->bytes)
      return one;
  }
  return NULL;
}

static int on_device(Address at) { return at >= fake.begin && at < fake.end; }

struct count {
  const char* name;
  unsigned long calls;
};
static struct count counts[128];

static void count_call(const char* name) {
  for (unsigned i = 0; i < 128; ++i) {
    if (!counts[i].name) counts[i].name = name;
    if (!strcmp(counts[i].name, name)) {
      ++counts[i].calls;
      return;
    }
  }
}

// What every call begins with; 0 where it may go on. `need`: 0 nothing, 1 cuInit, 2 a context.
static Result enter(const char* name, int need) {
  pthread_mutex_lock(&fake.lock);
  count_call(name);
  if (fake.inject && !strcmp(fake.inject_name, name)) {
    const Result code = fake.inject;
    fake.inject = 0;
    return refuse(code, "%s: asked for by fake_fail", name);
  }
  if (fake.broken && need) return fake.broken;
  if (need && !fake.initialised) return refuse(NOT_INITIALIZED, "%s before cuInit", name);
  if (need > 1 && (!thread.depth || !thread.contexts[thread.depth - 1] || !fake.retained))
    return refuse(INVALID_CONTEXT, "%s: this thread has no current context", name);
  return SUCCESS;
}

static Result leave(Result code) {
  pthread_mutex_unlock(&fake.lock);
  return code;
}

#define BEGIN(NEED)                             \
  Result code = enter(__func__, NEED);          \
  if (code) return leave(code)
#define REFUSE(...) return leave(refuse(__VA_ARGS__))
#define NEED(TEST, CODE, WHAT) \
  if (!(TEST)) REFUSE(CODE, "%s: %s", __func__, WHAT)

// ---- work --------------------------------------------------------------------------------------

static unsigned draw(unsigned below) {
  fake.random ^= fake.random << 13;
  fake.random ^= fake.random >> 7;
  fake.random ^= fake.random << 17;
  return (unsigned)((fake.random >> 33) % below);
}

static void broken(Result code, const char* text) {
  if (!fake.broken) fake.broken = refuse(code, "%s", text);
}

static Result check_launch(const char* name, const struct launch* one) {
  const struct function* function = one->function;
  const struct entry* entry = function->entry;
  const unsigned threads = one->block[0] * one->block[1] * one->block[2];
  if (!threads || threads > 1024 || one->block[1] != 1 || one->block[2] != 1)
    return refuse(INVALID_VALUE, "%s: %s has blocks of %u × %u × %u threads", name, entry->name,
                  one->block[0], one->block[1], one->block[2]);
  if (!one->grid[0] || one->grid[0] > 0x7fffffff || !one->grid[1] || one->grid[1] > 65535 ||
      !one->grid[2] || one->grid[2] > 65535)
    return refuse(INVALID_VALUE, "%s: %s has a grid of %u × %u × %u blocks", name, entry->name,
                  one->grid[0], one->grid[1], one->grid[2]);
  if (entry->max_threads && threads > entry->max_threads)
    return refuse(INVALID_VALUE, "%s: %s is made for at most %u threads, not %u", name, entry->name,
                  entry->max_threads, threads);
  const unsigned warps = (threads + 31) / 32, of_warp = (entry->registers * 32 + 255) / 256 * 256;
  if (warps * of_warp > 65536)
    return refuse(OUT_OF_RESOURCES, "%s: %s takes %u registers of %u threads", name, entry->name,
                  entry->registers, threads);
  const unsigned limit = function->dynamic_limit ? (unsigned)function->dynamic_limit
                                                 : (48u << 10) - entry->shared;
  if (one->shared > limit)
    return refuse(INVALID_VALUE, "%s: %s asks for %u bytes of shared memory, of %u it may have",
                  name, entry->name, one->shared, limit);
  return SUCCESS;
}

static void** copy_arguments(const struct function* function, void** arguments) {
  const unsigned count = function->sizes[0];
  size_t bytes = 0;
  for (unsigned i = 0; i < count; ++i) bytes += (function->sizes[1 + i] + 15) / 16 * 16;
  void** made = malloc((count + 1) * sizeof *made + bytes + 16);
  unsigned char* at = (unsigned char*)(((uintptr_t)(made + count + 1) + 15) / 16 * 16);
  for (unsigned i = 0; i < count; ++i) {
    made[i] = at;
    memcpy(at, arguments[i], function->sizes[1 + i]);
    at += (function->sizes[1 + i] + 15) / 16 * 16;
  }
  return made;
}

static void run_kernel(const struct launch* one) {
  const struct module* module = one->function->module;
  module->forget();
  for (unsigned i = 0; i < fake.count; ++i) {
    const struct memory* memory = (const struct memory*)fake.objects[i];
    if (memory->object.kind == MEMORY || memory->object.kind == HOST)
      module->give((const void*)memory->start, memory->bytes);
  }
  one->function->run(one->grid, one->block[0], one->shared, one->arguments);
  const char* mistake = module->error();
  if (mistake)
    broken(strstr(mistake, " of an array of ") || strstr(mistake, "belongs to nothing")
               ? ILLEGAL_ADDRESS : LAUNCH_FAILED, mistake);
}

static Result check_copy(const char* name, const struct copy* one) {
  if (!one->bytes) return SUCCESS;
  if (one->to_device && !holding(MEMORY, one->to, one->bytes))
    return refuse(INVALID_VALUE, "%s: %zu bytes to what is no memory of the device", name,
                  one->bytes);
  if (one->from_device && !holding(MEMORY, one->from, one->bytes))
    return refuse(INVALID_VALUE, "%s: %zu bytes from what is no memory of the device", name,
                  one->bytes);
  if ((!one->to_device && (!one->to || on_device(one->to))) ||
      (!one->from_device && (!one->from || on_device(one->from))))
    return refuse(INVALID_VALUE, "%s: an address that is not the host's", name);
  return SUCCESS;
}

static void run_copy(const struct copy* one) {
  if (!one->kept && check_copy("a copy", one))
    broken(ILLEGAL_ADDRESS, "a copy's memory was freed before it ran");
  else if (one->kept && !holding(MEMORY, one->to, one->bytes))
    broken(ILLEGAL_ADDRESS, "a copy's memory was freed before it ran");
  else
    memcpy((void*)one->to, one->kept ? one->kept : (const void*)one->from, one->bytes);
}

static void run_until(struct stream* stream, const struct event* event, unsigned long version);

static void run(struct work* work) {
  if (fake.broken) return;
  switch (work->kind) {
    case KERNEL: return run_kernel(&work->launch);
    case COPY: return run_copy(&work->copy);
    case FILL:
      if (!holding(MEMORY, work->copy.to, work->copy.bytes))
        return broken(ILLEGAL_ADDRESS, "memory that is filled was freed");
      memset((void*)work->copy.to, work->value, work->copy.bytes);
      return;
    case RECORD:
      work->event->done = work->version;
      clock_gettime(CLOCK_MONOTONIC, &work->event->time);
      return;
    case WAIT:
      if (work->event->done < work->version)
        run_until(work->event->stream, work->event, work->version);
      return;
    case RUN_GRAPH: break;
  }
  // A graph: again and again one of the nodes that wait for nothing any more.
  struct executable* graph = work->executable;
  unsigned char* done = calloc(graph->count + 1, 1);
  unsigned* ready = malloc((graph->count + 1) * sizeof *ready);
  for (unsigned left = graph->count; left && !fake.broken; --left) {
    unsigned count = 0;
    for (unsigned i = 0; i < graph->count; ++i) {
      const struct node* node = graph->nodes[i];
      int waits = done[i];
      for (unsigned k = 0; k < node->waits && !waits; ++k) waits = !done[node->before[k]];
      if (!waits) ready[count++] = i;
    }
    const unsigned chosen = ready[draw(count)];
    done[chosen] = 1;
    run(&graph->nodes[chosen]->work);
  }
  free(done);
  free(ready);
}

static void free_work(struct work* work) {
  free(work->launch.arguments);
  free(work->copy.kept);
}

// Runs what lies on the stream, up to a version of an event where one is given.
static void run_until(struct stream* stream, const struct event* event, unsigned long version) {
  while (stream->first && !(event && event->done >= version)) {
    struct work* work = stream->first;
    stream->first = work->next;
    if (!stream->first) stream->last = NULL;
    run(work);
    free_work(work);
    free(work);
  }
}

static void run_everything(void) {
  run_until(&fake.null_stream, NULL, 0);
  for (unsigned i = 0; i < fake.count; ++i)
    if (fake.objects[i]->kind == STREAM) run_until((struct stream*)fake.objects[i], NULL, 0);
}

// The legacy stream and those that were made without CU_STREAM_NON_BLOCKING wait for each other.
static void meet_others(const struct stream* stream) {
  if (stream == &fake.null_stream) {
    for (unsigned i = 0; i < fake.count; ++i) {
      struct stream* other = (struct stream*)fake.objects[i];
      if (other->object.kind == STREAM && !(other->flags & 1)) run_until(other, NULL, 0);
    }
  } else if (!(stream->flags & 1)) {
    run_until(&fake.null_stream, NULL, 0);
  }
}

static Result put(struct stream* stream, struct work work) {
  meet_others(stream);
  struct work* kept = malloc(sizeof *kept);
  *kept = work;
  kept->next = NULL;
  if (stream->last) stream->last->next = kept;
  if (!stream->first) stream->first = kept;
  stream->last = kept;
  if (!fake.lazy) run_until(stream, NULL, 0);
  return fake.broken;
}

// ---- the driver, devices and contexts ------------------------------------------------------------

EXPORT Result cuInit(unsigned flags) {
  BEGIN(0);
  NEED(!flags, INVALID_VALUE, "flags");
  if (!fake.initialised) {
    const size_t room = (size_t)1 << 40;  // of addresses
    void* got = mmap(NULL, room, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    NEED(got != MAP_FAILED, OUT_OF_MEMORY, "no addresses for device memory");
    fake.begin = fake.next = (Address)got;
    fake.end = fake.begin + room;
    fake.initialised = 1;
  }
  return leave(SUCCESS);
}

EXPORT Result cuDriverGetVersion(int* version) {
  BEGIN(0);
  NEED(version, INVALID_VALUE, "null");
  *version = 13000;
  return leave(SUCCESS);
}

static const struct {
  Result code;
  const char *name, *text;
} errors[] = {
    {SUCCESS, "CUDA_SUCCESS", "no error"},
    {INVALID_VALUE, "CUDA_ERROR_INVALID_VALUE", "invalid argument"},
    {OUT_OF_MEMORY, "CUDA_ERROR_OUT_OF_MEMORY", "out of memory"},
    {NOT_INITIALIZED, "CUDA_ERROR_NOT_INITIALIZED", "initialization error"},
    {NO_DEVICE, "CUDA_ERROR_NO_DEVICE", "no CUDA-capable device is detected"},
    {INVALID_DEVICE, "CUDA_ERROR_INVALID_DEVICE", "invalid device ordinal"},
    {INVALID_IMAGE, "CUDA_ERROR_INVALID_IMAGE", "device kernel image is invalid"},
    {INVALID_CONTEXT, "CUDA_ERROR_INVALID_CONTEXT", "invalid device context"},
    {NO_BINARY_FOR_GPU, "CUDA_ERROR_NO_BINARY_FOR_GPU",
     "no kernel image is available for execution on the device"},
    {INVALID_HANDLE, "CUDA_ERROR_INVALID_HANDLE", "invalid resource handle"},
    {NOT_FOUND, "CUDA_ERROR_NOT_FOUND", "named symbol not found"},
    {NOT_READY, "CUDA_ERROR_NOT_READY", "device not ready"},
    {ILLEGAL_ADDRESS, "CUDA_ERROR_ILLEGAL_ADDRESS", "an illegal memory access was encountered"},
    {OUT_OF_RESOURCES, "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES",
     "too many resources requested for launch"},
    {LAUNCH_FAILED, "CUDA_ERROR_LAUNCH_FAILED", "unspecified launch failure"},
    {NOT_SUPPORTED, "CUDA_ERROR_NOT_SUPPORTED", "operation not supported"},
};

static Result error_text(Result code, const char** text, int is_name) {
  for (unsigned i = 0; i < sizeof errors / sizeof *errors; ++i)
    if (errors[i].code == code) {
      *text = is_name ? errors[i].name : errors[i].text;
      return SUCCESS;
    }
  *text = NULL;
  return INVALID_VALUE;
}

EXPORT Result cuGetErrorName(Result error, const char** text) { return error_text(error, text, 1); }
EXPORT Result cuGetErrorString(Result error, const char** text) { return error_text(error, text, 0); }

EXPORT Result cuDeviceGetCount(int* count) {
  BEGIN(1);
  *count = 1;
  return leave(SUCCESS);
}

EXPORT Result cuDeviceGet(int* device, int ordinal) {
  BEGIN(1);
  NEED(!ordinal, INVALID_DEVICE, "there is one device");
  *device = 0;
  return leave(SUCCESS);
}

EXPORT Result cuDeviceGetName(char* name, int length, int device) {
  BEGIN(1);
  NEED(!device, INVALID_DEVICE, "there is one device");
  snprintf(name, (size_t)length, "emulated sm_%d", fake.capability);
  return leave(SUCCESS);
}

EXPORT Result cuDeviceTotalMem_v2(size_t* bytes, int device) {
  BEGIN(1);
  NEED(!device, INVALID_DEVICE, "there is one device");
  *bytes = fake.limit;
  return leave(SUCCESS);
}

EXPORT Result cuDeviceGetUuid_v2(unsigned char* uuid, int device) {
  BEGIN(1);
  NEED(!device, INVALID_DEVICE, "there is one device");
  memcpy(uuid, "emulated device!", 16);
  return leave(SUCCESS);
}

static int shared_limit(void) {
  switch (fake.capability) {
    case 75: return 65536;
    case 80: return 166912;
    case 86: case 89: return 101376;
    default: return 232448;
  }
}

EXPORT Result cuDeviceGetAttribute(int* value, int attribute, int device) {
  BEGIN(1);
  NEED(!device, INVALID_DEVICE, "there is one device");
  const int facts[][2] = {{1, 1024}, {2, 1024}, {3, 1024}, {4, 64}, {5, 0x7fffffff}, {6, 65535},
                          {7, 65535}, {8, 49152}, {10, 32}, {12, 65536}, {13, 1980000}, {16, 132},
                          {36, 2619000}, {37, 5120}, {38, 50 << 20}, {39, 2048}, {41, 1},
                          {75, fake.capability / 10}, {76, fake.capability % 10},
                          {81, shared_limit() + 1024}, {82, 65536}, {97, shared_limit()},
                          {106, 32}, {111, fake.capability < 80 ? 0 : 1024}, {115, 1}};
  for (unsigned i = 0; i < sizeof facts / sizeof *facts; ++i)
    if (facts[i][0] == attribute) {
      *value = facts[i][1];
      return leave(SUCCESS);
    }
  REFUSE(INVALID_VALUE, "cuDeviceGetAttribute: attribute %d is not emulated", attribute);
}

EXPORT Result cuDevicePrimaryCtxRetain(void** context, int device) {
  BEGIN(1);
  NEED(!device, INVALID_DEVICE, "there is one device");
  ++fake.retained;
  *context = &fake.context;
  return leave(SUCCESS);
}

EXPORT Result cuDevicePrimaryCtxRelease_v2(int device) {
  BEGIN(1);
  NEED(!device, INVALID_DEVICE, "there is one device");
  NEED(fake.retained, INVALID_CONTEXT, "released more often than retained");
  --fake.retained;
  return leave(SUCCESS);
}

EXPORT Result cuCtxPushCurrent_v2(void* context) {
  BEGIN(1);
  NEED(context == &fake.context && fake.retained, INVALID_CONTEXT, "no context");
  NEED(thread.depth < 64, INVALID_CONTEXT, "pushed 64 times");
  thread.contexts[thread.depth++] = context;
  return leave(SUCCESS);
}

EXPORT Result cuCtxPopCurrent_v2(void** context) {
  BEGIN(1);
  NEED(thread.depth, INVALID_CONTEXT, "nothing was pushed");
  --thread.depth;
  if (context) *context = thread.contexts[thread.depth];
  return leave(SUCCESS);
}

EXPORT Result cuCtxSetCurrent(void* context) {
  BEGIN(1);
  NEED(!context || (context == &fake.context && fake.retained), INVALID_CONTEXT, "no context");
  if (!thread.depth) thread.depth = 1;
  thread.contexts[thread.depth - 1] = context;
  return leave(SUCCESS);
}

EXPORT Result cuCtxGetCurrent(void** context) {
  BEGIN(1);
  *context = thread.depth ? thread.contexts[thread.depth - 1] : NULL;
  return leave(SUCCESS);
}

EXPORT Result cuCtxSynchronize(void) {
  BEGIN(2);
  run_everything();
  return leave(fake.broken);
}

// ---- memory --------------------------------------------------------------------------------------

EXPORT Result cuMemGetInfo_v2(size_t* free_bytes, size_t* total) {
  BEGIN(2);
  *free_bytes = fake.limit - fake.bytes;
  *total = fake.limit;
  return leave(SUCCESS);
}

EXPORT Result cuMemAlloc_v2(Address* address, size_t bytes) {
  BEGIN(2);
  NEED(address && bytes, INVALID_VALUE, "0 bytes");
  const size_t page = 4096, gap = 1 << 16, room = (bytes + page - 1) / page * page;
  NEED(fake.bytes + bytes <= fake.limit && fake.next + room + 2 * gap <= fake.end, OUT_OF_MEMORY,
       "the device's memory is full");
  struct memory* made = make(MEMORY, sizeof *made);
  made->start = fake.next + gap;
  made->bytes = bytes;
  fake.next = made->start + room;
  if (mprotect((void*)made->start, room, PROT_READ | PROT_WRITE)) {
    drop(made);
    REFUSE(OUT_OF_MEMORY, "cuMemAlloc_v2: this machine's memory is full");
  }
  memset((void*)made->start, 0xff, room);
  fake.bytes += bytes;
  if (fake.bytes > fake.peak) fake.peak = fake.bytes;
  *address = made->start;
  return leave(SUCCESS);
}

EXPORT Result cuMemFree_v2(Address address) {
  BEGIN(2);
  if (!address) return leave(SUCCESS);
  struct memory* memory = holding(MEMORY, address, 1);
  NEED(memory && memory->start == address, INVALID_VALUE, "not an allocation, or freed before");
  run_everything();
  const size_t room = (memory->bytes + 4095) / 4096 * 4096;
  madvise((void*)address, room, MADV_DONTNEED);
  mprotect((void*)address, room, PROT_NONE);
  fake.bytes -= memory->bytes;
  drop(memory);
  return leave(fake.broken);
}

EXPORT Result cuMemAllocAsync(Address* address, size_t bytes, void* stream) {
  if (!known_stream(stream)) return INVALID_HANDLE;
  return cuMemAlloc_v2(address, bytes);
}

EXPORT Result cuMemFreeAsync(Address address, void* stream) {
  if (!known_stream(stream)) return INVALID_HANDLE;
  return cuMemFree_v2(address);
}

EXPORT Result cuMemHostAlloc(void** address, size_t bytes, unsigned flags) {
  BEGIN(2);
  NEED(address && bytes && flags < 8, INVALID_VALUE, "bytes or flags");
  void* got = aligned_alloc(4096, (bytes + 4095) / 4096 * 4096);
  NEED(got, OUT_OF_MEMORY, "this machine's memory is full");
  memset(got, 0xff, bytes);
  struct memory* made = make(HOST, sizeof *made);
  made->start = (Address)got;
  made->bytes = bytes;
  *address = got;
  return leave(SUCCESS);
}

EXPORT Result cuMemFreeHost(void* address) {
  BEGIN(2);
  struct memory* memory = holding(HOST, (Address)address, 1);
  NEED(memory && memory->start == (Address)address, INVALID_VALUE, "not pinned memory");
  run_everything();
  free(address);
  drop(memory);
  return leave(fake.broken);
}

static Result copy(const char* name, struct stream* stream, struct copy one) {
  Result code = stream ? check_copy(name, &one) : refuse(INVALID_HANDLE, "%s: no stream", name);
  if (code || !one.bytes) return code;
  if (!one.from_device && !holding(HOST, one.from, one.bytes)) {
    one.kept = malloc(one.bytes);
    memcpy(one.kept, (const void*)one.from, one.bytes);
  }
  code = put(stream, (struct work){.kind = COPY, .copy = one});
  // Into memory that is not pinned the driver copies before it comes back.
  if (!one.to_device && !holding(HOST, one.to, one.bytes)) run_until(stream, NULL, 0);
  return code ? code : fake.broken;
}

EXPORT Result cuMemcpyHtoDAsync_v2(Address to, const void* from, size_t bytes, void* stream) {
  BEGIN(2);
  return leave(copy(__func__, known_stream(stream),
                    (struct copy){to, (Address)from, bytes, 1, 0, NULL}));
}
EXPORT Result cuMemcpyDtoHAsync_v2(void* to, Address from, size_t bytes, void* stream) {
  BEGIN(2);
  return leave(copy(__func__, known_stream(stream),
                    (struct copy){(Address)to, from, bytes, 0, 1, NULL}));
}
EXPORT Result cuMemcpyDtoDAsync_v2(Address to, Address from, size_t bytes, void* stream) {
  BEGIN(2);
  return leave(copy(__func__, known_stream(stream), (struct copy){to, from, bytes, 1, 1, NULL}));
}

static Result copy_now(const char* name, struct copy one) {
  const Result code = copy(name, &fake.null_stream, one);
  run_until(&fake.null_stream, NULL, 0);
  return code ? code : fake.broken;
}

EXPORT Result cuMemcpyHtoD_v2(Address to, const void* from, size_t bytes) {
  BEGIN(2);
  return leave(copy_now(__func__, (struct copy){to, (Address)from, bytes, 1, 0, NULL}));
}
EXPORT Result cuMemcpyDtoH_v2(void* to, Address from, size_t bytes) {
  BEGIN(2);
  return leave(copy_now(__func__, (struct copy){(Address)to, from, bytes, 0, 1, NULL}));
}
EXPORT Result cuMemcpyDtoD_v2(Address to, Address from, size_t bytes) {
  BEGIN(2);
  return leave(copy_now(__func__, (struct copy){to, from, bytes, 1, 1, NULL}));
}

EXPORT Result cuMemsetD8Async(Address to, unsigned char value, size_t count, void* stream) {
  BEGIN(2);
  struct stream* one = known_stream(stream);
  NEED(one, INVALID_HANDLE, "no stream");
  NEED(holding(MEMORY, to, count), INVALID_VALUE, "not memory of the device");
  return leave(put(one, (struct work){.kind = FILL, .copy = {.to = to, .bytes = count},
                                      .value = value}));
}
EXPORT Result cuMemsetD8_v2(Address to, unsigned char value, size_t count) {
  return cuMemsetD8Async(to, value, count, NULL);
}

EXPORT Result cuPointerGetAttribute(void* value, int attribute, Address address) {
  BEGIN(2);
  const struct memory* memory = holding(MEMORY, address, 1);
  if (!memory) memory = holding(HOST, address, 1);
  NEED(memory, INVALID_VALUE, "the driver does not know this address");
  switch (attribute) {
    case 1: *(void**)value = &fake.context; break;
    case 2: *(unsigned*)value = memory->object.kind == MEMORY ? 2 : 1; break;
    case 3: *(Address*)value = address; break;
    case 9: *(int*)value = 0; break;
    case 11: *(Address*)value = memory->start; break;
    case 12: *(size_t*)value = memory->bytes; break;
    default: REFUSE(NOT_SUPPORTED, "cuPointerGetAttribute: attribute %d is not emulated", attribute);
  }
  return leave(SUCCESS);
}

// ---- code ----------------------------------------------------------------------------------------

static void free_module(struct module* module) {
  image_free(&module->image);
  free(module->functions);
  if (module->library) dlclose(module->library);
}

static void find_function(struct module* module, unsigned index) {
  struct function* one = &module->functions[index];
  char name[512];
  *one = (struct function){.object = {KINDS}, .module = module,
                           .entry = &module->image.entries[index]};
  snprintf(name, sizeof name, "emulated_%s", one->entry->name);
  *(void**)&one->run = dlsym(module->library, name);
  snprintf(name, sizeof name, "emulated_parameters_%s", one->entry->name);
  one->sizes = dlsym(module->library, name);
  if (!one->sizes) one->run = NULL;
}

// The library that a line "// emulated: PATH" in PTX names, for processes that load one after another.
static const char* named_library(const char* text) {
  static char path[1024];
  const char* at = strstr(text, "// emulated: ");
  return at && sscanf(at, "// emulated: %1023[^\n]", path) == 1 ? path : NULL;
}

EXPORT Result cuModuleLoadDataEx(void** module, const void* image, unsigned options, int* names,
                                 void** values) {
  (void)options, (void)names, (void)values;
  BEGIN(2);
  NEED(module && image, INVALID_VALUE, "null");
  struct image found;
  NEED(image_read(&found, image), INVALID_IMAGE, "neither a cubin nor PTX");
  const int fits = found.is_ptx ? found.capability <= fake.capability
                                : found.capability / 10 == fake.capability / 10 &&
                                      found.capability <= fake.capability;
  const int wanted = found.capability;
  if (!fits) image_free(&found);
  if (!fits) REFUSE(NO_BINARY_FOR_GPU, "code for sm_%d on sm_%d", wanted, fake.capability);
  const char* path = found.is_ptx ? named_library(image) : NULL;
  if (!path) path = getenv("BERTILE_EMULATED_KERNELS");
  struct module* made = make(MODULE, sizeof *made);
  made->image = found;
  made->library = path ? dlopen(path, RTLD_NOW | RTLD_LOCAL) : NULL;
  if (!made->library) {
    free_module(made);
    drop(made);
    REFUSE(INVALID_IMAGE, "BERTILE_EMULATED_KERNELS: %s", path ? dlerror() : "is not set");
  }
  *(void**)&made->forget = dlsym(made->library, "emulated_forget");
  *(void**)&made->give = dlsym(made->library, "emulated_memory");
  *(void**)&made->error = dlsym(made->library, "emulated_error");
  made->functions = calloc(found.count + 1, sizeof *made->functions);
  for (unsigned i = 0; i < found.count; ++i) find_function(made, i);
  *module = made;
  return leave(SUCCESS);
}

EXPORT Result cuModuleLoadData(void** module, const void* image) {
  return cuModuleLoadDataEx(module, image, 0, NULL, NULL);
}

EXPORT Result cuModuleUnload(void* handle) {
  BEGIN(2);
  struct module* module = known(handle, MODULE);
  NEED(module, INVALID_HANDLE, "no module");
  run_everything();
  free_module(module);
  drop(module);
  return leave(SUCCESS);
}

EXPORT Result cuModuleGetFunction(void** function, void* handle, const char* name) {
  BEGIN(2);
  struct module* module = known(handle, MODULE);
  NEED(module, INVALID_HANDLE, "no module");
  for (unsigned i = 0; i < module->image.count; ++i)
    if (!strcmp(module->image.entries[i].name, name)) {
      NEED(module->functions[i].run, NOT_FOUND, "the emulated kernels lack it");
      *function = &module->functions[i];
      return leave(SUCCESS);
    }
  REFUSE(NOT_FOUND, "cuModuleGetFunction: the code has no kernel %s", name);
}

EXPORT Result cuFuncSetAttribute(void* handle, int attribute, int value) {
  BEGIN(2);
  struct function* function = known_function(handle);
  NEED(function, INVALID_HANDLE, "no function");
  if (attribute == 9) return leave(SUCCESS);  // how shared memory and cache are divided
  NEED(attribute == 8, NOT_SUPPORTED, "this attribute is not emulated");
  if (value < 0 || value + (int)function->entry->shared > shared_limit())
    REFUSE(INVALID_VALUE, "%d bytes of dynamic shared memory beside %u static ones, of %d", value,
           function->entry->shared, shared_limit());
  function->dynamic_limit = value;
  return leave(SUCCESS);
}

EXPORT Result cuFuncGetAttribute(int* value, int attribute, void* handle) {
  BEGIN(2);
  const struct function* function = known_function(handle);
  NEED(function, INVALID_HANDLE, "no function");
  const struct entry* entry = function->entry;
  switch (attribute) {
    case 0: *value = entry->max_threads ? (int)entry->max_threads : 1024; break;
    case 1: *value = (int)entry->shared; break;
    case 4: *value = (int)entry->registers; break;
    case 6: *value = function->module->image.capability; break;
    case 8: *value = function->dynamic_limit ? function->dynamic_limit : 49152; break;
    default: REFUSE(NOT_SUPPORTED, "cuFuncGetAttribute: attribute %d is not emulated", attribute);
  }
  return leave(SUCCESS);
}

struct kernel_parameters {  // CUDA_KERNEL_NODE_PARAMS, whose second version only adds to it
  void* function;
  unsigned grid[3], block[3], shared;
  void** arguments;
  void** extra;
};

static Result read_launch(const char* name, const struct kernel_parameters* given,
                          struct launch* made) {
  *made = (struct launch){.function = known_function(given->function), .shared = given->shared};
  if (!made->function) return refuse(INVALID_HANDLE, "%s: no function", name);
  if (given->extra) return refuse(NOT_SUPPORTED, "%s: extra is not emulated", name);
  memcpy(made->grid, given->grid, sizeof made->grid);
  memcpy(made->block, given->block, sizeof made->block);
  const Result code = check_launch(name, made);
  if (code) return code;
  if (made->function->sizes[0] && !given->arguments)
    return refuse(INVALID_VALUE, "%s: no arguments", name);
  made->arguments = copy_arguments(made->function, given->arguments);
  return SUCCESS;
}

EXPORT Result cuLaunchKernel(void* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx,
                             unsigned by, unsigned bz, unsigned shared, void* stream,
                             void** arguments, void** extra) {
  BEGIN(2);
  struct stream* one = known_stream(stream);
  NEED(one, INVALID_HANDLE, "no stream");
  const struct kernel_parameters given = {function, {gx, gy, gz}, {bx, by, bz}, shared, arguments,
                                          extra};
  struct work work = {.kind = KERNEL};
  code = read_launch(__func__, &given, &work.launch);
  return leave(code ? code : put(one, work));
}

// ---- streams and events --------------------------------------------------------------------------

EXPORT Result cuStreamCreate(void** stream, unsigned flags) {
  BEGIN(2);
  NEED(stream && flags < 2, INVALID_VALUE, "flags");
  struct stream* made = make(STREAM, sizeof *made);
  made->flags = flags;
  *stream = made;
  return leave(SUCCESS);
}

EXPORT Result cuStreamCreateWithPriority(void** stream, unsigned flags, int priority) {
  (void)priority;
  return cuStreamCreate(stream, flags);
}

EXPORT Result cuStreamDestroy_v2(void* handle) {
  BEGIN(2);
  struct stream* stream = known(handle, STREAM);
  NEED(stream, INVALID_HANDLE, "no stream");
  run_until(stream, NULL, 0);
  drop(stream);
  return leave(fake.broken);
}

EXPORT Result cuStreamSynchronize(void* handle) {
  BEGIN(2);
  struct stream* stream = known_stream(handle);
  NEED(stream, INVALID_HANDLE, "no stream");
  meet_others(stream);
  run_until(stream, NULL, 0);
  return leave(fake.broken);
}

EXPORT Result cuStreamQuery(void* handle) {
  BEGIN(2);
  struct stream* stream = known_stream(handle);
  NEED(stream, INVALID_HANDLE, "no stream");
  const int waits = stream->first != NULL;
  run_until(stream, NULL, 0);  // for the next who asks
  return leave(fake.broken ? fake.broken : waits ? NOT_READY : SUCCESS);
}

EXPORT Result cuStreamWaitEvent(void* handle, void* event_handle, unsigned flags) {
  BEGIN(2);
  struct stream* stream = known_stream(handle);
  struct event* event = known(event_handle, EVENT);
  NEED(stream && event && !flags, INVALID_HANDLE, "no stream, no event or flags");
  if (event->done == event->recorded) return leave(SUCCESS);
  return leave(put(stream, (struct work){.kind = WAIT, .event = event,
                                         .version = event->recorded}));
}

EXPORT Result cuEventCreate(void** event, unsigned flags) {
  BEGIN(2);
  NEED(event && flags < 8, INVALID_VALUE, "flags");
  struct event* made = make(EVENT, sizeof *made);
  made->flags = flags;
  *event = made;
  return leave(SUCCESS);
}

EXPORT Result cuEventDestroy_v2(void* handle) {
  BEGIN(2);
  struct event* event = known(handle, EVENT);
  NEED(event, INVALID_HANDLE, "no event");
  run_everything();
  drop(event);
  return leave(SUCCESS);
}

EXPORT Result cuEventRecord(void* handle, void* stream_handle) {
  BEGIN(2);
  struct event* event = known(handle, EVENT);
  struct stream* stream = known_stream(stream_handle);
  NEED(event && stream, INVALID_HANDLE, "no event or no stream");
  if (event->stream && event->done < event->recorded)
    run_until(event->stream, event, event->recorded);
  event->stream = stream;
  return leave(put(stream, (struct work){.kind = RECORD, .event = event,
                                         .version = ++event->recorded}));
}

static void finish(const struct event* event) {
  if (event->done < event->recorded && known_stream(event->stream))
    run_until(event->stream, event, event->recorded);
}

EXPORT Result cuEventSynchronize(void* handle) {
  BEGIN(2);
  const struct event* event = known(handle, EVENT);
  NEED(event, INVALID_HANDLE, "no event");
  finish(event);
  return leave(fake.broken);
}

EXPORT Result cuEventQuery(void* handle) {
  BEGIN(2);
  const struct event* event = known(handle, EVENT);
  NEED(event, INVALID_HANDLE, "no event");
  const int waits = event->done < event->recorded;
  finish(event);  // for the next who asks
  return leave(fake.broken ? fake.broken : waits ? NOT_READY : SUCCESS);
}

EXPORT Result cuEventElapsedTime(float* milliseconds, void* begin, void* end) {
  BEGIN(2);
  const struct event *first = known(begin, EVENT), *last = known(end, EVENT);
  NEED(first && last, INVALID_HANDLE, "no event");
  NEED(first->recorded && last->recorded && !((first->flags | last->flags) & 2), INVALID_HANDLE,
       "an event that was not recorded, or was made without timing");
  if (first->done < first->recorded || last->done < last->recorded) return leave(NOT_READY);
  *milliseconds = (float)((double)(last->time.tv_sec - first->time.tv_sec) * 1e3 +
                          (double)(last->time.tv_nsec - first->time.tv_nsec) / 1e6);
  return leave(SUCCESS);
}

// ---- graphs --------------------------------------------------------------------------------------

EXPORT Result cuGraphCreate(void** graph, unsigned flags) {
  BEGIN(2);
  NEED(graph && !flags, INVALID_VALUE, "flags");
  *graph = make(GRAPH, sizeof(struct graph));
  return leave(SUCCESS);
}

static void free_node(struct node* node) {
  free_work(&node->work);
  free(node->before);
  free(node);
}

EXPORT Result cuGraphDestroy(void* handle) {
  BEGIN(2);
  struct graph* graph = known(handle, GRAPH);
  NEED(graph, INVALID_HANDLE, "no graph");
  for (unsigned i = 0; i < graph->count; ++i) free_node(graph->nodes[i]);
  free(graph->nodes);
  drop(graph);
  return leave(SUCCESS);
}

static int node_index(struct node** nodes, unsigned count, const void* handle) {
  for (unsigned i = count; i-- > 0;)
    if (nodes[i] == handle) return (int)i;
  return -1;
}

static Result add_node(const char* name, void** made, void* handle, void* const* before,
                       size_t count, struct work work) {
  struct graph* graph = known(handle, GRAPH);
  if (!graph || !made) return refuse(INVALID_HANDLE, "%s: no graph", name);
  for (size_t i = 0; i < count; ++i)
    if (node_index(graph->nodes, graph->count, before[i]) < 0)
      return refuse(INVALID_VALUE, "%s: dependency %zu is no node of this graph", name, i);
  struct node* node = calloc(1, sizeof *node);
  node->work = work;
  node->waits = (unsigned)count;
  node->before = malloc((count + 1) * sizeof *node->before);
  for (size_t i = 0; i < count; ++i)
    node->before[i] = (unsigned)node_index(graph->nodes, graph->count, before[i]);
  graph->nodes = realloc(graph->nodes, (graph->count + 1) * sizeof *graph->nodes);
  graph->nodes[graph->count++] = node;
  *made = node;
  return SUCCESS;
}

EXPORT Result cuGraphAddKernelNode(void** made, void* graph, void* const* before, size_t count,
                                   const struct kernel_parameters* given) {
  BEGIN(2);
  struct work work = {.kind = KERNEL};
  code = read_launch(__func__, given, &work.launch);
  if (!code) code = add_node(__func__, made, graph, before, count, work);
  if (code) free_work(&work);
  return leave(code);
}
EXPORT Result cuGraphAddKernelNode_v2(void** made, void* graph, void* const* before, size_t count,
                                      const struct kernel_parameters* given) {
  return cuGraphAddKernelNode(made, graph, before, count, given);
}

struct place {  // one end of CUDA_MEMCPY3D
  size_t at[4];
  int kind;
  void* host;
  Address device;
  void* rest[4];
};

struct copy_parameters {
  struct place from, to;
  size_t bytes, height, depth;
};

EXPORT Result cuGraphAddMemcpyNode(void** made, void* graph, void* const* before, size_t count,
                                   const struct copy_parameters* given, void* context) {
  BEGIN(2);
  NEED(context == &fake.context, INVALID_CONTEXT, "another context");
  NEED(given->height == 1 && given->depth == 1, NOT_SUPPORTED, "only copies of one row");
  NEED((given->from.kind == 1 || given->from.kind == 2) &&
           (given->to.kind == 1 || given->to.kind == 2),
       INVALID_VALUE, "only memory of the host and of the device");
  const int to = given->to.kind == 2, from = given->from.kind == 2;
  struct copy one = {
      .to = (to ? given->to.device : (Address)given->to.host) + given->to.at[0],
      .from = (from ? given->from.device : (Address)given->from.host) + given->from.at[0],
      .bytes = given->bytes, .to_device = to, .from_device = from};
  code = check_copy(__func__, &one);
  return leave(code ? code : add_node(__func__, made, graph, before, count,
                                      (struct work){.kind = COPY, .copy = one}));
}

EXPORT Result cuGraphInstantiateWithFlags(void** executable, void* handle,
                                          unsigned long long flags) {
  BEGIN(2);
  const struct graph* graph = known(handle, GRAPH);
  NEED(graph, INVALID_HANDLE, "no graph");
  NEED(!flags, NOT_SUPPORTED, "flags are not emulated");
  struct executable* made = make(EXECUTABLE, sizeof *made);
  made->count = graph->count;
  made->nodes = malloc((graph->count + 1) * sizeof *made->nodes);
  made->origin = malloc((graph->count + 1) * sizeof *made->origin);
  for (unsigned i = 0; i < graph->count; ++i) {
    struct node *from = graph->nodes[i], *to = malloc(sizeof *to);
    *to = *from;
    to->before = malloc((from->waits + 1) * sizeof *to->before);
    memcpy(to->before, from->before, from->waits * sizeof *to->before);
    if (from->work.kind == KERNEL)
      to->work.launch.arguments =
          copy_arguments(from->work.launch.function, from->work.launch.arguments);
    made->nodes[i] = to;
    made->origin[i] = from;
  }
  *executable = made;
  return leave(SUCCESS);
}
EXPORT Result cuGraphInstantiate_v2(void** executable, void* graph, void** node, char* log,
                                    size_t size) {
  if (node) *node = NULL;
  if (log && size) *log = 0;
  return cuGraphInstantiateWithFlags(executable, graph, 0);
}

EXPORT Result cuGraphExecKernelNodeSetParams(void* handle, void* node,
                                             const struct kernel_parameters* given) {
  BEGIN(2);
  struct executable* graph = known(handle, EXECUTABLE);
  NEED(graph, INVALID_HANDLE, "no executable graph");
  const int index = node_index(graph->origin, graph->count, node);
  NEED(index >= 0, INVALID_VALUE, "no node of the graph that this was made of");
  struct work* work = &graph->nodes[index]->work;
  NEED(work->kind == KERNEL, INVALID_VALUE, "the node is no kernel");
  struct launch made;
  code = read_launch(__func__, given, &made);
  if (code) return leave(code);
  run_everything();  // what was launched before runs with the arguments that it had
  free(work->launch.arguments);
  work->launch = made;
  return leave(fake.broken);
}
EXPORT Result cuGraphExecKernelNodeSetParams_v2(void* graph, void* node,
                                                const struct kernel_parameters* given) {
  return cuGraphExecKernelNodeSetParams(graph, node, given);
}

EXPORT Result cuGraphLaunch(void* handle, void* stream) {
  BEGIN(2);
  struct executable* graph = known(handle, EXECUTABLE);
  struct stream* one = known_stream(stream);
  NEED(graph && one, INVALID_HANDLE, "no executable graph or no stream");
  return leave(put(one, (struct work){.kind = RUN_GRAPH, .executable = graph}));
}

EXPORT Result cuGraphExecDestroy(void* handle) {
  BEGIN(2);
  struct executable* graph = known(handle, EXECUTABLE);
  NEED(graph, INVALID_HANDLE, "no executable graph");
  run_everything();
  for (unsigned i = 0; i < graph->count; ++i) free_node(graph->nodes[i]);
  free(graph->nodes);
  free(graph->origin);
  drop(graph);
  return leave(fake.broken);
}

// ---- for tests -----------------------------------------------------------------------------------

// How often a function was called.
EXPORT unsigned long fake_calls(const char* name) {
  for (unsigned i = 0; i < 128 && counts[i].name; ++i)
    if (!strcmp(counts[i].name, name)) return counts[i].calls;
  return 0;
}

// How many of a kind are alive: memory, host, stream, event, graph, executable, module, context.
EXPORT unsigned fake_live(const char* kind) {
  unsigned found = 0;
  if (!strcmp(kind, "context")) return fake.retained;
  for (unsigned i = 0; i < fake.count; ++i) found += !strcmp(kind_names[fake.objects[i]->kind], kind);
  return found;
}

EXPORT size_t fake_bytes(void) { return fake.bytes; }  // of device memory, now
EXPORT size_t fake_peak(void) { return fake.peak; }
EXPORT const char* fake_reason(void) { return fake.reason; }  // why a call was refused last

// The device: its capability (75, 90) and its memory.
EXPORT void fake_device(int capability, size_t bytes) {
  fake.capability = capability;
  fake.limit = bytes;
}
EXPORT void fake_lazy(int lazy) { fake.lazy = lazy; }
EXPORT void fake_seed(uint64_t seed) { fake.random = seed * 2654435769u + 88172645463325252u; }

// The next call of a function answers this code, without doing anything.
EXPORT void fake_fail(const char* name, int code) {
  snprintf(fake.inject_name, sizeof fake.inject_name, "%s", name);
  fake.inject = code;
}

// The device works again after a kernel failed, as in a new process.
EXPORT void fake_mend(void) {
  fake.broken = SUCCESS;
  fake.reason[0] = 0;
}
