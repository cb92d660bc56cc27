#pragma once

#include <pybind11/pybind11.h>

namespace scoresde {

// A function for every operator (calls.cpp).
void define_calls(pybind11::module_& module);

// What the loops of samplers and solvers do between two operators (host.cpp).
void define_host(pybind11::module_& module);

}  // namespace scoresde
