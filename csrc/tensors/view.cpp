// Reading a torch tensor object into a View.
#include "tensors/view.h"

#include <pybind11/stl.h>

#include <algorithm>

namespace optim8 {
namespace {

struct TypeName {
    const char* torch_name;
    dlpack::DataType type;
};
constexpr TypeName type_names[] = {
    {"torch.float32", {dlpack::ieee, 32, 1}},          {"torch.float16", {dlpack::ieee, 16, 1}},
    {"torch.float64", {dlpack::ieee, 64, 1}},          {"torch.bfloat16", {dlpack::brain, 16, 1}},
    {"torch.uint8", {dlpack::unsigned_integer, 8, 1}}, {"torch.int8", {dlpack::signed_integer, 8, 1}},
    {"torch.int16", {dlpack::signed_integer, 16, 1}},  {"torch.int32", {dlpack::signed_integer, 32, 1}},
    {"torch.int64", {dlpack::signed_integer, 64, 1}},
};

// What is asked of torch once. Interpreter-lifetime objects, never released.
struct Torch {
    PyTypeObject* tensor = nullptr;
    PyObject* strided = nullptr;
    int (*describe)(void*, dlpack::Tensor*) = nullptr;

    Torch() {
        const py::module_ torch = py::module_::import("torch");
        const py::object type = torch.attr("Tensor");
        tensor = reinterpret_cast<PyTypeObject*>(type.inc_ref().ptr());
        strided = py::object(torch.attr("strided")).release().ptr();
        if (!py::hasattr(type, "__dlpack_c_exchange_api__")) return;
        const py::object capsule = type.attr("__dlpack_c_exchange_api__");
        const auto* api =
            static_cast<const dlpack::ExchangeApi*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
        if (api == nullptr) {
            PyErr_Clear();
        } else if (api->version.major == 1) {
            describe = api->describe;
        }
    }
};

const Torch& torch() {
    static const Torch* found = new Torch;
    return *found;
}

int64_t count(const View& view) {
    int64_t size = 1;
    for (int d = 0; d < view.ndim; ++d) size *= view.shape[d];
    return size;
}

bool read_by_exchange(PyObject* object, View& view) {
    dlpack::Tensor t{};
    if (torch().describe(object, &t) != 0) {
        PyErr_Clear();
        return false;
    }
    view.data = static_cast<char*>(t.data) + t.byte_offset;
    view.device_type = t.device.type;
    view.device = t.device.id;
    view.dtype = t.dtype;
    view.ndim = t.ndim;
    view.shape = t.shape;
    view.strides = t.strides;
    view.size = count(view);
    return true;
}

bool read_by_attributes(PyObject* object, View& view) {
    const py::handle tensor(object);
    if (tensor.attr("layout").ptr() != torch().strided) return false;
    const std::string type = py::str(tensor.attr("dtype"));
    const auto* known = std::find_if(std::begin(type_names), std::end(type_names),
                                     [&](const TypeName& entry) { return type == entry.torch_name; });
    if (known == std::end(type_names)) return false;
    view.dtype = known->type;
    const py::object device = tensor.attr("device");
    const std::string kind = py::str(device.attr("type"));
    if (kind != "cpu" && kind != "cuda") return false;
    view.device_type = kind == "cpu" ? dlpack::cpu : dlpack::cuda;
    view.device = device.attr("index").is_none() ? 0 : device.attr("index").cast<int32_t>();
    const auto shape = py::tuple(tensor.attr("shape")).cast<std::vector<int64_t>>();
    const auto strides = py::tuple(tensor.attr("stride")()).cast<std::vector<int64_t>>();
    view.ndim = static_cast<int>(shape.size());
    view.owned = shape;
    view.owned.insert(view.owned.end(), strides.begin(), strides.end());
    view.shape = view.owned.data();
    view.strides = view.owned.data() + view.ndim;
    view.size = count(view);
    view.data = reinterpret_cast<void*>(tensor.attr("data_ptr")().cast<uintptr_t>());
    return true;
}

// Whether a tensor's storage has no memory. torch adds the offset of a view even then, so that its address is the
// offset. Few processes have memory at such low addresses; where one may, the storage is asked.
bool is_offset_of_nothing(PyObject* object, const View& view) {
    constexpr uintptr_t beyond_any_offset = uintptr_t{1} << 40;
    if (reinterpret_cast<uintptr_t>(view.data) >= beyond_any_offset || view.data == nullptr) return false;
    try {
        return py::handle(object).attr("untyped_storage")().attr("data_ptr")().cast<uintptr_t>() == 0;
    } catch (const py::error_already_set&) {
        return true;  // a tracer's, whose storage does not tell
    }
}

bool read_any(PyObject* object, View& view) {
    if (!PyObject_TypeCheck(object, torch().tensor)) return false;
    if (torch().describe != nullptr) return read_by_exchange(object, view);
    try {
        return read_by_attributes(object, view);
    } catch (const py::error_already_set&) {
        return false;  // a tensor without storage, such as one of a tracer
    }
}

}  // namespace

bool read_view(PyObject* object, View& view) {
    if (!read_any(object, view)) return false;
    if (is_offset_of_nothing(object, view)) view.data = nullptr;
    return true;
}

View require_view(const char* who, const char* argument, py::handle object) {
    View view;
    if (read_view(object.ptr(), view)) {
        // Zeros that torch has not written yet, or a storage that was resized away.
        if (view.data != nullptr || view.size == 0) return view;
        throw py::value_error(std::string(who) + ": " + argument + " must have memory, got " + view.describe() +
                              " without any. Materialize it first.");
    }
    throw py::type_error(std::string(who) + ": " + argument +
                         " must be a dense torch.Tensor with memory of its own, got " +
                         std::string(py::str(py::type::handle_of(object).attr("__name__"))) + ".");
}

bool View::dense() const {
    if (contiguous()) return true;
    std::vector<std::pair<int64_t, int64_t>> dims;  // stride, extent
    for (int d = 0; d < ndim; ++d)
        if (shape[d] > 1) dims.emplace_back(strides[d], shape[d]);
    std::sort(dims.begin(), dims.end());
    int64_t expected = 1;
    for (const auto& [stride, extent] : dims) {
        if (stride != expected) return false;
        expected *= extent;
    }
    return true;
}

std::string View::describe() const {
    std::string text = "a type unknown here";
    for (const TypeName& entry : type_names)
        if (is(entry.type.code, entry.type.bits)) text = std::string(entry.torch_name).substr(6);
    text += " (";
    for (int d = 0; d < ndim; ++d) text += (d ? ", " : "") + std::to_string(shape[d]);
    if (ndim == 1) text += ",";
    return text + ") on " +
           (on_cpu()                      ? "cpu"
            : device_type == dlpack::cuda ? "cuda:" + std::to_string(device)
                                          : "another device");
}

}  // namespace optim8
