// Host module: the gate's layout and transition for Python (dgg_kernels.gate, dgg_kernels.replay).
#include <pybind11/native_enum.h>
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include "gate.h"

namespace py = pybind11;
using State = py::array_t<double, py::array::c_style>;

namespace {

double* data(State& state) {
  if (state.ndim() != 1 || state.size() < dgg::HEADER_SIZE)
    throw py::value_error("state: expected a 1-D float64 array made for state_size()");
  return state.mutable_data();
}

}  // namespace

PYBIND11_MODULE(_host, m) {
  m.doc() = "The gate's state layout and transition (csrc/gate.h) on the host.";
  m.attr("BUILD_TORCH") = DGG_TORCH;
  m.attr("BUILD_CUDA_ARCHS") = DGG_CUDA_ARCHS;
  py::native_enum<dgg::Slot>(m, "Slot", "enum.IntEnum", "Where a value lies in the state.")
      .value("THRESHOLD", dgg::THRESHOLD)
      .value("WINDOW_SIZE", dgg::WINDOW_SIZE)
      .value("MAX_REUSE", dgg::MAX_REUSE)
      .value("STATISTIC", dgg::STATISTIC)
      .value("AVERAGE", dgg::AVERAGE)
      .value("EMA_DECAY", dgg::EMA_DECAY)
      .value("INCLUDE_SHUT", dgg::INCLUDE_SHUT)
      .value("MINI_BATCHES", dgg::MINI_BATCHES)
      .value("SQUARED", dgg::SQUARED)
      .value("BATCHES", dgg::BATCHES)
      .value("ATTEMPTED", dgg::ATTEMPTED)
      .value("APPLIED", dgg::APPLIED)
      .value("POSITION", dgg::POSITION)
      .value("LATCH", dgg::LATCH)
      .value("REUSE", dgg::REUSE)
      .value("ENERGY", dgg::ENERGY)
      .value("INCREMENT_VALUE", dgg::INCREMENT_VALUE)
      .value("Z", dgg::Z)
      .value("SHUT", dgg::SHUT)
      .value("GRAD_NORM", dgg::GRAD_NORM)
      .value("HEADER_SIZE", dgg::HEADER_SIZE)
      .finalize();
  m.def("state_size", &dgg::state_size, py::arg("window"), py::arg("mini_batches"));
  m.def(
      "new_batch", [](State state) { dgg::gate_new_batch(data(state)); },
      py::arg("state").noconvert());
  m.def(
      "step",
      [](State state, double energy, py::object norm) {
        const bool has_norm = !norm.is_none();
        dgg::gate_step(data(state), energy, has_norm ? norm.cast<double>() : NAN, has_norm);
      },
      py::arg("state").noconvert(), py::arg("energy"), py::arg("norm") = py::none());
}
