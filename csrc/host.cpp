// pybind11 module cbn_ext._host: facts of the build and of the processor, and the planning of CUDA launches, for
// Python.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <string>

#include "cpu/capability.h"
#include "cuda/launch.h"

namespace cbn {

namespace {

std::map<std::string, std::string> build_facts() {
#if defined(__clang__)
  const std::string compiler = std::string("clang ") + __clang_version__;
#else
  const std::string compiler = std::string("gcc ") + __VERSION__;
#endif
  return {{"compiler", compiler}, {"cplusplus", std::to_string(__cplusplus)}};
}

}  // namespace
}  // namespace cbn

PYBIND11_MODULE(_host, m) {
  m.doc() = "Facts of the build and the processor, and the planning of launches.";
  m.def(
      "cpu_capability", [] { return cbn::capability_name(cbn::cpu_capability()); },
      "Instruction set of the CPU kernels: baseline, avx2 or avx512.");
  m.def("build_facts", &cbn::build_facts, "Compiler and language version of this build.");

  namespace py = pybind11;
  py::class_<cbn::Device>(
      m, "Device", "What a CUDA device allows: shared_memory in bytes of a block, cluster in blocks, cache in bytes.")
      .def(py::init<int, int, int, int>(), py::arg("multiprocessors"), py::arg("shared_memory"), py::arg("cluster"),
           py::arg("cache"));
  py::class_<cbn::Tuning>(m, "Tuning", "What a measurement may change: cluster, blocks, threads; see launch.h.")
      .def(py::init<int, int, int>(), py::arg("cluster") = cbn::Tuning{}.cluster,
           py::arg("blocks") = cbn::Tuning{}.blocks, py::arg("threads") = cbn::Tuning{}.threads);
  py::class_<cbn::Extent>(m, "Extent", "What a pass works on; sizes in bytes, vector in elements of a chunk.")
      .def(py::init<int64_t, int64_t, bool, int, int, int, int, int, int>(), py::arg("channels"), py::arg("points"),
           py::arg("channels_last"), py::arg("element_size"), py::arg("statistic_size"), py::arg("components"),
           py::arg("vector"), py::arg("most_threads"), py::arg("tensors"));
  py::class_<cbn::Plan>(m, "Plan", "Blocks, threads, and what of the channels and points each takes.")
      .def_readonly("resident", &cbn::Plan::resident)
      .def_readonly("threads", &cbn::Plan::threads)
      .def_readonly("columns", &cbn::Plan::columns)
      .def_readonly("channels_of_block", &cbn::Plan::channels_of_block)
      .def_readonly("channel_blocks", &cbn::Plan::channel_blocks)
      .def_readonly("splits", &cbn::Plan::splits)
      .def_readonly("points_of_split", &cbn::Plan::points_of_split)
      .def_readonly("slots", &cbn::Plan::slots)
      .def_readonly("shared", &cbn::Plan::shared)
      .def_property_readonly("blocks", &cbn::Plan::blocks);
  m.def("plan_resident", &cbn::plan_resident, py::arg("extent"), py::arg("device"), py::arg("tuning"),
        "Plan of a pass that reduces and then maps with the values on chip; None where they do not fit.");
  m.def("plan_reduction", &cbn::plan_reduction, py::arg("extent"), py::arg("device"), py::arg("tuning"),
        "Plan of a pass that reads values from global memory and leaves the sums of its splits there.");
  m.def("plan_map", &cbn::plan_map, py::arg("extent"), py::arg("device"), py::arg("tuning"),
        "Plan of a pass that reads values from global memory and maps them.");
  py::class_<cbn::PointLimits>(m, "PointLimits",
                               "What joint mode's passes over the channels of points are compiled for.")
      .def(py::init<int, int, int, unsigned>(), py::arg("threads"), py::arg("points_of_thread"), py::arg("side"),
           py::arg("shared"));
  m.def("points_of_thread", &cbn::points_of_thread, py::arg("extent"), py::arg("limits"), py::arg("device"),
        "Points of a thread in these passes.");
  m.def("splits_of_moments", &cbn::splits_of_moments, py::arg("extent"), py::arg("limits"), py::arg("device"),
        py::arg("tuning"),
        "Blocks that weigh points and leave sums of their moments; 0 where the moments are a pass of their own.");
  m.def("bytes_of_sums", &cbn::bytes_of_sums, py::arg("extent"), py::arg("splits"),
        "Memory of the sums that a reduction leaves.");
}
