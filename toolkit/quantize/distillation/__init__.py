"""Distillation of a source into its quantized model: what is in 16 bits anyway learns to answer like the source.

A search looks at one linear after the other. At the end of ``--effort best`` the groups' scales, the norms and the
biases of all decoder layers are trained together, by gradients of the divergence between the source's next tokens and
the quantized model's on the calibration samples; codes and zero points stay. (EfficientQAT, arXiv 2407.11062, ends in
such a phase, on texts' own tokens; here each token teaches a whole distribution, which takes fewer of them.)

linear: a product by packed codes that knows its scales' gradient. layers: the quantized layers, resident on the device.
divergence: how far the outputs are apart, and which way is down. samples: micro-batches, and what is held back.
train: the loop. stage: as a step of a run, from a journal's layers to those that replace them.
"""
