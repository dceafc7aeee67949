// Calls kernels on tensors that a file gives and writes their results to another: what an emulated
// processor needs in place of TVM's runtime. The format is said in emulated.py.
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <tvm/ffi/c_api.h>

enum { GUARD = 16384, TASKS = 3, MOST_AXES = 8, MOST_ARGUMENTS = 32, UNTOUCHED = 0xFF };

extern const TVMFFISafeCallType kernels[];

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
  return aligned_alloc(64, (bytes + 63) / 64 * 64);
}

static int free_workspace(int device, int number, void *memory) {
  (void)device, (void)number;
  free(memory);
  return 0;
}

// What objects of TVM's compiler take from its runtime, by pointers of these names.
int (*__TVMBackendParallelLaunch)(Job, void *, int) = parallel_launch;
void *(*__TVMBackendAllocWorkspace)(int, int, uint64_t, int, int) = alloc_workspace;
int (*__TVMBackendFreeWorkspace)(int, int, void *) = free_workspace;

void TVMFFIErrorSetRaisedFromCStrParts(const char *kind, const char **parts, int32_t count) {
  fprintf(stderr, "%s: ", kind);
  for (int32_t i = 0; i < count; ++i) fputs(parts[i] ? parts[i] : "", stderr);
  fputc('\n', stderr);
}

static void get(void *to, size_t bytes, FILE *from) {
  if (fread(to, 1, bytes, from) != bytes) {
    fprintf(stderr, "the tensors end too early\n");
    exit(2);
  }
}

typedef struct {
  DLTensor tensor;
  int64_t shape[MOST_AXES], strides[MOST_AXES];
  unsigned char *memory;
  size_t bytes;
  int32_t result;
} Argument;

static void read_argument(Argument *one, FILE *from) {
  int32_t head[4];  // type code, bits, axes, whether it is a result
  get(head, sizeof head, from);
  get(one->shape, head[2] * sizeof(int64_t), from);
  int64_t size = 1;
  for (int32_t i = head[2] - 1; i >= 0; --i) {
    one->strides[i] = size;
    size *= one->shape[i];
  }
  one->bytes = size * head[1] / 8;
  size_t room = (one->bytes + 63) / 64 * 64 + 2 * GUARD;
  one->memory = aligned_alloc(64, room);
  memset(one->memory, UNTOUCHED, room);  // a NaN, read as floats
  one->result = head[3];
  if (!one->result) get(one->memory + GUARD, one->bytes, from);
  one->tensor = (DLTensor){.data = one->memory + GUARD,
                           .device = {kDLCPU, 0},
                           .ndim = head[2],
                           .dtype = {head[0], head[1], 1},
                           .shape = one->shape,
                           .strides = one->strides};
}

static int is_untouched(const unsigned char *memory, size_t bytes) {
  for (size_t i = 0; i < bytes; ++i)
    if (memory[i] != UNTOUCHED) return 0;
  return 1;
}

static void call(int32_t kernel, int32_t count, FILE *from, FILE *to) {
  static Argument arguments[MOST_ARGUMENTS];
  TVMFFIAny values[MOST_ARGUMENTS], nothing = {0};
  for (int32_t i = 0; i < count; ++i) {
    read_argument(&arguments[i], from);
    values[i] = (TVMFFIAny){.type_index = kTVMFFIDLTensorPtr, .v_ptr = &arguments[i].tensor};
  }
  if (kernels[kernel](NULL, values, count, &nothing) != 0) exit(3);
  for (int32_t i = 0; i < count; ++i) {
    Argument *one = &arguments[i];
    if (!is_untouched(one->memory, GUARD) ||
        !is_untouched(one->memory + GUARD + one->bytes, GUARD)) {
      fprintf(stderr, "kernel %d wrote beside its argument %d\n", kernel, i);
      exit(4);
    }
    if (one->result) fwrite(one->memory + GUARD, 1, one->bytes, to);
    free(one->memory);
  }
}

int main(int count, char **paths) {
  if (count != 3) return 2;
  FILE *from = fopen(paths[1], "rb"), *to = fopen(paths[2], "wb");
  if (!from || !to) return 2;
  int32_t calls, head[2];  // kernel, arguments
  get(&calls, sizeof calls, from);
  for (; calls > 0; --calls) {
    get(head, sizeof head, from);
    call(head[0], head[1], from, to);
  }
  return fclose(to);
}
