/* A CUDA driver that starts nothing: it keeps what the last launches were given. */
#include <cuda.h>
#include <stdint.h>
#include <string.h>

#define KEPT 64
typedef struct { uint64_t function, stream; uint32_t grid[3], threads, shared, attributes, params, sizes[64];
                 unsigned char bytes[64][128]; } Started;
Started fake_started[KEPT];
int fake_count;
static size_t fake_sizes[256][64]; /* by function */
static int fake_params[256];
static CUcontext fake_context;

void fake_reset(void) { fake_count = 0; memset(fake_started, 0, sizeof fake_started); }
void fake_describe(int function, const uint32_t *sizes, int params) {
  fake_params[function] = params;
  for (int i = 0; i < params; i++) fake_sizes[function][i] = sizes[i];
}
CUresult cuFuncGetParamInfo(CUfunction f, size_t i, size_t *offset, size_t *size) {
  if ((int)i >= fake_params[(uint64_t)f]) return CUDA_ERROR_INVALID_VALUE;
  *offset = 0;
  *size = fake_sizes[(uint64_t)f][i];
  return CUDA_SUCCESS;
}
CUresult cuTensorMapEncodeTiled(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank, void *address,
                                const cuuint64_t *sizes, const cuuint64_t *strides, const cuuint32_t *box,
                                const cuuint32_t *ones, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill) {
  (void)type; (void)strides; (void)ones; (void)interleave; (void)promotion; (void)fill;
  uint64_t *out = (uint64_t *)map; /* address, rank, swizzle, sizes, boxes: enough to tell maps apart */
  memset(map, 0, sizeof *map);
  out[0] = (uint64_t)address; out[1] = rank; out[2] = swizzle;
  for (cuuint32_t i = 0; i < rank; i++) { out[3 + i] = sizes[i]; out[9 + i] = box[i]; }
  return CUDA_SUCCESS;
}
CUresult cuTensorMapReplaceAddress(CUtensorMap *map, void *address) {
  *(uint64_t *)map = (uint64_t)address;
  return CUDA_SUCCESS;
}
CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction f, void **params, void **extra) {
  (void)extra;
  if ((uint64_t)f == 255) return CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES;
  Started *s = &fake_started[fake_count++ % KEPT];
  s->function = (uint64_t)f; s->stream = (uint64_t)config->hStream;
  s->grid[0] = config->gridDimX; s->grid[1] = config->gridDimY; s->grid[2] = config->gridDimZ;
  s->threads = config->blockDimX; s->shared = config->sharedMemBytes; s->attributes = config->numAttrs;
  s->params = fake_params[(uint64_t)f];
  for (uint32_t i = 0; i < s->params; i++) {
    s->sizes[i] = fake_sizes[(uint64_t)f][i];
    memcpy(s->bytes[i], params[i], s->sizes[i]);
  }
  return CUDA_SUCCESS;
}
CUresult cuCtxGetCurrent(CUcontext *c) { *c = fake_context; return CUDA_SUCCESS; }
CUresult cuCtxSetCurrent(CUcontext c) { fake_context = c; return CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxRetain(CUcontext *c, CUdevice d) { *c = (CUcontext)(uint64_t)(d + 1); return CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice *d, int i) { *d = i; return CUDA_SUCCESS; }
