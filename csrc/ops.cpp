// The operators' schemas, on LibTorch's stable ABI, and their CPU implementations. Autograd and fakes are in
// Python.
#include <Python.h>
#include <torch/csrc/stable/library.h>

#include "compound_norm.h"

STABLE_TORCH_LIBRARY(cbn_ext, m) {
  m.def(
      "forward(Tensor x, Tensor? groups, Tensor? prior, Tensor mean, Tensor var, Tensor? weight, Tensor? "
      "bias, "
      "bool training, float eps) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "backward(Tensor grad, Tensor x, Tensor? groups, Tensor? prior, Tensor mean, Tensor var, Tensor "
      "batch_mass, "
      "Tensor batch_mean, Tensor batch_var, Tensor? weight, Tensor? bias, bool training, bool "
      "detach_responsibility, "
      "float eps) -> (Tensor, Tensor, Tensor)");
  m.def(
      "update_running(Tensor(a!)? prior, Tensor(b!) mean, Tensor(c!) var, Tensor batch_mass, Tensor "
      "batch_mean, "
      "Tensor batch_var, SymInt points, float momentum) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(cbn_ext, CPU, m) {
  m.impl("forward", TORCH_BOX(&cbn::forward_cpu));
  m.impl("backward", TORCH_BOX(&cbn::backward_cpu));
  m.impl("update_running", TORCH_BOX(&cbn::update_running_cpu));
}
