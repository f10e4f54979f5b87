/* dualpath.kvstore._native: the module itself. */
#include "parts.h"

static int (*const PARTS[])(PyObject *) = {
    dualpath_add_block_copy, dualpath_add_checksum, dualpath_add_key_index, dualpath_add_pages,
    dualpath_add_ring,       dualpath_add_row_gather,
};

static int execute(PyObject *module) {
    for (size_t i = 0; i < sizeof PARTS / sizeof PARTS[0]; i++) {
        if (PARTS[i](module) < 0) {
            return -1;
        }
    }
    return 0;
}

static PyModuleDef_Slot slots[] = {{Py_mod_exec, execute}, {0, NULL}};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "_native", "Native parts of the store.", 0, NULL, slots, NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit__native(void) { return PyModuleDef_Init(&definition); }
