#include "bind/checks.h"

#include <algorithm>
#include <vector>

namespace optim8 {
namespace {

// What a tensor without memory is, for messages: "a FakeTensor (torch.strided, on cpu)".
std::string kind_of(py::handle tensor) {
    const std::string type = py::str(py::type::handle_of(tensor).attr("__name__"));
    return "a " + type + " (" + std::string(py::str(tensor.attr("layout"))) + ", on " +
           std::string(py::str(tensor.attr("device"))) + ")";
}

constexpr const char* no_values_advice =
    "Give it values if it is on meta; step outside of what traces with such tensors (FakeTensorMode, torch.func, "
    "make_fx, torch.export).";

// Whether the memory was taken away, as FSDP does; a tracer's tensor never had any.
bool was_freed(py::handle tensor) {
    try {
        return tensor.attr("untyped_storage")().attr("nbytes")().cast<int64_t>() == 0;
    } catch (const py::error_already_set&) {
        return false;  // no storage either
    }
}

}  // namespace

View view_of(PyObject* object, const Place& place, const char* what, const char* advice) {
    View view;
    if (!read_view(object, view)) {
        const bool strided = std::string(py::str(py::handle(object).attr("layout"))) == "torch.strided";
        place.fail(std::string(what) + " is not a dense tensor with memory of its own, got " + kind_of(object) + ". " +
                   (strided ? no_values_advice : advice));
    }
    return view;
}

void check_memory(PyObject* object, const View& view, const Place& place, const char* what) {
    if (view.data != nullptr || view.size == 0) return;
    if (was_freed(object))
        place.fail(std::string(what) + " has no memory, got " + view.describe() +
                   " that was freed. Step while it is there.");
    place.fail(std::string(what) + " has no values, got " + kind_of(object) + ", " + view.describe() + ". " +
               no_values_advice);
}

void check_param(const View& p, const Place& place) {
    if (!p.has_storage())
        place.fail("must be float32, bfloat16 or float16, got " + p.describe() +
                   ". Convert the model, or leave this parameter out.");
}

void check_apart(const View& p, const Place& place) {
    std::vector<std::pair<int64_t, int64_t>> dims;  // stride, extent
    for (int d = 0; d < p.ndim; ++d)
        if (p.shape[d] > 1) dims.emplace_back(p.strides[d], p.shape[d]);
    std::sort(dims.begin(), dims.end());
    int64_t reach = 1;
    for (const auto& [stride, extent] : dims) {
        if (stride < reach)
            place.fail("must have an address for each element, got " + p.describe() +
                       " that is expanded or overlaps. Give it memory of its own with "
                       "`param.data = param.data.contiguous()`.");
        reach += stride * (extent - 1);
    }
}

void check_grad(const View& p, const View& g, const Place& place) {
    if (!g.same_device(p))
        place.fail("has a gradient on another device: parameter " + p.describe() + ", gradient " + g.describe() +
                   ". Move one of them.");
    if (!g.same_shape(p))
        place.fail("has a gradient of another shape: parameter " + p.describe() + ", gradient " + g.describe() + ".");
    if (!g.has_storage() || (g.storage() != p.storage() && g.storage() != Storage::Float32))
        place.fail("needs a gradient of its own dtype or float32: parameter " + p.describe() + ", gradient " +
                   g.describe() + ". Cast the gradient.");
}

}  // namespace optim8
