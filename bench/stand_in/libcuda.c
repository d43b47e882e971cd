/* Stands in for libcuda.so.1 where there is no GPU: whatever Triton's driver asks for is granted, a launch only counts.
   It says it is one GPU of compute capability 9.0 with 132 multiprocessors. Compiled and loaded by bench/host.py and by
   the tests of launches: for these `noted` takes the grid, the block and the eight bytes at each of `count` parameters. */
#include <string.h>
#include <stddef.h>

typedef int CUresult;
typedef unsigned long long CUdeviceptr;
typedef struct {
    unsigned grid[3], block[3], shared;
    void *stream, *attributes;
    unsigned num_attributes;
} Config;

long launches = 0;
int count = 0;
unsigned long long noted[4 + 128];

CUresult cuInit(unsigned flags) { return 0; }
CUresult cuDriverGetVersion(int *version) { *version = 13000; return 0; }
CUresult cuDeviceGetCount(int *count) { *count = 1; return 0; }
CUresult cuDeviceGet(int *device, int ordinal) { *device = 0; return 0; }
CUresult cuGetErrorString(CUresult error, const char **text) { *text = "an error of the stand-in driver"; return 0; }

CUresult cuDeviceGetAttribute(int *value, int attribute, int device) {
    switch (attribute) {
    case 10: *value = 32; break;      /* threads of a warp */
    case 16: *value = 132; break;     /* multiprocessors */
    case 75: *value = 9; break;       /* compute capability, major */
    case 76: *value = 0; break;       /* and minor */
    case 97: *value = 232448; break;  /* bytes of shared memory that a block may ask for */
    default: *value = 1024;
    }
    return 0;
}

CUresult cuCtxGetCurrent(void **context) { *context = (void *)8; return 0; }
CUresult cuCtxSetCurrent(void *context) { return 0; }
CUresult cuCtxGetDevice(int *device) { *device = 0; return 0; }
CUresult cuCtxSetLimit(int limit, size_t value) { return 0; }
CUresult cuCtxGetLimit(size_t *value, int limit) { *value = 1 << 20; return 0; }
CUresult cuDevicePrimaryCtxRetain(void **context, int device) { *context = (void *)8; return 0; }

static long modules = 0;
CUresult cuModuleLoadData(void **module, const void *image) { *module = (void *)(16 * ++modules); return 0; }
CUresult cuModuleUnload(void *module) { return 0; }
CUresult cuModuleGetFunction(void **function, void *module, const char *name) { *function = module; return 0; }
CUresult cuLibraryLoadData(void **library, ...) { *library = (void *)16; return 0; }
/* 0: the most threads of a block; the others are sizes in bytes and registers. */
CUresult cuFuncGetAttribute(int *value, int attribute, void *function) { *value = attribute ? 0 : 1024; return 0; }
CUresult cuFuncSetAttribute(void *function, int attribute, int value) { return 0; }
CUresult cuFuncSetCacheConfig(void *function, int config) { return 0; }
CUresult cuOccupancyMaxActiveClusters(int *count, void *function, const void *config) { *count = 1; return 0; }
CUresult cuTensorMapEncodeTiled(void *map, ...) { return 0; }
CUresult cuTensorMapEncodeIm2col(void *map, ...) { return 0; }

CUresult cuPointerGetAttribute(void *value, int attribute, CUdeviceptr pointer) {
    *(CUdeviceptr *)value = pointer;
    return 0;
}
CUresult cuPointerGetAttributes(unsigned count, int *attributes, void **values, CUdeviceptr pointer) {
    for (unsigned at = 0; at < count; at++) *(CUdeviceptr *)values[at] = pointer;
    return 0;
}

CUresult cuLaunchKernel(void *function, ...) { launches++; return 0; }
CUresult cuLaunchKernelEx(const Config *config, void *function, void **parameters, void **extra) {
    launches++;
    for (int axis = 0; axis < 3; axis++) noted[axis] = config->grid[axis];
    noted[3] = (unsigned long long)function << 32 | config->block[0];
    for (int at = 0; at < count; at++) memcpy(&noted[4 + at], parameters[at], 8);
    return 0;
}
