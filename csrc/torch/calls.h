#pragma once

#include <pybind11/pybind11.h>

namespace scoresde {

// Adds a function for every operator.
void define_calls(pybind11::module_& module);

}  // namespace scoresde
