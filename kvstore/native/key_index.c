#include "parts.h"

int dualpath_add_key_index(PyObject *module) { return 0; }
