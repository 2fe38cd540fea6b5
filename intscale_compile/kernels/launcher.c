/* Starts prepared sequences of kernels: what a launch needs besides addresses is written down once, and a call fills these in.
 *
 * A sequence is a list of launches; a launch holds a block of memory with its kernel's parameters, and a list of places in it
 * that take an address: the address in slot s plus a constant. A tensor map is such a place of 128 bytes. A call copies the
 * blocks to its own stack, so that threads may run one sequence at the same time.
 *
 * Every function returns 0, a CUresult, or a negative number of its own (see the enumeration).
 */
#include <cuda.h>
#include <dlfcn.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define MAX_LAUNCHES 4
#define MAX_PARAMS 64
#define MAX_PLACES 32
#define MAX_BLOCK 2048
#define MAX_SLOTS 24

enum { TOO_LARGE = -1, NO_DRIVER = -2, OTHER_PARAMETERS = -3 };

typedef struct { uint32_t offset, slot, is_map; uint64_t add; } Place;

typedef struct {
  CUfunction function;
  uint32_t grid[3], threads, shared, overlap, params, places, bytes;
  uint32_t offsets[MAX_PARAMS];
  Place place[MAX_PLACES];
  _Alignas(128) unsigned char block[MAX_BLOCK];
} Launch;

typedef struct { uint32_t launches, slots; Launch launch[MAX_LAUNCHES]; } Sequence;

static CUresult (*launch_kernel)(const CUlaunchConfig *, CUfunction, void **, void **);
static CUresult (*encode_tiled)(CUtensorMap *, CUtensorMapDataType, cuuint32_t, void *, const cuuint64_t *, const cuuint64_t *,
                                const cuuint32_t *, const cuuint32_t *, CUtensorMapInterleave, CUtensorMapSwizzle,
                                CUtensorMapL2promotion, CUtensorMapFloatOOBfill);
static CUresult (*replace_address)(CUtensorMap *, void *);
static CUresult (*param_info)(CUfunction, size_t, size_t *, size_t *);
static CUresult (*ctx_get_current)(CUcontext *);
static CUresult (*ctx_set_current)(CUcontext);
static CUresult (*primary_retain)(CUcontext *, CUdevice);
static CUresult (*get_device)(CUdevice *, int);

int intscale_open(const char *library) {
  void *driver = dlopen(library, RTLD_LAZY);
  if (!driver) return NO_DRIVER;
  *(void **)&launch_kernel = dlsym(driver, "cuLaunchKernelEx");
  *(void **)&encode_tiled = dlsym(driver, "cuTensorMapEncodeTiled");
  *(void **)&replace_address = dlsym(driver, "cuTensorMapReplaceAddress");
  *(void **)&param_info = dlsym(driver, "cuFuncGetParamInfo");
  *(void **)&ctx_get_current = dlsym(driver, "cuCtxGetCurrent");
  *(void **)&ctx_set_current = dlsym(driver, "cuCtxSetCurrent");
  *(void **)&primary_retain = dlsym(driver, "cuDevicePrimaryCtxRetain");
  *(void **)&get_device = dlsym(driver, "cuDeviceGet");
  return launch_kernel && encode_tiled && replace_address && param_info && ctx_get_current && ctx_set_current &&
                 primary_retain && get_device ? 0 : NO_DRIVER;
}

Sequence *intscale_new(int slots) {
  Sequence *made = NULL;
  if (slots > MAX_SLOTS || !(made = aligned_alloc(128, sizeof(Sequence)))) return NULL;
  memset(made, 0, sizeof(Sequence));
  made->slots = slots;
  return made;
}

void intscale_free(Sequence *sequence) { free(sequence); }

/* The driver says which parameters the kernel has: those given, and at most two pointers behind them, which stay null. */
int intscale_add_launch(Sequence *sequence, uint64_t function, const uint32_t *grid, int threads, int shared, int overlap,
                        const unsigned char *block, int bytes, const uint32_t *offsets, const uint32_t *sizes, int params) {
  if (sequence->launches == MAX_LAUNCHES || params + 2 > MAX_PARAMS || bytes + 16 > MAX_BLOCK) return TOO_LARGE;
  Launch *launch = &sequence->launch[sequence->launches];
  launch->function = (CUfunction)function;
  memcpy(launch->grid, grid, sizeof launch->grid);
  launch->threads = threads;
  launch->shared = shared;
  launch->overlap = overlap;
  memcpy(launch->block, block, bytes);
  memcpy(launch->offsets, offsets, params * sizeof *offsets);
  memset(launch->block + bytes, 0, 16);
  launch->offsets[params] = bytes;
  launch->offsets[params + 1] = bytes + 8;
  launch->bytes = bytes + 16;
  size_t offset, size;
  for (int i = 0; i < params; i++)
    if (param_info(launch->function, i, &offset, &size) != CUDA_SUCCESS || size != sizes[i]) return OTHER_PARAMETERS;
  int count = params;
  while (param_info(launch->function, count, &offset, &size) == CUDA_SUCCESS)
    if (size != 8 || ++count > params + 2) return OTHER_PARAMETERS;
  launch->params = count;
  sequence->launches++;
  return 0;
}

static int add_place(Sequence *sequence, int offset, int slot, uint64_t add, int is_map) {
  Launch *launch = &sequence->launch[sequence->launches - 1];
  if (launch->places == MAX_PLACES || slot >= (int)sequence->slots) return TOO_LARGE;
  launch->place[launch->places++] = (Place){offset, slot, is_map, add};
  return 0;
}

/* A pointer of the launch added last. */
int intscale_add_pointer(Sequence *sequence, int offset, int slot, uint64_t add) {
  return add_place(sequence, offset, slot, add, 0);
}

/* A tensor map of the launch added last; sizes from the innermost dimension on, strides in bytes, one fewer. */
int intscale_add_map(Sequence *sequence, int offset, int slot, uint64_t add, uint64_t address, int rank,
                     const uint64_t *sizes, const uint64_t *strides, const uint32_t *box, int type, int swizzle) {
  Launch *launch = &sequence->launch[sequence->launches - 1];
  const cuuint32_t ones[5] = {1, 1, 1, 1, 1};
  CUresult result = encode_tiled((CUtensorMap *)(launch->block + offset), (CUtensorMapDataType)type, rank, (void *)address,
                                 (const cuuint64_t *)sizes, (const cuuint64_t *)strides, box, ones,
                                 CU_TENSOR_MAP_INTERLEAVE_NONE, (CUtensorMapSwizzle)swizzle,
                                 CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result ? (int)result : add_place(sequence, offset, slot, add, 1);
}

/* A thread that PyTorch has not used yet has no context. */
static CUresult ensure_context(int device) {
  CUcontext context;
  CUdevice handle;
  CUresult result = ctx_get_current(&context);
  if (result || context) return result;
  if ((result = get_device(&handle, device)) || (result = primary_retain(&context, handle))) return result;
  return ctx_set_current(context);
}

static CUresult run_launch(const Launch *launch, const uint64_t *slots, CUstream stream) {
  _Alignas(128) unsigned char block[MAX_BLOCK];
  void *params[MAX_PARAMS];
  memcpy(block, launch->block, launch->bytes);
  for (uint32_t i = 0; i < launch->places; i++) {
    const Place *place = &launch->place[i];
    uint64_t address = slots[place->slot] ? slots[place->slot] + place->add : 0;
    if (!place->is_map) {
      memcpy(block + place->offset, &address, 8);
      continue;
    }
    CUresult result = replace_address((CUtensorMap *)(block + place->offset), (void *)address);
    if (result) return result;
  }
  for (uint32_t i = 0; i < launch->params; i++) params[i] = block + launch->offsets[i];
  CUlaunchAttribute overlap = {.id = CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION};
  overlap.value.programmaticStreamSerializationAllowed = 1;
  CUlaunchConfig config = {.gridDimX = launch->grid[0], .gridDimY = launch->grid[1], .gridDimZ = launch->grid[2],
                           .blockDimX = launch->threads, .blockDimY = 1, .blockDimZ = 1,
                           .sharedMemBytes = launch->shared, .hStream = stream, .attrs = &overlap,
                           .numAttrs = launch->overlap ? 1 : 0};
  return launch_kernel(&config, launch->function, params, NULL);
}

int intscale_run(const Sequence *sequence, int device, uint64_t stream, const uint64_t *slots) {
  CUresult result = ensure_context(device);
  for (uint32_t i = 0; !result && i < sequence->launches; i++)
    result = run_launch(&sequence->launch[i], slots, (CUstream)stream);
  return (int)result;
}
