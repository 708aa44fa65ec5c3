"""Datasets as people have them: looked through, checked and described.

=========================  ========  ==================================================  =======
what lies there            format    rows                                                module
=========================  ========  ==================================================  =======
``*.npz``                  npz       of its arrays, such as x and y                      arrays
``*.csv *.tsv``            csv       lines under a header; columns are features          tables
``*.parquet *.pq``         parquet   of the table                                        tables
folder of image folders    images    a .png or .jpg each, its folder is the class        images
``*.jsonl``                text      a line each: {"text": …, "label": …}                texts
folder of text folders     text      a .txt each, its folder is the class                texts
``*.txt`` …                text      pieces of plain text, for language models           texts
=========================  ========  ==================================================  =======

`read` looks at every row, so what it returns can be learnt from: no NaN, no missing label, nothing ragged.
It is called when a dataset is pushed and again where it is opened. Nothing heavy is imported before a format
needs it: tables want pyarrow, images Pillow.
"""

from penstock.datasets import laid_out
from penstock.datasets.contents import Contents, ReadOptions
from penstock.datasets.describe import describe
from penstock.datasets.examples import EXAMPLES, write_example
from penstock.datasets.reading import FORMATS, detect_format, find_files, read

__all__ = [
    "EXAMPLES",
    "FORMATS",
    "Contents",
    "ReadOptions",
    "describe",
    "detect_format",
    "find_files",
    "laid_out",
    "read",
    "write_example",
]
