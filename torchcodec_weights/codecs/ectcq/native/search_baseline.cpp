#define ECTCQ_SEARCH search_baseline
#include "search.inc"
