/* dualpath.kvstore._native: the module itself. */
#include "parts.h"

static int execute(PyObject *module) {
    if (dualpath_add_block_copy(module) < 0 || dualpath_add_checksum(module) < 0 ||
        dualpath_add_key_index(module) < 0 ||
        dualpath_add_pages(module) < 0) {
        return -1;
    }
    return dualpath_add_ring(module);
}

static PyModuleDef_Slot slots[] = {{Py_mod_exec, execute}, {0, NULL}};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "_native", "Native parts of the store.", 0, NULL, slots, NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit__native(void) { return PyModuleDef_Init(&definition); }
