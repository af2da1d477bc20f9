"""The small package that the notebooks of Every Byte share.

`every_byte.gpu` opens the GPU, real or virtual; `every_byte.allocator` is the model
of PyTorch's caching allocator behind the virtual one.
"""
