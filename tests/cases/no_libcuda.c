/* In the place of libcuda.so.1 where there is no GPU: what Triton asks of it is granted, and a launch is only noted.
   `noted` takes the grid, the block and the eight bytes at each of `count` parameters. */
#include <stddef.h>
#include <string.h>

typedef int CUresult;
typedef unsigned long long Word;
typedef struct {
    unsigned grid[3], block[3], shared;
    void *stream, *attributes;
    unsigned num_attributes;
} Config;

long launches = 0;
int count = 0;
Word noted[4 + 128];

CUresult cuInit(unsigned flags) { return 0; }
CUresult cuDriverGetVersion(int *version) { *version = 13000; return 0; }
CUresult cuGetErrorString(CUresult error, const char **text) { *text = "no driver"; return 0; }
CUresult cuDeviceGetCount(int *devices) { *devices = 1; return 0; }
CUresult cuDeviceGet(int *device, int ordinal) { *device = 0; return 0; }
CUresult cuDeviceGetAttribute(int *value, int attribute, int device) {
    /* Shared memory that a block may ask for; registers and threads of a multiprocessor don't matter here. */
    *value = attribute == 97 ? 232448 : 1024;
    return 0;
}
CUresult cuCtxGetCurrent(void **context) { *context = (void *)8; return 0; }
CUresult cuCtxSetCurrent(void *context) { return 0; }
CUresult cuCtxGetDevice(int *device) { *device = 0; return 0; }
CUresult cuCtxSetLimit(int limit, size_t value) { return 0; }
CUresult cuCtxGetLimit(size_t *value, int limit) { *value = 1 << 20; return 0; }
CUresult cuDevicePrimaryCtxRetain(void **context, int device) { *context = (void *)8; return 0; }
CUresult cuPointerGetAttribute(void *value, int attribute, Word pointer) { *(Word *)value = pointer; return 0; }
static long modules = 0;
CUresult cuModuleLoadData(void **module, const void *data) { *module = (void *)(16 * ++modules); return 0; }
CUresult cuModuleUnload(void *module) { return 0; }
CUresult cuModuleGetFunction(void **function, void *module, const char *name) { *function = module; return 0; }
CUresult cuLibraryLoadData(void **library, ...) { *library = (void *)16; return 0; }
CUresult cuFuncGetAttribute(int *value, int attribute, void *function) { *value = attribute == 0 ? 1024 : 0; return 0; }
CUresult cuFuncSetAttribute(void *function, int attribute, int value) { return 0; }
CUresult cuFuncSetCacheConfig(void *function, int config) { return 0; }
CUresult cuOccupancyMaxActiveClusters(int *clusters, void *function, const void *config) { *clusters = 1; return 0; }
CUresult cuTensorMapEncodeTiled(void *map, ...) { return 0; }
CUresult cuTensorMapEncodeIm2col(void *map, ...) { return 0; }

CUresult cuLaunchKernelEx(const Config *config, void *function, void **parameters, void **extra) {
    launches++;
    for (int axis = 0; axis < 3; axis++) noted[axis] = config->grid[axis];
    noted[3] = (Word)function << 32 | config->block[0];
    for (int at = 0; at < count; at++) memcpy(&noted[4 + at], parameters[at], sizeof(Word));
    return 0;
}
