// Where in the groups a parameter stands, and checks of its tensors that say so.
#pragma once

#include "tensors/view.h"

#include <string>

namespace optim8 {

// One parameter's place, for messages. `names`: those of the group's parameters, or None.
struct Place {
    const std::string& owner;
    int64_t group, index;
    const py::object& names;

    [[noreturn]] void fail(const std::string& what) const {
        const bool named = py::isinstance<py::list>(names) && index < PyList_GET_SIZE(names.ptr());
        const std::string name =
            named ? " " + std::string(py::repr(py::handle(PyList_GET_ITEM(names.ptr(), index)))) : "";
        throw py::value_error(owner + ": parameter " + std::to_string(index) + name + " of group " +
                              std::to_string(group) + " " + what);
    }
};

// The view of a tensor; `what` it is and `advice` go into the message where it has none.
View view_of(PyObject* object, const Place& place, const char* what, const char* advice);
void check_memory(PyObject* object, const View& view, const Place& place, const char* what);
void check_param(const View& p, const Place& place);
// A slice has gaps and can be stepped all the same; elements that share an address cannot. So each stride must pass
// over all that the smaller ones reach.
void check_apart(const View& p, const Place& place);
void check_grad(const View& p, const View& g, const Place& place);

}  // namespace optim8
