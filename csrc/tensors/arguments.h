// Checks of the arguments of native calls. Python checks first, with messages for users; these bind every caller.
#pragma once

#include "tensors/view.h"

#include <string>

namespace optim8 {

struct Arguments {
    const char* who;
    int32_t device_type = dlpack::cpu;
    mutable int32_t device = -1;  // that of the first tensor; all must be on one

    [[noreturn]] void fail(const std::string& what) const { throw py::value_error(std::string(who) + ": " + what); }

    // A contiguous tensor on the device that the call is for.
    View tensor(const char* argument, py::handle object) const {
        View view = require_view(who, argument, object);
        if (view.device_type != device_type || !view.contiguous())
            fail(std::string(argument) + " must be contiguous and on " + (device_type == dlpack::cpu ? "cpu" : "cuda") +
                 ", got " + view.describe() + ".");
        if (device >= 0 && view.device != device)
            fail(std::string(argument) + " must be on the device of the other tensors, cuda:" + std::to_string(device) +
                 ", got " + view.describe() + ".");
        device = view.device;
        return view;
    }
    View floats(const char* argument, py::handle object) const {
        View view = tensor(argument, object);
        if (!view.has_storage()) wrong_type(argument, "float32, bfloat16 or float16", view);
        return view;
    }
    View float32(const char* argument, py::handle object, int64_t size) const {
        View view = tensor(argument, object);
        if (!view.is_float32()) wrong_type(argument, "float32", view);
        return sized(argument, view, size);
    }
    View uint8(const char* argument, py::handle object, int64_t size) const {
        View view = tensor(argument, object);
        if (!view.is_uint8()) wrong_type(argument, "uint8", view);
        return sized(argument, view, size);
    }
    View int8(const char* argument, py::handle object) const {
        View view = tensor(argument, object);
        if (!view.is_int8()) wrong_type(argument, "int8", view);
        return view;
    }
    View int32(const char* argument, py::handle object) const {
        View view = tensor(argument, object);
        if (!view.is_int32()) wrong_type(argument, "int32", view);
        return view;
    }
    View sized(const char* argument, View view, int64_t size) const {
        if (view.size != size)
            fail(std::string(argument) + " must have " + std::to_string(size) + " entries, got " + view.describe() +
                 ".");
        return view;
    }
    void blocksize(int64_t blocksize, int64_t smallest) const {
        if (blocksize < smallest || blocksize > 4096 || (blocksize & (blocksize - 1)) != 0)
            fail("blocksize must be a power of two from " + std::to_string(smallest) + " to 4096, got " +
                 std::to_string(blocksize) + ".");
    }
    [[noreturn]] void wrong_type(const char* argument, const char* needed, const View& view) const {
        fail(std::string(argument) + " must be " + needed + ", got " + view.describe() + ".");
    }
};

// A matrix as rows of its last dimension.
struct Rows {
    int64_t rows = 1, columns = 1;
    explicit Rows(const View& view) {
        for (int d = 0; d + 1 < view.ndim; ++d) rows *= view.shape[d];
        if (view.ndim > 0) columns = view.shape[view.ndim - 1];
    }
};

}  // namespace optim8
