// The operators' schemas, on LibTorch's stable ABI. Autograd and fakes are in Python.
#include <Python.h>
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(cbn_ext, m) {
  m.def(
      "forward(Tensor x, Tensor? residual, Tensor? groups, Tensor? prior, Tensor mean, Tensor var, Tensor? weight, "
      "Tensor? bias, int mode, bool training, bool relu, float eps) "
      "-> (Tensor y, Tensor mask, Tensor running, Tensor batch, Tensor posterior)");
  m.def(
      "backward(Tensor grad, Tensor x, Tensor? mask, Tensor? groups, Tensor posterior, Tensor running, Tensor batch, "
      "Tensor? weight, "
      "Tensor? bias, int mode, bool training, bool relu, bool detach_responsibility, float eps) "
      "-> (Tensor dx, Tensor dresidual, Tensor dweight, Tensor dbias)");
  m.def(
      "moments(Tensor x, Tensor? groups, Tensor? prior, Tensor mean, Tensor var, int mode, float eps) "
      "-> (Tensor batch, Tensor posterior)");
  m.def(
      "normalise(Tensor x, Tensor? residual, Tensor? groups, Tensor? prior, Tensor mean, Tensor var, Tensor posterior, "
      "Tensor batch, "
      "Tensor? weight, Tensor? bias, int mode, bool relu, float eps) -> (Tensor y, Tensor mask, Tensor running)");
  m.def(
      "gradient_sums(Tensor grad, Tensor x, Tensor? mask, Tensor? groups, Tensor posterior, Tensor running, Tensor "
      "batch, "
      "Tensor? weight, Tensor? bias, int mode, bool relu, float eps) -> (Tensor dweight, Tensor dbias)");
  m.def(
      "input_gradient(Tensor grad, Tensor x, Tensor? mask, Tensor? groups, Tensor posterior, Tensor running, Tensor "
      "batch, "
      "Tensor? weight, Tensor? bias, Tensor dweight, Tensor dbias, int mode, bool relu, bool detach_responsibility, "
      "float eps) -> (Tensor dx, Tensor dresidual)");
  m.def("merge_moments(Tensor parts) -> (Tensor batch)");
  m.def(
      "update_running(Tensor(a!)? prior, Tensor(b!) mean, Tensor(c!) var, Tensor batch, SymInt points, "
      "float momentum) -> ()");
  m.def("read_cuda_environment() -> ()");
}
