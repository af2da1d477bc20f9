"""The small package that the notebooks of Every Byte share.

`helpers.gpu` opens the GPU, real or virtual; `helpers.allocator` is the model
of PyTorch's caching allocator behind the virtual one.
"""
