// The part of the DLPack 1.x exchange ABI that is used here, declared from its public specification
// (dmlc.github.io/dlpack): a table of C functions by which a framework describes its tensors without Python calls.
#pragma once

#include <cstdint>

namespace optim8 {
namespace dlpack {

struct Device {
    int32_t type;
    int32_t id;
};
struct DataType {
    uint8_t code;
    uint8_t bits;
    uint16_t lanes;
};
struct Tensor {
    void* data;
    Device device;
    int32_t ndim;
    DataType dtype;
    int64_t* shape;
    int64_t* strides;
    uint64_t byte_offset;
};
// What travels in a capsule of this name; who takes it over calls `destroy`.
constexpr const char* capsule_name = "dltensor";
struct ManagedTensor {
    Tensor tensor;
    void* context;
    void (*destroy)(ManagedTensor*);
};
struct ExchangeApi {
    struct {
        uint32_t major, minor;
    } version;
    void* previous;
    void* allocate;
    void* managed_from_object;
    void* managed_to_object;
    int (*describe)(void* object, Tensor* out);  // -1 with a Python exception set
    void* current_stream;
};

enum DeviceType : int32_t { cpu = 1, cuda = 2 };
enum TypeCode : uint8_t { signed_integer = 0, unsigned_integer = 1, ieee = 2, brain = 4 };

}  // namespace dlpack
}  // namespace optim8
