"""The tensor subclass: what a quantized weight is, how it is made, and its operators."""
