// The Python module cbloss_fused._C, or what a builder of kernels for a hub calls it:
// register(library) gives the kernels of cpu/ops.cpp to the operators of that library of PyTorch;
// set_isa as in cpu/call.h.
#include <Python.h>

#include <stdexcept>
#include <string>

#include "cpu/call.h"

#ifndef TORCH_EXTENSION_NAME
#define TORCH_EXTENSION_NAME _C
#endif
#define CB_JOIN(a, b) a##b
#define CB_INIT(name) CB_JOIN(PyInit_, name)

void register_operators(const char* library);

namespace {

PyObject* register_in(const std::string& library) {
  register_operators(library.c_str());
  return Py_BuildValue("");  // None
}
PyObject* switch_isa(const std::string& name) {
  return PyUnicode_FromString(set_isa(name).c_str());
}

// A function of one text, its errors as Python's.
template <PyObject* (*FUNCTION)(const std::string&)>
PyObject* call(PyObject*, PyObject* argument) {
  PyObject* bytes = PyUnicode_AsUTF8String(argument);
  if (bytes == nullptr) return nullptr;
  const std::string text = PyBytes_AsString(bytes);
  Py_DECREF(bytes);
  try {
    return FUNCTION(text);
  } catch (const std::invalid_argument& error) {
    PyErr_SetString(PyExc_ValueError, error.what());
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

}  // namespace

extern "C" __attribute__((visibility("default"))) PyObject* CB_INIT(TORCH_EXTENSION_NAME)() {
  static PyMethodDef methods[] = {{"register", call<register_in>, METH_O, nullptr},
                                  {"set_isa", call<switch_isa>, METH_O, nullptr},
                                  {nullptr, nullptr, 0, nullptr}};
  static PyModuleDef module = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
