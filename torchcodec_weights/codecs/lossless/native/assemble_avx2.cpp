#define ASSEMBLER kForAvx2
#include "assemble.inc"
