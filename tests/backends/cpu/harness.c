/* Calls one compiled kernel without TVM's runtime: harness INPUTS OUTPUTS.
 *
 * INPUTS is a sequence of tensors in the kernel's order, little-endian: int32 DLPack type code, bits, number of axes; int64 sizes; the
 * elements. OUTPUTS receives the elements of all tensors, in order, after the call. The exit code is 0, or that of the kernel.
 * Parallel loops run their tasks one after another.
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <tvm/ffi/c_api.h>

enum { MOST_TENSORS = 32, MOST_AXES = 8, ALIGNMENT = 64 };

typedef struct {
  void* sync_handle;
  int32_t num_task;
} ParallelGroup;
typedef int (*ParallelTask)(int task, ParallelGroup* group, void* data);

/* The kernel's object holds these pointers; a loader fills them in. */
extern int (*__TVMBackendParallelLaunch)(ParallelTask, void*, int) __attribute__((weak));
extern void* (*__TVMBackendAllocWorkspace)(int, int, uint64_t, int, int) __attribute__((weak));
extern int (*__TVMBackendFreeWorkspace)(int, int, void*) __attribute__((weak));

int KERNEL(void* handle, const TVMFFIAny* arguments, int32_t count, TVMFFIAny* result);

void TVMFFIErrorSetRaisedFromCStr(const char* kind, const char* message) { fprintf(stderr, "%s: %s\n", kind, message); }

void TVMFFIErrorSetRaisedFromCStrParts(const char* kind, const char** parts, int32_t count) {
  fprintf(stderr, "%s: ", kind);
  for (int32_t i = 0; i < count; ++i) fputs(parts[i] ? parts[i] : "", stderr);
  fputc('\n', stderr);
}

static int launch(ParallelTask task, void* data, int tasks) {
  ParallelGroup group = {0, tasks > 0 ? tasks : 1};
  for (int i = 0; i < group.num_task; ++i) {
    int failed = task(i, &group, data);
    if (failed) return failed;
  }
  return 0;
}

/* Memory with a filled margin behind it: a kernel must not read sense into what lies past a tensor. */
static void* allocate(uint64_t bytes) {
  uint64_t whole = (bytes + 2 * ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
  void* memory = aligned_alloc(ALIGNMENT, whole);
  if (!memory) exit(99);
  memset(memory, 0x5A, whole);
  return memory;
}

static void* workspace(int device, int id, uint64_t bytes, int code, int bits) {
  (void)device, (void)id, (void)code, (void)bits;
  return allocate(bytes);
}

static int release(int device, int id, void* memory) {
  (void)device, (void)id;
  free(memory);
  return 0;
}

static void read_all(void* to, size_t bytes, FILE* file) {
  if (bytes && fread(to, 1, bytes, file) != bytes) exit(98);
}

int main(int argc, char** argv) {
  static DLTensor tensors[MOST_TENSORS];
  static int64_t shapes[MOST_TENSORS][MOST_AXES];
  static uint64_t sizes[MOST_TENSORS];
  TVMFFIAny arguments[MOST_TENSORS], result;
  memset(arguments, 0, sizeof arguments);
  memset(&result, 0, sizeof result);
  if (argc != 3) return 97;
  if (&__TVMBackendParallelLaunch) __TVMBackendParallelLaunch = launch;
  if (&__TVMBackendAllocWorkspace) __TVMBackendAllocWorkspace = workspace;
  if (&__TVMBackendFreeWorkspace) __TVMBackendFreeWorkspace = release;

  FILE* file = fopen(argv[1], "rb");
  if (!file) return 96;
  int count = 0;
  int32_t head[3];
  while (count < MOST_TENSORS && fread(head, sizeof head, 1, file) == 1) {
    DLTensor* tensor = &tensors[count];
    if (head[2] > MOST_AXES) return 95;
    read_all(shapes[count], 8 * (size_t)head[2], file);
    uint64_t elements = 1;
    for (int axis = 0; axis < head[2]; ++axis) elements *= (uint64_t)shapes[count][axis];
    sizes[count] = elements * (uint64_t)(head[1] / 8);
    tensor->data = allocate(sizes[count]);
    read_all(tensor->data, sizes[count], file);
    tensor->device.device_type = kDLCPU;
    tensor->ndim = head[2];
    tensor->dtype.code = (uint8_t)head[0];
    tensor->dtype.bits = (uint8_t)head[1];
    tensor->dtype.lanes = 1;
    tensor->shape = shapes[count];
    arguments[count].type_index = kTVMFFIDLTensorPtr;
    arguments[count].v_ptr = tensor;
    ++count;
  }
  fclose(file);

  int failed = KERNEL(0, arguments, count, &result);
  if (failed) return 1;

  file = fopen(argv[2], "wb");
  if (!file) return 94;
  for (int i = 0; i < count; ++i) fwrite(tensors[i].data, 1, sizes[i], file);
  return fclose(file) ? 93 : 0;
}
