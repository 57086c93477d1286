// The CUDA implementations of the operators whose schemas stand in ../ops.cpp.
#include <torch/csrc/stable/library.h>

#include "../compound_norm.h"
#include "tuning.h"

STABLE_TORCH_LIBRARY_IMPL(cbn_ext, CUDA, m) {
  m.impl("forward", TORCH_BOX(&cbn::forward_cuda));
  m.impl("backward", TORCH_BOX(&cbn::backward_cuda));
  m.impl("update_running", TORCH_BOX(&cbn::update_running_cuda));
}

STABLE_TORCH_LIBRARY_IMPL(cbn_ext, CompositeExplicitAutograd, m) {
  m.impl("read_cuda_environment", TORCH_BOX(&cbn::read_cuda_environment));
}
