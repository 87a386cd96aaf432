/* cuBLAS: handles and descriptors exist, matrix products are not computed. */
#include "device.h"
#include <string.h>

enum { CUBLAS_STATUS_NOT_INITIALIZED = 1 };

static int create(void **handle) {
    if (virtual_device_use()) return CUBLAS_STATUS_NOT_INITIALIZED;
    *handle = new_handle();
    return SUCCESS;
}
API(cublasCreate_v2)(void **handle) { return create(handle); }
API(cublasLtCreate)(void **handle) { return create(handle); }
API(cublasLtMatmulDescCreate)(void **out) { *out = new_handle(); return SUCCESS; }
API(cublasLtMatrixLayoutCreate)(void **out) { *out = new_handle(); return SUCCESS; }
API(cublasLtMatmulPreferenceCreate)(void **out) { *out = new_handle(); return SUCCESS; }
API(cublasGetVersion_v2)(void *handle, int *version) { (void)handle; *version = CUDA_RUNTIME_VERSION * 10; return SUCCESS; }
API_AS(size_t, cublasLtGetVersion)(void) { return CUDA_RUNTIME_VERSION * 10; }
API(cublasGetStream_v2)(void *handle, void **stream) { (void)handle; *stream = 0; return SUCCESS; }
API(cublasGetPointerMode_v2)(void *handle, int *mode) { (void)handle; *mode = 0; return SUCCESS; }
API(cublasGetMathMode)(void *handle, int *mode) { (void)handle; *mode = 0; return SUCCESS; }
API(cublasGetAtomicsMode)(void *handle, int *mode) { (void)handle; *mode = 0; return SUCCESS; }
API(cublasGetSmCountTarget)(void *handle, int *count) { (void)handle; *count = 0; return SUCCESS; }
API_AS(const char *, cublasGetStatusName)(int status) { return status ? "CUBLAS_STATUS_NOT_SUPPORTED" : "CUBLAS_STATUS_SUCCESS"; }
API_AS(const char *, cublasGetStatusString)(int status) { return status ? last_refusal() : "the operation completed"; }

struct heuristic { unsigned long long algorithm[8]; size_t workspace_bytes; int state; float waves; int reserved[4]; };
API(cublasLtMatmulAlgoGetHeuristic)(void *handle, void *operation, void *a, void *b, void *c, void *d, void *preference,
                                    int asked, struct heuristic *out, int *found) {
    (void)handle, (void)operation, (void)a, (void)b, (void)c, (void)d, (void)preference;
    *found = asked > 0;
    if (asked > 0) memset(out, 0, sizeof *out);
    return SUCCESS;
}
