"""Timing of linear kernels, interleaved round by round (`quantize bench kernels`; docs/kernels.md)."""
