"""Datasets as people have them: looked through, checked and described.

=========================  ========  ==================================================  =======
what lies there            format    rows                                                module
=========================  ========  ==================================================  =======
``*.npz``                  npz       of its arrays, such as x and y                      arrays
=========================  ========  ==================================================  =======

`read` looks at every row, so what it returns can be learnt from: no NaN, no missing label, nothing ragged.
It is called when a dataset is pushed and again where it is opened.
"""

from penstock.datasets.contents import Contents, ReadOptions
from penstock.datasets.reading import FORMATS, detect_format, read

__all__ = ["FORMATS", "Contents", "ReadOptions", "detect_format", "read"]
