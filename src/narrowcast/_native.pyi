"""The compiled module (csrc/module.cpp). Tensors are passed as addresses."""
