// torch tensors on the CPU as arguments, by DLPack's C exchange functions: 0.1 us each, where a tensor's own
// __dlpack__ takes 7.

#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <cstdint>
#include <type_traits>

#include "bfloat16.h"

// A tensor's memory, lent for one call. N: its shape, -1 for any size; its rows are dense unless `Strided`.
template <typename T, bool Strided, int64_t... N>
class ArrayOf {
public:
    static constexpr int64_t wanted[] = {N...};
    static constexpr int dims = sizeof...(N);

    T* data() const { return memory; }
    size_t shape(int i) const { return sizes[i]; }
    int64_t stride(int i) const { return strides[i]; }

    // Takes the tensor where it is of this type and shape and has memory, which a FakeTensor has not; returns
    // whether it did.
    bool take(const nanobind::dlpack::dltensor& from) {
        using namespace nanobind;
        constexpr uint8_t code = std::is_same_v<T, Bfloat16> ? uint8_t(dlpack::dtype_code::Bfloat)
                                 : std::is_floating_point_v<T> ? uint8_t(dlpack::dtype_code::Float)
                                                               : uint8_t(dlpack::dtype_code::Int);
        if (from.device.device_type != device::cpu::value || from.ndim != dims || from.dtype.code != code ||
            from.dtype.bits != 8 * sizeof(T) || from.dtype.lanes != 1)
            return false;
        bool dense = true, empty = false;
        int64_t next = 1;
        for (int i = dims - 1; i >= 0; --i) {
            sizes[i] = from.shape[i], strides[i] = from.strides[i];
            if (wanted[i] >= 0 && sizes[i] != wanted[i]) return false;
            dense &= sizes[i] == 1 || strides[i] == next;
            empty |= sizes[i] == 0;
            next *= sizes[i];
        }
        memory = reinterpret_cast<T*>(static_cast<char*>(from.data) + from.byte_offset);
        return empty || (from.data != nullptr && (Strided || dense));
    }

private:
    T* memory = nullptr;
    int64_t sizes[dims] = {}, strides[dims] = {};
};

template <typename T, int64_t... N>
using Array = ArrayOf<T, false, N...>;
template <typename T, int64_t... N>
using StridedArray = ArrayOf<T, true, N...>;

// The part of DLPack's table (version 1.3) that is used here.
struct ExchangeTable {
    uint32_t major, minor;
    void* previous;
    void *allocate, *managed_from, *managed_to;
    int (*lend)(void* object, nanobind::dlpack::dltensor* out);
    void* stream;
};

// Lends the tensor `object` to `out` where its type allows it; returns whether it did.
inline bool lent(PyObject* object, nanobind::dlpack::dltensor* out) {
    static PyObject* const name = PyUnicode_InternFromString("__dlpack_c_exchange_api__");
    PyObject* capsule = PyObject_GetAttr(reinterpret_cast<PyObject*>(Py_TYPE(object)), name);
    void* table = capsule == nullptr ? nullptr : PyCapsule_GetPointer(capsule, "dlpack_exchange_api");
    // The table lives as long as the process.
    Py_XDECREF(capsule);
    const ExchangeTable* exchange = static_cast<const ExchangeTable*>(table);
    if (exchange != nullptr && exchange->major == 1 && exchange->lend != nullptr &&
        exchange->lend(object, out) == 0)
        return true;
    PyErr_Clear();
    return false;
}

namespace nanobind::detail {

template <typename T, bool Strided, int64_t... N>
struct type_caster<ArrayOf<T, Strided, N...>> {
    using Own = ArrayOf<T, Strided, N...>;
    NB_TYPE_CASTER(Own, const_name("torch.Tensor"))

    bool from_python(handle object, uint8_t, cleanup_list*) noexcept {
        dlpack::dltensor tensor;
        return lent(object.ptr(), &tensor) && value.take(tensor);
    }
};

}  // namespace nanobind::detail
