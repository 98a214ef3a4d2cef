// What native code knows of a torch tensor: its true address, size, layout, type and device, read from the tensor
// object itself, so that no caller can hand over a wrong size. Needs no torch header: torch describes its
// tensors through the DLPack exchange table (2.10 and later) or, slower, through their Python attributes.
#pragma once

#include "core/row.h"
#include "tensors/dlpack.h"

#include <pybind11/pybind11.h>

#include <string>
#include <vector>

namespace optim8 {

namespace py = pybind11;

struct View {
    void* data = nullptr;
    int64_t size = 0;  // values
    int32_t device_type = 0, device = 0;
    dlpack::DataType dtype{};
    int ndim = 0;
    const int64_t* shape = nullptr;
    const int64_t* strides = nullptr;
    std::vector<int64_t> owned;  // shape and strides, where torch did not lend its own

    int64_t bytes() const { return size * dtype.bits / 8; }
    bool on_cpu() const { return device_type == dlpack::cpu; }
    bool is(uint8_t code, uint8_t bits) const { return dtype.code == code && dtype.bits == bits; }
    bool is_float32() const { return is(dlpack::ieee, 32); }
    bool is_uint8() const { return is(dlpack::unsigned_integer, 8); }
    bool is_int8() const { return is(dlpack::signed_integer, 8); }
    bool is_int16() const { return is(dlpack::signed_integer, 16); }
    bool is_int32() const { return is(dlpack::signed_integer, 32); }

    // float32, bfloat16 or float16.
    bool has_storage() const { return is_float32() || is(dlpack::brain, 16) || is(dlpack::ieee, 16); }
    Storage storage() const {
        if (is_float32()) return Storage::Float32;
        return dtype.code == dlpack::brain ? Storage::BFloat16 : Storage::Float16;
    }

    bool same_device(const View& other) const { return device_type == other.device_type && device == other.device; }
    bool same_shape(const View& other) const {
        if (ndim != other.ndim) return false;
        for (int d = 0; d < ndim; ++d)
            if (shape[d] != other.shape[d]) return false;
        return true;
    }
    // Whether the same index is at the same place in both, given the same shape.
    bool same_layout(const View& other) const {
        for (int d = 0; d < ndim; ++d)
            if (shape[d] > 1 && strides[d] != other.strides[d]) return false;
        return true;
    }
    bool contiguous() const {
        if (size == 0) return true;
        int64_t expected = 1;
        for (int d = ndim - 1; d >= 0; --d) {
            if (shape[d] > 1 && strides[d] != expected) return false;
            expected *= shape[d];
        }
        return true;
    }
    // Whether the values fill an address range without gaps or overlap, in any order of the dimensions.
    bool dense() const;
    std::string describe() const;  // "float32 (3, 4) on cpu"
};

// True with `view` filled, false where the object is no tensor with plain strided memory.
bool read_view(PyObject* object, View& view);

// The same, for an argument; where there is no view, throws TypeError that names function and argument.
View require_view(const char* who, const char* argument, py::handle object);

}  // namespace optim8
