/* A replacement for NVRTC, the runtime compiler of kernels. It compiles nothing, since kernels never run on the virtual
   device. The real one looks for a real driver and crashes without it. This library has the real one's name, since
   PyTorch opens it by that name. */
#include <stddef.h>

#define API(name) __attribute__((visibility("default"))) int name
#define API_AS(type, name) __attribute__((visibility("default"))) type name

static int empty(size_t *size, char *out) {
    if (size) *size = 1;
    if (out) *out = 0;
    return 0;
}

API(nvrtcVersion)(int *major, int *minor) {
    *major = CUDA_RUNTIME_VERSION / 1000;
    *minor = CUDA_RUNTIME_VERSION % 1000 / 10;
    return 0;
}
API(nvrtcCreateProgram)(void **program) { *program = program; return 0; }
API(nvrtcDestroyProgram)(void **program) { *program = 0; return 0; }
API(nvrtcCompileProgram)(void) { return 0; }
API(nvrtcAddNameExpression)(void) { return 0; }
API(nvrtcGetLoweredName)(void *program, const char *name, const char **out) { (void)program; *out = name; return 0; }
API(nvrtcGetPTXSize)(void *program, size_t *size) { (void)program; return empty(size, 0); }
API(nvrtcGetCUBINSize)(void *program, size_t *size) { (void)program; return empty(size, 0); }
API(nvrtcGetProgramLogSize)(void *program, size_t *size) { (void)program; return empty(size, 0); }
API(nvrtcGetPTX)(void *program, char *out) { (void)program; return empty(0, out); }
API(nvrtcGetCUBIN)(void *program, char *out) { (void)program; return empty(0, out); }
API(nvrtcGetProgramLog)(void *program, char *out) { (void)program; return empty(0, out); }
API_AS(const char *, nvrtcGetErrorString)(int error) {
    return error ? "unknown error of the virtual CUDA device" : "NVRTC_SUCCESS";
}
