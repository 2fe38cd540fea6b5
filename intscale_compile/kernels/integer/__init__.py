"""Ops of integer-only models: everything between token ids and logits, on integers.

A value that is fp32 or bf16 in the float model is int32 with 16 fraction bits here (Q16); codes are int8 with one scale per
row; a scale is a dyadic number ``m * 2**-k``, both in one int32 (:mod:`.arithmetic`). Every op is defined by exact integer
arithmetic on one token's row (attention: and the keys and values that it sees), so its bits depend on no batch, tile or device.
"""
