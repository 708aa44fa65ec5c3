"""Versions in other formats, each compared with its source before it is published.

=============  ==========================================  ==================================================
to             from                                        what it is
=============  ==========================================  ==================================================
pt2            torchscript, safetensors                    a program of torch.export
onnx           pt2, torchscript, safetensors, skops        for ONNX Runtime, by torch's exporter or skl2onnx
aoti           pt2, torchscript, safetensors               a package of AOTInductor: code for this processor
safetensors    pt2, torchscript, onnx                      weights by name; see `to_safetensors`
=============  ==========================================  ==================================================
"""
