// What the comparisons of csrc/cuda with csrc/cpu share: memory that ends where its values end, hostile values, and
// the count of what was compared.
#pragma once

#include "core/jobs.h"
#include "core/storage.h"
#include "cpu/kernels/kernels.h"
#include "cuda/kernels.h"
#include "cuda/lanes.h"

#include <cmath>
#include <cstdio>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <vector>

namespace optim8 {

// The CPU's kernels, in their plainest form; that the other instruction sets give the same is tested elsewhere.
namespace scalar {
#define OPTIM8_DECLARE(name, job) void name(const job&, int64_t, int64_t);
OPTIM8_KERNELS(OPTIM8_DECLARE)
#undef OPTIM8_DECLARE
}  // namespace scalar

inline std::mt19937_64 generator(20240229);

// Values that begin `offset` values after an address that fits any packet and end where the memory ends, so that
// AddressSanitizer sees a touch of what lies behind.
template <class T>
class Buffer {
  public:
    explicit Buffer(int64_t size, int64_t offset = 0)
        : size_(size), offset_(offset), memory_(new char[static_cast<size_t>(size + offset) * sizeof(T)]()) {}
    T* data() const { return reinterpret_cast<T*>(memory_.get()) + offset_; }
    T& operator[](int64_t i) const { return data()[i]; }
    int64_t size() const { return size_; }
    Buffer copy() const {
        Buffer other(size_, offset_);
        for (int64_t i = 0; i < size_; ++i) other[i] = data()[i];
        return other;
    }

  private:
    int64_t size_, offset_;
    std::unique_ptr<char[]> memory_;
};

// What kernels read must be in a Buffer, as it must be in a GPU's memory: tests/cuda/ptx looks at it.
template <class T>
Buffer<T> buffer_of(const T* from, int64_t size) {
    Buffer<T> buffer(size);
    for (int64_t i = 0; i < size; ++i) buffer[i] = from[i];
    return buffer;
}

inline long compared = 0, differing = 0;

template <class T>
std::string text_of(T x) {
    if constexpr (std::is_integral_v<T> || std::is_same_v<T, double>)
        return std::to_string(x);
    else
        return std::to_string(to_float(x));
}
template <class T>
bool same(T a, T b) {
    if constexpr (!std::is_integral_v<T> && !std::is_same_v<T, double>)
        if (std::isnan(to_float(a)) && std::isnan(to_float(b))) return true;
    return std::memcmp(&a, &b, sizeof(T)) == 0;
}

// Every bit of every value; a NaN equals any NaN.
template <class T>
void expect_same(const std::string& what, const Buffer<T>& actual, const Buffer<T>& expected) {
    compared += actual.size();
    for (int64_t i = 0; i < actual.size(); ++i) {
        if (same(actual[i], expected[i])) continue;
        if (++differing <= 20)
            std::printf("%s: value %ld of %ld is %s, on the CPU %s\n", what.c_str(), static_cast<long>(i),
                        static_cast<long>(actual.size()), text_of(actual[i]).c_str(), text_of(expected[i]).c_str());
    }
}

enum class Kind { Plain, Wide, Zeros, Subnormal, Huge, NotFinite };
constexpr Kind kinds[] = {Kind::Plain, Kind::Wide, Kind::Zeros, Kind::Subnormal, Kind::Huge, Kind::NotFinite};

// Plain: standard normal. Wide: over many decades, with zeros and one huge value. Huge: all so large that their squares
// leave the range of cuda/quick.h. NotFinite: some NaN and infinities.
template <class T>
void fill(const Buffer<T>& values, Kind kind) {
    std::normal_distribution<float> normal;
    std::uniform_real_distribution<float> decade(-12, 3);
    for (int64_t i = 0; i < values.size(); ++i) {
        float x = normal(generator);
        if (kind == Kind::Zeros) x = 0;
        if (kind == Kind::Subnormal) x *= 1e-40f;
        if (kind == Kind::Huge) x *= 1e17f;
        if (kind == Kind::Wide) x *= i % 7 == 3 ? 0.0f : std::pow(10.0f, decade(generator));
        if (kind == Kind::Wide && i == values.size() / 2) x = 3e4f;
        if (kind == Kind::NotFinite && i % 97 == 11) x = std::numeric_limits<float>::quiet_NaN();
        if (kind == Kind::NotFinite && i % 89 == 5) x = i % 2 ? -INFINITY : INFINITY;
        values[i] = from_float<T>(x);
    }
}
template <class T>
void fill_codes(const Buffer<T>& codes) {
    for (int64_t i = 0; i < codes.size(); ++i) codes[i] = static_cast<T>(generator());
}

template <class T>
constexpr Storage storage_of = std::is_same_v<T, float>      ? Storage::Float32
                               : std::is_same_v<T, bfloat16> ? Storage::BFloat16
                                                             : Storage::Float16;
template <class T>
const char* name_of() {
    return std::is_same_v<T, float> ? "float32" : std::is_same_v<T, bfloat16> ? "bfloat16" : "float16";
}
// work(TypeOf<T>) for each storage type.
template <class Work>
void each_type(const Work& work) {
    work(TypeOf<float>{});
    work(TypeOf<bfloat16>{});
    work(TypeOf<float16>{});
}

void compare_quick();
void compare_step();
void compare_blockwise();
void compare_fourbit();
void compare_int8();

}  // namespace optim8
