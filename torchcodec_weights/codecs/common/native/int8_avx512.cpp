#define INT8_KERNELS kInt8Avx512
#include "int8.inc"
