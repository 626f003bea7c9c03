#define ASSEMBLER kBaseline
#include "assemble.inc"
