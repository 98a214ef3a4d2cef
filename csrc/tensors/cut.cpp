// Tensors in the memory of another one, each with a storage of its own. In Python that takes several calls for each.
#include "tensors/cut.h"

#include "tensors/dlpack.h"
#include "tensors/view.h"

#include <memory>

namespace optim8 {
namespace {

// A tensor on its way to torch, which frees it when the storage is gone. Holds the tensor whose memory it is in.
struct Cut {
    dlpack::ManagedTensor managed{};
    py::object whole;
    std::vector<int64_t> sizes;  // shape and strides
};

void destroy(dlpack::ManagedTensor* managed) {
    // Storages may be freed by any thread, and after the interpreter is gone.
    if (!Py_IsInitialized()) return;
    const py::gil_scoped_acquire gil;
    delete static_cast<Cut*>(managed->context);
}

void destroy_capsule(PyObject* capsule) {
    // Torch renames a capsule that it takes over.
    if (!PyCapsule_IsValid(capsule, dlpack::capsule_name)) return;
    destroy(static_cast<dlpack::ManagedTensor*>(PyCapsule_GetPointer(capsule, dlpack::capsule_name)));
}

int64_t reach_of(const std::vector<int64_t>& shape, const std::vector<int64_t>& strides) {
    int64_t last = 0;
    for (size_t d = 0; d < shape.size(); ++d) {
        if (shape[d] == 0) return 0;
        last += (shape[d] - 1) * strides[d];
    }
    return last + 1;
}

}  // namespace

py::list cut(py::handle flat, const std::vector<int64_t>& begins, const std::vector<std::vector<int64_t>>& shapes,
             const std::vector<std::vector<int64_t>>& strides) {
    const View whole = require_view("cut", "flat", flat);
    if (shapes.size() != begins.size() || strides.size() != begins.size())
        throw py::value_error("cut: begins, shapes and strides must be as many as the tensors.");
    py::list capsules(begins.size());
    for (size_t i = 0; i < begins.size(); ++i) {
        const int64_t begin = begins[i], end = begin + reach_of(shapes[i], strides[i]);
        if (shapes[i].size() != strides[i].size() || begin < 0 || end < begin || end > whole.size)
            throw py::value_error("cut: tensor " + std::to_string(i) + " must lie within the " +
                                  std::to_string(whole.size) + " values of flat.");
        auto piece = std::make_unique<Cut>();
        piece->whole = py::reinterpret_borrow<py::object>(flat);
        piece->sizes = shapes[i];
        piece->sizes.insert(piece->sizes.end(), strides[i].begin(), strides[i].end());
        dlpack::Tensor& tensor = piece->managed.tensor;
        tensor.data = static_cast<char*>(whole.data) + begin * (whole.dtype.bits / 8);
        tensor.device = {whole.device_type, whole.device};
        tensor.ndim = static_cast<int32_t>(shapes[i].size());
        tensor.dtype = whole.dtype;
        tensor.shape = piece->sizes.data();
        tensor.strides = piece->sizes.data() + shapes[i].size();
        piece->managed.context = piece.get();
        piece->managed.destroy = &destroy;
        PyObject* capsule = PyCapsule_New(&piece->managed, dlpack::capsule_name, &destroy_capsule);
        if (capsule == nullptr) throw py::error_already_set();
        piece.release();
        PyList_SET_ITEM(capsules.ptr(), static_cast<Py_ssize_t>(i), capsule);
    }
    return capsules;
}

}  // namespace optim8
