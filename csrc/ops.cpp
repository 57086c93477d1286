// The operators' schemas, on LibTorch's stable ABI, and their CPU implementations. Autograd and fakes are in
// Python.
#include <Python.h>
#include <torch/csrc/stable/library.h>

#include "compound_norm.h"

STABLE_TORCH_LIBRARY(cbn_ext, m) {
  m.def(
      "forward(Tensor x, Tensor? residual, Tensor? groups, Tensor? prior, Tensor mean, Tensor var, Tensor? weight, "
      "Tensor? bias, bool training, bool relu, float eps) -> (Tensor y, Tensor mask, Tensor running, Tensor batch)");
  m.def(
      "backward(Tensor grad, Tensor x, Tensor? mask, Tensor? groups, Tensor running, Tensor batch, Tensor? weight, "
      "Tensor? bias, bool training, bool relu, bool detach_responsibility, float eps) "
      "-> (Tensor dx, Tensor dresidual, Tensor dweight, Tensor dbias)");
  m.def(
      "update_running(Tensor(a!)? prior, Tensor(b!) mean, Tensor(c!) var, Tensor batch, SymInt points, "
      "float momentum) -> ()");
  m.def("read_cuda_environment() -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(cbn_ext, CPU, m) {
  m.impl("forward", TORCH_BOX(&cbn::forward_cpu));
  m.impl("backward", TORCH_BOX(&cbn::backward_cpu));
  m.impl("update_running", TORCH_BOX(&cbn::update_running_cpu));
}
