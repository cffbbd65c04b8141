// The Python module acefast._C: facts about this build. No tensor passes through it; the ops are in the op libraries
// (csrc/cpu, csrc/cuda), which Python loads with torch.ops.load_library.
#include <pybind11/pybind11.h>

#include "build_facts.h"

namespace py = pybind11;

namespace {

// {"version": "0.1.0", "compiler": ..., "flags": ..., "cpu_levels": "default,avx2,avx512", "torch": ..., ...}; all
// strings.
py::dict build_info() {
  py::dict info;
  info["version"] = ACEFAST_VERSION;
  info["compiler"] = ACEFAST_COMPILER;
  info["flags"] = ACEFAST_FLAGS;
  info["cpu_levels"] = ACEFAST_LEVELS;          // instruction sets the CPU library was built for
  info["torch"] = ACEFAST_TORCH;                // torch whose headers were used
  info["torch_target"] = ACEFAST_TORCH_TARGET;  // oldest torch that can load the op libraries
  info["cuda_archs"] = ACEFAST_CUDA_ARCHS;      // "" without CUDA
  info["nvcc"] = ACEFAST_NVCC;                  // "" without CUDA
  info["commit"] = ACEFAST_COMMIT;
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Facts about acefast's native build.";
  m.def("build_info", &build_info,
        "Returns a dict of strings: version, compiler, flags, cpu_levels, torch, torch_target, cuda_archs, nvcc, "
        "commit.");
}
