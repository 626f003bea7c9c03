#define INT8_KERNELS kInt8Avx2
#include "int8.inc"
