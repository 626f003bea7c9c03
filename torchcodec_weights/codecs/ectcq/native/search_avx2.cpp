// The same for AVX2: this file alone is compiled with its flags.
#define ECTCQ_SEARCH search_avx2
#include "search.inc"
