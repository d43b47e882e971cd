// The floor of the ABI: runs everywhere.
#include "level.h"

#define FUSEDLOSS_LEVEL baseline
#define FUSEDLOSS_VECTOR_BYTES 16
#define FUSEDLOSS_FUSED_MULTIPLY_ADD 0
#include "level.inl"
