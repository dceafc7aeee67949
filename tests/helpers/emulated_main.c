// Calls kernels on tensors that a file gives and writes their results to another: what an emulated
// processor needs in place of TVM's runtime. The format is said in emulated.py. No C library is
// linked: for another architecture it would first have to be compiled.
#include <stddef.h>
#include <stdint.h>

#include <tvm/ffi/c_api.h>

enum { GUARD = 16384, TASKS = 3, MOST_AXES = 8, MOST_ARGUMENTS = 32, UNTOUCHED = 0xFF };
enum { OPENAT = 56, READ = 63, WRITE = 64, EXIT = 94, MMAP = 222 };  // of Linux on aarch64
enum { HERE = -100, READ_ONLY = 0, CREATE = 01101, ROOM = 1 << 30 };

extern const TVMFFISafeCallType kernels[];

static long ask(long number, long a, long b, long c, long d, long e) {
  register long x8 __asm__("x8") = number, x0 __asm__("x0") = a, x1 __asm__("x1") = b;
  register long x2 __asm__("x2") = c, x3 __asm__("x3") = d, x4 __asm__("x4") = e;
  register long x5 __asm__("x5") = 0;
  __asm__ volatile("svc 0"
                   : "+r"(x0)
                   : "r"(x8), "r"(x1), "r"(x2), "r"(x3), "r"(x4), "r"(x5)
                   : "memory");
  return x0;
}

void *memset(void *to, int value, size_t bytes) {
  for (volatile unsigned char *at = to; bytes--; ++at) *at = value;
  return to;
}

void *memcpy(void *to, const void *from, size_t bytes) {
  volatile unsigned char *at = to;
  for (const unsigned char *one = from; bytes--; ++one, ++at) *at = *one;
  return to;
}

static void say(const char *text) {
  size_t length = 0;
  while (text[length]) ++length;
  ask(WRITE, 2, (long)text, length, 0, 0);
}

_Noreturn static void stop(const char *text, int code) {
  if (text) say(text), say("\n");
  for (;;) ask(EXIT, code, 0, 0, 0, 0);
}

// Memory is given in order, and taken back all at once after each call.
static unsigned char *memory;
static size_t used;

static void *allocate(size_t bytes) {
  void *given = memory + used;
  used += (bytes + 63) / 64 * 64;
  if (used > ROOM) stop("the tensors are too large", 2);
  return given;
}

typedef struct {
  void *sync_handle;
  int32_t num_task;
} Environment;

typedef int (*Job)(int task, Environment *environment, void *data);

// Job after job, by as many as three threads would share the loop.
static int parallel_launch(Job job, void *data, int count) {
  Environment environment = {NULL, TASKS};
  (void)count;
  for (int task = 0; task < TASKS; ++task) {
    int code = job(task, &environment, data);
    if (code != 0) return code;
  }
  return 0;
}

static void *alloc_workspace(int device, int number, uint64_t bytes, int code, int bits) {
  (void)device, (void)number, (void)code, (void)bits;
  return allocate(bytes);
}

static int free_workspace(int device, int number, void *given) {
  (void)device, (void)number, (void)given;
  return 0;
}

// What objects of TVM's compiler take from its runtime, by pointers of these names.
int (*__TVMBackendParallelLaunch)(Job, void *, int) = parallel_launch;
void *(*__TVMBackendAllocWorkspace)(int, int, uint64_t, int, int) = alloc_workspace;
int (*__TVMBackendFreeWorkspace)(int, int, void *) = free_workspace;

void TVMFFIErrorSetRaisedFromCStrParts(const char *kind, const char **parts, int32_t count) {
  say(kind), say(": ");
  for (int32_t i = 0; i < count; ++i) say(parts[i] ? parts[i] : "");
}

static void get(void *to, size_t bytes, int from) {
  for (long some; bytes; bytes -= some, to = (char *)to + some)
    if ((some = ask(READ, from, (long)to, bytes, 0, 0)) <= 0) stop("the tensors end too early", 2);
}

static void put(const void *from, size_t bytes, int to) {
  for (long some; bytes; bytes -= some, from = (const char *)from + some)
    if ((some = ask(WRITE, to, (long)from, bytes, 0, 0)) <= 0) stop("cannot write", 2);
}

typedef struct {
  DLTensor tensor;
  int64_t shape[MOST_AXES], strides[MOST_AXES];
  unsigned char *memory;
  size_t bytes;
  int32_t result;
} Argument;

static void read_argument(Argument *one, int from) {
  int32_t head[4];  // type code, bits, axes, whether it is a result
  get(head, sizeof head, from);
  get(one->shape, head[2] * sizeof(int64_t), from);
  int64_t size = 1;
  for (int32_t i = head[2] - 1; i >= 0; --i) {
    one->strides[i] = size;
    size *= one->shape[i];
  }
  one->bytes = size * head[1] / 8;
  one->memory = allocate(one->bytes + 2 * GUARD);
  memset(one->memory, UNTOUCHED, one->bytes + 2 * GUARD);  // a NaN, read as floats
  one->result = head[3];
  if (!one->result) get(one->memory + GUARD, one->bytes, from);
  one->tensor = (DLTensor){.data = one->memory + GUARD,
                           .device = {kDLCPU, 0},
                           .ndim = head[2],
                           .dtype = {head[0], head[1], 1},
                           .shape = one->shape,
                           .strides = one->strides};
}

static int is_untouched(const unsigned char *at, size_t bytes) {
  while (bytes--)
    if (*at++ != UNTOUCHED) return 0;
  return 1;
}

static void call(int32_t kernel, int32_t count, int from, int to) {
  static Argument arguments[MOST_ARGUMENTS];
  TVMFFIAny values[MOST_ARGUMENTS], nothing = {0};
  for (int32_t i = 0; i < count; ++i) {
    read_argument(&arguments[i], from);
    values[i] = (TVMFFIAny){.type_index = kTVMFFIDLTensorPtr, .v_ptr = &arguments[i].tensor};
  }
  if (kernels[kernel](NULL, values, count, &nothing) != 0) stop("", 3);
  for (int32_t i = 0; i < count; ++i) {
    Argument *one = &arguments[i];
    if (!is_untouched(one->memory, GUARD) ||
        !is_untouched(one->memory + GUARD + one->bytes, GUARD))
      stop("a kernel wrote beside an argument", 4);
    if (one->result) put(one->memory + GUARD, one->bytes, to);
  }
}

__attribute__((used)) static void run(long *stack) {
  char **paths = (char **)(stack + 1);  // behind their number
  long from = ask(OPENAT, HERE, (long)paths[1], READ_ONLY, 0, 0);
  long to = ask(OPENAT, HERE, (long)paths[2], CREATE, 0644, 0);
  if (stack[0] != 3 || from < 0 || to < 0) stop("give a file to read and one to write", 2);
  // anonymous memory, of which what is not touched costs nothing
  memory = (unsigned char *)ask(MMAP, 0, ROOM, 3, 0x4022, -1);
  int32_t calls, head[2];  // kernel, arguments
  for (get(&calls, sizeof calls, from); calls > 0; --calls) {
    get(head, sizeof head, from);
    used = 0;
    call(head[0], head[1], from, to);
  }
  stop(NULL, 0);
}

__asm__(".globl _start\n_start:\n  mov x0, sp\n  b run\n");
