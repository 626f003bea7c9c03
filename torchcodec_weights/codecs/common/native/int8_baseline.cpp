#define INT8_KERNELS kInt8Baseline
#include "int8.inc"
