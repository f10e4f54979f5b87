# The native extension module (kvstore/native/). Optional: import it only inside try/except
# ImportError, in the module that also holds, or chooses, the Python twin.
