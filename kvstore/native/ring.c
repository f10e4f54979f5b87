#include "parts.h"

int dualpath_add_ring(PyObject *module) { return 0; }
