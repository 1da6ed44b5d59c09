#include "bindings/register.h"
namespace xdf { void register_crf(pybind11::module_&) {} }
