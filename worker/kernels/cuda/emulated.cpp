// The kernels of one kind of number as functions of a library: `peapod_NAME(shape, arguments)`, where shape is the grid's x and y, the
// threads of a block and its bytes of shared memory.

#include "emulator.h"
#include "kernels.cu"

#define EMULATE(name) \
  extern "C" void peapod_##name(const unsigned* shape, void** arguments) { emulator::launch(name, shape, arguments); }

EMULATE(group_norm_sums)
EMULATE(group_norm_apply)
EMULATE(group_norm_gradient_sums)
EMULATE(group_norm_gradient_apply)
EMULATE(add_residual)
EMULATE(geglu_forward)
EMULATE(geglu_backward)
EMULATE(add_layer_norm_forward)
EMULATE(add_layer_norm_backward)
EMULATE(squared_difference_sums)
EMULATE(squared_difference_gradient)
EMULATE(rows_to_e4m3)
