// Asking Python objects the same question one after the other, without searching for the answer's place each time.
#pragma once

#include "tensors/view.h"

#include <utility>

namespace optim8 {

// Looks a name up in a type, and remembers its descriptor for as long as the objects are of that type, if it is one of
// those written in C (PyGetSetDescr_Type, PyMethodDescr_Type): they can be called without another search. Where a type
// overrides the name or how it finds names, nothing is remembered and every object is asked by name.
class Descriptor {
  public:
    Descriptor(PyObject* name, PyTypeObject* kind) : name_(name), kind_(kind) {}

    // Borrowed, and null where the object must be asked by name.
    PyObject* of(PyObject* object) {
        if (type_.ptr() != reinterpret_cast<PyObject*>(Py_TYPE(object))) look(Py_TYPE(object));
        return found_.ptr();
    }
    PyObject* name() const { return name_; }

  private:
    void look(PyTypeObject* type) {
        type_ = py::reinterpret_borrow<py::object>(reinterpret_cast<PyObject*>(type));
        found_ = py::object();
        if (type->tp_getattro != PyObject_GenericGetAttr) return;
        auto found = py::reinterpret_steal<py::object>(PyObject_GetAttr(type_.ptr(), name_));
        if (!found) PyErr_Clear();
        if (found && Py_TYPE(found.ptr()) == kind_) found_ = std::move(found);
    }

    PyObject* name_;
    PyTypeObject* kind_;
    py::object type_, found_;
};

// An attribute of each of many objects.
class Attribute {
  public:
    explicit Attribute(PyObject* name) : descriptor_(name, &PyGetSetDescr_Type) {}
    py::object of(PyObject* object) {
        PyObject* direct = descriptor_.of(object);
        return checked(direct != nullptr ? PyGetSetDescr_Type.tp_descr_get(direct, object,
                                                                           reinterpret_cast<PyObject*>(Py_TYPE(object)))
                                         : PyObject_GetAttr(object, descriptor_.name()));
    }
    static py::object checked(PyObject* answer) {
        if (answer == nullptr) throw py::error_already_set();
        return py::reinterpret_steal<py::object>(answer);
    }

  private:
    Descriptor descriptor_;
};

// A method without arguments, of each of many objects; whether it gives True.
class Question {
  public:
    explicit Question(PyObject* name) : descriptor_(name, &PyMethodDescr_Type) {}
    bool of(PyObject* object) {
        PyObject* direct = descriptor_.of(object);
        return Attribute::checked(direct != nullptr ? PyObject_CallOneArg(direct, object)
                                                    : PyObject_CallMethodNoArgs(object, descriptor_.name()))
                   .ptr() == Py_True;
    }

  private:
    Descriptor descriptor_;
};

// Looks keys up in a dict that was most likely filled in the order in which they are asked for: the next key is
// recognised by identity, and only another one is searched for by its hash, which for a tensor is a call into Python.
class InOrder {
  public:
    explicit InOrder(PyObject* dict, Py_ssize_t at = 0) : dict_(dict), at_(at) {}

    // The value, borrowed; null, without an exception, where the key is not there.
    PyObject* find(PyObject* key) {
        if (PyObject* value = step(key)) return value;
        PyObject* value = PyDict_GetItemWithError(dict_, key);
        if (value == nullptr && PyErr_Occurred()) throw py::error_already_set();
        return value;
    }
    // Whether this very object is the next key.
    bool is_next(PyObject* key) const {
        Py_ssize_t next = at_;
        PyObject *found, *value;
        return PyDict_Next(dict_, &next, &found, &value) && found == key;
    }
    // Goes past a key that is not asked for, if it is the next one.
    void pass(PyObject* key) { step(key); }
    // Where the next key is expected, for another search in the same dict. Any number is safe there.
    Py_ssize_t at() const { return at_; }

  private:
    PyObject* step(PyObject* key) {
        Py_ssize_t next = at_;
        PyObject *found, *value;
        if (!PyDict_Next(dict_, &next, &found, &value) || found != key) return nullptr;
        at_ = next;
        return value;
    }

    PyObject* dict_;
    Py_ssize_t at_;
};

}  // namespace optim8
